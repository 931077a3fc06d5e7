"""Rows of text through the same adapters as images."""

import gzip
import json
import lzma
import pickle

import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from torch.utils.data import ConcatDataset, Subset
from torch.utils.data import Dataset as TorchDataset

from dq_lightning.core.config import FeatureConfig, QuantizeConfig, TextConfig
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.features.readable import find_unreadable
from dq_lightning.pipeline.plan import make_plan
from dq_lightning.pipeline.wanted import Wanted
from dq_lightning.sources.adapt import as_source, grouping_id
from dq_lightning.sources.base import Source
from dq_lightning.sources.jsonl import is_rows_file, read_rows

ROWS = [
    {"id": 7, "instruction": "Add.", "input": "2 and 3", "output": "5", "task": "sum", "tags": ["a", "b"]},
    {"id": 8, "instruction": "Grüße auf Deutsch.", "input": "", "output": "Guten Tag", "task": "talk", "tags": []},
    {"id": 9, "instruction": "翻译", "input": "hello", "output": "你好 👋", "task": "talk", "tags": ["c"]},
    {"id": 9, "instruction": "翻译", "input": "hello", "output": "你好 👋", "task": "talk", "tags": ["c"]},
    {"id": 10, "instruction": "Repeat. " * 5000, "input": "", "output": "no", "task": "sum", "tags": []},
]
TEXTS = [
    "Add.\n2 and 3\n5",
    "Grüße auf Deutsch.\nGuten Tag",
    "翻译\nhello\n你好 👋",
    "翻译\nhello\n你好 👋",
    "Repeat. " * 5000 + "\nno",
]


@pytest.fixture
def json_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


class RowDataset(TorchDataset):
    def __init__(self, rows):
        self.items = rows

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def sources(json_file):
    hub = load_dataset("json", data_files=str(json_file))
    return {
        "list": as_source(list(ROWS)),
        "tuple": as_source(tuple(ROWS)),
        "file": as_source(json_file),
        "name": as_source(str(json_file)),
        "hub": as_source(hub["train"]),
        "splits": as_source(hub),
        "map": as_source(RowDataset(ROWS), text=TextConfig(template="alpaca")),
        "subset": as_source(Subset(hub["train"], [0, 1, 2, 3, 4])),
        "concat": as_source(ConcatDataset([ROWS[:2], Subset(ROWS, [2, 3, 4])])),
    }


KINDS = ["list", "tuple", "file", "name", "hub", "splits", "map", "subset", "concat"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_dataset_gives_rows_and_texts(kind, json_file, memory):
    source = sources(json_file)[kind]
    assert isinstance(source, Source)
    assert source.modality == "text"
    assert [source.plain(i) for i in range(len(source))] == ROWS
    assert [list(source.plain(i)) for i in range(len(source))] == [list(row) for row in ROWS]
    assert [source.texts([i])[0] for i in range(len(source))] == TEXTS
    assert source.texts([4, 0, 2]) == [TEXTS[4], TEXTS[0], TEXTS[2]]
    assert source.texts(range(1, 4)) == TEXTS[1:4]
    assert source.labels() is None
    assert source.encoded(0) is None
    assert grouping_id(source) is None
    source.check_repeatable()
    kept = source.subset(torch.tensor([1, 3]))
    assert [kept[0], kept[1]] == [ROWS[1], ROWS[3]]
    finisher = source.finisher(torch.tensor([1, 3]))
    assert finisher(1, source.plain(3)) == source.delivered(3) == ROWS[3]
    assert pickle.loads(pickle.dumps(source)).texts([0])[0] == TEXTS[0]
    assert source.digest(memory) == source.quick_digest(memory)
    with pytest.raises(SourceError, match="no image"):
        source.image(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["instruction", "task", "id"])
def test_identity_follows_every_field_of_every_row(kind, field, tmp_path, fresh_memory, monkeypatch):
    digests = set()
    for name in ("a", "b", "c"):
        path = tmp_path / name / "rows.json"
        path.parent.mkdir()
        changed = [dict(row) for row in ROWS]
        if name == "c":
            changed[3][field] = "other" if field != "id" else 11
        path.write_text(json.dumps(changed))
        monkeypatch.setitem(globals(), "ROWS", changed)
        digests.add((name == "c", sources(path)[kind].digest(fresh_memory())))
    assert len(digests) == 2
    assert len({digest for _, digest in digests}) == 2


def test_order_of_rows_and_of_fields_is_identity(memory):
    digest = as_source(ROWS).digest(memory)
    assert as_source(ROWS[::-1]).digest(memory) != digest
    assert as_source([dict(reversed(row.items())) for row in ROWS]).digest(memory) != digest
    assert as_source([dict(row) for row in ROWS]).digest(memory) == digest


@pytest.mark.parametrize("kind", ["list", "file", "hub", "map", "subset", "concat"])
def test_a_column_groups_the_rows(kind, json_file):
    source = as_source(sources(json_file)["hub"].plain_dataset if kind == "hub" else _given(kind, json_file), **_text(kind),
                       labels="task")  # fmt: skip
    labels = source.labels()
    assert labels.names == ("sum", "talk")
    assert labels.values.tolist() == [0, 1, 1, 1, 0]
    assert grouping_id(source) == "column:task"
    numbered = as_source(_given(kind, json_file), **_text(kind), labels=[0, 1, 2, 0, 1])
    assert numbered.labels().values.tolist() == [0, 1, 2, 0, 1]


def _text(kind):
    return {"text": TextConfig(template="alpaca")} if kind == "map" else {}


def _given(kind, json_file):
    return {
        "list": ROWS,
        "file": json_file,
        "hub": Dataset.from_json(str(json_file)),
        "map": RowDataset(ROWS),
        "subset": Subset(ROWS, range(5)),
        "concat": ConcatDataset([ROWS[:3], ROWS[3:]]),
    }[kind]


@pytest.mark.parametrize("kind", ["list", "hub", "map"])
def test_a_column_of_labels_groups_and_a_missing_one_is_an_error(kind, json_file):
    with pytest.raises(SourceError, match=r"'topic'.*'instruction'"):
        as_source(_given(kind, json_file), **_text(kind), labels="topic").labels()
    labels = as_source(_given(kind, json_file), **_text(kind), labels="tags").labels()
    assert labels.names == ("a", "b", "c")
    assert labels.members.int().tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_what_is_embedded_is_part_of_the_identity_of_the_text():
    whole, answers = as_source(ROWS), as_source(ROWS, text=TextConfig(embed="response"))
    assert answers.texts([0, 2]) == ["5", "你好 👋"]
    assert whole.text_identity() != answers.text_identity()
    again = as_source(whole, text=TextConfig(embed="instruction"))
    assert again.texts([0])[0] == "Add.\n2 and 3"
    assert whole.texts([0])[0] == TEXTS[0]
    assert as_source(Subset(ROWS, [2]), text=TextConfig(embed="response")).texts([0])[0] == "你好 👋"


def test_hugging_face_conversations_and_plain_text():
    turns = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]] * 3
    chat = as_source(Dataset.from_dict({"messages": turns, "source": ["a", "b", "a"]}))
    assert chat.texts([0, 2]) == ["hi\nhello"] * 2
    plain = as_source(Dataset.from_dict({"text": ["eins", "zwei"], "label": [0, 1]}))
    assert (plain.modality, plain.texts([1]), plain.labels()) == ("text", ["zwei"], None)


def test_datasets_with_images_stay_images():
    pixels = Image.new("RGB", (4, 4))
    features = {"image": [pixels, pixels], "text": ["a cat", "a dog"]}
    assert as_source(Dataset.from_dict(features)).modality == "image"
    assert as_source([{"image": pixels, "text": "a cat"}]).modality == "image"
    with pytest.raises(SourceError, match="Image type"):
        as_source(Dataset.from_dict({"image": [b"\x00"], "text": ["a"]}))
    with pytest.raises(SourceError, match="images and text"):
        as_source(ConcatDataset([ROWS, [(pixels, 0)]]))


def test_columns_that_fit_no_template_are_told_when_text_is_needed(memory):
    source = as_source([{"review": "a", "reply": "b"}])
    assert source.digest(memory)  # ready-made embeddings need no text
    with pytest.raises(SourceError, match="'review', 'reply'"):
        source.texts([0])[0]
    named = as_source(source, text=TextConfig(columns="review"))
    assert named.texts([0]) == ["a"]
    with pytest.raises(SourceError, match="'review', 'reply'"):
        make_plan(
            [{"review": "a", "reply": "b"}] * 3,
            Wanted(QuantizeConfig(features=FeatureConfig(encoder="some/model"))),
        )


PAIRS = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "label": i % 2, "idx": i} for i in range(4)]


@pytest.mark.parametrize("kind", [list, Dataset.from_list, RowDataset])
def test_pairs_of_sentences_and_columns_by_name(kind, memory):
    text = TextConfig(columns=("sentence1", "sentence2"))
    named = as_source(kind(PAIRS), text=text, labels="label")
    assert named.texts([1, 3]) == ["a1\nb1", "a3\nb3"]
    assert named.labels().values.tolist() == [0, 1, 0, 1]
    one = as_source(kind(PAIRS), text=TextConfig(columns="sentence2"))
    assert one.texts([2])[0] == "b2"
    assert one.text_identity() != named.text_identity()
    assert TextConfig.from_dict(TextConfig(columns="sentence2").to_dict()) == TextConfig(columns=("sentence2",))
    with pytest.raises(SourceError, match="names 'sentences', but the columns are 'sentence1'"):
        as_source(kind(PAIRS), text=TextConfig(columns="sentences")).template()
    if kind is not RowDataset:
        assert as_source(kind(PAIRS)).texts([1]) == ["a1\nb1"]
    else:
        with pytest.raises(SourceError, match=r"rows of text.*TextConfig\(columns="):
            as_source(kind(PAIRS)).image(0)


def test_the_first_row_and_the_first_part_decide_for_no_other(memory):
    bare = {"instruction": "Add.", "output": "5"}
    for given in ([bare, ROWS[0]], ConcatDataset([[bare], [ROWS[0]]]), RowDataset([bare, ROWS[0]])):
        source = as_source(given, text=TextConfig(template="alpaca"))
        assert source.texts([0, 1]) == ["Add.\n5", TEXTS[0]]


def test_plain_text_has_no_instruction_to_embed():
    with pytest.raises(ConfigError, match="no instruction"):
        as_source([{"text": "a"}], text=TextConfig(embed="instruction")).texts([0])


@pytest.mark.parametrize("cell", [None, 3, ["a"]])
def test_a_cell_that_is_no_text_names_row_and_column(cell, json_file):
    rows = [*ROWS[:2], ROWS[2] | {"output": cell}]
    with pytest.raises(SourceError, match="row 2, column 'output'"):
        as_source(rows).texts(range(3))


def test_one_row_and_no_row():
    assert as_source(ROWS[:1]).texts([0]) == TEXTS[:1]
    for empty in ([], Dataset.from_dict({"text": []})):
        with pytest.raises(SourceError, match="empty"):
            as_source(empty)


def test_rows_of_different_kinds_and_options_that_do_not_fit():
    with pytest.raises(SourceError, match="row 1 is no dict"):
        as_source([ROWS[0], "text"])
    with pytest.raises(SourceError, match="image_column"):
        as_source(ROWS, target_transform=str)
    with pytest.raises(ConfigError, match="transform="):
        as_source(as_source(ROWS), transform=str)


def test_a_transform_sees_the_whole_row():
    source = as_source(ROWS, transform=lambda row: row["output"])
    assert source.subset(torch.tensor([0, 1]))[1] == "Guten Tag"
    assert source.texts([1])[0] == TEXTS[1]
    assert source.finisher(torch.tensor([0]))(0, source.plain(0)) == "5"


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.xz", "r.jsonl.gz", "R.JSONL.XZ", "lines.json"])
def test_files_of_rows(tmp_path, name):
    path = tmp_path / name
    lines = ".jsonl" in name.lower() or name.startswith("lines")
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n" if lines else json.dumps(ROWS)
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("\ufeff" + text)
    assert is_rows_file(str(path))
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1}', "valid JSON"),
        ("a.json", b"[1, 2]", "row 0"),
        ("a.jsonl", b'{"a": "b"}\n{"a": ', "line 2"),
        ("a.jsonl", b'{"a": "\xff"}', "UnicodeDecodeError"),
        ("a.json.xz", b"nothing", "LZMAError"),
        ("a.json.gz", gzip.compress(b"[" * 99999)[:-9], "EOFError"),
        ("a.jsonl", b"\n", "empty"),
        ("a.json", b"[]", "empty"),
    ],
)
def test_damaged_files_say_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        as_source(tmp_path / name)


@pytest.mark.parametrize("name", ["list.jsonl", "list.json", "lines.json", "lines.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_what_a_file_holds_counts_not_its_name(tmp_path, name, encoding):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    text = lines if name.startswith("lines") else json.dumps(ROWS, ensure_ascii=False, indent=1)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_rows(tmp_path / name) == ROWS


def test_rows_inside_of_an_object_are_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=1))
    with pytest.raises(SourceError, match="one JSON dict, not a list of rows: save its list 'data'"):
        read_rows(tmp_path / "a.json")


def test_half_a_character_stops_nothing_but_the_reading_of_its_text(tmp_path, memory):
    halved = [*ROWS[:2], ROWS[2] | {"output": "\ud83d", "task": "\udc00"}]
    (tmp_path / "a.json").write_text(json.dumps(halved))
    source = as_source(tmp_path / "a.json", labels="task", on_error="skip")
    assert source.plain(2) == halved[2]
    assert source.digest(memory) == as_source(halved).digest(memory)
    assert source.labels().num_classes == 3
    with pytest.raises(SourceError, match=r"row 2, column 'output'.*half of a character"):
        source.texts(range(3))
    assert find_unreadable(source, progress=False).tolist() == [2]


def test_paths_that_are_no_file_of_rows(tmp_path):
    assert not is_rows_file(tmp_path)
    assert not is_rows_file("store.xz")
    with pytest.raises(SourceError, match="not named"):
        as_source(tmp_path)
    with pytest.raises(SourceError, match="FileNotFoundError"):
        as_source(tmp_path / "no.json")


def test_the_real_rows(shared_dir, tmp_path, memory):
    path = shared_dir / "data" / "alpaca" / "alpaca_data.json.xz"
    source = as_source(path)
    assert len(source) == 52002
    row = source.plain(51760)
    assert list(row) == ["instruction", "input", "output"]
    assert all(part in source.texts([51760])[0] for part in row.values())
    rows = read_rows(path)[::10]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    assert as_source(tmp_path / "rows.json").digest(memory) == as_source(rows).digest(memory)
