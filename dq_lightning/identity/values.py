"""Digests of the content of values: numbers, text, arrays, images, containers, and objects by their attributes."""

import copyreg
import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dq_lightning.core.errors import DQError, SourceError

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
_ROWS_AT_ONCE = 256
_MAX_CHANNELS = 4
_MAX_SHORT_LENGTH = 64
_VALUES_AT_ONCE = 4096
_MAX_DEPTH = 100
_NUMBERS = (type(None), type(Ellipsis), bool, int, float, complex)


def digest_text(*parts: object) -> str:
    """Return the hexadecimal SHA-256 of the texts of some parts, joined with a separator.

    >>> digest_text("a", "b") == digest_text("ab")
    False
    """
    return hashlib.sha256("\x1f".join(map(str, parts)).encode(errors="surrogatepass")).hexdigest()


def digest_of(*values: Any) -> str:
    """Return the hexadecimal SHA-256 of the content of values, such as the items of a dataset.

    The types of values and the order of sequences count; the order of the keys of a mapping does not.

    Raises:
        SourceError: a value cannot be described: it is an open file, is nested too deeply, or cannot be pickled.
        DQError: a tensor has no values (meta, lazy), or has a layout that is not supported.
    """
    describer = Describer()
    return digest_text(*[describer.describe(value) for value in values])


class Describer:
    """Describes any value by a short text that differs if the value differs and is equal in every process.

    This class describes the items of a dataset: objects are described by the name of their class and by what they hold.
    Subclasses also describe code, files and networks.
    """

    order_of_keys = False
    """Whether the order of the keys of a mapping counts."""

    def __init__(self) -> None:
        self._open: list[int] = []
        # Texts by id. The value is kept too, so that no other object can get its id.
        self._known: dict[int, tuple[Any, str]] = {}

    def describe(self, value: Any) -> str:
        """Return the text that describes a value.

        Raises:
            SourceError: the value, or something in it, cannot be described.
        """
        kind = type(value)
        if kind in _NUMBERS:
            return f"{kind.__name__}:{value!r}"
        if isinstance(value, str | bytes | PurePath):
            return self.text(value)
        if id(value) in self._open:  # a cycle is described by the number of levels up to where it closes
            return f"above:{len(self._open) - self._open.index(id(value))}"
        if id(value) not in self._known:
            if len(self._open) > _MAX_DEPTH:
                return self.opaque_value(value, "is nested too deeply")
            self._open.append(id(value))
            try:
                self._known[id(value)] = value, self._compound(value)
            finally:
                self._open.pop()
        return self._known[id(value)][1]

    def all(self, values: Any) -> list[str]:
        """Return the texts that describe several values."""
        return [self.describe(value) for value in values]

    # methods that subclasses override

    def text(self, value: Any) -> str:
        """Describe a string, bytes or a path."""
        if isinstance(value, bytes):
            return (
                f"bytes:{value!r}" if len(value) <= _MAX_SHORT_LENGTH else f"bytes:{hashlib.sha256(value).hexdigest()}"
            )
        return f"path:{value.as_posix()!r}" if isinstance(value, PurePath) else f"{type(value).__name__}:{str(value)!r}"

    def kind(self, kind: type) -> str:
        """Describe a class."""
        return f"class:{kind.__qualname__}"

    def special(self, value: Any) -> str | None:
        """Describe a value that needs more than its content; return None for other values."""
        return self.kind(value) if isinstance(value, type) else None

    def opaque_value(self, value: Any, why: str) -> str:
        """Handle a value that cannot be described; here by raising SourceError. `why` completes "which ..."."""
        raise SourceError(
            f"The items hold a {type(value).__module__}.{type(value).__qualname__}, which {why}, so a later run could not tell "
            "whether the data are the same. Pass fingerprint= with a name of your own for this version of the data."
        )

    # content

    def _compound(self, value: Any) -> str:
        special = self.special(value)
        if special is not None:
            return special
        if isinstance(value, Tensor | np.ndarray | np.generic):
            try:
                return self._array(np.asarray(value) if isinstance(value, np.generic) else value)
            except (DQError, RuntimeError, OSError, ValueError) as error:
                if type(self) is Describer:
                    # The value belongs to an item: the caller adds the number of the item to the message.
                    raise
                return self.opaque_value(value, f"has no values that can be read ({error})")
        if isinstance(value, Image.Image):
            return self._image(value)
        if isinstance(value, Mapping):
            return digest_text(*self._container(value), *self._items_of(value))
        if isinstance(value, list | tuple):
            return digest_text(*self._container(value), len(value), *self._sequence(value))
        if isinstance(value, set | frozenset):
            return digest_text(*self._container(value), *sorted(self.all(value)))
        if callable(getattr(value, "to_numpy", None)) and not isinstance(value, type):
            return self._table(value)
        return self._object(value)

    def _container(self, value: Any) -> list[str]:
        """Describe the class of a container, and the attributes that a subclass of a container adds."""
        kind = type(value)
        attributes = getattr(value, "__dict__", None)
        return [self.kind(kind), *([self.describe(attributes)] if attributes and attributes is not value else [])]

    def _items_of(self, value: Mapping[Any, Any]) -> list[str]:
        pairs = [(self.describe(key), self.describe(value[key])) for key in value]
        in_order = self.order_of_keys and all(isinstance(key, str | int) for key in value)
        return [text for pair in (pairs if in_order else sorted(pairs)) for text in pair]

    def _sequence(self, value: Any) -> list[str]:
        # A million integers need not be described one by one.
        held = list(value)
        if len(held) > _MAX_SHORT_LENGTH and set(map(type, held)) <= {int}:
            return [repr(held)]
        # The texts of a million other values need not be in memory all at once.
        starts = range(0, len(held), _VALUES_AT_ONCE) if len(held) > _VALUES_AT_ONCE else ()
        return [digest_text(*self.all(held[at : at + _VALUES_AT_ONCE])) for at in starts] or self.all(held)

    def _array(self, value: Any) -> str:
        """Describe an array or tensor by kind, dtype, shape and bytes in row order, whatever its layout in memory."""
        if isinstance(value, Tensor):
            shape = "nested" if value.is_nested else tuple(value.shape)
            beside = (
                []
                if type(value) in (Tensor, torch.nn.Parameter)
                else [type(value).__name__, self.describe(vars(value))]
            )
            return digest_text("tensor", value.dtype, shape, digest_tensor(value), *beside)
        if value.dtype.hasobject:
            return digest_text("objects", value.shape, self.describe(value.tolist()))
        if isinstance(value, np.ma.MaskedArray):
            mask = np.ma.getmaskarray(value)
            return digest_text("masked", self._array(np.asarray(value.data)), self._array(mask))
        return digest_text("array", value.dtype.descr, value.shape, digest_bytes(value))

    def _image(self, value: Image.Image) -> str:
        try:
            pixels = digest_bytes(np.frombuffer(value.tobytes(), np.uint8))
        except Exception as error:
            # Pillow's decoders may raise any exception, and a closed image raises ValueError.
            if type(self) is Describer:
                raise
            return self.opaque_value(value, f"cannot be decoded ({error})")
        palette = value.getpalette("RGBA") if value.mode in ("P", "PA") else None
        # Information beside the pixels, such as orientation or transparency, may decide what a transform does.
        plain = (str, bytes, bool, int, float, tuple)
        info = {str(name): held for name, held in value.info.items() if isinstance(held, plain)}
        texts = digest_text(*(f"{name}={held!r}" for name, held in sorted(info.items())))
        return digest_text("image", value.mode, value.size, pixels, palette, texts)

    def _table(self, value: Any) -> str:
        """Describe a table of pandas, polars or pyarrow by columns; converting it whole would turn integers into floats."""
        texts = [type(value).__qualname__]
        try:
            if hasattr(value, "iloc"):
                texts.append(self.describe(value.index.to_numpy()))
                columns = [value.iloc[:, place] for place in range(value.shape[1])] if value.ndim == 2 else [value]
            else:
                columns = value.get_columns() if hasattr(value, "get_columns") else getattr(value, "columns", [value])
            for column in columns:
                texts += [str(getattr(column, "name", "")), str(getattr(column, "dtype", getattr(column, "type", "")))]
                # pyarrow converts columns that it has to copy only with `zero_copy_only=False`.
                single = type(column).__module__.startswith("pyarrow") and not hasattr(column, "chunks")
                texts.append(self.describe(column.to_numpy(zero_copy_only=False) if single else column.to_numpy()))
            texts += [str(name) for name in getattr(value, "column_names", ())]
        except SourceError:
            raise
        except Exception as error:
            return self.opaque_value(value, f"gives no arrays ({error})")
        return digest_text(*texts)

    def _object(self, value: Any) -> str:
        """Describe an object by its class, attributes and slots, and by the state that its own pickling keeps."""
        kind: Any = type(value)
        parts = [self.kind(kind)]
        held = {name: getattr(value, name) for name in slots_of(kind) if hasattr(value, name)}
        held |= getattr(value, "__dict__", {})
        reducer = copyreg.dispatch_table.get(kind)
        own = reducer or kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__
        if isinstance(value, logging.Logger):
            return digest_text(*parts, value.name)
        if _is_open_file(value):
            return self.opaque_value(value, "is an open file")
        for name, one in sorted(self.attributes(value, held).items()):
            parts += [name, self.describe(one)]
        if own or not held:
            try:
                kept: Any = reducer(value) if reducer else value.__reduce_ex__(4)
            except Exception:
                return self.opaque_value(value, "has no attributes that can be read")
            parts += [kept] if isinstance(kept, str) else self._reduced(kept, held)
        return digest_text(*parts)

    def _reduced(self, kept: tuple[Any, ...], held: dict[str, Any]) -> list[str]:
        lists = [list(part) for part in kept[3:5] if part is not None]
        # Most pickling methods return the attributes, which are described already.
        state = [part for part in kept[2:3] if not (isinstance(part, dict) and part.keys() == held.keys())]
        return self.all([kept[0], kept[1], *state, *lists])

    def attributes(self, value: Any, held: dict[str, Any]) -> dict[str, Any]:
        """Return those attributes of an object that count; `held` maps the names of all attributes to their values."""
        return held


def slots_of(kind: type) -> list[str]:
    """Return the names of the slots of a class and its bases."""
    names = []
    for owner in kind.__mro__:
        slots = vars(owner).get("__slots__", ())
        own = [slots] if isinstance(slots, str) else list(slots)
        # Private names are stored with the name of their class in front.
        private = f"_{owner.__name__.lstrip('_')}"
        names += [f"{private}{n}" if n.startswith("__") and not n.endswith("__") else n for n in own]
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def digest_bytes(value: Any) -> str:
    """Return the hexadecimal SHA-256 of the bytes of a NumPy array in row order."""
    digest = hashlib.sha256()
    # An array that is not contiguous, such as torchvision's CIFAR, which is a transposed view, is copied in pieces that
    # fit the processor's cache.
    rows = value.shape[0] if value.ndim and value.flags.c_contiguous else _ROWS_AT_ONCE
    for start in range(0, value.shape[0], max(1, rows)) if value.ndim else (0,):
        part = _in_row_order(value[start : start + rows] if value.ndim else value)
        if part.size:
            digest.update(part.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _is_open_file(value: Any) -> bool:
    try:
        return hasattr(value, "fileno")
    except Exception:
        # Identifiers of h5py raise another error than AttributeError.
        return True


def _in_row_order(array: Any) -> Any:
    """Return an array whose bytes are in row order: the same one, or a copy."""
    if array.flags.c_contiguous or not array.ndim or array.shape[-1] > _MAX_CHANNELS or array.dtype.kind not in "biuf":
        return np.ascontiguousarray(array)
    # NumPy copies one number after the other where the channels of pixels lie apart, and whole rows of one channel.
    made = np.empty(array.shape, array.dtype)
    for channel in range(array.shape[-1]):
        made[..., channel] = array[..., channel]
    return made


def digest_tensor(tensor: Tensor) -> str:
    """Return the hexadecimal SHA-256 of all values of a tensor, for dense tensors in row order.

    The device and gradients have no influence.

    Raises:
        DQError: the tensor has no values (meta, lazy), or has a layout that is not supported.
    """
    digest = hashlib.sha256()
    for part in _dense_parts(tensor.detach()):
        digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield dense tensors on the CPU that together hold all the information of a tensor."""
    if tensor.is_meta or isinstance(tensor, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
        raise DQError("a tensor has no values (meta or lazy): load or initialise it first")
    if tensor.is_nested:
        for part in tensor.unbind():
            yield torch.tensor(part.shape)
            yield from _dense_parts(part)
    elif tensor.is_quantized:
        yield tensor.int_repr().cpu()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        else:
            yield tensor.q_per_channel_scales().double().cpu()
            yield tensor.q_per_channel_zero_points().double().cpu()
    elif tensor.layout in _COMPRESSED:
        for name in (*_COMPRESSED[tensor.layout], "values"):
            yield from _dense_parts(getattr(tensor, name)())
    elif tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        yield whole.indices().cpu()
        yield from _dense_parts(whole.values())
    elif tensor.layout == torch.strided:
        yield tensor.cpu().as_subclass(Tensor).resolve_conj().resolve_neg()
    else:
        raise DQError(f"tensors of layout {tensor.layout} are not supported: convert them with to_dense()")
