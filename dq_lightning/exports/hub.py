"""Kept images as a Hugging Face dataset: on the disk, or on the hub."""

import tempfile
from pathlib import Path
from typing import Any

from dq_lightning.core.errors import StoreError
from dq_lightning.exports.images import write_parquet
from dq_lightning.exports.rows import whole
from dq_lightning.exports.samples import KeptImages


def write_image_dataset(images: KeptImages, folder: str | Path) -> Path:
    """Write a folder that `datasets.load_from_disk` opens; the images' bytes are inside.

    Args:
        images: to write.
        folder: not there yet, or such a folder, which is replaced.

    Raises:
        StoreError: the folder holds something else.
    """
    target = Path(folder)
    if target.exists() and not (target / "dataset_info.json").is_file():
        raise StoreError(f"{target} exists and is no dataset of ours; pass another folder")

    def write(place: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            _as_dataset(images, Path(scratch)).save_to_disk(str(place))

    return whole(target, write)


def push_images(images: KeptImages, repository: str, *, private: bool = True, split: str = "train") -> None:
    """Upload to a repository of datasets on the Hugging Face hub; the token is the hub library's own.

    Args:
        images: to upload.
        repository: `OWNER/NAME`.
        private: of a repository that is made now.
        split: that they become.

    Raises:
        StoreError: the hub refuses or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = _as_dataset(images, Path(scratch))
        try:
            made.push_to_hub(repository, private=private, split=split)
        except Exception as error:
            raise StoreError(
                f"{repository} could not be written ({type(error).__name__}: {error}): log in with `hf auth login`, or "
                "upload what `dq-lightning export SET parquet FILE` writes"
            ) from error


def _as_dataset(images: KeptImages, scratch: Path) -> Any:
    from datasets import Dataset

    file = write_parquet(images, scratch / "train.parquet")
    # its own cache, which leaves with the scratch folder
    return Dataset.from_parquet(str(file), cache_dir=str(scratch / "cache"))
