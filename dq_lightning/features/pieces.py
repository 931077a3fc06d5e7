"""Compute embeddings in pieces, by independent processes or on separate computers, and merge them.

Piece `index` of `nums` rows holds the rows from `index * nums` on in the file `NAME_{index}.npy` (float32 [B, D]).
The file `NAME_{index}.json` beside it, which is written last, says which piece of which data this is and which encoder
made it.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dq_lightning.cache.files import file_digest
from dq_lightning.core.console import get_logger
from dq_lightning.core.errors import FeatureError
from dq_lightning.core.records import Features
from dq_lightning.features.samples import SampleSource

NAME = "embeds"
AGAIN = "make it again, or remove its .npy and .json files if it belongs to other data"


class Part:
    """A source for `extract_features` that consists of the samples of another source at consecutive positions."""

    def __init__(self, source: SampleSource, rows: range) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, positions: Sequence[int]) -> list[str]:
        """Return the texts of some samples, as `samples.SampleSource` does."""
        return self._source.texts([self._rows[position] for position in positions])

    def image(self, index: int) -> Any:
        """Return the RGB image of a sample, as `samples.SampleSource` does."""
        return self._source.image(self._rows[index])

    def decode_warning(self, index: int) -> str | None:
        """Return the warning about a sample's pixels, or None, as `samples.SampleSource` does."""
        return self._source.decode_warning(self._rows[index])


def embed_piece(
    source: SampleSource,
    embed: Callable[[Part], Features],
    *,
    index: int,
    nums: int,
    out_dir: str | Path,
    identity: Mapping[str, Any],
    name: str = NAME,
) -> Path:
    """Embed at most `nums` rows from row `index * nums` on and write them; a complete existing piece is kept.

    `embed` makes the features of a part of the source, such as `extract_features` with an encoder. `identity` holds the
    JSON values that must be equal in all pieces: the digest of the source, the digest of the encoder, and which text is
    embedded. The files in the folder `out_dir` have names that begin with `name`; the path of the `.npy` file is
    returned.

    Raises:
        FeatureError: the piece lies outside of the source, or the folder has pieces of another size.
    """
    total = len(source)
    if nums < 1 or not 0 <= index * nums < total:
        raise FeatureError(
            f"piece {index} of {nums} rows lies outside of the {total:,} samples: the pieces are 0 to "
            f"{-(-total // max(nums, 1)) - 1}"
        )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}_{index}.npy"
    facts = {"index": index, "nums": nums, "num_samples": total, "identity": _plain(identity)}
    written = _read_facts(target.with_suffix(".json"))
    if written is not None and _is_whole(target, written) and {**written, **facts} == written:
        return target
    _check_neighbours(folder, name, nums)
    made = embed(Part(source, _rows(facts))).embedding.numpy()
    # A piece without a description counts as missing, so the old description is removed first and the new one is
    # written last.
    target.with_suffix(".json").unlink(missing_ok=True)
    _write(target, lambda file: np.save(file, made, allow_pickle=False))
    facts["sha256"] = file_digest(target)
    _write(target.with_suffix(".json"), lambda file: file.write(json.dumps(facts, indent=2).encode()))
    return target


def _check_neighbours(folder: Path, name: str, nums: int) -> None:
    """Raise a FeatureError if the folder has a piece of another size, which would not fit this one."""
    for path in sorted(folder.glob(f"{name}_*.json")):
        other = _read_facts(path)
        if other is not None and other["nums"] != nums:
            raise FeatureError(
                f"{path} describes a piece of {other['nums']:,} rows, but nums={nums} was given: pass the same "
                f"nums=, or another folder, or remove the pieces in {folder} first"
            )


def merge_pieces(
    folder: str | Path, *, name: str = NAME, identity: Mapping[str, Any] | None = None
) -> NDArray[np.float32]:
    """Merge the pieces of a folder, whose names begin with `name`, into embeddings float32 [N, D], one row a sample.

    `identity` holds all or some of the identity values that the pieces must have; None only requires that they agree.

    Raises:
        FeatureError: a piece is missing, damaged, or made of other data or by another encoder; the message names it.
    """
    folder = Path(folder)
    found = {path: _read_facts(path) for path in sorted(folder.glob(f"{name}_*.json"))}
    if not found:
        raise FeatureError(f"there is no piece {name}_*.npy with its {name}_*.json in {folder}: make the pieces first")
    damaged = [path for path, facts in found.items() if facts is None]
    if damaged:
        raise FeatureError(f"{damaged[0]} can't be read: {AGAIN}")
    pieces = {path.with_suffix(".npy"): facts for path, facts in found.items() if facts is not None}
    first_path, first = next(iter(pieces.items()))
    shared = {key: first[key] for key in ("identity", "nums", "num_samples")}
    if identity is not None:
        asked = first["identity"] | _plain(identity)
        _check_same(first_path, first, {"identity": asked}, "the given data and encoder")
    for path, facts in pieces.items():
        _check_same(path, facts, shared, first_path.name)
    by_index = {facts["index"]: path for path, facts in pieces.items()}
    nums, total = shared["nums"], shared["num_samples"]
    missing = [index for index in range(-(-total // nums)) if index not in by_index]
    if missing:
        listed = "; ".join(f"{name}_{i}.npy (rows {i * nums} to {min((i + 1) * nums, total) - 1})" for i in missing[:5])
        raise FeatureError(f"{len(missing)} of {-(-total // nums)} pieces are missing in {folder}: {listed}")
    return _joined([by_index[index] for index in sorted(by_index)], pieces, total)


def merge_published(folder: Path, name: str) -> NDArray[np.float32]:
    """Merge pieces without descriptions in the order of their numbers; only a gap between the numbers can be noticed.

    Raises:
        FeatureError: there are no pieces, one is missing, or they do not fit together.
    """
    found = {
        int(m[1]): path
        for path in folder.glob(f"{name}_*.npy")
        if (m := re.fullmatch(rf"{name}_(\d+)\.npy", path.name))
    }
    if not found:
        raise FeatureError(
            f"there is no {name}_*.npy in {folder}: run `dq-lightning embed DATA --index 0 --nums 10000` first"
        )
    missing = [number for number in range(max(found)) if number not in found]
    if missing:
        raise FeatureError(
            f"{folder / f'{name}_{missing[0]}.npy'} is missing: make this piece, too, with "
            f"`dq-lightning embed DATA --index {missing[0]}` and the same --nums"
        )
    get_logger().warning(
        f"the pieces in {folder} have no .json files that describe them, so they are used without checking that they were made "
        "from these data"
    )
    try:
        parts = [np.load(found[number], allow_pickle=False) for number in sorted(found)]
        merged = np.concatenate([np.asarray(part, dtype=np.float32) for part in parts])
    except (OSError, ValueError) as error:
        raise FeatureError(f"the pieces in {folder} do not fit together ({error}): make them again") from error
    if merged.ndim != 2 or not np.isfinite(merged).all():
        raise FeatureError(
            f"the pieces in {folder} must together be a matrix of finite numbers [N, D], but they are of shape "
            f"{list(merged.shape)} or hold NaN or infinity: make them again"
        )
    return merged


def _joined(paths: Sequence[Path], pieces: Mapping[Path, Mapping[str, Any]], total: int) -> NDArray[np.float32]:
    merged: NDArray[np.float32] | None = None
    for path in paths:
        facts = pieces[path]
        if not _is_whole(path, facts):
            raise FeatureError(f"{path} is missing, or is not what its .json file describes: {AGAIN}")
        part = np.load(path, mmap_mode="r", allow_pickle=False)
        if merged is None:
            merged = np.empty((total, part.shape[1]), np.float32)
        rows = _rows(facts)
        if part.shape != (len(rows), merged.shape[1]):
            raise FeatureError(f"{path} has the shape {list(part.shape)}, which does not fit the others: {AGAIN}")
        merged[rows.start : rows.stop] = part
    assert merged is not None
    return merged


def _check_same(path: Path, facts: Mapping[str, Any], shared: Mapping[str, Any], reference: str) -> None:
    for key, wanted in shared.items():
        seen = facts[key]
        if seen == wanted:
            continue
        if isinstance(seen, Mapping):
            key = next(k for k in {*seen, *wanted} if seen.get(k) != wanted.get(k))
            seen, wanted = seen.get(key), wanted.get(key)
        raise FeatureError(
            f"{path} does not belong to these pieces: its {key} is {seen!r}, but that of {reference} is {wanted!r}; {AGAIN}"
        )
    if path.stem.rpartition("_")[2] != str(facts["index"]) or not len(_rows(facts)):
        raise FeatureError(
            f"{path} does not belong to these pieces: it describes itself as piece {facts['index']}; {AGAIN}"
        )


def _rows(facts: Mapping[str, Any]) -> range:
    start = facts["index"] * facts["nums"]
    return range(start, min(start + facts["nums"], facts["num_samples"]))


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dict(identity)))
    return plain


def _read_facts(path: Path) -> dict[str, Any] | None:
    """Read the description of a piece; return None if it does not exist or is invalid."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    numbers = ("index", "nums", "num_samples")
    if not isinstance(facts, dict) or not all(type(facts.get(key)) is int for key in numbers):
        return None
    return facts if isinstance(facts.get("identity"), dict) and facts["nums"] > 0 else None


def _is_whole(path: Path, facts: Mapping[str, Any]) -> bool:
    return path.is_file() and facts.get("sha256") == file_digest(path)


def _write(path: Path, put: Callable[[Any], Any]) -> None:
    """Write a file under another name and rename it, so that a file with the final name is always complete."""
    handle, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        put(file)
        file.flush()
        os.fsync(file.fileno())
    Path(partial).replace(path)
