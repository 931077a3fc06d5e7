"""Memory of the whole flow over many tiny samples: bounded in the parent, and not growing in the loader processes."""

import json
import sys

import pytest

from tests import warm_processes
from tests.lightning_scripts import many_samples


@pytest.mark.skipif(sys.platform != "linux", reason="memory of other processes is read from /proc")
@pytest.mark.parametrize(("count", "peak_mib"), [(8_000, 1000), pytest.param(1_000_000, 2000, marks=pytest.mark.slow)])
def test_memory_stays_bounded(count, peak_mib, tmp_path):
    command = [many_samples.__file__, count, tmp_path / "cache", tmp_path / "report.json"]
    run = warm_processes.run(command, warm_processes.environment(), timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    print(report)  # noqa: T201
    assert report["kept"] == count // 10
    assert report["peak"] < peak_mib
    first, *later = report["workers"]
    assert len(first) == many_samples.WORKERS
    assert len(later) == many_samples.EPOCHS - 1
    # reference counts touch shared pages in the first epoch; a leak would grow with every one
    for epoch in later:
        assert all(after - before < 30 for before, after in zip(first, epoch, strict=True))
