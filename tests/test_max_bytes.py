"""Compact sets under a budget of bytes, from real images and rows to the train loader."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10, ImageFolder

from dq_lightning import (
    EncodingConfig,
    FeatureConfig,
    PackedDataset,
    PatchConfig,
    QualityConfig,
    QuantizeConfig,
    QuantizedDataModule,
    SelectionConfig,
    load_selection,
    quantize,
)
from dq_lightning.core.errors import ConfigError, SourceError
from dq_lightning.packed.patches import unpack_image
from dq_lightning.pipeline import frontier
from dq_lightning.pipeline.frontier import Frontier
from tests.lightning_scripts.common import photos

pytestmark = pytest.mark.usefixtures("quick_collections")


@pytest.fixture
def features(tmp_path):
    """Path of ready-made features of so many samples."""

    def make(count):
        path = tmp_path / f"features-{count}.npy"
        if not path.exists():
            np.save(path, np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32))
        return FeatureConfig(encoder=str(path))

    return make


@pytest.fixture
def fewer(monkeypatch):
    """Settings are compared on few images and at few qualities."""
    monkeypatch.setattr(frontier, "COMPARED", {"small": 20, "photo": 4})
    monkeypatch.setattr(frontier, "MEASURED", {"small": 60, "photo": 60})
    monkeypatch.setattr(frontier, "QUALITIES", dict.fromkeys(("small", "photo"), (20, 40, 75, 95)))


def made(cache, data, settings):
    info = quantize(data, settings, cache_dir=cache, progress=False)
    assert info.bytes == sum(file.stat().st_size for file in Path(info.path).iterdir())
    return info


def test_real_small_images(tmp_path, cifar_root, features, caplog, monkeypatch):
    """As many as fit, down to the floor; then finer ones; each is what the codec makes of the image."""
    monkeypatch.setattr(frontier, "COMPARED", {"small": 40})
    data = Subset(CIFAR10(cifar_root, train=False), range(400))
    sizes = []
    for share, wanted in (("2%", (90, 180)), ("10%", (400, 400))):
        with caplog.at_level(logging.INFO, "dq_lightning"):
            info = made(tmp_path, data, QuantizeConfig(max_bytes=share, features=features(400)))
        told = info.encoding
        assert info.source_bytes == 400 * 3072
        assert told["max_bytes"] == info.source_bytes * int(share[:-1]) // 100
        assert list(info.seconds) == [
            name for name in ("identity", "features", "bins", "store") if name in info.seconds
        ]
        assert 0.9 * told["max_bytes"] <= info.bytes <= told["max_bytes"]
        assert wanted[0] <= info.num_samples <= wanted[1]
        assert told["psnr"] >= 26
        assert f"samples as {told['codec'].upper()} {told['quality']}" in caplog.text
        assert "dropping a fifth of the patches too, the dullest, would give" in caplog.text
        sizes.append((info.num_samples, told["psnr"]))
        errors = []
        for (image, label), position in zip(
            PackedDataset(info.path), load_selection(info.path).index.tolist(), strict=True
        ):
            plain, target = data[position]
            assert (type(image), image.size, image.info, label) == (Image.Image, (32, 32), {}, target)
            errors.append(np.mean((np.asarray(image, np.float32) - np.asarray(plain)) ** 2))
        assert 10 * np.log10(255**2 / np.mean(errors)) == pytest.approx(told["psnr"], abs=0.7)
    assert sizes == sorted(sizes)
    assert made(tmp_path, data, QuantizeConfig(max_bytes="10%", features=features(400))).reused


def test_real_photos(tmp_path, shared_dir, features, fewer):
    """Also their sides are reduced; nothing is encoded anew that is smaller as it is."""
    data = ImageFolder(shared_dir / "data" / "imagenette_224_small" / "train")
    data = Subset(data, range(0, len(data), 20))
    whole = sum(Path(data.dataset.samples[i][0]).stat().st_size for i in data.indices)
    settings = QuantizeConfig(max_bytes="8%", features=features(len(data)))
    small = made(tmp_path, data, settings)
    assert small.encoding["max_bytes"] == whole * 8 // 100
    assert 0.9 * whole * 0.08 <= small.bytes <= whole * 0.08
    assert {max(image.size) for image, _ in PackedDataset(small.path)} == {small.encoding["longest_side"] or 224}
    exact = made(tmp_path, data, QuantizeConfig(max_bytes="120%", features=features(len(data))))
    assert (exact.num_samples, exact.encoding["codec"], exact.encoding["psnr"]) == (len(data), "keep", None)
    fine = EncodingConfig("jpeg", quality=100)  # no new file is smaller
    own = made(tmp_path, data, QuantizeConfig(encoding=fine, selection=SelectionConfig(keep_ratio=1.0)))
    assert own.bytes <= exact.bytes * 1.2
    for store in (exact, own):
        for (image, _), (plain, _) in zip(PackedDataset(store.path), data, strict=True):
            assert image.tobytes() == plain.tobytes()


@pytest.mark.parametrize("seed", range(4))
def test_no_budget_is_exceeded(tmp_path, features, fewer, seed, monkeypatch):
    """Even where the estimate is far too low, the finished set fits; smaller sets are parts of larger ones."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(100, 300))
    data = photos(count, None)
    if seed % 2:
        real = Frontier.measure_again
        monkeypatch.setattr(
            Frontier, "measure_again", lambda own, one: replace(real(own, one), sample_bytes=0.6 * one.sample_bytes)
        )
    kept = []
    fixed = EncodingConfig("jpeg", quality=int(draw.integers(20, 90)), least_psnr=0.0)
    for budget in sorted(draw.integers(12_000, 40_000, 2).tolist()):
        info = made(tmp_path, data, QuantizeConfig(max_bytes=budget, encoding=fixed, features=features(count)))
        assert info.bytes <= budget
        assert (info.encoding["codec"], info.encoding["quality"]) == ("jpeg", fixed.quality)
        kept.append(set(load_selection(info.path).index.tolist()))
    assert kept[0] <= kept[1]


def test_a_fixed_number_of_samples_is_kept(tmp_path, features, fewer):
    data = photos(100, None)
    for ratio in (0.125, 0.5, 1.0):  # the first is also what is kept without a budget
        settings = QuantizeConfig(max_bytes=40_000, selection=SelectionConfig(keep_ratio=ratio), features=features(100))
        info = made(tmp_path, data, settings)
        assert info.num_samples == int(100 * ratio + 0.5)
        assert info.bytes <= 40_000
    with pytest.raises(ConfigError, match="too little for the 100 samples"):
        made(tmp_path, data, QuantizeConfig(max_bytes=9_000, selection=SelectionConfig(keep_ratio=1.0)))
    with pytest.raises(ConfigError, match="too little for one sample"):
        made(tmp_path, data, QuantizeConfig(max_bytes=500, features=features(100)))


def test_arrays_stay_arrays(tmp_path, features, fewer):
    data = [(np.asarray(image), label) for image, label in photos(60, None)]
    info = made(tmp_path, data, QuantizeConfig(max_bytes="15%", features=features(60)))
    image, label = PackedDataset(info.path)[0]
    assert (image.dtype, image.shape, type(label)) == (np.uint8, (32, 32, 3), int)
    assert info.encoding["codec"] in ("jpeg", "webp")


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_grey_images_stay_grey(tmp_path, features, codec):
    grey = [image.convert("L") for image, _ in photos(60, None)]
    kinds = (lambda image: image, np.asarray, lambda image: torch.from_numpy(np.array(image))[None])
    for kind in kinds:
        data = [(kind(image), i % 3) for i, image in enumerate(grey)]
        config = QuantizeConfig(encoding=EncodingConfig(codec), features=features(60), store="packed")
        info = made(tmp_path, data, config)
        for position, (stored, _) in zip(
            load_selection(info.path).index.tolist(), PackedDataset(info.path), strict=True
        ):
            wanted = data[position][0]
            if isinstance(wanted, Image.Image):
                assert (stored.mode, stored.size) == (wanted.mode, wanted.size)
            else:
                assert (type(stored), stored.dtype, stored.shape) == (type(wanted), wanted.dtype, wanted.shape)
            lost = np.abs(np.asarray(stored, dtype=float) - np.asarray(wanted, dtype=float)).mean()
            assert lost < 12


def test_small_images_are_kept_as_their_own_files(tmp_path, features):
    (tmp_path / "images" / "one").mkdir(parents=True)
    paths = [tmp_path / "images" / "one" / f"{i:03}.jpg" for i in range(60)]
    for path, (image, _) in zip(paths, photos(60, None), strict=True):
        image.save(path, quality=60)
    config = QuantizeConfig(max_bytes="60%", encoding=EncodingConfig("keep"), features=features(60))
    info = made(tmp_path, ImageFolder(tmp_path / "images"), config)
    # What the files of one size have in common is stored once.
    assert info.num_samples == 60
    assert info.bytes < 0.6 * sum(path.stat().st_size for path in paths)
    for path, (image, _) in zip(paths, PackedDataset(info.path), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_a_fixed_drop_ratio_is_kept_to(tmp_path, cifar_root, features, fewer):
    """As many samples as fit without their dullest quarter, down to the floor on what is kept; then finer ones."""
    images, found = CIFAR10(cifar_root, train=False), []
    data = [images[i] for i in range(150)]
    patches = PatchConfig(drop_ratio=0.25, saliency="variance", reconstruct="off")
    for budget, encoding in ((25_000, EncodingConfig()), (90_000, EncodingConfig()), (90_000, EncodingConfig("keep"))):
        settings = QuantizeConfig(max_bytes=budget, patches=patches, encoding=encoding, features=features(150))
        info = made(tmp_path, data, settings)
        assert 0.5 * budget <= info.bytes <= budget
        assert info.patch_keep_ratio == 0.75
        errors = []
        for (stored, _), position in zip(
            PackedDataset(info.path, patches="packed"), load_selection(info.path).index.tolist(), strict=True
        ):
            pixels, mask = unpack_image(stored)
            stays = mask.reshape(8, 8).repeat(4, 0).repeat(4, 1)
            errors.append(np.mean((pixels[stays].astype(np.float32) - np.asarray(data[position][0])[stays]) ** 2))
        found.append((info.num_samples, info.encoding["psnr"], float(np.mean(errors))))
        assert made(tmp_path, data, settings).reused
    (few, coarse, error), (every, fine, _), (exact, none, lossless) = found
    assert few < every == 150
    assert 26 <= coarse < fine
    assert 10 * np.log10(255**2 / error) == pytest.approx(coarse, abs=0.7)
    assert (none, lossless) == (None, 0.0)
    assert exact < 50  # 2,304 bytes of pixels each


def test_dropped_patches_within_a_budget_are_filled(tmp_path, features, fewer):
    module = QuantizedDataModule(
        photos(60),
        max_bytes="40%",
        drop_ratio=0.2,
        config={"features": features(60).to_dict()},
        cache_dir=tmp_path,
        batch_size=10,
    )
    module.prepare_data()
    module.setup("fit")
    assert module.info.bytes <= 60 * 3072 * 0.4
    assert module.data_keep_ratio == pytest.approx(0.8, abs=0.01)
    assert tuple(next(iter(module.train_dataloader()))[0].shape) == (10, 3, 32, 32)
    plain = QuantizedDataModule.from_store(module.info.path, batch_size=10, cache_dir=tmp_path)
    plain.prepare_data()
    plain.setup("fit")
    assert plain.train_dataloader().dataset[0][0].size == (32, 32)


def test_wrong_labels_and_unequal_classes_within_a_budget(tmp_path, fewer):
    """Suspects are left out and listed, and classes share what fits in equal numbers."""
    draw = np.random.default_rng(0)
    true = np.repeat(np.arange(4), (160, 120, 80, 40))
    labels = np.where(draw.random(400) < 0.2, (true + 1) % 4, true)
    np.save(tmp_path / "features.npy", (6 * np.eye(8)[true] + draw.normal(size=(400, 8))).astype(np.float32))
    data = [(image, int(label)) for (image, _), label in zip(photos(400, None), labels, strict=True)]
    features = FeatureConfig(encoder=str(tmp_path / "features.npy"))
    quality, encoding = QualityConfig(drop_worst="auto"), EncodingConfig("webp", quality=30)
    settings = QuantizeConfig(
        max_bytes=40_000,
        quality=quality,
        encoding=encoding,
        features=features,
        selection=SelectionConfig(balance="equal"),
    )
    info = made(tmp_path, data, settings)
    kept, suspects = load_selection(info.path).index, info.suspects
    assert 0.85 * 40_000 <= info.bytes <= 40_000
    assert not set(kept.tolist()) & set(suspects.index.tolist())
    wrong = labels != true
    assert 0.15 * 400 < len(suspects) < 0.35 * 400
    assert wrong[kept.numpy()].mean() < 0.03 < wrong.mean()
    counts = np.bincount(labels[kept.numpy()])
    left = np.bincount(labels[np.setdiff1d(np.arange(400), suspects.index.numpy())])
    assert all(count in (counts.max(), counts.max() - 1, most) for count, most in zip(counts, left, strict=True))
    again = made(tmp_path, data, settings)
    assert again.reused
    assert again.suspects.index.tolist() == suspects.index.tolist()
    # A list of suspects takes few bytes, and nothing but digits of its scores is lost.
    assert (Path(info.path) / "tensors.safetensors").stat().st_size < 1300 + 8 * len(suspects)
    whole = made(tmp_path, data, replace(settings, max_bytes=None, encoding=EncodingConfig())).suspects
    for name in ("index", "label", "suggested"):
        assert torch.equal(getattr(whole, name), getattr(suspects, name))
    assert suspects.score.dtype == whole.score.dtype
    assert torch.allclose(suspects.score, whole.score, rtol=1e-6)


def test_rows_of_text(tmp_path, features, caplog):
    rows = [
        {"instruction": f"Count to {i}", "input": "", "output": " ".join(map(str, range(i % 50)))} for i in range(400)
    ]
    made(tmp_path, rows, QuantizeConfig(store="packed", features=features(400)))
    with caplog.at_level(logging.INFO, "dq_lightning"):
        info = made(tmp_path, rows, QuantizeConfig(max_bytes="40%", features=features(400)))
    why = "keep_ratio changed (0.125 -> as many as fit), max_bytes changed (not set -> 40%); reusing"
    assert f"computing the compact set because {why}" in caplog.text
    assert info.bytes <= info.encoding["max_bytes"]
    assert 0 < info.num_samples < 200
    assert PackedDataset(info.path)[3] == rows[int(load_selection(info.path).index[3])]


def test_images_with_boxes_are_not_scaled(tmp_path, features, fewer):
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (5, 6, 3), dtype=np.uint8)).resize((90, 80)) for _ in range(12)]
    sides = []
    for target in (1, {"boxes": [[10, 10, 80, 90]], "labels": [1]}, torch.tensor([[10.0, 10, 80, 90]])):
        data = [(picture, target) for picture in pictures]
        info = made(tmp_path, data, QuantizeConfig(max_bytes=12_000, features=features(12)))
        sides.append(info.encoding["longest_side"])
    assert sides[0] is not None
    assert sides[1:] == [None, None]


def test_a_side_that_boxes_do_not_follow_is_told(tmp_path, features, caplog):
    pictures = [image.resize((90, 80)) for image, _ in photos(12, None)]
    encoding = EncodingConfig("jpeg", longest_side=45)
    half = SelectionConfig(keep_ratio=0.5)
    config = QuantizeConfig(encoding=encoding, store="packed", features=features(12), selection=half)
    for target, told in ((1, False), ({"boxes": [[10, 10, 80, 70]], "labels": [1]}, True)):
        caplog.clear()
        made(tmp_path, [(picture, target) for picture in pictures], config)
        assert ("they will no longer fit" in caplog.text) == told


@pytest.mark.parametrize("max_bytes", [None, 90_000])
def test_a_setting_that_changes_no_image_is_told(tmp_path, features, caplog, max_bytes):
    kept = SelectionConfig(keep_ratio=0.5 if max_bytes is None else None)
    encoding = EncodingConfig("webp") if max_bytes is None else EncodingConfig(quality=30)
    config = QuantizeConfig(
        encoding=encoding, max_bytes=max_bytes, store="packed", features=features(12), selection=kept
    )
    data = [(image, i % 2) for i, (image, _) in enumerate(photos(12, None))]
    made(tmp_path, data, config)
    assert "changes 8-bit grey and RGB images" not in caplog.text
    info = made(tmp_path, [(image.convert("RGBA"), label) for image, label in data], config)
    asked = "codec='webp'" if max_bytes is None else "quality=30"
    assert f"encoding.{asked} changes 8-bit grey and RGB images alone" in caplog.text
    assert "mode RGBA, 32 x 32 pixels" in caplog.text
    image, _ = PackedDataset(info.path)[0]
    assert image.tobytes() == data[int(load_selection(info.path).index[0])][0].convert("RGBA").tobytes()


@pytest.mark.parametrize("max_bytes", [25_000, 40_000, 60_000])
def test_images_that_no_codec_holds_among_others(tmp_path, features, max_bytes):
    data = [(image.convert("RGBA") if i % 8 == 3 else image, i % 3) for i, (image, _) in enumerate(photos(160, None))]
    info = made(tmp_path, data, QuantizeConfig(max_bytes=max_bytes, features=features(160)))
    assert 0.85 * max_bytes < info.bytes <= max_bytes


def test_what_is_advised_when_nothing_fits_is_what_would_help(tmp_path, features, fewer):
    noise = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3), dtype=np.uint8)
    data = [(Image.fromarray(pixels), 1) for pixels in noise]

    def advice(**encoding):
        config = QuantizeConfig(max_bytes=8_000, encoding=EncodingConfig(**encoding), features=features(12))
        with pytest.raises(ConfigError) as error:
            quantize(data, config, cache_dir=tmp_path, progress=False)
        return str(error.value).partition("Raise it")[2]

    assert advice() == ", or allow coarser images by an encoding.least_psnr below 26 dB"
    assert advice(codec="keep") == ", or leave codec open"


def test_rows_of_very_different_lengths_fill_the_budget(tmp_path, features):
    random = np.random.default_rng(5)
    lengths = np.minimum(60 * (1 + random.pareto(1.05, 1500)), 9_000).astype(int)
    rows = [{"text": bytes(random.integers(97, 123, length, dtype=np.uint8)).decode()} for length in lengths]
    info = made(tmp_path, rows, QuantizeConfig(max_bytes="20%", features=features(1500)))
    assert info.source_bytes > lengths.sum()
    assert 0.9 * info.encoding["max_bytes"] < info.bytes <= info.encoding["max_bytes"]


def test_all_that_a_sample_holds_counts_and_samples_of_any_kind_are_stored_as_they_are(tmp_path, features, fewer):
    pixels = np.random.default_rng(0).integers(0, 99, (100, 2, 12, 12, 3), dtype=np.uint8)
    pairs = [
        {"left": Image.fromarray(a), "right": Image.fromarray(b), "label": i % 9} for i, (a, b) in enumerate(pixels)
    ]
    settings = {"features": features(100).to_dict(), "max_bytes": "50%"}
    with pytest.raises(SourceError, match="has 2 images"):
        quantize(pairs, settings, cache_dir=tmp_path)
    info = made(tmp_path, pairs, QuantizeConfig.from_dict(settings | {"image_column": "left"}))
    assert info.source_bytes == pixels.nbytes
    assert info.source_bytes // 3 < info.bytes <= info.source_bytes // 2
    waves = [{"wave": torch.randn(50), "label": i % 3} for i in range(100)]
    info = made(tmp_path, waves, QuantizeConfig.from_dict(settings))
    assert info.bytes <= info.source_bytes // 2
    assert info.num_samples > 20
    assert torch.equal(PackedDataset(info.path)[3]["wave"], waves[int(load_selection(info.path).index[3])]["wave"])


def test_the_data_module_trains_on_what_is_stored(tmp_path, features, fewer):
    module = QuantizedDataModule(
        photos(200), max_bytes="10%", config={"features": features(200).to_dict()}, cache_dir=tmp_path, batch_size=10
    )
    module.prepare_data()
    module.setup("fit")
    assert module.info.bytes <= 200 * 3072 // 10
    images, labels = next(iter(module.train_dataloader()))
    assert (tuple(images.shape), len(labels)) == ((10, 3, 32, 32), 10)
    again = QuantizedDataModule.from_store(module.info.path, batch_size=10)
    again.setup("fit")
    assert len(again.train_dataloader().dataset) == module.info.num_samples


@pytest.mark.parametrize(
    "settings",
    [
        lambda: QuantizeConfig(max_bytes="many"),
        lambda: QuantizeConfig(max_bytes=0),
        lambda: QuantizeConfig(max_bytes="1MB", store="indices"),
        lambda: QuantizeConfig(max_bytes="1MB", patches=PatchConfig(drop_ratio=0.2, max_bytes=10)),
        lambda: QuantizeConfig(
            max_bytes="1MB", patches=PatchConfig(drop_ratio=0.2), encoding=EncodingConfig(longest_side=9)
        ),
        lambda: quantize(photos(10), QuantizeConfig(encoding=EncodingConfig(quality=50))),
        lambda: EncodingConfig("jpeg", quality=0),
        lambda: EncodingConfig("gif"),
        lambda: EncodingConfig(longest_side=0),
    ],
)
def test_contradicting_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        settings()
