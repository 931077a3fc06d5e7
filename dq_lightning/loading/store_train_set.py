"""The training set of a data module that trains from a packed compact set alone, without the original dataset."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dq_lightning.cache.entries import Cache
from dq_lightning.cache.manifest import MANIFEST
from dq_lightning.cache.shards import KeptShards
from dq_lightning.core.config import Reconstruct, VerifyPolicy
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import CacheError, ConfigError
from dq_lightning.core.fields import address_scheme
from dq_lightning.loading.inner import AnyDataModule
from dq_lightning.loading.loaders import check_collatable
from dq_lightning.loading.paths import open_path
from dq_lightning.loading.train_set import (
    BuildOptions,
    DataModuleTrainSet,
    DatasetTrainSet,
    Located,
    Opened,
    PeerIdentity,
    TrainSet,
    filled_late,
    stored_dataset,
)
from dq_lightning.packed.reader import PackedDataset
from dq_lightning.pipeline.compact import filled_key, open_compact, open_packed, set_folder, stored_patch_plan
from dq_lightning.pipeline.filling import write_filled
from dq_lightning.pipeline.patch_plan import PatchPlan
from dq_lightning.pipeline.plan import FILLED
from dq_lightning.pipeline.remote import local_set
from dq_lightning.pipeline.wanted import Wanted
from dq_lightning.sources.adapt import as_source
from dq_lightning.sources.hub_streams import shard_files
from dq_lightning.sources.strip import KEEP


@dataclass(frozen=True)
class StoreFolder:
    """A compact set that the user passed as a folder.

    Attributes:
        path: folder of the entry, or its address in a file system of fsspec.
        reconstruct: when dropped patches are filled: `"prepare"`, `"batch"` or `"off"`; None uses the setting that the
            set was made with.
    """

    path: str | Path
    reconstruct: Reconstruct | None = None


class StoreTrainSet(TrainSet):
    """A training set that is a packed store.

    If its dropped patches are filled before training, the filled images are kept in the cache.

    Raises:
        ConfigError: a keyword was given that chooses among the samples of a dataset.
        StoreError: the folder holds no packed set, or a damaged one.
    """

    def __init__(
        self, folder: StoreFolder, wanted: Wanted, verify: VerifyPolicy, cache_dir: str | Path | None = None
    ) -> None:
        if wanted.choosing:
            named = ", ".join(f"{name}=" for name in wanted.choosing)
            raise ConfigError(
                f"{folder.path} is a packed compact set, a finished choice: leave out {named}, or pass the original dataset"
            )
        self._path, self._wanted = local_set(folder.path, cache_dir), wanted
        self._samples = open_packed(self._path, verify=verify)
        self._compact = open_compact(self._path, verify="off")
        self._patches = self._patch_plan(folder.reconstruct)
        self.fills_late = filled_late(self._patches) is not None

    def prepare(self, cache: Cache, options: BuildOptions) -> Located:
        patches = self._patches
        if options.default_collate and not self.fills_late:
            check_collatable(open_packed(self._path, finisher=self._finisher(), verify="off"), "the train set")
        if patches is None or not patches.fills_ahead:
            return Located(self._compact)
        resolved = patches.resolve(cache.memory)
        parts = self._filled_parts(resolved, cache)

        def write(folder: Path) -> None:
            get_logger().info(f"filling the dropped patches of {len(self._samples):,} samples of {self._path}")
            shards = KeptShards(cache.place(FILLED, parts), "filling", fresh=options.force)
            given: dict[str, Any] = {"device": options.device, "progress": options.progress, "shards": shards}
            write_filled(folder, self._path, self._samples.digest, resolved, **given)

        return Located(replace(self._compact, filled=cache.build(FILLED, parts, write, force=options.force)))

    def locate(self, cache: Cache, prepared: Located | None = None, peer: PeerIdentity | None = None) -> Located:
        if prepared is not None:
            return prepared
        if self._patches is None or not self._patches.fills_ahead:
            return Located(self._compact)
        filled = cache.find(FILLED, self._filled_parts(self._patches, cache))
        if filled is None:
            raise CacheError(
                f"the filled images of {self._path} are not in {cache.root}: prepare_data makes them; on several nodes "
                "pass a shared cache_dir=, or set prepare_data_per_node=True"
            )
        return Located(replace(self._compact, filled=filled))

    def open(self, cache: Cache, located: Located) -> Opened:
        # The folder may hold another store by now than the one that was opened first.
        PackedDataset(self._path).require(self._samples.digest)
        dataset = stored_dataset(located.compact, self._patches, self._finisher(), cache.verify)
        return Opened(located.compact, dataset=dataset, patches=filled_late(self._patches))

    @property
    def num_classes(self) -> int | None:
        return self._compact.info.num_classes

    def _patch_plan(self, reconstruct: Reconstruct | None) -> PatchPlan | None:
        if self._compact.patches is None:
            return None
        # With "auto" the reconstructor that the store names is used, if it is one of this package's. Otherwise
        # `stored_patch_plan` requires the user to name one, since a path where the store was made may mean nothing here.
        named, network = self._wanted.config.patches.reconstructor, self._wanted.reconstructor
        if network is None and named != "auto":
            network = named
        return stored_patch_plan(self._compact, reconstructor=network, reconstruct=reconstruct)

    def _filled_parts(self, patches: PatchPlan, cache: Cache) -> dict[str, Any]:
        assert patches.reconstructor is not None
        identity = patches.reconstructor.identity(cache.memory)
        if identity is None:
            raise CacheError(
                f"the identity of the reconstructor {patches.reconstructor.name} is not remembered in {cache.root}, so the "
                "filled images cannot be found: call prepare_data first, with the same cache_dir="
            )
        return filled_key({"reconstructor": identity}, self._compact)

    def _finisher(self) -> Any:
        """Return the finisher that applies the user's transforms; None without any, which is what `"keep"` means here."""
        wanted = self._wanted
        given = [
            None if isinstance(one, str) and one == KEEP else one for one in (wanted.transform, wanted.target_transform)
        ]
        if given == [None, None]:
            # Without a transform there is no need to find the image in a sample.
            return None
        columns: dict[str, Any] = {name: self._compact.config.get(name) for name in ("image_column", "label_column")}
        source = as_source(self._samples, transform=given[0], target_transform=given[1], **columns)
        return source.finisher(torch.arange(len(self._samples)))


def make_train_set(train: Any, wanted: Wanted, verify: VerifyPolicy, cache_dir: str | Path | None = None) -> TrainSet:
    """Make the training set for what the user passed as `train`.

    That is a data module, a dataset, a `StoreFolder`, or a path: of a packed set or of a dataset, see `open_path`; an
    address is that of a packed set, or of a tar or Parquet file. `verify` says how a packed set is checked when it is
    opened, as in `quantize`, and `cache_dir` is the folder of the cache that keeps the copy of a set at an address.

    Raises:
        ConfigError: a path is none of these.
        StoreError: a packed set is damaged.
    """
    if isinstance(train, AnyDataModule):
        return DataModuleTrainSet(train, wanted)
    if isinstance(train, str | Path):
        held = address_scheme(train) is not None or (set_folder(train) / MANIFEST).is_file()
        train = StoreFolder(train) if held and shard_files(train) is None else open_path(train, "train")
    if isinstance(train, StoreFolder):
        return StoreTrainSet(train, wanted, verify, cache_dir)
    return DatasetTrainSet(train, wanted)
