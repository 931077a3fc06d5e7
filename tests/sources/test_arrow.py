"""The digest of Arrow columns: of content alone."""

import hashlib
import io
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.sources.arrow import digest_tables
from tests.full_count import examples

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TYPES = {
    "int": (pa.int32(), st.integers(-5, 5)),
    "float": (pa.float64(), st.floats(allow_nan=False, width=16)),
    "bool": (pa.bool_(), st.booleans()),
    "text": (pa.string(), st.text(max_size=3)),
    "large": (pa.large_binary(), st.binary(max_size=3)),
    "when": (pa.timestamp("ms"), st.datetimes().map(lambda d: d.replace(microsecond=0))),
    "list": (pa.list_(pa.string()), st.lists(st.none() | st.text(max_size=2), max_size=3)),
    "deep": (pa.list_(pa.list_(pa.int8())), st.lists(st.none() | st.lists(st.integers(0, 3), max_size=2), max_size=2)),
    "fixed": (pa.list_(pa.int16(), 2), st.lists(st.integers(0, 3), min_size=2, max_size=2)),
    "struct": (
        pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))]),
        st.fixed_dictionaries(
            {"a": st.none() | st.integers(0, 3), "b": st.none() | st.lists(st.text(max_size=2), max_size=2)}
        ),
    ),
    "image": (IMAGE, st.fixed_dictionaries({"bytes": st.binary(max_size=3), "path": st.none()})),
    "images": (
        pa.list_(IMAGE),
        st.lists(st.fixed_dictionaries({"bytes": st.binary(max_size=3), "path": st.none()}), max_size=2),
    ),
}


class Files:
    """Files that exist only here."""

    def __init__(self, **content):
        self.content = content

    def files(self, paths, skips=False):
        return [hashlib.sha256(self.content[path]).hexdigest() for path in paths]


def digest(*arrays, memory=None):
    pieces = [pa.table({"c": array}) for array in arrays]
    return digest_tables(pieces, ["c"], memory or Files())[0]


@st.composite
def columns(draw):
    kind, values = TYPES[draw(st.sampled_from(sorted(TYPES)))]
    return kind, draw(st.lists(st.none() | values, max_size=12))


@st.composite
def pairs(draw):
    """Two columns of one type, of which the second often differs in one place only."""
    kind, values = TYPES[draw(st.sampled_from(sorted(TYPES)))]
    first = draw(st.lists(st.none() | values, max_size=6))
    second = list(first)
    if second and draw(st.booleans()):
        second[draw(st.integers(0, len(second) - 1))] = draw(st.none() | values)
    elif draw(st.booleans()):
        second = draw(st.lists(st.none() | values, max_size=6))
    return kind, first, second


@given(columns(), st.data())
def test_chunks_slices_offsets_and_saving_do_not_show(column, data):
    kind, values = column
    whole = pa.array(values, kind)
    wanted = digest(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=3)))
    edges = [0, *cuts, len(values)]
    slices = [whole.slice(a, b - a) for a, b in itertools.pairwise(edges)]
    assert digest(*slices) == wanted
    assert digest(pa.chunked_array(slices, kind)) == wanted
    around = data.draw(st.integers(0, 5))
    padded = pa.concat_arrays([whole[: min(around, len(values))], whole, whole[:2]])
    assert digest(padded.slice(min(around, len(values)), len(values))) == wanted
    stream = io.BytesIO()
    table = pa.table({"c": padded.slice(min(around, len(values)), len(values))})
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    assert digest(pa.ipc.open_stream(stream.getvalue()).read_all().column("c")) == wanted
    if values:
        picked = pa.concat_arrays([whole, whole]).take(pa.array(range(len(values), 2 * len(values))))
        assert digest(picked) == wanted


@settings(max_examples=examples(300))
@given(pairs())
def test_equal_digests_exactly_for_equal_values(pair):
    kind, first, second = pair
    a, b = pa.array(first, kind), pa.array(second, kind)
    same = repr(a.to_pylist()) == repr(b.to_pylist())
    assert (digest(a) == digest(b)) == same


def test_what_lies_under_nulls_does_not_count():
    data = np.array([1, 2, 3], np.int32)
    made = [
        pa.Array.from_buffers(pa.int32(), 3, [pa.py_buffer(bytes([0b101])), pa.py_buffer(values)])
        for values in (data, data * np.array([1, 9, 1], np.int32))
    ]
    assert digest(made[0]) == digest(made[1]) == digest(pa.array([1, None, 3], pa.int32()))
    texts = [
        pa.Array.from_buffers(
            pa.string(),
            3,
            [
                pa.py_buffer(bytes([0b101])),
                pa.py_buffer(np.array([0, 1, ends, ends + 1], np.int32)),
                pa.py_buffer(b"axxb"[:ends] + b"b"),
            ],
        )
        for ends in (1, 3)
    ]
    assert [text.to_pylist() for text in texts] == [["a", None, "b"]] * 2
    assert digest(texts[0]) == digest(texts[1])


def test_images_count_by_their_bytes_or_by_the_file_behind_the_path():
    def column(*rows):
        return pa.array([dict(zip(("bytes", "path"), row, strict=True)) if row else None for row in rows], IMAGE)

    memory = Files(a=b"1", b=b"2", c=b"1")
    assert digest(column((b"1", "x"), None)) == digest(column((b"1", "y"), None)) != digest(column((b"2", "x"), None))
    assert digest(column((None, "a")), memory=memory) == digest(column((None, "c")), memory=memory)
    assert digest(column((None, "a")), memory=memory) != digest(column((None, "b")), memory=memory)
    assert digest(column((None, None)), memory=memory) != digest(column((None, "a")), memory=memory)
    _, outside = digest_tables([pa.table({"c": column((b"1", "a"), (None, "b"))})], ["c"], memory)
    assert outside
    assert not digest_tables([pa.table({"c": column((b"1", "a"))})], ["c"], memory)[1]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.map_(pa.string(), pa.int8()), pa.decimal128(9, 2), pa.date32()])
def test_rare_types_are_read_too(kind):
    values = {
        "string_view": ["a", None, "b"],
        "map": [[("a", 1)], None, [("b", 2)]],
        "decimal": [1, None, 2],
        "date": [1, None, 2],
    }
    rows = next(rows for name, rows in values.items() if str(kind).startswith(name))
    whole = pa.array(rows, kind)
    assert digest(whole) == digest(whole[:1], whole[1:])
    assert digest(whole) != digest(pa.array([*rows[:2], rows[0]], kind))


def test_columns_are_named_and_their_order_does_not_count():
    a, b = pa.array([1, 2]), pa.array([3, 4])
    one = digest_tables([pa.table({"a": a, "b": b})], ["a", "b"], Files())
    assert one == digest_tables([pa.table({"b": b, "a": a})], ["b", "a"], Files())
    assert one != digest_tables([pa.table({"a": b, "b": a})], ["a", "b"], Files())
