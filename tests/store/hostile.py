"""Opens what an attacker could put in place of a store, in a process of its own; prints the peak growth of its memory in MiB,
without and with one sample of forty images of the largest size.

Anything but an error of the package, or more than a few megabytes, fails the test that starts this.
"""

import contextlib
import io
import json
import resource
import shutil
import struct
import sys
import warnings
import zlib
from pathlib import Path

import torch
from PIL import Image

from dq_lightning.cache import files, manifest
from dq_lightning.cache.tensors import TENSORS_FILE, read_features, write_tensor_folder
from dq_lightning.core.errors import DQError
from dq_lightning.packed import values
from dq_lightning.packed.npy import npy_header
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.packed.writer import write_packed
from dq_lightning.sources.pixels import header_problem

SIDE = 1 << 16
HUGE = 1 << 60


def zeros(mebibytes: int) -> bytes:
    """So many of them, deflated without ever being held."""
    deflate, piece = zlib.compressobj(1), bytes(1 << 20)
    return b"".join(deflate.compress(piece) for _ in range(mebibytes)) + deflate.flush()


def png_bomb() -> bytes:
    """A header that claims 65,536 x 65,536 pixels, and rows of zeros that inflate a thousandfold."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zeros(256)) + chunk(b"IEND", b"")


def text_chunk_bomb() -> bytes:
    """A valid small PNG with a compressed text that inflates to 512 MiB."""
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "PNG")
    text = b"Comment\0\0" + zeros(512)
    extra = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    return file.getvalue()[:33] + extra + file.getvalue()[33:]


def with_size(kind: str, place: bytes, offset: int, size: bytes) -> bytes:
    """A small image whose header claims another size."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    data = bytearray(file.getvalue())
    at = data.index(place) + offset
    data[at : at + len(size)] = size
    return bytes(data)


def image_bombs() -> dict[str, bytes]:
    """Encoded images that claim far more than they hold."""
    return {
        "png": png_bomb(),
        "png text": text_chunk_bomb(),
        "jpeg": with_size("JPEG", b"\xff\xc0", 5, b"\xff\xff\xff\xff"),
        "webp": with_size("WEBP", b"\x9d\x01\x2a", 3, b"\xff\x3f\xff\x3f"),
        "gif": with_size("GIF", b"GIF8", 6, b"\xff\xff\xff\xff"),
        "bmp": with_size("BMP", b"BM", 18, struct.pack("<ii", 1 << 30, 1 << 30)),
        "tiff": with_size("TIFF", b"\x00\x01\x04\x00\x01\x00\x00\x00\x08", 5, struct.pack("<I", 1 << 30)),
    }


def value(node: object, buffers: bytes = b"") -> bytes:
    """The tagged encoding of a value."""
    text = json.dumps(node).encode()
    return struct.pack("<I", len(text)) + text + buffers


def write_store(folder: Path) -> Path:
    """A store of numbers and text."""
    items = [((i, f"text {i}"), None) for i in range(6)]
    write_packed(
        folder, items, ids=list("abcdef"), index=torch.arange(6), bins=torch.zeros(6, dtype=torch.int16), attributes={}
    )
    return folder


def replaced(folder: Path, name: str, data: bytes, **changes: object) -> None:
    """Put a file into a store as its author would: with its size and digest written down."""
    (folder / name).write_bytes(data)
    description = json.loads((folder / "store.json").read_text())
    del description["digest"]
    description["files"][name] = {"size": len(data), "sha256": files.file_digest(folder / name)}
    (folder / "store.json").write_bytes(files.seal(description | changes))


def stores(root: Path) -> dict[str, Path]:
    """Stores that lie, each sealed."""
    made = {
        name: write_store(root / name)
        for name in ("ids", "names", "object", "shape", "count", "deep", "values", "sparse")
    }
    replaced(made["ids"], "id_offsets.npy", npy_header("<i8", (7,)) + struct.pack("<7q", 0, HUGE, -HUGE, 1, 2, 3, 4))
    replaced(made["names"], "ids.bin", b"\x9fbcdef")
    replaced(made["object"], "index.npy", npy_header("|O", (6,)) + bytes(48))
    replaced(made["shape"], "index.npy", npy_header("<i8", (1 << 60,)) + bytes(48))
    replaced(made["count"], "ids.bin", b"abcdef", num_samples=(1 << 32) - 1)
    (made["deep"] / "store.json").write_bytes(b'{"a":' * 200_000 + b"1" + b"}" * 200_000)
    replaced(made["values"], "value_offsets.npy", npy_header("<i8", (7,)) + struct.pack("<7q", 0, HUGE, -5, 1, 2, 3, 4))
    with (made["sparse"] / "ids.bin").open("r+b") as file:
        file.truncate(1 << 40)
    return made


def manifests(root: Path) -> dict[str, Path]:
    """Entries whose manifest names something outside, or far too much."""
    made = {}
    names = {
        "absolute": "/etc/passwd",
        "above": "../x",
        "backslash": "..\\x",
        "drive": "C:x",
        "link": "link",
        "empty": "",
    }
    for case, name in names.items():
        folder = made[case] = root / f"manifest-{case}"
        folder.mkdir()
        (folder / "data").write_bytes(b"x")
        manifest.write_manifest(folder, station="s", key="k", parts={})
        values_of = json.loads((folder / "manifest.json").read_text())
        del values_of["digest"]
        values_of["files"][name] = {"size": 1, "sha256": values_of["files"]["data"]["sha256"]}
        (folder / "manifest.json").write_bytes(files.seal(values_of))
    (made["link"] / "link").symlink_to("/etc/passwd")
    return made


def tensor_folders(root: Path) -> dict[str, Path]:
    """Features with a shape, dtype or size that lies."""
    made = {}
    for case, facts in {
        "huge": {"shape": [HUGE, HUGE]},
        "huge and empty": {"shape": [0, 1 << 47, 1 << 47]},
        "negative": {"shape": [-1, 4]},
        "dtype": {"dtype": "object"},
        "another dtype": {"dtype": "I32"},
        "text": {"shape": "44"},
        "path": {"name": "../embedding"},
    }.items():
        folder = made[case] = root / f"tensors-{case}"
        write_tensor_folder(folder, {"embedding": torch.ones(4, 4)}, {})
        path = folder / TENSORS_FILE
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        sealed = json.loads(header["__metadata__"]["dq_lightning"])
        del sealed["digest"]
        name = facts.pop("name", "embedding")
        listed = header.pop("embedding") | facts
        sealed["tensors"] = {name: [listed["dtype"], listed["shape"], sealed["tensors"]["embedding"][2]]}
        header = {"__metadata__": {"dq_lightning": files.seal(sealed).decode()}, name: listed}
        path.write_bytes(with_header(json.dumps(header).encode()) + data[end:])
    return made


def with_header(header: bytes) -> bytes:
    """The beginning of a file of tensors."""
    return len(header).to_bytes(8, "little") + header


def largest_png() -> bytes:
    """A whole image of nearly the size that Pillow opens without being told to: half a gibibyte out of 200 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 13_000
    deflate, row = zlib.compressobj(1), bytes(1 + 3 * side)
    data = b"".join(deflate.compress(row) for _ in range(side)) + deflate.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def many_patched() -> tuple[object, bytes]:
    """Forty images of the largest allowed size, each of which keeps nothing."""
    side = 11_000
    node = ["q", [side, side, "RGB", "array", side, "raw"], 1, 0]
    return ["l", *[node] * 40], bytes(40)


def crowded(root: Path) -> dict[str, Path]:
    """Sealed JSON whose values take far more memory than its text."""
    made = {}
    for case in ("manifest.json", "store.json", TENSORS_FILE):
        folder = made[case] = root / f"crowded-{case}"
        folder.mkdir()
        count = 300_000 if case == TENSORS_FILE else 11 << 20
        text = b'{"a": [' + b"[]," * count + b"[]]}"
        if case == TENSORS_FILE:
            text = with_header(json.dumps({"__metadata__": {"dq_lightning": text.decode()}}).encode())
        (folder / case).write_bytes(text)
    return made


def opened(case: str, read: object) -> None:
    """Read; only an error of the package will do."""
    try:
        read()  # type: ignore[operator]
    except DQError:
        return
    raise AssertionError(f"{case} was accepted")


def read_all(path: Path) -> None:
    """Everything a store gives."""
    read = PackedDataset(path)
    list(read.ids)
    list(read)


def main() -> None:
    """See the module."""
    warnings.simplefilter("ignore")
    root = Path(sys.argv[1])
    bombs, lying, outside = image_bombs(), stores(root), manifests(root)
    tensors, crowds = tensor_folders(root), crowded(root)
    read_all(write_store(root / "good"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case, data in bombs.items():
        opened(case, lambda data=data: values.decode_value(value(["p", ["e", "hf"], len(data)], data)))
        header_problem(data)
    for case, node in {
        "raw": ["p", ["r", "RGB", SIDE, SIDE, None, None], 3],
        "array": ["a", "<f8", [1 << 40, 1 << 10], 8],
        "tensor": ["T", "float32", [1 << 40], 8],
        "bytes": ["y", HUGE],
        "negative": ["y", -HUGE],
    }.items():
        opened(case, lambda node=node: values.decode_value(value(node, b"12345678")))
    opened("lists", lambda: values.decode_value(struct.pack("<I", 60 << 20) + b"[" + b"[]," * (20 << 20)))
    node, buffers = many_patched()
    opened("patched", lambda: values.decode_value(value(node, buffers)))
    opened("nested", lambda: values.decode_value(struct.pack("<I", 400_000) + b"[" * 200_000 + b"]" * 200_000))
    for case, path in lying.items():
        opened(case, lambda path=path: read_all(path))
    for case, path in outside.items():
        opened(case, lambda path=path: manifest.check_entry(path, "hash", station="s", key="k"))
    for case, path in tensors.items():
        opened(case, lambda path=path: read_features(path))
    opened("crowded manifest", lambda: manifest.read_manifest(crowds["manifest.json"]))
    opened("crowded store", lambda: read_all(crowds["store.json"]))
    opened("crowded tensors", lambda: read_features(crowds[TENSORS_FILE]))
    with contextlib.suppress(OSError):
        shutil.rmtree(root)
    small = growth(before)
    data = largest_png()
    one = ["p", ["e", "hf"], len(data)]
    opened("forty large images", lambda: values.decode_value(value(["l", *[one] * 40], data * 40)))
    sys.stdout.write(f"{small} {growth(before)}")


def growth(before: int) -> int:
    """By how many MiB the peak of this process has grown."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10


if __name__ == "__main__":
    main()
