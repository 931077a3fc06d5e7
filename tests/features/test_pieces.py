"""Embeddings in pieces: the pieces are the whole, and a missing or foreign one is named."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from dq_lightning.core.errors import FeatureError
from dq_lightning.features import pieces
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features
from dq_lightning.features.pieces import embed_piece, merge_pieces

IDENTITY = {"source": "abc", "encoder": "def", "text": {"template": "alpaca"}}
OPTIONS = {"device": "cpu", "progress": False, "num_workers": 0}


class Brightness(nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3))


@pytest.fixture
def spec(to_float):
    return choose_encoder((Brightness(), to_float))


@pytest.fixture
def embed(spec):
    return partial(extract_features, spec=spec, **OPTIONS)


@pytest.fixture
def made(make_source, embed, tmp_path):
    """Ten samples in pieces of four, made in any order."""
    source = make_source(10)
    for index in (2, 0, 1):
        embed_piece(source, embed, index=index, nums=4, out_dir=tmp_path, identity=IDENTITY)
    return source, tmp_path


def test_merged_pieces_are_the_whole(made, spec):
    source, folder = made
    merged = merge_pieces(folder)
    assert merged.dtype == np.float32
    assert torch.equal(torch.from_numpy(merged), extract_features(source, spec, **OPTIONS).embedding)
    assert sorted(path.name for path in folder.glob("*.npy")) == ["embeds_0.npy", "embeds_1.npy", "embeds_2.npy"]
    assert [len(np.load(folder / f"embeds_{i}.npy")) for i in range(3)] == [4, 4, 2]
    assert np.array_equal(merge_pieces(folder, identity=IDENTITY), merged)
    np.save(folder / "merged.npy", merged)
    again = extract_features(source, choose_encoder(folder / "merged.npy"), **OPTIONS).embedding
    assert torch.equal(again, torch.from_numpy(merged))


def test_a_piece_that_is_whole_is_not_made_again(made, embed):
    source, folder = made

    def again(index=1, **changes):
        wanted = {"identity": IDENTITY, **changes}
        counted = lambda part: calls.append(1) or embed(part)  # noqa: E731
        return embed_piece(source, counted, index=index, nums=4, out_dir=folder, **wanted)

    calls = []
    again()
    assert calls == []
    (folder / "embeds_1.npy").write_bytes(b"damaged")
    again()
    again(identity=IDENTITY | {"encoder": "other"})
    assert len(calls) == 2
    with pytest.raises(FeatureError, match=r"embeds_1\.npy does not belong to these pieces.*encoder.*'other'"):
        merge_pieces(folder)


def test_a_missing_piece_is_named_with_its_rows(made):
    _, folder = made
    (folder / "embeds_1.json").unlink()
    with pytest.raises(FeatureError, match=r"1 of 3 pieces.*embeds_1\.npy \(rows 4 to 7\)"):
        merge_pieces(folder)
    (folder / "embeds_2.json").unlink()
    with pytest.raises(FeatureError, match=r"2 of 3.*rows 8 to 9"):
        merge_pieces(folder)
    (folder / "embeds_0.json").unlink()
    with pytest.raises(FeatureError, match="no piece"):
        merge_pieces(folder)


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "json"])
def test_a_damaged_piece_is_named(made, damage):
    _, folder = made
    piece = folder / "embeds_1.npy"
    if damage == "cut":
        piece.write_bytes(piece.read_bytes()[:-1])
    elif damage == "gone":
        piece.unlink()
    elif damage == "other":
        np.save(piece, np.zeros((4, 3), np.float32))
    else:
        piece.with_suffix(".json").write_text('{"index": 1')
    with pytest.raises(FeatureError, match=r"embeds_1\.(npy|json)"):
        merge_pieces(folder)


@pytest.mark.parametrize("change", [{"nums": 5}, {"num_samples": 11}, {"identity": {"source": "abc"}}, {"index": 0}])
def test_a_foreign_piece_is_named(made, change):
    _, folder = made
    path = folder / "embeds_1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FeatureError, match=r"embeds_1\.npy does not belong to these pieces"):
        merge_pieces(folder)


def test_pieces_of_other_data_than_asked_for(made):
    with pytest.raises(
        FeatureError, match=r"embeds_0\.npy does not belong to these pieces: its source is 'abc'.*'xyz'"
    ):
        merge_pieces(made[1], identity=IDENTITY | {"source": "xyz"})


def test_a_piece_under_another_number(made):
    _, folder = made
    for suffix in (".npy", ".json"):
        shutil.copy(folder / f"embeds_0{suffix}", folder / f"embeds_7{suffix}")
    with pytest.raises(FeatureError, match=r"embeds_7\.npy does not belong to these pieces"):
        merge_pieces(folder)


@pytest.mark.parametrize(("index", "nums"), [(3, 4), (-1, 4), (0, 0), (1, 10)])
def test_pieces_outside_of_the_data(make_source, embed, tmp_path, index, nums):
    with pytest.raises(FeatureError, match="outside of the 10 samples"):
        embed_piece(make_source(10), embed, index=index, nums=nums, out_dir=tmp_path, identity=IDENTITY)


def test_text_goes_in_pieces_too(tmp_path):
    asked = []

    class Words:
        def __len__(self):
            return 7

        def texts(self, positions):
            asked.append(positions)
            return [f"text {position}" for position in positions]

    part = pieces.Part(Words(), range(4, 7))
    assert part.texts(range(1, 3)) == ["text 5", "text 6"]
    assert asked == [[5, 6]]
    assert part.texts([2, 0]) == ["text 6", "text 4"]
