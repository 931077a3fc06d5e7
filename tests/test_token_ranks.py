"""Token batches on two processes, under Lightning's own replacement of samplers."""

import json

import pytest

from tests.lightning_scripts import token_ranks
from tests.warm_processes import run_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks([token_ranks.__file__, folder])
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("count", [200, 37])
def test_ranks_share_every_epoch(ranks, count):
    first, second = (report[f"{count} rows, attempt 0"] for report in ranks)
    assert len(first) == len(second) == 3
    for one, other in zip(first, second, strict=True):
        assert [len(batch["rows"]) for batch in one] == [len(batch["rows"]) for batch in other]
        mine, theirs = ([row for batch in share for row in batch["rows"]] for share in (one, other))
        assert {*mine, *theirs} == set(range(count))
        # an odd row is repeated, so that the ranks stay in step
        assert len(mine) + len(theirs) == count + count % 2
        assert len({*mine} & {*theirs}) <= count % 2


def test_order_changes_with_the_epoch_and_not_with_the_global_random_state(ranks):
    for report in ranks:
        epochs = report["200 rows, attempt 0"]
        assert len({json.dumps(epoch) for epoch in epochs}) == 3
        assert report["200 rows, attempt 1"] == epochs


def test_batches_of_a_step_are_about_as_long(ranks):
    pairs = [
        (a["length"], b["length"])
        for one, other in zip(*(report["200 rows, attempt 0"] for report in ranks), strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 8
    assert max(max(pair) for pair in pairs) - min(min(pair) for pair in pairs) > 30
