"""Tables and files of rows that are named on the command line: what is in a cell is what is delivered."""

import pytest

from dq_lightning.commands.opening import open_dataset
from dq_lightning.core.errors import SourceError
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


class Two:
    """A class as torchvision's, of which `train` says which part is read."""

    def __init__(self, train=True):
        self.part = "train" if train else "test"


class One:
    """A class without parts."""


def test_a_split_that_is_not_there_is_refused(tmp_path):
    """A misspelt split must give neither the other part nor the whole."""
    for split in ("train", "test"):
        assert open_dataset(f"{__name__}.Two", None, split).part == split
    for name in ("photos/train/cat", "photos/val/cat", "tables"):
        (tmp_path / name).mkdir(parents=True)
    for folder in ("train", "val"):
        (tmp_path / "photos" / folder / "cat" / "a.png").write_bytes(b"")
        write(tmp_path / "tables" / f"{folder}-0.csv", "text,label", [(folder, "1")])
        opened = open_dataset(None, tmp_path / "photos", folder)
        assert opened.samples[0][0].endswith(f"{folder}/cat/a.png")
        assert open_dataset(None, tmp_path / "tables", folder)["text"][:] == [folder]
    # what has no splits is read as a whole, also where the split is in its own name
    for split in ("train", "val"):
        assert len(open_dataset(None, tmp_path / "photos" / "val", split)) == 1
        assert len(open_dataset(None, tmp_path / "tables" / "val-0.csv", "train")) == 1
    described = {"class_path": f"{__name__}.One"}
    write(tmp_path / "rows.jsonl", '{"text": "a"}', [])
    places = (
        tmp_path / "photos",
        tmp_path / "photos" / "train",
        tmp_path / "tables",
        tmp_path / "tables" / "val-0.csv",
    )
    for dataset, place in (
        (f"{__name__}.Two", None),
        (f"{__name__}.One", None),
        (described, None),
        *((None, place) for place in (*places, tmp_path / "rows.jsonl")),
    ):
        with pytest.raises(SourceError, match="has no split 'vla'"):
            open_dataset(dataset, place, "vla")
