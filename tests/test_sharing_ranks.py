"""Several ranks make one compact set: the bytes of one process, whoever comes, works slowly, fails or dies."""

import json
import socket
from pathlib import Path

import pytest

from tests.lightning_scripts import all_ranks
from tests.lightning_scripts.sharing_ranks import BATCH_SIZE, COUNT
from tests.warm_processes import Process, environment, run
from tests.warm_processes import run_ranks as launched

# They take about half a minute.
pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("lightning_scripts") / "sharing_ranks.py"


def run_ranks(folder, count, *names, statuses=None):
    """Run scenarios as so many ranks, and return what each rank reported, by scenario and rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    ranks = [
        Process([SCRIPT, folder, *names], environment(RANK=str(rank), LOCAL_RANK=str(rank), **common))
        for rank in range(count)
    ]
    try:
        done = [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    output = "\n".join(one.stdout + one.stderr for one in done)
    assert [one.returncode for one in done] == (statuses or [0] * count), output
    return {
        name: {int(path.stem[7:]): json.loads(path.read_text()) for path in (folder / name).glob("report-*.json")}
        for name in names
    }


def run_alone(folder, name):
    done = run([SCRIPT, folder, name], environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / name / "report-0.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process reported, without any other."""
    report = run_alone(tmp_path_factory.mktemp("alone"), "alone")
    assert report["seen"] == COUNT
    return report


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("two"), 2, "shared", "apart", "slow", "late", "only-one", "broken")


def assert_like(reports, alone, count=2):
    """All ranks have the set of one process; the networks together saw each image once."""
    assert sorted(reports) == list(range(count))
    for report in reports.values():
        assert report.get("hash") == alone["hash"], report
    assert any(report["content"] == alone["content"] for report in reports.values())
    assert sum(not report["reused"] for report in reports.values()) == 1
    assert sum(report["seen"] for report in reports.values()) == COUNT


def test_bytes_of_one_process(two, alone):
    reports = two["shared"]
    assert_like(reports, alone)
    assert all(report["seen"] >= 4 * BATCH_SIZE for report in reports.values())
    assert reports[0]["content"] == reports[1]["content"] == alone["content"]


@pytest.fixture(scope="module")
def patches_alone(tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("patches"), "patches")


def test_every_stage_of_patches_is_shared(tmp_path, patches_alone):
    """Also by ranks without a common disk, of which the helper gets the features and the store when it needs them."""
    of_scenarios = run_ranks(tmp_path, 2, "patches", "apart-patches")
    for reports in of_scenarios.values():
        assert {report["hash"] for report in reports.values()} == {patches_alone["hash"]}
        assert sum(report["seen"] for report in reports.values()) == patches_alone["seen"]
        lines = [line for report in reports.values() for line in report["log"] if "other ranks did" in line]
        assert [line.partition(":")[0] for line in lines] == ["features", "bins", "saliency", "packing", "filling"]
        assert not any("other ranks did 0 " in line for line in lines)
    assert all(report["content"] == patches_alone["content"] for report in of_scenarios["patches"].values())
    reports = of_scenarios["apart-patches"].values()
    assert [report["content"] for report in reports if not report["reused"]] == [patches_alone["content"]]
    (content,) = (report["content"] for report in reports if report["reused"])
    assert content == {name: digest for name, digest in patches_alone["content"].items() if name[0] in "156"}


def test_rank_killed_while_it_packs(tmp_path, patches_alone):
    (report,) = run_ranks(tmp_path, 2, "patches-killed", statuses=[0, -9])["patches-killed"].values()
    assert "has ended" in report["error"], report["error"]
    assert list((tmp_path / "cache" / "0-partial" / "5-store").rglob("*.shard"))
    reports = run_ranks(tmp_path, 2, "patches-resumed")["patches-resumed"]
    assert any("samples are done already" in line for report in reports.values() for line in report["log"])
    assert reports[0]["content"] == patches_alone["content"]


def test_a_stream_is_read_by_all_and_encoded_once(tmp_path):
    alone = run_alone(tmp_path / "alone", "stream")
    reports = run_ranks(tmp_path, 2, "stream")["stream"]
    assert_like(reports, alone)
    assert all(report["seen"] >= 4 * BATCH_SIZE for report in reports.values())
    assert reports[0]["content"] == alone["content"]
    assert any(f"of {COUNT // BATCH_SIZE}" in line for report in reports.values() for line in report["log"])


def test_without_a_shared_disk(two, alone):
    """The rank that helped has a cache of its own, into which the finished set is copied, and perhaps the features."""
    reports = two["apart"]
    assert_like(reports, alone)
    assert all(report["seen"] >= 4 * BATCH_SIZE for report in reports.values())
    helper = next(report for report in reports.values() if report["reused"])
    copied = {name[0] for name in helper["content"]}
    assert {"5"} <= copied <= {"1", "5"}
    assert helper["content"] == {name: digest for name, digest in alone["content"].items() if name[0] in copied}
    assert Path(helper["path"]).is_dir()


def test_slow_and_late_ranks_hold_nobody_up(two, alone):
    assert_like(two["slow"], alone)
    assert two["slow"][1]["seen"] < two["slow"][0]["seen"]
    assert_like(two["late"], alone)
    # one rank that calls waits for no other
    assert list(two["only-one"]) == [1]
    assert two["only-one"][1]["content"] == alone["content"]


def test_failure_of_one_rank_is_raised_on_all(two):
    for report in two["broken"].values():
        assert "disk on fire" in report["error"]
        assert report["seconds"] < 30


def test_four_ranks(tmp_path, alone):
    reports = run_ranks(tmp_path, 4, "shared")["shared"]
    assert_like(reports, alone, count=4)
    assert all(report["content"] == alone["content"] for report in reports.values())


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_others_and_the_next_run_goes_on(tmp_path, alone, killed):
    statuses = [0, 0]
    statuses[killed] = -9
    name = f"kill-{killed}"
    (report,) = run_ranks(tmp_path, 2, name, statuses=statuses)[name].values()
    assert report["seconds"] < 60
    assert "has ended" in report["error"], report["error"]
    sealed = list((tmp_path / "cache" / "0-partial").rglob("*.shard"))
    assert sealed
    reports = run_ranks(tmp_path, 2, "resumed")["resumed"]
    assert {report["hash"] for report in reports.values()} == {alone["hash"]}
    assert any("samples are done already" in line for report in reports.values() for line in report["log"])
    assert reports[0]["content"] == alone["content"]
    assert sum(report["seen"] for report in reports.values()) < COUNT


def test_all_ranks_of_a_trainer_prepare(tmp_path):
    launched([all_ranks.__file__, tmp_path])
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert first["hash"] == second["hash"]
    assert first["embedded"] + second["embedded"] == 80
    assert min(first["embedded"], second["embedded"]) > 0
    assert len(first["trained"]) == len(second["trained"]) == 10
    assert len({*first["trained"], *second["trained"]}) == 20


def test_a_rank_that_finds_the_set_waits_for_one_that_makes_it(tmp_path):
    """Each has a cache of its own, and making takes longer than a collective of the process group may."""
    launched([all_ranks.__file__, tmp_path, "apart"])
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert (first["embedded"], second["embedded"]) == (0, 80)
    assert first["hash"] == second["hash"]
