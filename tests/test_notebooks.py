"""The notebooks of the documentation run on bundled data without a network, and show what they say that they show."""

from pathlib import Path

import pytest

from tests.notebooks import read, run_notebook

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))


def shape_of(outputs):
    """What is equal on every processor: the kinds of the outputs, and the first word of each printed line."""
    return [
        [line.split()[0] for line in output["text"]] if output["output_type"] == "stream" else sorted(output["data"])
        for output in outputs
    ]


def test_there_are_three_small_ones():
    assert [path.stem for path in NOTEBOOKS] == ["dirty_data", "images", "text"]
    assert all(path.stat().st_size < 100_000 for path in NOTEBOOKS)


# .ci/run runs the slow ones, too: each of the others takes about ten seconds of a processor
CASES = [pytest.param(path, id=path.stem, marks=[] if path.stem == "text" else pytest.mark.slow) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", CASES)
def test_a_notebook_runs_and_prints_what_it_holds(path):
    stored = [cell["outputs"] for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [shape_of(outputs) for outputs in run_notebook(path)] == [shape_of(outputs) for outputs in stored]
    assert any(stored)
