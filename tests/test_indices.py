"""A choice that exists already, `indices=`: no encoder, no features, no bins; everything after them as for any other choice."""

import json
import logging
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from dq_lightning import (
    BinConfig,
    FeatureConfig,
    PackedDataset,
    PatchConfig,
    QuantizeConfig,
    QuantizedDataModule,
    SelectionConfig,
    cli,
    load_selection,
    quantize,
)
from dq_lightning.cache.entries import Cache
from dq_lightning.commands.reconstruction import reconstruct_images
from dq_lightning.core.errors import CacheError, ConfigError, DQError, StoreError
from dq_lightning.exports.images import write_image_folder
from dq_lightning.pipeline import binning, extracting, filling, plan, scoring, selecting
from tests.lightning_scripts.common import Recorder, name_of, photos, trainer

CHOSEN = [3, 30, 11, 7]
PATCHES = PatchConfig(drop_ratio=0.25, saliency="random")


@pytest.fixture
def no_encoder(monkeypatch):
    """Whoever asks for an encoder, features or bins fails."""
    for place, name in (
        (plan, "choose_encoder"),
        (extracting, "extract_features"),
        (binning, "make_shared_bins"),
        (selecting, "select"),
    ):
        monkeypatch.setattr(place, name, lambda *a, _name=name, **k: pytest.fail(f"{_name} was used"))


@pytest.mark.parametrize("kind", ["list", "array", "int16", "tensor", "file", "text", "selection"])
def test_every_form_is_the_same_choice(kind, tmp_path, no_encoder):
    file = tmp_path / "select_indices_CIFAR10_0.1.npy"
    np.save(file, np.array(CHOSEN))
    given = {
        "list": CHOSEN,
        "array": np.array(CHOSEN),
        "int16": np.array(CHOSEN, np.int16),
        "tensor": torch.tensor(CHOSEN),
        "file": file,
        "text": str(file),
    }
    first = quantize(photos(40), indices=CHOSEN, cache_dir=tmp_path)
    given["selection"] = load_selection(first.path)
    info = quantize(photos(40), indices=given[kind], cache_dir=tmp_path)
    assert info.reused
    assert info.path == first.path
    assert load_selection(info.path).index.tolist() == sorted(CHOSEN)
    assert info.num_source_samples == 40
    stations = {entry.station for entry in Cache(tmp_path).entries()}
    assert stations == {"3-selection", "5-store"}


def test_other_data_or_other_positions_are_other_entries(tmp_path, no_encoder):
    paths = {
        quantize(data, indices=chosen, cache_dir=tmp_path).path
        for data in (photos(40), photos(50))
        for chosen in ([1, 2], [1, 3], [1])
    }
    assert len(paths) == 6


def test_training_on_a_choice(tmp_path, no_encoder):
    module = QuantizedDataModule(photos(40), indices=CHOSEN, batch_size=2, num_workers=0, cache_dir=tmp_path)
    model = Recorder()
    trainer().fit(model, module)
    assert set(model.seen) == {name_of(photos(40)[i][0]) for i in CHOSEN}
    assert module.selection.bin.tolist() == [-1] * 4
    assert module.hparams["keep_ratio"] is None
    with pytest.raises(CacheError, match="given as indices="):
        module.bins  # noqa: B018
    json.loads(json.dumps(module.info.to_dict()))
    again = QuantizedDataModule(photos(40), indices=CHOSEN, batch_size=2, num_workers=0, cache_dir=tmp_path)
    again.setup("fit")
    assert again.info.content_hash == module.info.content_hash


@pytest.mark.parametrize("store", ["indices", "packed"])
def test_patches_and_store_as_asked_for(tmp_path, no_encoder, store):
    config = QuantizeConfig(store=store)
    info = quantize(photos(40, None), config, indices=CHOSEN, cache_dir=tmp_path)
    assert info.kind == store
    if store == "packed":
        assert [label for _, label in PackedDataset(info.path)] == [photos(40, None)[i][1] for i in sorted(CHOSEN)]
    patched = quantize(photos(40, None), QuantizeConfig(patches=PATCHES), indices=CHOSEN, cache_dir=tmp_path)
    assert patched.patch_keep_ratio == 0.75
    assert patched.num_samples == 4


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([1, 1], "repeated"),
        ([-1, 2], "-1"),
        ([40], "40"),
        ([], "nothing"),
        ([0.5], "integers"),
        (np.zeros(40, bool), "nonzero"),
        ([[1, 2]], "integers"),
        ("nothing.npy", "cannot be read"),
    ],
)
def test_what_is_no_choice(bad, said, tmp_path, no_encoder):
    with pytest.raises(DQError, match=said):
        quantize(photos(40), indices=bad, cache_dir=tmp_path)
    with pytest.raises(DQError, match=said):
        QuantizedDataModule(photos(40), indices=bad, cache_dir=tmp_path).prepare_data()
    if not isinstance(bad, str) and np.asarray(bad).dtype != bool:
        np.save(tmp_path / "bad.npy", np.array(bad))
        with pytest.raises(StoreError):
            quantize(photos(40), indices=tmp_path / "bad.npy", cache_dir=tmp_path)


def test_with_settings_that_choose(tmp_path):
    """The error names both, also where a keyword has the value that is the default."""
    for given in ({"keep_ratio": 0.125}, {"num_bins": 10}, {"encoder": "auto"}):
        with pytest.raises(ConfigError, match=f"indices= and {next(iter(given))}= were both given"):
            QuantizedDataModule(photos(40), indices=CHOSEN, **given)
    for config in (
        QuantizeConfig(selection=SelectionConfig(keep_ratio=0.5)),
        QuantizeConfig(bins=BinConfig(num_bins=5)),
        QuantizeConfig(features=FeatureConfig(encoder="resnet18")),
    ):
        for use in (QuantizedDataModule, quantize):
            with pytest.raises(ConfigError, match=r"indices= and config\.\w+\.\w+ were both given"):
                use(photos(40), indices=CHOSEN, config=config)
    QuantizedDataModule(photos(40), indices=CHOSEN, seed=3, labels=False, cache_dir=tmp_path).prepare_data()


class Torn(Dataset):
    """Some images cannot be read."""

    def __init__(self, bad):
        self.photos, self.bad = photos(40, None), bad

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError("torn")
        return self.photos[i]


def test_samples_that_cannot_be_read(tmp_path, no_encoder):
    """Only the chosen ones are looked at."""
    info = quantize(Torn([3, 20]), indices=CHOSEN, on_error="skip", cache_dir=tmp_path, fingerprint="torn")
    assert load_selection(info.path).index.tolist() == [7, 11, 30]
    assert info.num_unreadable == 1
    with pytest.raises(ConfigError, match="1 of them can't be read"):
        quantize(
            Torn([20]),
            QuantizeConfig(selection=SelectionConfig(keep_ratio=1.0)),
            on_error="skip",
            cache_dir=tmp_path,
            fingerprint="torn",
        )


def test_all_samples_need_no_encoder(tmp_path, no_encoder):
    module = QuantizedDataModule(
        photos(40), keep_ratio=1.0, encoder="no-such-network", num_workers=0, cache_dir=tmp_path
    )
    trainer().fit(Recorder(), module)
    assert module.selection.index.tolist() == list(range(40))
    assert module.hparams["keep_ratio"] == 1.0


def test_near_duplicates_still_need_one(tmp_path):
    config = QuantizeConfig(bins=BinConfig(num_bins=2, deduplicate=0.5), selection=SelectionConfig(keep_ratio=1.0))
    with pytest.raises(ConfigError, match="near-duplicates"):
        quantize(photos(40), config, cache_dir=tmp_path)


@pytest.fixture
def images(tmp_path):
    for i, (image, label) in enumerate(photos(40, None)):
        place = tmp_path / "images" / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    np.save(tmp_path / "chosen.npy", np.array(CHOSEN))
    return tmp_path / "images"


def test_the_command_quantize(tmp_path, images, no_encoder, capsys):
    place = ["--data_path", str(images), "--cache_dir", str(tmp_path / "cache"), "--progress", "false"]
    out = tmp_path / "out"
    cli.main(["quantize", *place, "--indices", str(tmp_path / "chosen.npy"), "--output", str(out)])
    assert np.load(out / "select_indices_images_0.1.npy").tolist() == sorted(CHOSEN)
    capsys.readouterr()
    cli.main(["info", str(out)])
    told = json.loads(capsys.readouterr().out)
    assert "keep_ratio" not in told["config"]["selection"]
    cli.main(
        ["quantize", "--config", str(out / "config.yaml"), "--progress", "false", "--cache_dir", str(tmp_path / "b")]
    )
    cli.main(["quantize", *place, "--indices", "[3, 30, 11, 7]"])
    with pytest.raises(SystemExit):
        cli.main(["quantize", *place, "--indices", str(tmp_path / "chosen.npy"), "--keep_ratio", "0.125"])
    assert "indices= and keep_ratio= were both given" in capsys.readouterr().err


def test_reconstruct_is_found_again(tmp_path, images, no_encoder, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dq_lightning")
    data, given = ImageFolder(images), {"indices": tmp_path / "chosen.npy", "progress": False}
    made = reconstruct_images(data, PATCHES, cache_dir=tmp_path / "cache", **given)
    folder = write_image_folder(made, tmp_path / "first")
    monkeypatch.setattr(scoring, "score_selection", lambda *a, **k: pytest.fail("computed again"))
    monkeypatch.setattr(filling, "write_filled", lambda *a, **k: pytest.fail("filled again"))
    made = reconstruct_images(data, PATCHES, cache_dir=tmp_path / "cache", **given)
    again = write_image_folder(made, tmp_path / "second")
    assert "reusing the compact set" in caplog.text
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    assert len(names) == 4
    for name in names:
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_reconstruct_goes_on_after_an_interruption(tmp_path, images, no_encoder, monkeypatch):
    """What was scored and packed before the filling failed is not done again."""
    data = ImageFolder(images)
    real = filling.write_filled
    monkeypatch.setattr(filling, "write_filled", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        reconstruct_images(data, PATCHES, cache_dir=tmp_path / "cache", progress=False)
    monkeypatch.setattr(filling, "write_filled", real)
    monkeypatch.setattr(scoring, "score_selection", lambda *a, **k: pytest.fail("computed again"))
    made = reconstruct_images(data, PATCHES, cache_dir=tmp_path / "cache", progress=False)
    assert len(list(made)) == 40


def test_reconstruct_in_the_mean_colour(tmp_path, images, no_encoder):
    """`reconstruct="off"` fills nothing; `"batch"`, which needs a training, fills as `"prepare"` does."""
    data, chosen = ImageFolder(images), tmp_path / "chosen.npy"
    made = {}
    for mode in ("off", "batch", "prepare"):
        config = PatchConfig(drop_ratio=0.25, saliency="random", reconstruct=mode)
        kept = reconstruct_images(data, config, indices=chosen, cache_dir=tmp_path / "cache", progress=False)
        made[mode] = [image.data for image in kept]
    assert made["batch"] == made["prepare"] != made["off"]


def test_in_a_yaml_file_of_the_cli(tmp_path, images):
    from lightning.pytorch.cli import LightningCLI

    from tests.lightning_scripts.common import QUIET

    train = {
        "class_path": "torchvision.datasets.ImageFolder",
        "init_args": {"root": str(images), "transform": {"class_path": "torchvision.transforms.ToTensor"}},
    }
    for given in ([3, 30, 11, 7], str(tmp_path / "chosen.npy")):
        arguments = {
            "data": {"train": train, "indices": given, "cache_dir": str(tmp_path / "cache"), "num_workers": 0},
            "trainer": {"max_epochs": 1},
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ran = LightningCLI(
                Recorder, QuantizedDataModule, save_config_callback=None, trainer_defaults=QUIET,
                args={"fit": arguments, "subcommand": "fit"},
            )  # fmt: skip
        assert ran.datamodule.selection.index.tolist() == sorted(CHOSEN)


def test_the_published_choice_of_cifar10(cifar_root, tmp_path, no_encoder):
    """The 6,250 row numbers that come with the package, on the whole dataset."""
    from torchvision.datasets import CIFAR10

    from dq_lightning.features.bundled import BUNDLED_ENCODER_FILE

    published = next((BUNDLED_ENCODER_FILE.parent / "ready").glob("select_indices_*CIFAR10*.npy"))
    info = quantize(CIFAR10(cifar_root), indices=published, cache_dir=tmp_path)
    assert (info.num_samples, info.num_source_samples) == (6250, 50_000)
    assert np.array_equal(load_selection(info.path).index, np.load(published))
    assert Image.fromarray(CIFAR10(cifar_root).data[0]).mode == "RGB"
