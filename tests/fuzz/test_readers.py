"""A short turn of what fuzz_readers.py does for hours: any bytes give a value or an error of the package."""

import contextlib
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dq_lightning.cache import files, manifest
from dq_lightning.core.errors import DQError
from dq_lightning.packed import values
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.pixels import header_problem
from tests.full_count import examples
from tests.inputs.broken import picture

often = settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@often
@given(field=st.sampled_from(["format", "version", "station", "key", "parts", "files"]), value=json_values)
def test_manifests(tmp_path_factory, field, value):
    folder = tmp_path_factory.mktemp("entry")
    (folder / "data").write_bytes(b"data")
    manifest.write_manifest(folder, station="s", key="k", parts={})
    listed = json.loads((folder / "manifest.json").read_text())
    del listed["digest"]
    (folder / "manifest.json").write_bytes(files.seal(listed | {field: value}))
    with contextlib.suppress(DQError):
        assert manifest.check_entry(folder, "hash", station="s", key="k")["files"].keys() <= {"data"}


@often
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["instruction", "input", "output", "text"]), json_values) | json_values
    ),
    lines=st.booleans(),
    cut=st.integers(0, 8),
)
def test_rows(tmp_path_factory, rows, lines, cut):
    place = tmp_path_factory.mktemp("rows") / ("rows.jsonl" if lines else "rows.json")
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    place.write_text(text[: len(text) - cut])
    with contextlib.suppress(DQError):
        source = as_source(place)
        assert len(source.texts(range(len(source)))) == len(source) <= len(rows)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@often
@given(data=st.data())
def test_images(kind, data):
    file = io.BytesIO()
    picture(0).save(file, kind)
    changed = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    encoded = bytes(changed[: data.draw(st.integers(1, len(changed)))])
    header_problem(encoded)
    text = json.dumps(["p", ["e", "hf"], len(encoded)]).encode()
    with contextlib.suppress(DQError):
        assert values.decode_value(len(text).to_bytes(4, "little") + text + encoded).size[0] > 0
