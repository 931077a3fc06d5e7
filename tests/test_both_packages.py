"""Lightning comes in two packages that share no class: the data module of each trains under its own Trainer and CLI."""

import copy
import json
import pickle
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
from lightning.pytorch.cli import LightningCLI as LightningsCLI
from pytorch_lightning.cli import LightningCLI as PytorchLightningsCLI
from torch.utils.data import DataLoader

import dq_lightning
import dq_lightning.pytorch
from dq_lightning.core.errors import ConfigError
from dq_lightning.pipeline import extracting
from tests.lightning_scripts.common import QUIET, Recorder, held_out, photos
from tests.test_lightning_cli import CONFIG, LinkedCLI
from tests.warm_processes import run_ranks

SCRIPT = Path(__file__).parent / "lightning_scripts" / "pytorch_lightning_ranks.py"


class PlRecorder(pl.LightningModule):
    """A linear classifier, and where its batches came from."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(3, num_classes)

    training_step = Recorder.training_step
    validation_step = Recorder.validation_step
    test_step = Recorder.test_step
    predict_step = Recorder.predict_step
    step = Recorder.step
    on_train_epoch_start = Recorder.on_train_epoch_start
    configure_optimizers = Recorder.configure_optimizers
    seen: ClassVar[list[int]] = []
    epochs: ClassVar[list[list[int]]] = []


class LightningsOwn(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(photos(40), 8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(held_out(), 8)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.moved = getattr(self, "moved", 0) + 1
        return batch


class PytorchLightningsOwn(pl.LightningDataModule):
    train_dataloader = LightningsOwn.train_dataloader
    val_dataloader = LightningsOwn.val_dataloader
    on_after_batch_transfer = LightningsOwn.on_after_batch_transfer


# package, its class of ours, a model, and a user's own data module
LIGHTNING = (L, dq_lightning.QuantizedDataModule, Recorder)
PYTORCH = (pl, dq_lightning.pytorch.QuantizedDataModule, PlRecorder)
BOTH = pytest.mark.parametrize(
    ("package", "quantized", "model"), [LIGHTNING, PYTORCH], ids=["lightning", "pytorch_lightning"]
)
OTHER = pytest.mark.parametrize(
    ("package", "quantized", "model"),
    [(L, PYTORCH[1], Recorder), (pl, LIGHTNING[1], PlRecorder)],
    ids=["theirs", "ours"],
)
GIVEN = {"keep_ratio": 0.25, "num_bins": 2, "batch_size": 5, "num_workers": 0}


def trainer(package, **settings):
    return package.Trainer(**({"max_epochs": 1, "devices": 1} | QUIET | settings))


@BOTH
@pytest.mark.parametrize("by_name", [True, False])
def test_fit_validate_test_predict(package, quantized, model, by_name, tmp_path):
    module = quantized(photos(40), val=held_out(), test=held_out(), predict=held_out(), cache_dir=tmp_path, **GIVEN)
    running, network = trainer(package), model()
    for task in (running.fit, running.validate, running.predict, running.test):
        task(network, datamodule=module) if by_name else task(network, module)
    assert running.callback_metrics["test_loss"] > 0
    assert module.info.num_samples == 10
    assert isinstance(module, package.LightningDataModule)
    assert running.datamodule is module


@BOTH
def test_training_goes_on_from_a_checkpoint(package, quantized, model, tmp_path):
    running = trainer(package, enable_checkpointing=True, default_root_dir=tmp_path)
    running.fit(model(), quantized(photos(40), cache_dir=tmp_path / "cache", **GIVEN))
    (saved,) = tmp_path.rglob("*.ckpt")
    again = trainer(package, max_epochs=2)
    again.fit(
        model(), quantized(photos(40), cache_dir=tmp_path / "cache", **GIVEN), ckpt_path=saved, weights_only=False
    )
    assert again.global_step == 4
    with pytest.raises(dq_lightning.DQError, match="the checkpoint was trained on the compact set"):
        trainer(package, max_epochs=3).fit(
            model(),
            quantized(photos(40), cache_dir=tmp_path / "cache", **GIVEN | {"keep_ratio": 0.5}),
            ckpt_path=saved,
            weights_only=False,
        )


@BOTH
@pytest.mark.parametrize("own", [LightningsOwn, PytorchLightningsOwn])
def test_a_data_module_of_either_package_is_wrapped(package, quantized, model, own, tmp_path):
    inner = own()
    module = quantized.from_datamodule(inner, keep_ratio=0.25, num_bins=2, cache_dir=tmp_path)
    running = trainer(package)
    running.fit(model(), module)
    assert running.global_step == 2
    assert inner.moved >= 2
    assert inner.trainer is running


@OTHER
@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("by_name", [True, False])
def test_the_wrong_pair_is_told_before_any_work(package, quantized, model, task, by_name, tmp_path, monkeypatch):
    monkeypatch.setattr(extracting, "extract_features", lambda *a, **k: pytest.fail("work was done"))
    module = quantized(photos(40), val=held_out(), test=held_out(), predict=held_out(), cache_dir=tmp_path, **GIVEN)
    run = getattr(trainer(package), task)
    fitting = "from dq_lightning import Q" if package is L else r"from dq_lightning\.pytorch import Q"
    with pytest.raises(ConfigError, match=fitting):
        run(model(), datamodule=module) if by_name else run(model(), module)


@BOTH
def test_the_class_of_a_package(package, quantized, model, tmp_path):
    """Hooks and help are the same for both; copies in other processes are whole."""
    assert issubclass(quantized, package.LightningDataModule)
    assert not {name for name in vars(quantized) if not name.startswith("__")} - {"_abc_impl"}
    assert "keep_ratio: share of the samples" in quantized.__doc__
    module = quantized(photos(40), cache_dir=tmp_path, **GIVEN)
    module.prepare_data()
    module.setup("fit")
    assert module.hparams == {"keep_ratio": 0.25, "num_bins": 2, "seed": 0}
    for same in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(same) is quantized
        assert same.info == module.info
        assert len(same.train_dataloader()) == 2
    assert quantized.from_datasets(photos(40), batch_size=4, num_workers=0).batch_size == 4


@pytest.fixture
def config(tmp_path):
    for i, (image, label) in enumerate(photos(40, transform=None)):
        place = tmp_path / "images" / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i}.png")
    text = CONFIG.format(root=tmp_path / "images", cache=tmp_path / "cache")
    text = textwrap.dedent(text).replace("dq_lightning.Q", "dq_lightning.pytorch.Q")
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


class PlLinkedCLI(PytorchLightningsCLI):
    add_arguments_to_parser = LinkedCLI.add_arguments_to_parser


def test_cli_of_pytorch_lightning(config):
    settings = {"save_config_callback": None, "trainer_defaults": QUIET}
    arguments = [
        "fit",
        f"--config={config}",
        "--data.init_args.keep_ratio=0.25",
        "--data.init_args.train.init_args.root",
    ]
    cli = PlLinkedCLI(
        PlRecorder, pl.LightningDataModule, subclass_mode_data=True, args=[*arguments, str(config.parent / "images")],
        **settings,
    )  # fmt: skip
    assert type(cli.datamodule) is dq_lightning.pytorch.QuantizedDataModule
    assert cli.datamodule.info.num_samples == 10
    assert cli.model.hparams.num_classes == 10
    head = "  class_path: dq_lightning.pytorch.QuantizedDataModule\n  init_args:\n"
    config.write_text(config.read_text().replace(head, ""))
    cli = PytorchLightningsCLI(
        PlRecorder, dq_lightning.pytorch.QuantizedDataModule, args=["fit", f"--config={config}"], **settings
    )
    assert cli.datamodule.info.num_samples == 20
    with pytest.raises(Exception, match=r"LightningDataModule|Lightning class"):
        LightningsCLI(
            Recorder, dq_lightning.pytorch.QuantizedDataModule, args=["fit", f"--config={config}"], **settings
        )


def test_help_of_the_cli_of_pytorch_lightning(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        PytorchLightningsCLI(PlRecorder, dq_lightning.pytorch.QuantizedDataModule, args=["fit", "--help"])
    told = capsys.readouterr().out
    assert "--data.indices" in told
    assert "share of the samples that is kept" in told


def test_two_processes_of_pytorch_lightning(tmp_path):
    run_ranks([SCRIPT, tmp_path])
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert first["hash"] == second["hash"]
    assert len({*first["seen"], *second["seen"]}) == 10
