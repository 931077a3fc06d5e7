"""Samples that are no images and no text: their features are given as an array, or made by a function."""

import numpy as np
import pytest
import torch

from dq_lightning import (
    PackedDataset,
    QuantizedDataModule,
    as_source,
    load_selection,
    make_bins,
    margin_scores,
    quantize,
    select,
)
from dq_lightning.core.errors import FeatureError, SourceError
from dq_lightning.features.choose import choose_encoder

COUNT = 24
SETTINGS = {"keep_ratio": 0.25, "num_bins": 3, "batch_size": 2, "num_workers": 0}


def wave(i):
    """Sound of another length for each sample."""
    return torch.sin(torch.arange(100 + 7 * i) / (1 + i))[None]


KINDS = {
    "sound": lambda i: (wave(i), 16_000, f"word {i}"),
    "sound and class": lambda i: (wave(i), i % 2),
    "table": lambda i: {"row": np.array([i, i**2, -i], np.float64), "label": i % 2},
    "volume": lambda i: {"scan": torch.full((6, 5, 7, 9), float(i)), "mask": torch.zeros(5, 7, 9, dtype=torch.bool)},
    "bands": lambda i: torch.full((13, 8, 8), float(i)),
}


class Samples:
    """A dataset of one kind, behind a base class that says nothing."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return COUNT

    def __getitem__(self, i):
        return KINDS[self.kind](i)


def leaves(item):
    if isinstance(item, dict):
        item = tuple(item.values())
    return [part for one in item for part in leaves(one)] if isinstance(item, tuple) else [item]


def summary(item):
    """Three numbers of whatever arrays a sample holds."""
    arrays = [torch.as_tensor(part).double() for part in leaves(item) if not isinstance(part, str | int)]
    return torch.stack([torch.stack([a.mean(), a.abs().max(), (a**2).mean()]) for a in arrays]).sum(0)


def same(one, other):
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_ready_features_and_functions_make_any_sample_fit(kind, tmp_path):
    dataset, classes = Samples(kind), [i % 2 for i in range(COUNT)]
    features = torch.stack([summary(dataset[i]) for i in range(COUNT)]).float()
    own = kind in ("sound and class", "table")
    bins = make_bins(features, num_bins=3, labels=torch.tensor(classes))
    wanted = select(bins, keep_ratio=0.25, scores=margin_scores(features, classes)).index
    for name, encoder in (("array", features), ("function", summary)):
        module = QuantizedDataModule(
            dataset, encoder=encoder, labels=None if own else classes, cache_dir=tmp_path / name, **SETTINGS
        )
        module.prepare_data()
        module.setup("fit")
        assert torch.equal(module.selection.index, wanted)
        kept = module.train_dataloader().dataset
        assert all(same(kept[j], dataset[i]) for j, i in enumerate(wanted.tolist()))
    settings = {"store": "packed", "selection": {"keep_ratio": 0.25}, "bins": {"num_bins": 3}}
    info = quantize(dataset, settings, encoder=summary, labels=classes, cache_dir=tmp_path / "function", progress=False)
    packed = PackedDataset(info.path)
    assert torch.equal(packed.index, wanted)
    assert all(same(packed[j], dataset[i]) for j, i in enumerate(wanted.tolist()))


def test_rows_of_a_table_of_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"a": [float(i) for i in range(COUNT)], "label": [i % 2 for i in range(COUNT)]})
    with pytest.raises(SourceError, match="Image type"):
        as_source(table)
    made = quantize(table, encoder=lambda row: [row["a"], 1.0], cache_dir=tmp_path, progress=False)
    features = [[float(i), 1.0] for i in range(COUNT)]
    bins = make_bins(torch.tensor(features), labels=torch.arange(COUNT) % 2)
    margins = margin_scores(torch.tensor(features), torch.arange(COUNT) % 2)
    assert torch.equal(load_selection(made.path).index, select(bins, keep_ratio=0.125, scores=margins).index)


def test_what_needs_images_still_says_so(tmp_path):
    features = np.eye(COUNT, dtype=np.float32)
    for settings in (
        {},
        {"encoder": features, "drop_ratio": 0.2},
        {"encoder": features, "config": {"encoding": {"codec": "webp"}}},
    ):
        with pytest.raises(SourceError, match="no image"):
            QuantizedDataModule(Samples("sound"), cache_dir=tmp_path, **settings).prepare_data()


def other(item):
    return summary(item) + 1


def test_a_function_is_known_by_what_it_does():
    memory = None

    def scaled(scale):
        return lambda item: scale * summary(item)

    first, again, changed = (choose_encoder(scaled(scale)).identity(memory) for scale in (1.0, 1.0, 2.0))
    assert first == again != changed
    assert choose_encoder(summary).identity(memory) != choose_encoder(other).identity(memory)
    net = torch.nn.Linear(3, 2)
    with_net = [choose_encoder(lambda item: net(summary(item).float())).identity(memory)]
    torch.nn.init.zeros_(net.weight)
    assert choose_encoder(lambda item: net(summary(item).float())).identity(memory) not in with_net
    with pytest.raises(FeatureError, match="string attribute `identity`"):
        choose_encoder(lambda item: np.load(open("/tmp/" + str(item)))).identity(memory)  # noqa: PTH123, SIM115


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda item: item[0], r"one row of numbers"),
        (lambda item: item[0][0], r"it gave \[107\] where it gave \[100\]"),
        (lambda item: item["none"], r"sample 0: TypeError"),
    ],
)
def test_what_a_function_must_give(function, said, tmp_path):
    with pytest.raises(FeatureError, match=said):
        quantize(Samples("sound"), encoder=function, cache_dir=tmp_path, progress=False)
