"""One rank of several fails: every process is gone soon, and each survivor has printed the cause."""

import json

import pytest

from dq_lightning.loading.failures import NO_NOTE
from tests import warm_processes
from tests.lightning_scripts import failing_ranks

CAUSES = {"error": "disk on fire", "exit": "asked to stop", "kill": NO_NOTE}
PLACES = ("prepare", "override", "setup", "train")
TWO = [f"{place}-{kind}-{rank}" for place in PLACES for kind in CAUSES for rank in (0, 1)]
# every place with an error; the two other ways at two places each; either rank
SOME = [
    *("prepare-error-0", "override-error-1", "setup-error-0", "train-error-1"),
    *("prepare-kill-1", "train-kill-0", "setup-exit-1", "override-exit-0"),
]
FOUR = ["prepare-error-2", "setup-kill-0"]
ALL_FOUR = [f"{place}-{kind}-{rank}" for place in PLACES for kind in CAUSES for rank in (0, 3)]


def check(folder, count, names):
    """Run the scenarios and look at how every rank ended."""
    command = [failing_ranks.__file__, folder, count, *names]
    run = warm_processes.run(command, warm_processes.environment(), timeout=failing_ranks.LIMIT_SECONDS * len(names))
    assert run.returncode == 0, run.stdout + run.stderr
    for name in names:
        _, kind, failing = name.split("-")
        end = json.loads((folder / name / "end.json").read_text())
        assert sorted(end) == [str(rank) for rank in range(count)], (
            f"{name}: ranks {sorted(end)} alone ended by themselves"
        )
        assert end[failing][0] == (-9 if kind == "kill" else 1)
        for rank in range(count):
            code, seconds = end[str(rank)]
            assert code != 0
            assert seconds < failing_ranks.LIMIT_SECONDS
            printed = (folder / name / f"rank-{rank}.txt").read_text()
            if not (kind == "kill" and str(rank) == failing):
                assert CAUSES[kind] in printed, f"{name}, rank {rank}:\n{printed}"
            if kind != "kill" and str(rank) != failing:
                assert f"rank {failing} failed" in printed


def test_two_ranks(tmp_path):
    check(tmp_path, 2, SOME)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    check(tmp_path, 4, FOUR)


@pytest.mark.slow
def test_every_rank_of_two(tmp_path):
    check(tmp_path, 2, TWO)


@pytest.mark.slow
def test_first_and_last_of_four_ranks(tmp_path):
    check(tmp_path, 4, ALL_FOUR)
