"""The data module in a YAML file, through the real LightningCLI."""

import json
import sys
import textwrap
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI

from dq_lightning import QuantizedDataModule
from tests.lightning_scripts.common import QUIET, Recorder, photos

CONFIG = """
trainer: {{max_epochs: 1, devices: 1}}
data:
  class_path: dq_lightning.QuantizedDataModule
  init_args:
    train:
      class_path: torchvision.datasets.ImageFolder
      init_args:
        root: {root}
        transform:
          class_path: torchvision.transforms.Compose
          init_args:
            transforms:
              - class_path: torchvision.transforms.RandomHorizontalFlip
              - class_path: torchvision.transforms.ToTensor
    val:
      class_path: torchvision.datasets.ImageFolder
      init_args:
        root: {root}
        transform: {{class_path: torchvision.transforms.ToTensor}}
    keep_ratio: 0.5
    num_bins: 4
    batch_size: 6
    cache_dir: {cache}
"""


class LinkedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")


@pytest.fixture
def config(tmp_path):
    root = tmp_path / "images"
    for i, (image, label) in enumerate(photos(40, transform=None)):
        place = root / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    path = tmp_path / "config.yaml"
    path.write_text(textwrap.dedent(CONFIG.format(root=root, cache=tmp_path / "cache")))
    return path


def run(arguments, **settings):
    return LinkedCLI(
        Recorder, QuantizedDataModule, subclass_mode_data=True, save_config_callback=None, args=arguments,
        trainer_defaults=QUIET, **settings,
    )  # fmt: skip


def test_fit_from_yaml(config):
    cli = run(["fit", f"--config={config}"])
    assert cli.model.hparams.num_classes == 10
    assert cli.model.layer.out_features == 10
    assert cli.datamodule.info.num_samples == 20
    assert cli.datamodule.config.bins.num_bins == 4
    assert cli.trainer.global_step == 4
    assert isinstance(cli.datamodule.train_dataloader().dataset[0][0], torch.Tensor)
    assert len(cli.datamodule.val_dataloader().dataset) == 40


def test_overrides_from_the_command_line(config):
    cli = run(
        [
            "fit",
            f"--config={config}",
            "--data.init_args.keep_ratio=0.25",
            "--data.init_args.num_workers=0",
            "--data.init_args.store=packed",
            "--data.init_args.encoder=bundled",
            "--data.init_args.drop_last=true",
        ]
    )
    assert cli.datamodule.info.num_samples == 10
    assert cli.datamodule.info.kind == "packed"
    assert cli.trainer.global_step == 1
    cli = run(["validate", f"--config={config}"])
    assert cli.trainer.callback_metrics["val_loss"] > 0


@pytest.mark.parametrize("form", ["data.init_args.train.init_args.root", "data.train.root"])
def test_one_argument_of_a_dataset_from_the_command_line(config, tmp_path, form):
    """The rest of it stays as the file has it."""
    half = tmp_path / "half"
    for path in sorted((tmp_path / "images").rglob("*.png"))[::2]:
        (half / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(half / path.parent.name / path.name)
    train = instantiated(config, f"--{form}={half}")
    assert type(train.train).__name__ == "ImageFolder"
    assert (train.train.root, len(train.train)) == (str(half), 20)
    assert type(train.train.transform).__name__ == "Compose"
    assert train.val.root == str(tmp_path / "images")


class Given(QuantizedDataModule):
    """Keeps what it is given."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.train, self.val = args[0] if args else kwargs["train"], kwargs["val"]


def instantiated(config, *arguments):
    text = config.read_text().replace("dq_lightning.QuantizedDataModule", f"{__name__}.Given")
    config.write_text(text)
    return run([f"--config={config}", *arguments], run=False).datamodule


def test_a_function_makes_the_dataset(config, tmp_path):
    """`datasets.load_dataset` by name, its arguments from the file, or whole from the command line; never silently another."""
    whole = {"class_path": "datasets.load_dataset", "init_args": {"path": "imagefolder", "split": "train"}}
    whole["init_args"]["data_dir"] = str(tmp_path / "images")
    values = yaml.safe_load(config.read_text())
    values["data"]["init_args"]["train"] = whole
    config.write_text(yaml.safe_dump(values))
    assert len(instantiated(config).train) == 40
    whole["init_args"]["split"] = "train[:30]"
    assert len(instantiated(config, f"--data.init_args.train={json.dumps(whole)}").train) == 30
    # jsonargparse puts our words into an error of its own
    with pytest.raises(ValueError, match=r"train= is no dataset.*--data.init_args.train="):
        instantiated(config, "--data.init_args.train.init_args.split=train")


def test_full_config_from_yaml(config, tmp_path):
    text = config.read_text() + textwrap.indent(
        textwrap.dedent(
            """
            config:
              features: {encoder: bundled, batch_size: 16}
              bins: {lam: 0.5}
              selection: {draw: rank}
            """
        ),
        "    ",
    )
    config.write_text(text)
    cli = run(["fit", f"--config={config}"])
    assert cli.datamodule.config.bins.lam == 0.5
    assert cli.datamodule.config.bins.num_bins == 4
    assert cli.datamodule.config.selection.draw == "rank"
    assert cli.datamodule.info.num_samples == 20


def test_the_class_alone_from_yaml(config, monkeypatch, tmp_path):
    """Without subclass mode the data module's arguments stand directly under `data`."""
    text = config.read_text().replace("  class_path: dq_lightning.QuantizedDataModule\n  init_args:\n", "")
    config.write_text(text)
    cli = LightningCLI(
        Recorder, QuantizedDataModule, save_config_callback=None, trainer_defaults=QUIET,
        args=["fit", f"--config={config}", "--data.seed=3", "--trainer.enable_checkpointing=true",
              f"--trainer.default_root_dir={tmp_path}"],
    )  # fmt: skip
    assert cli.datamodule.config.selection.seed == 3
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    stored = torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
    assert stored["keep_ratio"] == 0.5
    assert "train" not in stored


def test_help_names_every_setting(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        LightningCLI(Recorder, QuantizedDataModule, args=["fit", "--help"])
    told = capsys.readouterr().out
    for name in ("keep_ratio", "num_bins", "encoder", "eval_batch_size", "cache_dir", "verify"):
        assert f"--data.{name}" in told
    assert "share of the samples that is kept" in told


class OwnArguments(QuantizedDataModule):
    """A user's subclass with arguments of its own."""

    def __init__(self, cache: str, share: float = 0.25):
        super().__init__(photos(), keep_ratio=share, num_bins=5, cache_dir=cache)


class Inside(LightningDataModule):
    """A user's data module that makes one of ours."""

    def __init__(self, cache: str):
        super().__init__()
        self.inner = QuantizedDataModule(photos(), keep_ratio=0.25, num_bins=5, cache_dir=cache)

    def prepare_data(self):
        self.inner.prepare_data()

    def setup(self, stage):
        self.inner.setup(stage)

    def train_dataloader(self):
        return self.inner.train_dataloader()


@pytest.mark.parametrize("kind", [OwnArguments, Inside])
def test_classes_with_arguments_of_their_own(kind, tmp_path):
    cli = LightningCLI(
        Recorder, kind, save_config_callback=None, trainer_defaults=QUIET,
        args=["fit", f"--data.cache={tmp_path / 'cache'}", "--trainer.max_epochs=1"],
    )  # fmt: skip
    assert cli.trainer.global_step > 0
    ours = cli.datamodule if kind is OwnArguments else cli.datamodule.inner
    assert ours.hparams["keep_ratio"] == 0.25
