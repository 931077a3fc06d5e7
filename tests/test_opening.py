"""Tables and files of rows that are named on the command line: what is in a cell is what is delivered."""

import pytest

from dq_lightning.commands.opening import open_dataset
from dq_lightning.sources.adapt import as_source

WORDS = ["NA", "N/A", "None", "null", "nan", "NULL", "n/a", "#N/A", "-1.#IND", "<NA>", "True", "1e5"]


def write(path, header, rows):
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("by_hub", [False, True])
def test_words_for_missing_cells_are_text(tmp_path, by_hub, monkeypatch):
    rows = [(f"Say {word}", word, "", str(n)) for n, word in enumerate(WORDS)]
    write(tmp_path / "train.csv", "instruction,output,input,id", rows)
    monkeypatch.chdir(tmp_path.parent)
    opened = open_dataset(f"hub:./{tmp_path.name}", None) if by_hub else open_dataset(None, tmp_path)
    assert opened["output"][:] == WORDS
    assert opened["id"][:] == list(range(len(WORDS)))
    assert as_source(opened).texts(range(2)) == ["Say NA\nNA", "Say N/A\nN/A"]
    assert set(opened["input"][:]) == {None}


def test_numbers_stay_as_they_are_written(tmp_path):
    rows = [
        ("1", "007", "0.5", "3", "a", "9" * 19),
        ("2", "10", "1.25", "", "NA", "1"),
        ("3", "5", "2.0", "4", "", "1"),
    ]
    opened = open_dataset(None, write(tmp_path / "a.csv", "output,code,score,stars,country,big", rows))
    assert opened["output"][:] == ["1", "2", "3"]  # an answer is text, also where all are numbers
    assert opened["code"][:] == ["007", "10", "5"]
    assert opened["score"][:] == [0.5, 1.25, 2.0]
    assert opened["stars"][:] == [3, None, 4]
    assert opened["country"][:] == ["a", "NA", None]
    assert opened["big"][:] == ["9" * 19, "1", "1"]


def test_words_after_many_numbers(tmp_path):
    # datasets takes the types of its first 10,000 rows for those of all
    rows = [(f"a{n}", str(n)) for n in range(10_050)] + [("last", "none")]
    opened = open_dataset(None, write(tmp_path / "a.csv", "text,label", rows))
    assert opened["label"][:][-2:] == ["10049", "none"]
