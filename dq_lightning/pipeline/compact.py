"""Read and write compact sets on the disk: find one in the cache, or open any folder that holds a complete entry."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dq_lightning.cache.entries import Cache
from dq_lightning.cache.files import read_sealed, seal, sealed_digest, write_bytes
from dq_lightning.cache.manifest import MANIFEST, check_copied_entry, read_manifest, request_full_check
from dq_lightning.cache.tensors import TENSORS_FILE, read_bins, read_features, read_selection
from dq_lightning.core.config import PatchConfig, Reconstruct, TextConfig, VerifyPolicy
from dq_lightning.core.errors import CacheError, DQError, StoreError
from dq_lightning.core.records import Bins, Features, Selection, StoreInfo
from dq_lightning.packed.reader import PackedDataset, Patches
from dq_lightning.packed.writer import STORE_FILE
from dq_lightning.pipeline.patch_bytes import PatchFacts
from dq_lightning.pipeline.patch_plan import PatchPlan, make_patch_plan
from dq_lightning.pipeline.plan import (
    ALGORITHM_VERSIONS,
    BINS,
    FEATURES,
    FILLED,
    STORE,
    Parts,
    Plan,
    keeps_all,
    known_identity,
    usable_parts,
)

# Name of the folder of a compact set inside the output folder of the `quantize` command.
SET_FOLDER = "compact"
COMPACT_FILE = "compact.json"
# A store may name these reconstructors without the user's confirmation, because they load no network of somebody else's
# choice: they stand for the table of `choose_reconstructor` and for the network inside this package.
OWN_RECONSTRUCTORS = ("auto", "bundled")


@dataclass(frozen=True)
class Compact:
    """A compact set: its folder, its samples, the key parts of every station, and its settings.

    Attributes:
        info: folder and size of the set, and further facts about it.
        selection: positions and bins of its samples.
        parts: parts of the key of every station; empty for an entry that was opened outside of the cache.
        config: settings that the set was made with.
        patches: facts about the patches of a store of patches, else None.
        store_digest: digest of a store of patches, as `PackedDataset.digest` gives it, else None.
        filled: folder of the same samples with their dropped patches filled, if they were filled before training; else
            None.
    """

    info: StoreInfo
    selection: Selection
    parts: Parts = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    patches: PatchFacts | None = None
    store_digest: str | None = None
    filled: Path | None = None

    @property
    def reading(self) -> dict[str, Any]:
        """The keywords of `as_source` with which its samples are read: how rows of text are read, and the columns."""
        text = TextConfig.from_dict(self.config["text"]) if "text" in self.config else None
        return {"text": text} | {name: self.config.get(name) for name in ("image_column", "label_column")}


def write_description(
    folder: Path,
    plan: Plan,
    patches: PatchFacts | None = None,
    encoding: dict[str, Any] | None = None,
    num_unreadable: int = 0,
    source_bytes: int | None = None,
) -> None:
    """Write the description of a compact set, `compact.json`, which carries its own digest.

    `encoding` says how the images were encoded anew, as in `StoreInfo.encoding`. `num_unreadable` is the number of
    skipped samples, for an entry whose selection is in its samples alone. `source_bytes` is the size of the whole
    dataset in bytes, where it was measured without `patches`, which hold it themselves.
    """
    labels = plan.classes
    # A `Source` that the user passed may have been made with columns that the config does not name.
    columns = {"image_column": plan.source.image_column, "label_column": plan.source.label_column}
    config = plan.config.to_dict()
    config["selection"]["keep_ratio"] = plan.config.selection.share
    if plan.chosen is not None:
        # The settings of features and bins had no influence on the set.
        config = {name: value for name, value in config.items() if name not in ("features", "bins")}
        config["selection"] = {"keep_ratio": 1.0} if keeps_all(plan.config) else {"indices": plan.chosen_id}
    described = {
        "kind": plan.store_kind,
        "source": plan.source.describe(),
        "encoder": None if plan.encoder is None else plan.encoder.description,
        "encoder_digest": plan.encoder_digest,
        "num_source_samples": len(plan.source),
        "num_classes": labels.num_classes if labels is not None else None,
        "class_names": list(labels.names) if labels is not None and labels.names is not None else None,
        "config": config | columns,
        "patches": None if patches is None else asdict(patches),
    } | ({} if encoding is None else {"encoding": encoding})
    # The samples hold the targets of the dataset, which are not the classes where the user gave these, or a rule for them.
    described |= {"labels": plan.labels_id} if plan.labels_id is not None else {}
    described |= {"num_unreadable": num_unreadable} if num_unreadable else {}
    described |= {"source_bytes": source_bytes} if source_bytes is not None and patches is None else {}
    write_bytes(folder / COMPACT_FILE, seal(described))


def classes_are_given(path: Path, described: dict[str, Any]) -> bool | None:
    """Whether a set's classes were given by the user, so that they are not the targets in its samples.

    They are these targets where this is False, and None stands for a rule that made them of the targets, such as
    `"dominant"`. Descriptions of earlier versions say nothing, but the key of an entry of the cache does.
    """
    identity = described.get("labels")
    if identity is None:
        with suppress(OSError, DQError):  # A copied folder may have no manifest.
            identity = read_manifest(path)["parts"].get("labels")
    if not isinstance(identity, str) or identity == "none" or identity.startswith("column:"):
        return False
    is_digest = len(identity) == 64 and set(identity) <= set("0123456789abcdef")
    return True if is_digest else None


def find_compact(plan: Plan, cache: Cache, source: str | None = None) -> Compact | None:
    """Return the compact set of a plan from the cache, or None if it is not there.

    It does not read the dataset in full, loads no model and uses no GPU. With `on_error="skip"`, a set that was made
    with `on_error="raise"` is found too, because it skipped no sample. A set whose filled images are missing is not
    found. `source` is the identity of the data; None looks up remembered digests.
    """
    source = source or known_identity(plan, cache.memory)
    identities = plan.identities(cache.memory)
    if source is None or identities is None:
        return None
    for parts in usable_parts(plan, source, identities):
        compact = cache.read(STORE, parts[STORE], partial(open_compact, parts=parts))
        if compact is not None and FILLED in parts:
            filled = cache.find(FILLED, filled_key(parts[FILLED], compact))
            compact = None if filled is None else replace(compact, filled=filled)
        if compact is not None:
            return compact
    return None


def filled_key(own: dict[str, Any], compact: Compact) -> dict[str, Any]:
    """Return the parts of the key of a compact set's filled images.

    They hold the digest of the store's content, and not what the store says about its origin.

    Args:
        own: the plan's own parts of the station: the identity of the reconstructor under `"reconstructor"`.
        compact: compact set that is a store of patches.
    """
    return own | {"store": compact.store_digest, "filled_version": ALGORITHM_VERSIONS[FILLED]}


def set_folder(path: str | Path) -> Path:
    """Return the folder of a compact set; an output folder of `quantize --output` holds it as `compact/`."""
    place = Path(path).expanduser()
    inside = place / SET_FOLDER
    return inside if not (place / MANIFEST).exists() and (inside / MANIFEST).exists() else place


def open_compact(
    path: Path, parts: Parts | None = None, *, reused: bool = True, verify: VerifyPolicy = "size"
) -> Compact:
    """Read the selection and the description of an entry of the store station, in the cache or copied from a cache.

    Args:
        path: folder of the entry.
        parts: parts of the key of every station. None means that the cache has not verified the entry, so this function
            verifies it.
        reused: value of `StoreInfo.reused`.
        verify: how the entry is verified where `parts` is None: `"size"`, `"hash"` or `"off"`.

    Raises:
        StoreError: the folder holds no compact set, or a damaged one.
    """
    if parts is None:
        check_copied_entry(path, verify, station=STORE)
    try:
        described = read_sealed(path / COMPACT_FILE)
        selection = _read_selection(path, described)
        _check_described(described, selection)
        patches = described["patches"] and PatchFacts(**described["patches"])
        info = StoreInfo(
            path=str(path),
            kind=described["kind"],
            num_samples=len(selection),
            num_source_samples=described["num_source_samples"],
            bytes=sum(file.stat().st_size for file in path.iterdir()),
            content_hash=selection.content_hash(),
            num_classes=described["num_classes"],
            num_unreadable=selection.num_unreadable,
            suspects=selection.suspects,
            reused=reused,
            encoding=described.get("encoding"),
            encoder=described.get("encoder"),
            encoder_digest=described.get("encoder_digest"),
            **(_costs(patches) if patches else {"source_bytes": described.get("source_bytes")}),
        )
        digest = sealed_digest(read_sealed(path / STORE_FILE)) if patches else None
    except (OSError, DQError, KeyError, TypeError, ValueError) as error:
        request_full_check(path)
        raise StoreError(
            f"{path} holds no compact set that can be used ({error}): in a cache the next run makes it again, a copy must be "
            "copied again"
        ) from error
    return Compact(info, selection, parts or {}, described["config"], patches, digest)


def _read_selection(path: Path, described: dict[str, Any]) -> Selection:
    """Read the selection of an entry.

    A store that is to take few bytes has it in its samples alone, and beside them a selection of no samples if any were
    left out because of their scores.
    """
    left_out = None
    if (path / TENSORS_FILE).exists() or not (path / STORE_FILE).exists():
        left_out = read_selection(path)
        if len(left_out) or not (path / STORE_FILE).exists():
            return left_out
    samples = PackedDataset(path)
    suspects = None if left_out is None else left_out.suspects
    return Selection(samples.index, samples.bin, described.get("num_unreadable", 0), suspects)


def _check_described(described: dict[str, Any], selection: Selection) -> None:
    """Raise StoreError or KeyError for values of other types or ranges than those that `write_description` writes."""

    def is_count(value: Any, least: int = 0) -> bool:
        return type(value) is int and value >= least

    total, names, patches = described["num_source_samples"], described["class_names"], described["patches"]
    index = selection.index
    fit = {
        "kind": described["kind"] in ("indices", "packed"),
        "num_source_samples": is_count(total) and (not len(index) or 0 <= int(index.min()) <= int(index.max()) < total),
        "num_classes": described["num_classes"] is None or is_count(described["num_classes"]),
        "class_names": names is None or isinstance(names, list),
        "config": isinstance(described["config"], dict),
        "num_unreadable": is_count(described.get("num_unreadable", 0)),
        "source_bytes": described.get("source_bytes") is None or is_count(described["source_bytes"]),
        "encoding": _is_encoding(described.get("encoding")),
        "encoder": isinstance(described.get("encoder"), str | None),
        "encoder_digest": isinstance(described.get("encoder_digest"), str | None),
        "patches": patches is None
        or (
            is_count(patches["patch_size"], 1)
            and len(patches["image_size"]) == 2
            and all(is_count(side, 1) for side in patches["image_size"])
            and type(patches["keep_ratio"]) in (int, float)
            and all(
                patches[n] is None or is_count(patches[n])
                for n in ("original_bytes", "source_bytes", "unpatched_bytes")
            )
        ),
    }
    if wrong := [name for name, fits in fit.items() if not fits]:
        raise StoreError(f"{COMPACT_FILE} has an impossible {wrong[0]}: {described.get(wrong[0])!r:.80}")


def _is_encoding(value: Any) -> bool:
    """Whether a description of an encoding is one that `write_description` is given."""
    if value is None:
        return True
    names = {"codec": str, "quality": int, "longest_side": int, "psnr": float, "max_bytes": int}
    return isinstance(value, dict) and all(
        name in names and (inner is None or type(inner) is names[name]) for name, inner in value.items()
    )


def _costs(patches: PatchFacts) -> dict[str, Any]:
    return {
        "patch_keep_ratio": patches.keep_ratio,
        "original_bytes": patches.original_bytes,
        "source_bytes": patches.source_bytes,
        "unpatched_bytes": patches.unpatched_bytes,
    }


def stored_patch_plan(
    compact: Compact, *, reconstructor: Any = None, reconstruct: Reconstruct | None = None
) -> PatchPlan:
    """Make the patch plan that says how the dropped patches of an existing store of patches are filled.

    The reconstructor is a name, path or network; None uses the one that the store was made with, if it is one of
    `OWN_RECONSTRUCTORS`. `reconstruct` says when patches are filled; None uses the setting that the store was made
    with.

    Raises:
        StoreError: the store names any other network, and the user named none. Whoever made a store must not decide
            what is downloaded and loaded by those who use it.
    """
    assert compact.patches is not None
    config = PatchConfig.from_dict(compact.config.get("patches", {}))
    when = reconstruct or config.reconstruct
    if reconstructor is None and when != "off" and config.reconstructor not in OWN_RECONSTRUCTORS:
        raise StoreError(
            f"the dropped patches of {compact.info.path} were filled by reconstructor={config.reconstructor!r} where it was "
            f"made. A store does not choose what is loaded here: pass reconstructor={config.reconstructor!r} if you trust it, "
            'another name, folder or network, "bundled" for the small one of this package, or reconstruct="off" for the mean '
            "colour"
        )
    # The patches are already chosen, so random saliency is set to avoid choosing a classifier.
    config = replace(config, saliency="random", reconstruct=when, patch_size=compact.patches.patch_size)
    height, width = compact.patches.image_size
    chosen = config.reconstructor if reconstructor is None else reconstructor
    return make_patch_plan(config, (height, width), reconstructor=chosen)


def load_selection(path: str | Path) -> Selection:
    """Read which samples a compact set holds.

    Args:
        path: folder of the entry (`StoreInfo.path`), of kind `"indices"` or `"packed"`.

    Returns:
        A `Selection`: positions int64 [M] in the dataset that the set was made from, and bins int16 [M].

    Raises:
        StoreError: the folder holds no compact set, or a damaged one.

    Example:
        >>> import tempfile, torch
        >>> from dq_lightning import quantize
        >>> dataset = [(torch.full((3, 8, 8), i / 40), i % 2) for i in range(40)]
        >>> with tempfile.TemporaryDirectory() as cache:
        ...     info = quantize(dataset, indices=[3, 1, 7], cache_dir=cache)
        ...     load_selection(info.path).index
        tensor([1, 3, 7])
    """
    return open_compact(Path(path)).selection


def read_bins_of(compact: Compact, cache: Cache) -> Bins:
    """Return the bins that a compact set was drawn from, if they are in the cache.

    Raises:
        CacheError: the bins are not in this cache, there are none because the samples were given or all kept, or they
            were made again and differ from those of the compact set.
    """
    path = _behind(compact, cache, BINS)
    bins, selection = read_bins(path), compact.selection
    fit = len(bins) == compact.info.num_source_samples
    if fit:
        # Suspects that are kept, because too few samples remain without them, are in no bin of the entry.
        found = bins.assignment[selection.index]
        inside = found >= 0
        fit = torch.equal(found[inside], selection.bin[inside]) and (bool(inside.all()) or bins.suspects is not None)
    if not fit:
        raise CacheError(
            f"the bins in {path} were made again after the compact set {compact.info.path}, and came out different (the "
            "features of another device differ in their last bits): a run with force_recompute=True makes both anew"
        )
    return bins


def read_features_of(compact: Compact, cache: Cache) -> Features:
    """Return the features that a compact set was chosen by, if they are in the cache.

    Raises:
        CacheError: the features are not in this cache, or there are none because the samples were given or all kept.
    """
    return read_features(_behind(compact, cache, FEATURES))


def _behind(compact: Compact, cache: Cache, station: str) -> Path:
    """Return the folder of the entry of a station that a compact set was made from."""
    name = station.partition("-")[2]
    if compact.parts and station not in compact.parts:
        raise CacheError(
            f"there are no {name} behind the compact set {compact.info.path}: its samples were given as indices=, or all "
            f"were kept{'. make_bins makes bins of any features' if station == BINS else ''}"
        )
    path = cache.find(station, compact.parts[station]) if compact.parts else None
    if path is None:
        raise CacheError(
            f"the {name} behind the compact set {compact.info.path} are not in {cache.root}: they stay in the cache where it "
            "was made, and a run with force_recompute=True over the original dataset makes them again"
        )
    return path


def open_packed(
    path: str | Path,
    *,
    finisher: Any = None,
    verify: VerifyPolicy = "size",
    patches: Patches = "mean",
) -> PackedDataset:
    """Open the packed samples of a compact set, which is verified as a whole; the arguments are those of `PackedDataset`.

    Raises:
        StoreError: the folder holds no packed set, or a damaged one.
    """
    compact = open_compact(Path(path), verify=verify)
    samples = PackedDataset(path, finisher=finisher, verify=verify, patches=patches)
    check_same_samples(samples, compact.selection)
    return samples


def check_same_samples(samples: PackedDataset, selection: Selection) -> None:
    """Check that the positions and bins in a packed store equal those of a selection.

    Raises:
        StoreError: they differ, so the store belongs to another compact set.
    """
    if not torch.equal(samples.index, selection.index) or not torch.equal(samples.bin, selection.bin):
        request_full_check(samples.path)
        raise StoreError(
            f"{samples.path} holds samples of another selection than its compact set: in a cache the next run makes it again, "
            "a copy must be copied again"
        )
