"""Writing kept images as a Hugging Face dataset, to the disk or to the hub."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dq_lightning.core.errors import StoreError
from dq_lightning.exports.card import dataset_card
from dq_lightning.exports.images import write_parquet
from dq_lightning.exports.rows import check_free, whole
from dq_lightning.exports.samples import KeptImages

DATA = "data"
# Files of about this size are what the hub's library uploads by itself.
SHARD_BYTES = 500 << 20


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
            file = write_parquet(images, Path(scratch) / "train.parquet")
            _read(file, Path(scratch)).save_to_disk(str(place))

    return whole(target, write)


def push_images(
    images: KeptImages,
    repository: str,
    *,
    private: bool = True,
    facts: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    whole: Sequence[int] | None = None,
    license: str = "unknown",
) -> None:
    """Upload images with a dataset card to the Hugging Face hub, in one commit, with the token that its library has stored.

    The repository is named as `OWNER/NAME`; one that this call creates is private unless `private` is False. The card's
    arguments are those of `dataset_card`; `facts` default to the number of images.

    Raises:
        StoreError: the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_repository(
            images, Path(scratch) / "repository", repository, facts or {}, settings, whole=whole, license=license
        )
        try:
            hub = HfApi()
            hub.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
            hub.upload_folder(
                repo_id=repository,
                repo_type="dataset",
                folder_path=str(folder),
                commit_message="Compact set made by dq-lightning",
                delete_patterns="data/*",
            )
        except Exception as error:
            raise StoreError(
                f"the repository {repository} could not be written ({type(error).__name__}: {error}): log in with "
                "`hf auth login`, or upload the file that `dq-lightning export SET parquet FILE` writes"
            ) from error


def write_repository(
    images: KeptImages,
    folder: Path,
    repository: str,
    facts: dict[str, Any],
    settings: dict[str, Any] | None = None,
    *,
    whole: Sequence[int] | None = None,
    license: str = "unknown",
) -> Path:
    """Write the files of a dataset repository, `README.md` and `data/train-*.parquet`, into a new folder; return it."""
    (folder / DATA).mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = write_parquet(images, Path(scratch) / "train.parquet")
        made = _read(file, Path(scratch))
        kept = None
        if "label" in made.column_names and images.class_names is not None:
            labels = np.asarray(made["label"][:])
            kept = np.bincount(labels[labels >= 0], minlength=len(images.class_names)).tolist()
        shards = -(-file.stat().st_size // SHARD_BYTES)
        for number in range(shards):
            place = folder / DATA / f"train-{number:05d}-of-{shards:05d}.parquet"
            if shards == 1:
                shutil.move(file, place)
            else:
                made.shard(shards, number, contiguous=True).to_parquet(str(place))
    text = dataset_card(
        repository,
        {"samples": len(images)} | facts,
        kept=kept,
        whole=whole,
        class_names=images.class_names,
        settings=settings,
        license=license,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def _read(file: Path, scratch: Path) -> Any:
    """Open a Parquet file as a dataset that has a cache of its own, which is removed together with the scratch folder."""
    from datasets import Dataset

    return Dataset.from_parquet(str(file), cache_dir=str(scratch / "cache"))
