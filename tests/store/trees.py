"""Hypothesis strategies for samples, what "the same sample" means, and stores of given samples."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from dq_lightning.packed.images import MODE_BITS, raw_bytes_of
from dq_lightning.packed.writer import write_packed

ARRAY_DTYPES = ["|u1", "|b1", "<i2", ">i4", "<i8", "<f2", "<f4", "<f8", "<c8", "<M8[s]", "<U3", "|S4"]
TENSOR_DTYPES = [torch.uint8, torch.bool, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]


def write_samples(folder: Path, samples: Sequence[Any]) -> None:
    """Pack samples of one bin, named by their positions."""
    items = [(sample, None) for sample in samples]
    ids, bins = list(map(str, range(len(items)))), torch.zeros(len(items), dtype=torch.int16)
    write_packed(folder, items, ids=ids, index=torch.arange(len(items)), bins=bins, attributes={})


@st.composite
def images(draw: Any) -> Image.Image:
    mode = draw(st.sampled_from(sorted(MODE_BITS)))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    length = raw_bytes_of(mode, size)
    pixels = draw(st.binary(min_size=length, max_size=length))
    if mode == "1":
        # the bits beyond the width are no pixels
        return Image.frombytes(
            "L", size, draw(st.binary(min_size=size[0] * size[1], max_size=size[0] * size[1]))
        ).convert("1")
    image = Image.frombytes(mode, size, pixels)
    if mode in ("P", "PA"):
        colours = draw(st.integers(1, 256))
        image.putpalette(draw(st.binary(min_size=3 * colours, max_size=3 * colours)))
    if mode == "P" and draw(st.booleans()):
        image.info["transparency"] = draw(st.one_of(st.integers(0, 255), st.binary(min_size=1, max_size=256)))
    return image


@st.composite
def arrays(draw: Any) -> Any:
    dtype = np.dtype(draw(st.sampled_from(ARRAY_DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    length = int(np.prod(shape)) * dtype.itemsize
    if dtype.kind == "U":
        return np.full(shape, draw(st.text(max_size=3)), dtype)
    if dtype.kind == "b":
        return np.frombuffer(draw(st.binary(min_size=length, max_size=length)), "u1").reshape(shape) > 127
    return np.frombuffer(draw(st.binary(min_size=length, max_size=length)), dtype).reshape(shape)


@st.composite
def tensors(draw: Any) -> torch.Tensor:
    dtype = draw(st.sampled_from(TENSOR_DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    values = torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9))))
    return values.to(dtype)


numbers = st.one_of(st.booleans(), st.integers(), st.floats(), st.complex_numbers())
numpy_scalars = st.one_of(
    st.integers(-9, 9).map(np.int16), st.floats(width=32).map(np.float32), st.booleans().map(np.bool_)
)
texts = st.one_of(st.none(), st.text(max_size=5), st.binary(max_size=5), st.just("\ud800"))
leaves = st.one_of(numbers, numpy_scalars, texts, images(), arrays(), tensors())
samples = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.one_of(st.text(max_size=3), st.integers(0, 3)), inner, max_size=3),
    ),
    max_leaves=6,
)


def equal(one: Any, other: Any) -> bool:
    """Bit for bit: NaN equals NaN of the same bits, 0.0 differs from -0.0, and types count."""
    if isinstance(one, Image.Image):
        return isinstance(other, Image.Image) and _image_facts(one) == _image_facts(other)
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return same and (
            one.numel() == 0 or bool((one.view(-1).view(torch.uint8) == other.view(-1).view(torch.uint8)).all())
        )
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, complex):
        return equal(one.real, other.real) and equal(one.imag, other.imag)
    return bool(one == other)


def _image_facts(image: Image.Image) -> tuple[Any, ...]:
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    return (
        type(image),
        image.format,
        image.mode,
        image.size,
        image.tobytes(),
        palette,
        image.info,
        dict(image.getexif()),
    )
