"""Writing kept images as files: a folder of class folders, tar shards, Parquet, or litdata chunks."""

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import StoreError
from dq_lightning.exports.rows import check_free, features_of, whole, write_index
from dq_lightning.exports.samples import KeptImage, KeptImages

METADATA = "metadata.csv"
INDEX = "index.npy"
SHARD_BYTES = 1 << 30
ROW_GROUP = 256
LITDATA_CHUNK_BYTES = 64 << 20
UNLABELED = "unlabeled"


def write_image_folder(images: KeptImages, folder: str | Path) -> Path:
    """Write a folder that torchvision's `ImageFolder` and Hugging Face's `imagefolder` read, and return it.

    There is one folder for each class. Files are named by their position in the source, with leading zeros, so that a
    reader that sorts names sees the order of the source inside a class; the class folders sort in the order of the
    labels. Beside them, `metadata.csv` lists position, bin and id of every file, and `index.npy` (int64 [M]) holds the
    position of item i of `ImageFolder`.

    Args:
        images: images to write.
        folder: folder that does not exist yet, is empty, or was written by this function and is then replaced.

    Raises:
        StoreError: the folder holds something else, an image has no class, or the disk cannot be written.
    """
    target = Path(folder)
    check_free(target, METADATA)
    names = folder_names(images.class_names)

    def write(place: Path) -> None:
        place.mkdir()
        for name in names:
            (place / name).mkdir()
        rows = []
        for image in images:
            label = 0 if image.label is None else image.label
            if not 0 <= label < len(names):
                raise StoreError(
                    f"sample {image.position} has no class ({label}), so it fits into no class folder: choose another format"
                )
            file_name = f"{image.position:09d}{image.suffix}"
            (place / names[label] / file_name).write_bytes(image.data)
            class_name = "" if images.class_names is None or image.label is None else images.class_names[label]
            facts = ("" if image.label is None else label, class_name, image.position, image.bin, image.name)
            rows.append((names[label], file_name, facts))
        # This is the order of `ImageFolder`.
        rows.sort(key=lambda row: row[:2])
        with (place / METADATA).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["file_name", "label", "class_name", "index", "bin", "id"])
            table.writerows((f"{name}/{file_name}", *facts) for name, file_name, facts in rows)
        write_index(torch.tensor([facts[2] for _, _, facts in rows], dtype=torch.int64), place / INDEX)
        if empty := [name for name in names if not any((place / name).iterdir())]:
            get_logger().warning(
                f"no image of the classes {', '.join(empty[:5])}{' and others' if empty[5:] else ''} was kept, so their "
                "folders are empty: open the folder with torchvision's ImageFolder(..., allow_empty=True)"
            )

    return whole(target, write)


def folder_names(class_names: tuple[str, ...] | None) -> list[str]:
    """Return the names of the class folders: the class names where they sort in label order, else zero-padded numbers.

    Example:
        >>> folder_names(("cat", "dog"))
        ['cat', 'dog']
        >>> folder_names(("dog", "cat"))
        ['0', '1']
    """
    names = list(class_names or (UNLABELED,))
    plain = all(name and not name.startswith(".") and not set(name) & set('/\\:\0<>|?*"') for name in names)
    if plain and sorted(set(names)) == names:
        return names
    width = len(str(len(names) - 1))
    return [f"{number:0{width}d}" for number in range(len(names))]


def write_webdataset(images: KeptImages, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write tar shards `NAME-000000.tar` in the WebDataset layout: image, `.cls` and `.json` of each sample.

    Equal sets give equal bytes, because the times and owners in the tar headers are left empty.

    Args:
        images: images to write.
        folder: as in `write_image_folder`; a folder that holds `shards.json` is replaced. It is returned.
        shard_bytes: size in bytes after which a new shard begins; the sample that exceeds it is the last of its shard.

    Raises:
        StoreError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    check_free(target, "shards.json")

    def write(place: Path) -> None:
        place.mkdir()
        counts: dict[str, int] = {}
        shard: tarfile.TarFile | None = None
        for image in images:
            if shard is None or shard.offset > shard_bytes:
                if shard is not None:
                    shard.close()
                name = f"{images.name}-{len(counts):06d}.tar"
                shard = tarfile.open(place / name, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
                counts[name] = 0
            for suffix, data in _members(image):
                facts = tarfile.TarInfo(f"{image.position:09d}{suffix}")
                facts.size = len(data)
                shard.addfile(facts, io.BytesIO(data))
            counts[name] += 1
        if shard is not None:
            shard.close()
        described = {"shards": counts, "class_names": images.class_names}
        (place / "shards.json").write_text(json.dumps(described, indent=1), encoding="utf-8")

    return whole(target, write)


def _members(image: KeptImage) -> Iterator[tuple[str, bytes]]:
    yield image.suffix, image.data
    if image.label is not None:
        yield ".cls", str(image.label).encode()
    yield ".json", json.dumps({"index": image.position, "bin": image.bin, "id": image.name}).encode()


def write_parquet(images: KeptImages, path: str | Path) -> Path:
    """Write one Parquet file that contains the image files, for `Dataset.from_parquet` of Hugging Face datasets.

    The columns are `image`, `label` (a `ClassLabel`, -1 for an image without a class; missing without classes), `index`,
    `bin` and `id`. Images are written in groups of 256 rows, so that memory does not grow with their number. The path is
    returned.

    Raises:
        StoreError: the file cannot be written.
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    schema = features_of(images.class_names)

    def write(place: Path) -> None:
        with pq.ParquetWriter(place, schema, write_page_checksum=True) as file:
            rows = map(_row, images)
            while some := list(islice(rows, ROW_GROUP)):
                file.write_table(pa.Table.from_pylist(some, schema))

    return whole(Path(path), write)


def _row(image: KeptImage) -> dict[str, Any]:
    row = {
        "image": {"bytes": image.data, "path": f"{image.position:09d}{image.suffix}"},
        "index": image.position,
        "bin": image.bin,
        "id": image.name,
    }
    return row if image.label is None else row | {"label": image.label}


def write_litdata(images: KeptImages, folder: str | Path) -> Path:
    """Write chunks for litdata's `StreamingDataset`: dicts of `image` (file bytes), `label`, `index`, `bin` and `id`.

    The folder is as in `write_image_folder`, and is returned; one that holds litdata's `index.json` is replaced.

    Raises:
        StoreError: litdata is not installed, or the folder holds something else or cannot be written.
    """
    try:
        from litdata.streaming.writer import BinaryWriter
    except ImportError as error:
        raise StoreError('this export needs litdata: pip install "dq-lightning[litdata]"') from error
    target = Path(folder)
    check_free(target, "index.json")

    def write(place: Path) -> None:
        place.mkdir()
        writer = BinaryWriter(cache_dir=str(place), chunk_bytes=LITDATA_CHUNK_BYTES)
        for number, image in enumerate(images):
            writer[number] = _row(image) | {"image": image.data}
        writer.done()
        writer.merge(1)

    return whole(target, write)


def write_ids(names: Sequence[str], path: str | Path) -> Path:
    """Write the names of the kept samples, one on each line, in the order of the selection, and return the path."""
    text = "".join(f"{name}\n" for name in names)
    return whole(Path(path), lambda place: place.write_text(text, encoding="utf-8", errors="surrogateescape"))
