"""Coverage-guided fuzzing of what reads files of others: the store reader, the manifest, rows of text, images.

Needs the package atheris. Each input is a file of a store, a manifest, a file of rows or an image; the reader must give a value
or raise an error of the package, in bounded memory and time. One target runs until it is stopped or finds something:

    python tests/fuzz/fuzz_readers.py store CORPUS -max_total_time=600 -rss_limit_mb=3072 -timeout=20

with `store`, `manifest`, `rows` or `image`; CORPUS is a folder, filled with valid files when it is empty.
"""

import contextlib
import io
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["dq_lightning", "PIL", "json"]):
    from PIL import Image

    from dq_lightning.cache import files, manifest
    from dq_lightning.packed import values
    from dq_lightning.packed.reader import PackedDataset
    from dq_lightning.sources.adapt import as_source
    from dq_lightning.sources.pixels import header_problem, to_rgb
    from dq_lightning.sources.prompts import choose_template

import numpy as np
import torch

from dq_lightning.core.errors import DQError
from dq_lightning.packed.writer import write_packed

FILES = ("store.json", "index.npy", "ids.bin", "id_offsets.npy", "value_offsets.npy", "values.bin", "checksums.npy")
# more pixels than this are Pillow's own error; far below it, so that a bomb of the allowed size stays small
Image.MAX_IMAGE_PIXELS = 1 << 22


def write_store(folder: Path) -> None:
    """A store with a column of every kind."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), dtype=np.uint8)
    items = [((Image.fromarray(pixels[i]), i, f"text {i}", {"box": torch.ones(2) * i}), None) for i in range(4)]
    items[2] = ((Image.fromarray(pixels[2]), "other", None, {"box": [1, 2.5, b"x"]}), None)
    write_packed(
        folder, items, ids=list("abcd"), index=torch.arange(4), bins=torch.zeros(4, dtype=torch.int16), attributes={}
    )


def changed(tree: Any, choose: atheris.FuzzedDataProvider) -> Any:
    """A JSON value with a few of its parts replaced, as the input says."""
    for _ in range(choose.ConsumeIntInRange(1, 4)):
        spot: Any = [tree]
        key: Any = 0
        while isinstance(spot[key], dict | list) and spot[key] and choose.ConsumeBool():
            spot = spot[key]
            key = choose.PickValueInList(list(spot) if isinstance(spot, dict) else list(range(len(spot))))
        text = choose.ConsumeUnicode(8)
        number = choose.ConsumeInt(8)
        new = choose.PickValueInList(
            [None, True, number, number / 7, text, [], {}, [number], {text: spot[key]}, [spot[key]] * 2]
        )
        spot[key] = new
    return tree


class Targets:
    """The four readers, each over the bytes of one input."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        write_store(self.store)
        self.whole = {name: (self.store / name).read_bytes() for name in FILES}
        self.entry = folder / "entry"
        self.entry.mkdir()
        (self.entry / "data.bin").write_bytes(b"data")
        manifest.write_manifest(self.entry, station="s", key="k", parts={})
        self.manifest = (self.entry / "manifest.json").read_bytes()

    def sealed(self, data: bytes) -> bytes:
        """JSON as an attacker would seal it; anything else as it is."""
        try:
            parsed = json.loads(data)
            parsed.pop("digest", None)
            return files.seal(parsed)
        except Exception:
            return data

    def replaced(self, whole: bytes, data: bytes) -> bytes:
        """A description with some of its values replaced, sealed again."""
        parsed = json.loads(whole)
        del parsed["digest"]
        return self.sealed(json.dumps(changed(parsed, atheris.FuzzedDataProvider(data))).encode())

    def on_store(self, data: bytes) -> None:
        """Read a store, one of whose files is the input."""
        if not data:
            return
        name, content = FILES[data[0] % len(FILES)], data[1:]
        if name == "store.json":
            content = self.sealed(content) if data[0] < 128 else self.replaced(self.whole[name], content)
        (self.store / name).write_bytes(content)
        try:
            read = PackedDataset(self.store, verify="off")
            list(read.ids[: 1 << 10])
            for position in range(min(len(read), 8)):
                read[position]
        finally:
            (self.store / name).write_bytes(self.whole[name])

    def on_manifest(self, data: bytes) -> None:
        """Verify an entry whose manifest is the input."""
        content = self.replaced(self.manifest, data[1:]) if data[:1] > b"\x7f" else self.sealed(data)
        (self.entry / "manifest.json").write_bytes(content)
        manifest.check_entry(self.entry, "hash", station="s", key="k")

    def on_rows(self, data: bytes) -> None:
        """Read a file of rows and all their texts."""
        place = self.folder / ("rows.json" if data[:1] == b"[" else "rows.jsonl")
        place.write_bytes(data)
        source = as_source(place)
        choose_template(source.columns())
        source.texts(range(len(source)))

    def on_image(self, data: bytes) -> None:
        """An encoded image by both ways in: a folder's loader, and a value of a store."""
        header_problem(data)
        header = json.dumps(["p", ["e", "hf"], len(data)]).encode()
        values.decode_value(len(header).to_bytes(4, "little") + header + data)
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                rgb = to_rgb(image)
        except Exception:
            return  # a source names the sample and passes the reason on
        assert (rgb.mode, rgb.size) == ("RGB", image.size)

    def seeds(self, name: str) -> list[bytes]:
        """Valid inputs to begin with."""
        if name == "store":
            # from 128 on the rest of the input chooses what is replaced in store.json
            replacing = [bytes([133]) + bytes(range(7 * i, 7 * i + 40)) for i in range(8)]
            return replacing + [bytes([place]) + self.whole[file] for place, file in enumerate(FILES)]
        if name == "manifest":
            return [self.manifest, *(b"\xff" + bytes(range(7 * i, 7 * i + 40)) for i in range(8))]
        if name == "rows":
            row = {"instruction": "a", "input": "", "output": "b"}
            chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
            texts = [
                json.dumps([row, row]),
                json.dumps(row) + "\n" + json.dumps(row),
                json.dumps(chat),
                '{"text": "x"}',
            ]
            return [text.encode() for text in texts]
        found = []
        for mode in ("L", "RGB", "RGBA", "P", "1", "CMYK", "I;16", "LA", "F"):
            for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
                file = io.BytesIO()
                try:
                    Image.new(mode, (9, 7)).save(file, kind)
                except (OSError, KeyError, ValueError):
                    continue
                found.append(file.getvalue())
        return found


def main() -> None:
    """Run one target; see the module."""
    name, corpus = sys.argv[1], Path(sys.argv[2])
    folder = Path(tempfile.mkdtemp(prefix="dq_fuzz_"))
    targets = Targets(folder)
    read: Callable[[bytes], None] = getattr(targets, f"on_{name}")
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        for number, seed in enumerate(targets.seeds(name)):
            (corpus / f"seed{number}").write_bytes(seed)

    def once(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(DQError):
                read(data)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
