"""Embeddings that exist already in place of an encoder: checked, identified by content, for images and text."""

import numpy as np
import pytest
import torch

from dq_lightning.core.errors import FeatureError
from dq_lightning.features.choose import choose_encoder
from dq_lightning.features.extract import extract_features


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def save(folder, values, name="made.npy"):
    np.save(folder / name, values)
    return folder / name


def made(encoder, count=9, modality="text", **options):
    return extract_features(range(count), choose_encoder(encoder, modality=modality), progress=False, **options)


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("kind", ["path", "string", "array", "tensor", "transposed"])
def test_rows_arrive_as_they_are(values, tmp_path, kind, modality):
    path = save(tmp_path, values)
    given = {
        "path": path,
        "string": str(path),
        "array": values,
        "tensor": torch.from_numpy(values),
        "transposed": np.asfortranarray(values),
    }[kind]
    features = made(given, modality=modality)
    assert torch.equal(features.embedding, torch.from_numpy(values))
    assert features.head_gradient is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(values, dtype):
    given = torch.from_numpy(values).to(dtype)
    assert torch.equal(made(given).embedding, given.float())


def test_more_rows_than_a_block():
    many = np.arange(10_000 * 2, dtype=np.float32).reshape(-1, 2)
    assert torch.equal(made(many, len(many)).embedding, torch.from_numpy(many))


def test_identity_is_the_content_wherever_it_lies(values, tmp_path, memory):
    def identity(encoder):
        return choose_encoder(encoder, modality="text").identity(memory)

    first = identity(values)
    (tmp_path / "there").mkdir()
    same = [
        torch.from_numpy(values),
        save(tmp_path, values),
        save(tmp_path / "there", values, "moved.npy"),
        values.copy(),
    ]
    assert {identity(one) for one in same} == {first}
    changed = values.copy()
    changed[8, 3] += 1e-6
    other = [changed, values[::-1].copy(), values.astype(np.float64), values.reshape(4, 9)]
    assert len({first, *map(identity, other)}) == 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((9, 4), np.int64), "int64"),
        (np.zeros(9, np.float32), r"\[N, D\]"),
        (np.zeros((9, 2, 2), np.float32), r"\[9, 2, 2\]"),
        (np.zeros((9, 0), np.float32), r"\[9, 0\]"),
        (torch.zeros(9, 4, dtype=torch.int8), "int8"),
        ("/nowhere/made.npy", "no such file"),
    ],
)
def test_what_is_no_embedding_is_refused_at_once(bad, message):
    with pytest.raises(FeatureError, match=message):
        choose_encoder(bad, modality="text")


def test_another_number_of_rows(values):
    for count in (8, 10):
        with pytest.raises(FeatureError, match=f"9 rows.*{count} samples"):
            made(values, count)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_rows_that_are_not_finite_are_named(values, value):
    values = values.astype(np.float64)
    values[[2, 5], 1] = value
    with pytest.raises(FeatureError, match=r"2 of 9 samples.*samples 2, 5.*Repair"):
        made(values)


def test_files_that_are_damaged_or_pickled(tmp_path, values):
    cut = save(tmp_path, values)
    cut.write_bytes(cut.read_bytes()[:100])
    pickled = tmp_path / "pickled.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for path in (cut, pickled):
        with pytest.raises(FeatureError, match="can't be read"):
            choose_encoder(path, modality="text")


def test_gradients_and_weights_do_not_go_with_them(values):
    with pytest.raises(FeatureError, match="linear head"):
        made(values, kind="gradient", labels=torch.zeros(9, dtype=torch.int64))
    with pytest.raises(FeatureError, match="weights="):
        choose_encoder(values, weights="a.safetensors", modality="text")
