from functools import partial

import numpy as np
import pytest
import torch

from dq_lightning.bins import make
from dq_lightning.bins.duplicates import find_duplicates
from dq_lightning.bins.make import make_bins
from dq_lightning.core.errors import ConfigError, DQError, FeatureError
from dq_lightning.core.records import Features


def far_blobs(seed=0, per_blob=40):
    generator = np.random.default_rng(seed)
    centres = np.eye(5) * 10
    blob = generator.permutation(np.repeat(np.arange(5), per_blob))
    return centres[blob] + 0.1 * generator.standard_normal((len(blob), 5)), blob


def test_clusters_find_blobs_and_bins_are_made_inside():
    values, blob = far_blobs()
    bins = make_bins(values, num_bins=4, clusters=5)
    pairs = set(zip(bins.group.tolist(), blob.tolist(), strict=True))
    # a first centre may fall on a blob twice: then two clusters share it, but none mixes far blobs unless centres lack
    assert len(bins.group.unique()) <= 5
    for group in bins.group.unique():
        inside = bins.group == group
        assert torch.equal(bins.rank[inside], make_bins(values[inside.numpy()], num_bins=4).rank)
    assert len(pairs) < 5 + 5


def test_clusters_inside_labels():
    values, blob = far_blobs(1)
    labels = blob % 2
    bins = make_bins(values, num_bins=2, labels=labels, clusters=3)
    for group in bins.group.unique():
        assert len(np.unique(labels[(bins.group == group).numpy()])) == 1
    again = make_bins(values, num_bins=2, labels=labels, clusters=3)
    assert torch.equal(bins.group, again.group)


def test_one_cluster_is_no_cluster_and_more_than_samples_is_no_error():
    values, _ = far_blobs(2, 4)
    assert torch.equal(make_bins(values, clusters=1).rank, make_bins(values).rank)
    assert sorted(make_bins(values, clusters=1000).group.unique().tolist()) == list(range(20))


def test_equal_rows_make_one_cluster():
    assert make_bins(np.ones((30, 3)), num_bins=3, clusters=4).group.unique().tolist() == [0]


def test_clusters_need_plain_embeddings():
    with pytest.raises(ConfigError, match="labels="):
        make_bins(Features(torch.ones(6, 2), torch.ones(6, 2)), clusters=2)


def test_progress_counts_every_pick(monkeypatch):
    bars = []

    class Bar:
        def __init__(self, show, *, total, **_):
            self.show, self.total, self.done = show, total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, count):
            self.done += count
            assert 0 <= self.done <= self.total

    monkeypatch.setattr(make, "progress_bar", Bar)
    values = torch.randn(3000, 8)
    make_bins(values, num_bins=3, progress=True)
    make_bins(values[:500], num_bins=3, labels=np.arange(500) % 7)
    make_bins(values[:90], num_bins=3, objective="facility_location", maximizer="lazy")
    assert [(bar.show, bar.done) for bar in bars] == [(True, 3000), (False, 500), (False, 90)]


def test_a_missing_gpu_is_told():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="device='cpu'"):
        make_bins(torch.ones(3, 2), device="cuda")


def test_torch_threads_and_random_state_are_left_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    make_bins(torch.ones(30, 2) * torch.arange(30)[:, None], num_bins=2, maximizer="stochastic")
    with pytest.raises(FeatureError):
        make_bins(torch.full((3, 2), float("nan")))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("labels", "seen"),
    [
        ([0.0, 1.0, float("nan"), 1.0], "nan for sample 2"),
        (["a", float("nan"), "b", "a"], "nan for sample 1"),
        (["a", None, "b", "a"], "None for sample 1"),
        ([1, None, 2, 1], "None for sample 1"),
        (["a", 1, "b", "a"], "1 for sample 1"),
        (np.array([b"a"] * 4), "b'a' for sample 0"),
        (5, r"shape \(\)"),
        ([[1], [2, 3], [1], [1]], "one integer or string a sample"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, seen):
    """NumPy would write NaN among strings as the class "nan"."""
    for call in (make_bins, partial(find_duplicates, threshold=0.9)):
        with pytest.raises(DQError, match=seen):
            call(np.eye(4), labels=labels)


def test_labels_of_many_kinds_are_classes():
    kinds = [
        [7, 3, 7, -1],
        np.array([7, 3, 7, -1], object),
        np.array([7, 3, 7, -1], np.int8),
        torch.tensor([7, 3, 7, -1]),
    ]
    for labels in kinds:
        assert make_bins(np.eye(4), num_bins=1, labels=labels).group.tolist() == [7, 3, 7, -1]
    for labels in (["b", "a", "b", ""], np.array(["b", "a", "b", ""]), np.array(["b", "a", "b", ""], object)):
        assert make_bins(np.eye(4), num_bins=1, labels=labels).group.tolist() == [2, 1, 2, 0]
