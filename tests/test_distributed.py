"""Two processes, as users start them: by Lightning's launcher, by spawning, and as two nodes."""

import json
import socket
from pathlib import Path

import pytest

from tests.warm_processes import Process, environment

SCRIPT = Path(__file__).with_name("lightning_scripts") / "several_processes.py"


def start(mode, folder, **more):
    return Process([SCRIPT, mode, folder], environment(**more))


def reports(folder, output):
    paths = [folder / f"report-{rank}.json" for rank in (0, 1)]
    assert all(path.is_file() for path in paths), output
    return [json.loads(path.read_text()) for path in paths]


def assert_halves(first, second, count):
    """Each process saw its half of the compact set, and together they saw all of it."""
    assert len(first["seen"]) == len(second["seen"]) == count // 2
    assert len({*first["seen"], *second["seen"]}) == count
    assert first["hash"] == second["hash"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What each of two processes of Lightning's own launcher reported, and how the last run ended."""
    folder = tmp_path_factory.mktemp("popen")
    done = start("popen", folder).wait(240)
    output = done.stdout + done.stderr
    return reports(folder, output), done.returncode, output


def test_one_build_and_disjoint_halves(launched):
    (first, second), _, _ = launched
    assert first["builds after the first"] == first["builds after the second"] == 1
    assert_halves(first["miss"], second["miss"], 50)


def test_miss_and_hit_train_alike_on_every_rank(launched):
    for report in launched[0]:
        assert report["miss"]["seen"] == report["hit"]["seen"]


def test_unseeded_split_is_the_same_on_all_ranks(launched):
    (first, second), _, _ = launched
    assert_halves(first["unseeded split"], second["unseeded split"], 40)


def test_split_that_changes_is_explained_on_every_rank(launched):
    first, second = (report["split from the clock"]["error"] for report in launched[0])
    assert "setup('fit') gave another train set than in prepare_data" in first
    for error in (first, second):
        assert "seed of its own" in error


@pytest.mark.parametrize(("run", "cause"), [("failure", "disk on fire"), ("exit", "asked to stop")])
def test_failure_of_one_rank_is_raised_on_all(launched, run, cause):
    (first, second), _, _ = launched
    assert cause in first[run]["error"]
    assert second[run]["error"].startswith("DistributedError: rank 0 failed while preparing the compact set")
    assert cause in second[run]["error"]
    assert max(first[run]["seconds"], second[run]["seconds"]) < 100


def test_too_small_for_the_processes(launched):
    for report in launched[0]:
        assert "50 samples: with 2 processes, batch_size=26 and drop_last=True" in report["too small"]["error"]


def test_different_sets_are_stopped_with_both_hashes(launched):
    hashes = [report["own hash"] for report in launched[0]]
    assert len(set(hashes)) == 2
    for report in launched[0]:
        assert all(value in report["different sets"]["error"] for value in hashes)
        assert "on rank 0;" in report["different sets"]["error"]


def test_cache_that_one_rank_cannot_see(launched):
    (first, second), _, _ = launched
    for report in (first, second):
        assert "no compact set for these data and settings" in report["unseen cache"]["error"]
        assert "on rank 1" in report["unseen cache"]["error"]


def test_uncaught_failure_ends_every_process(launched):
    _, code, output = launched
    assert code not in (0, None)
    assert "OSError: the last straw" in output
    assert "rank 0 failed while preparing the compact set" in output


def test_two_nodes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    processes = [start("nodes", tmp_path, NODE_RANK=str(node), **common) for node in (0, 1)]
    try:
        done = [process.wait(120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    first, second = reports(tmp_path, "\n".join(one.stdout + one.stderr for one in done))
    assert_halves(first["own caches"], second["own caches"], 50)
    assert first["builds with own caches"] == 2
    assert_halves(first["shared cache, one prepares"], second["shared cache, one prepares"], 50)
    assert first["builds with a shared cache"] == 3
    for report in (first, second):
        assert "prepare_data_per_node=True" in report["own caches, one prepares"]["error"]


@pytest.mark.slow
def test_spawned_processes(tmp_path):
    done = start("spawn", tmp_path).wait(120)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert_halves(*reports(tmp_path, output), 50)
    assert output.count("computing the compact set") == 1
