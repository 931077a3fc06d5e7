"""Budgets of bytes: the sizes of encoded images, and the choice of a setting."""

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dq_lightning.core.errors import ConfigError
from dq_lightning.core.records import StoredImage
from dq_lightning.core.sizes import budget_bytes
from dq_lightning.packed import lossy
from dq_lightning.packed.file_stream import join_file, shared_starts, split_file, split_like, write_file
from dq_lightning.packed.images import memory_bytes
from dq_lightning.packed.lossy import encode_lossy
from dq_lightning.pipeline.budget import ByteSetting, plan_bytes

TOTAL = 1000


@st.composite
def tables(draw):
    """Settings of which those that take more bytes lose less."""
    sizes = sorted(draw(st.lists(st.integers(5, 3000), min_size=1, max_size=8, unique=True)))
    errors = sorted(draw(st.lists(st.floats(10, 50), min_size=len(sizes), max_size=len(sizes), unique=True)))
    made = [ByteSetting("jpeg", number + 1, None, *pair) for number, pair in enumerate(zip(sizes, errors, strict=True))]
    return [*made, ByteSetting("keep", None, None, sizes[-1] + draw(st.integers(1, 999)))]


@given(tables(), st.integers(0, 4_000_000), st.integers(0, 200_000), st.integers(0, 500))
def test_a_plan_stays_within_the_budget_and_grows_with_it(table, budget, more, fixed):
    small = [one.sample_bytes for one in table if one.psnr >= 26]
    if budget - fixed < min(small):
        with pytest.raises(ConfigError, match="too little for one sample"):
            plan_bytes(table, budget, TOTAL, fixed_bytes=fixed)
        return
    plan, larger = (plan_bytes(table, size, TOTAL, fixed_bytes=fixed) for size in (budget, budget + more))
    assert plan.num_samples * plan.setting.sample_bytes + fixed <= budget
    assert plan.num_samples <= larger.num_samples <= TOTAL
    assert min(plan.setting.psnr, larger.setting.psnr) >= 26  # the table's last setting loses nothing
    if plan.num_samples == larger.num_samples:
        assert plan.setting.psnr <= larger.setting.psnr
    for other, count in plan.others:
        better = (count, other.merit) > (plan.num_samples, plan.setting.merit)
        assert not (better and other.psnr >= 26)


@given(tables(), st.integers(1000, 4_000_000), st.integers(1, TOTAL))
def test_a_fixed_number_of_samples_takes_the_finest_setting_that_fits(table, budget, fixed):
    fitting = [one.psnr for one in table if fixed * one.sample_bytes <= budget]
    if not fitting:
        with pytest.raises(ConfigError, match=rf"too little for the {fixed:,} samples"):
            plan_bytes(table, budget, TOTAL, num_samples=fixed)
        return
    plan = plan_bytes(table, budget, TOTAL, num_samples=fixed)
    assert plan.num_samples == fixed
    assert plan.setting.psnr == max(fitting)


@pytest.mark.parametrize(("loses", "codec"), [(-1.0, "jpeg"), (0.9, "jpeg"), (1.1, "webp")])
def test_jpeg_may_lose_one_decibel_but_no_sample(loses, codec):
    table = [ByteSetting("webp", 66, None, 300.0, 31.0), ByteSetting("jpeg", 75, None, 299.0, 31.0 - loses)]
    for fixed in (None, 50):
        assert plan_bytes(table, 30_000, 100, num_samples=fixed).setting.codec == codec
    assert plan_bytes([table[0], replace(table[1], sample_bytes=310.0)], 30_000, 100).setting.codec == "webp"
    # Not at the cost of the floor, which the other reaches.
    table = [ByteSetting("webp", 10, None, 300.0, 26.2), ByteSetting("jpeg", 20, None, 299.0, 25.5)]
    assert all(plan_bytes(table, 30_000, 100, num_samples=fixed).setting.codec == "webp" for fixed in (None, 50))


def test_one_line_tells_the_choice_and_what_it_left():
    table = [ByteSetting("jpeg", 30, None, 160.0, 26.7), ByteSetting("keep", None, None, 3090.0)]
    assert plan_bytes(table, 160_000, 5000).describe(5000) == (
        "1,000 of 5,000 samples as JPEG 30 (160 bytes each, 26.7 dB); instead of 51 samples as the dataset's own bytes "
        "(3,090 bytes each, exact)"
    )
    assert math.isinf(plan_bytes(table, 31_000, 10).setting.psnr)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 100), st.booleans(), st.integers(0, 2**32 - 1))
def test_files_come_back_from_their_beginning_and_their_rest(height, width, quality, grey, seed):
    shape = (height, width) if grey else (height, width, 3)
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
    for codec in ("jpeg", "webp"):
        data = encode_lossy(image, codec, quality)
        beginning, rest = split_file(data)
        assert beginning != b""
        assert join_file(beginning, rest) == data
        assert memory_bytes(data) == 4 * height * width
        for cut in (data, data[:-1], data[: len(data) // 2], data + b"x", beginning, beginning + b"\xff\xd9"):
            assert join_file(*split_file(cut)) == cut
            assert split_like(cut, ((b"", b""), (b"", beginning))) == split_file(cut)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_are_encoded_as_pillow_saves_them(mode, monkeypatch):
    monkeypatch.setattr(lossy, "_arguments", {})
    noise = np.random.default_rng(0).integers(0, 256, (6, 30, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels).convert(mode) for pixels in noise]
    for quality in (1, 28, 75, 100):
        for image in images:
            image.info = {"dpi": (90, 90), "comment": b"not stored with the pixels"}
            saved = io.BytesIO()
            Image.fromarray(np.asarray(image)).save(saved, "JPEG", quality=quality, subsampling="4:2:0")
            assert encode_lossy(image, "jpeg", quality) == saved.getvalue()
    large = Image.fromarray(np.asarray(images[0])).resize((300, 70))
    saved = io.BytesIO()
    large.save(saved, "JPEG", quality=60, subsampling="4:2:0", optimize=True)
    assert encode_lossy(large, "jpeg", 60) == saved.getvalue()
    assert len(lossy._arguments) == 4
    assert None not in lossy._arguments.values()


def test_sizes_leave_out_what_images_share():
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    for codec, head in (("jpeg", 623 + 2), ("webp", 20 + 7)):
        files = [StoredImage(encode_lossy(image, codec, 50), "pil", properties=b"") for image in images]
        starts = shared_starts(files)
        assert all(abs(len(file.data) - head - len(write_file(file, starts))) <= 1 for file in files)


@pytest.mark.parametrize("text", ["many", "10 %%", "%", "-5%", "0", "0%", "nan%", "1/0%"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ConfigError):
        budget_bytes(text, 1000)
