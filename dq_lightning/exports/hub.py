"""Writing kept images as a Hugging Face dataset, to the disk or to the hub."""

import tempfile
from pathlib import Path
from typing import Any

from dq_lightning.core.errors import StoreError
from dq_lightning.exports.images import write_parquet
from dq_lightning.exports.rows import check_free, whole
from dq_lightning.exports.samples import KeptImages


def write_image_dataset(images: KeptImages, folder: str | Path) -> Path:
    """Write a folder that `datasets.load_from_disk` opens; the bytes of the image files are inside.

    The folder, which is returned, does not exist yet, is empty, or holds such a dataset, which is replaced.

    Raises:
        StoreError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    check_free(target, "dataset_info.json")

    def write(place: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            _as_dataset(images, Path(scratch)).save_to_disk(str(place))

    return whole(target, write)


def push_images(images: KeptImages, repository: str, *, private: bool = True) -> None:
    """Upload images to a dataset repository on the Hugging Face hub, with the token that the hub library has stored.

    The repository is named as `OWNER/NAME`; one that this call creates is private unless `private` is False.

    Raises:
        StoreError: the hub refuses the upload or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as scratch:
        made = _as_dataset(images, Path(scratch))
        try:
            made.push_to_hub(repository, private=private, split="train")
        except Exception as error:
            raise StoreError(
                f"the repository {repository} could not be written ({type(error).__name__}: {error}): log in with "
                "`hf auth login`, or upload the file that `dq-lightning export SET parquet FILE` writes"
            ) from error


def _as_dataset(images: KeptImages, scratch: Path) -> Any:
    from datasets import Dataset

    file = write_parquet(images, scratch / "train.parquet")
    # The dataset gets a cache of its own, which is removed together with the scratch folder.
    return Dataset.from_parquet(str(file), cache_dir=str(scratch / "cache"))
