"""The benchmark behind the advice on encoders, bins and ratios: its tables at a tiny size, and going on where it was."""

import importlib.util
import sys
from pathlib import Path

import pytest

from dq_lightning.demo.sample_data import SampleCIFAR10

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = [
    "--samples", "200", "--test-samples", "50", "--bins", "2", "10", "--ratios", "0.1", "--seeds", "1", "--steps", "2",
    "--batch-size", "10",
]  # fmt: skip


@pytest.fixture
def advice(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    # set by Lightning's seed_everything, and taken back with the test
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    spec = importlib.util.spec_from_file_location("advice", BENCHMARKS / "advice.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "advice", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CIFAR10", lambda root, train=True: SampleCIFAR10(train))
    return module


def test_tables_and_going_on(advice, tmp_path, monkeypatch, capsys):
    options = [*TINY, "--cifar", "unused", "--results", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", ["advice.py", *options])
    trained = []

    def watched(part, test, args, seed):
        trained.append(part)
        assert len(test) == 50
        return 10.0 + len(trained)

    monkeypatch.setattr(advice, "accuracy", watched)
    advice.main()
    printed = capsys.readouterr().out
    assert [len(part) for part in trained] == [20] * 4
    rows = [line for line in printed.splitlines() if line.startswith(("| bundled", "| random", "| stratified"))]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        "bundled", "random", "stratified", "bundled", "bundled", "bundled", "random", "stratified",
    ]  # fmt: skip
    # an arm that stands in two tables is trained once, with one result
    assert rows[0].split(" | ")[3] == rows[4].split(" | ")[3] == "11.0 ± 0.0"
    stratified = trained[2].tensors[1].bincount(minlength=10)
    assert stratified.max() - stratified.min() <= 2
    monkeypatch.setattr(advice, "accuracy", None)
    advice.main()
    again = [line.rpartition(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert again == [line.rpartition(" | ")[0] for line in printed.splitlines() if line.startswith("| ")]


def test_a_network_is_trained(advice, tmp_path, capsys):
    args = advice.parse([*TINY, "--cifar", "unused", "--results", str(tmp_path / "r.json")])
    args.bins, args.ratios = [], []
    table, arm, (accuracy,), _ = next(advice.measured(args))
    assert (table, arm.encoder, arm.bins) == ("encoder", "bundled", 10)
    assert 0 <= accuracy <= 100
    epochs = advice.with_epochs(args, 20).epochs
    # two batches an epoch
    assert epochs == 1
