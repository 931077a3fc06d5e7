"""What is decided, refused and told before bins are made."""

import logging

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dq_lightning.bins import make, plan, similarity
from dq_lightning.bins.make import make_bins
from dq_lightning.core.config import BinConfig
from dq_lightning.core.control_groups import free_of_groups
from dq_lightning.core.errors import ConfigError


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("dq_lightning"), "propagate", True)
    caplog.set_level(logging.INFO, logger="dq_lightning")
    return caplog


@pytest.mark.parametrize("objective", ["facility_location", "log_determinant"])
def test_the_memory_that_is_told_is_the_memory_that_is_taken(monkeypatch, objective):
    """A second matrix beside the first, of another bin or of its parts, would be twice as much."""
    plans = []
    made = plan.make_plan
    monkeypatch.setattr(make, "make_plan", lambda *given: plans.append(made(*given)) or plans[-1])
    monkeypatch.setattr(similarity, "_ENTRIES", 1 << 14)
    values = torch.rand(250, 8, generator=torch.Generator().manual_seed(0))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        make_bins(values, num_bins=3, objective=objective, progress=False)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert 0.6 < np.cumsum(changes).max() / plans[0].bytes < 1.2


def test_clusters_of_unequal_sizes_keep_to_the_memory(told):
    generator = np.random.default_rng(0)
    values = np.concatenate([5 + generator.normal(size=(500, 4)) / 100, 5 * generator.normal(size=(23, 4))])
    sizes = torch.bincount(make_bins(values, clusters=4, similarity="dot", num_bins=2).group)
    assert "523 samples in 4 groups" in told.text
    assert sizes.max() > 400
    # Clusters of equal sizes would fit.
    with pytest.raises(ConfigError, match=f"engine='dense' needs .* for a group of {sizes.max()} samples"):
        make_bins(values, clusters=4, similarity="dot", num_bins=2, engine="dense", matrix_memory=4 * 200**2)
    make_bins(values[:5], clusters=100, num_bins=1)
    assert "5 samples in 5 groups" in told.text


@pytest.mark.parametrize(
    ("changed", "used"),
    [
        ({"lam": 0.5}, {"objective": "graph_cut"}),
        ({"gamma": 0.5}, {"similarity": "rbf"}),
        ({"epsilon": 0.2}, {"maximizer": "stochastic"}),
        ({"beta": 0.5}, {"maximizer": "approximate_lazy"}),
        ({"search_seed": 1}, {"clusters": 2}),
        ({"engine": "stream"}, {}),
        ({"matrix_memory": "1GB"}, {"engine": "dense"}),
    ],
)
def test_a_setting_without_effect_is_told(told, changed, used):
    without = {"objective": "facility_location"} if {"lam", "engine", "matrix_memory"} & set(changed) else {}
    plan.tell_without_effect(BinConfig(**changed, **without))
    name = next(iter(changed))
    assert f"{name}={changed[name]!r} has no effect here" in told.text
    told.clear()
    plan.tell_without_effect(BinConfig(**changed, **used))
    assert not told.records


@pytest.mark.parametrize("value", [1.5, True, None, "0%", "101%", "half", [1]])
def test_memory_of_the_matrix_that_is_none(value):
    with pytest.raises(ConfigError, match="matrix_memory"):
        BinConfig(matrix_memory=value)


def limit(folder, names, most, used, dropped, key):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (most, used, f"anon 3\n{key} {dropped}\n"), strict=True):
        (folder / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("line", "below", "names", "key"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current", "memory.stat"), "inactive_file"),
        (
            "7:cpu,memory:/job/step",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
            "total_inactive_file",
        ),
    ],
)
def test_free_memory_is_that_of_the_control_groups(tmp_path, monkeypatch, line, below, names, key):
    own, root = tmp_path / "own", tmp_path / "mount" / below
    own.write_text(f"1:name=systemd:/x\n{line}\n")
    assert free_of_groups(tmp_path / "mount", own) == 1 << 62
    limit(root / "job" / "step", names, 900, 200, 50, key)
    assert free_of_groups(tmp_path / "mount", own) == 750
    limit(root / "job", names, 500, 400, 100, key)
    assert free_of_groups(tmp_path / "mount", own) == 200
    limit(root, names, "max", 0, 0, key)
    assert free_of_groups(tmp_path / "mount", own) == 200
    # In a container the own group is the one at the mount.
    own.write_text("0::/../elsewhere\n7:memory:/docker/123\n")
    limit(root, names, 100, 90, 5, key)
    assert free_of_groups(tmp_path / "mount", own) == 15
    monkeypatch.setattr(plan, "free_of_groups", lambda: 1000)
    assert plan.free_memory(torch.device("cpu")) == 1000
