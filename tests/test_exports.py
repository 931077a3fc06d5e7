"""Compact sets as files: the same fields in the same order, exact rows, whole or not at all."""

import json
import lzma

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_from_disk

from dq_lightning.core.errors import StoreError
from dq_lightning.exports.rows import write_dataset, write_index, write_json
from dq_lightning.sources.jsonl import read_rows

ROWS = [
    {
        "output": f"o{i}",
        "instruction": 'Ünïcödé 🙂\n"quoted"\t\u2028',
        "input": "",
        "score": i / 3,
        "tags": ["a", {"b": None}],
    }
    for i in range(6)
]
KEPT = torch.tensor([0, 2, 5])


@pytest.mark.parametrize("name", ["kept.json", "deeper/kept.jsonl"])
def test_json_holds_the_rows_as_they_were(tmp_path, name):
    path = write_json(ROWS, KEPT, tmp_path / name)
    text = path.read_text(encoding="utf-8")
    read = [json.loads(line) for line in text.split("\n") if line] if name.endswith("l") else json.loads(text)
    assert read == [ROWS[i] for i in KEPT.tolist()]
    assert [list(row) for row in read] == [list(ROWS[0])] * 3
    assert "🙂" in text
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_json_is_written_as_alpaca_was_published(shared_dir, tmp_path):
    with lzma.open(shared_dir / "data" / "alpaca" / "alpaca_data.json.xz") as file:
        original = file.read().decode()
    rows = json.loads(original)[:50]
    written = write_json(rows, torch.arange(50), tmp_path / "all.json").read_text(encoding="utf-8")
    end = original.index("\n    },\n", len(written) - 200)
    # the same bytes but for the escapes of letters beyond ASCII
    assert json.dumps(json.loads(written)) == json.dumps(json.loads(original[:end] + "\n    }\n]"))
    assert written.splitlines()[:6] == original.splitlines()[:6]


def test_nothing_kept(tmp_path):
    assert json.loads(write_json(ROWS, KEPT[:0], tmp_path / "none.json").read_text()) == []


def test_dataset_keeps_its_features(tmp_path):
    features = Features({"text": Value("large_string"), "kind": ClassLabel(names=["x", "y"]), "n": Value("int16")})
    rows = Dataset.from_list([{"text": str(i), "kind": i % 2, "n": i} for i in range(50)], features=features)
    shuffled = rows.shuffle(seed=1)
    write_dataset(shuffled, KEPT, tmp_path / "set")
    again = load_from_disk(tmp_path / "set")
    assert again.features == features
    assert again.to_list() == [shuffled[i] for i in KEPT.tolist()]
    assert again._indices is None
    assert sum(entry.stat().st_size for entry in (tmp_path / "set").glob("*.arrow")) < 2000


def test_dataset_of_plain_rows_replaces_an_older_one(tmp_path):
    rows = [{"b": 1, "a": "x"}, {"b": 2, "a": "y"}, {"b": 3, "a": "z"}]
    for kept in ([0, 1], [2]):
        write_dataset(rows, torch.tensor(kept), tmp_path / "set")
        assert load_from_disk(tmp_path / "set").to_list() == [rows[i] for i in kept]
    assert load_from_disk(tmp_path / "set").column_names == ["b", "a"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_dataset_of_rows_that_differ(tmp_path):
    rows = [{"a": 1, "b": [1, "x"]}, {"a": "x", "b": [], "c": {"k": 1}}, {"a": None, "b": [{"k": 2}], "c": {"l": "z"}}]
    write_dataset(rows, torch.arange(3), tmp_path / "set")
    # a field that the first row lacks is there, and no field is filled into what is nested
    assert load_from_disk(tmp_path / "set").to_list() == [rows[0] | {"c": None}, *rows[1:]]
    for cell in (object(), (1, 2), {3: "x"}, b"bytes"):
        with pytest.raises(StoreError, match=r"column 'a' cannot be written.*write json instead"):
            write_dataset([*rows[:2], {"a": cell}], torch.arange(3), tmp_path / "set")
    with pytest.raises(StoreError, match=r"column 'text' cannot be written.*surrogates.*write json instead"):
        write_dataset([{"n": 1, "text": "\ud83d"}], torch.arange(1), tmp_path / "set")


@pytest.mark.parametrize("name", ["kept.json", "kept.jsonl"])
def test_half_a_character_is_written_as_its_escape(tmp_path, name):
    rows = [{"text": "ok \U0001f600"}, {"text": "\ud83d half", "\udc00": ["\udfff"]}]
    path = write_json(rows, torch.arange(2), tmp_path / name)
    assert read_rows(path) == rows
    assert "\U0001f600" in path.read_text(encoding="utf-8")


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("a")
    with pytest.raises(StoreError, match="was not written by this export"):
        write_dataset(ROWS, KEPT, tmp_path / "thesis")


def test_row_numbers(tmp_path):
    read = np.load(write_index(KEPT.int(), tmp_path / "rows.npy"), allow_pickle=False)
    assert read.dtype == np.int64
    assert read.tolist() == [0, 2, 5]


def test_failures_leave_the_older_file(tmp_path):
    path = tmp_path / "kept.json"
    write_json(ROWS, KEPT, path)
    before = path.read_bytes()
    for rows, said in (
        ([*ROWS[:5], {"x": float("nan")}], "row 5 cannot be written"),
        (ROWS[:3], "rows 0 to 5, but there are 3"),
    ):
        with pytest.raises(StoreError, match=said):
            write_json(rows, KEPT, path)
    with pytest.raises(StoreError, match="row 5 cannot be written"):
        write_json([*ROWS[:5], {"x": object()}], KEPT, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]
