"""The training examples with the published recipes run, at a small size, on the files of the commands."""

import os
import pickle
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image

from dq_lightning import cli
from dq_lightning.core.errors import StoreError
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.exports.published import open_image_folder
from tests import warm_processes
from tests.published_table import words
from tests.test_examples import EXAMPLES, run, write_small_cifar10

QUIET = ["--accelerator", "cpu", "--num_workers", "0", "--quiet"]
SMALL = [
    *QUIET,
    *["--epochs", "1", "--limit_batches", "1", "--batch_size", "16", "--eval_batch_size", "16", "--seeds", "0"],
]
PUBLISHED = {
    "model": "resnet50", "epochs": "260", "lr": "0.6", "reprob": "0.6", "remode": "pixel", "batch_size": "128",
    "aug_splits": "3", "aa": "rand-m9-mstd0.5-inc1",
}  # fmt: skip


def default(name: str, option: str) -> str:
    """The default that an example's parser has."""
    found = re.search(rf'"--{option}",[^\n]*default=([^,)\n]+)', (EXAMPLES / name).read_text(encoding="utf-8"))
    assert found is not None, option
    return found[1].strip('"')


def test_defaults_are_the_published_ones():
    assert [default("cifar10.py", name) for name in ("epochs", "learning_rate")] == ["200", "0.1"]
    assert {name: default("imagenet.py", name) for name in PUBLISHED} == PUBLISHED


def test_cifar10_trains_on_rows_of_a_file(tmp_path):
    write_small_cifar10(tmp_path)
    name = "select_indices_CIFAR10_0.02.npy"
    np.save(tmp_path / name, np.arange(0, 2000, 50))
    printed = run("cifar10.py", "--data", str(tmp_path), "--select_indices", name, *SMALL, cwd=tmp_path)
    assert f"{name}, batches of 16, seed 0" in printed
    assert "(mean of 1 runs, last epoch)" in printed


@pytest.mark.slow
def test_cifar10_trains_on_what_dq_chooses(tmp_path):
    write_small_cifar10(tmp_path)
    printed = run("cifar10.py", "--data", str(tmp_path), "--keep_ratio", "0.1", *SMALL, cwd=tmp_path)
    assert "DQ 10.0%, batches of 16, seed 0" in printed


@pytest.mark.slow
def test_cifar10_trains_on_reconstructed_images(tmp_path):
    write_small_cifar10(tmp_path)
    np.save(tmp_path / "rows.npy", np.arange(0, 2000, 50))
    cli.main(
        ["reconstruct", str(tmp_path / "pixel"), "--dataset", "dq_lightning.demo.sample_data.SampleCIFAR10", "--indices",
         str(tmp_path / "rows.npy"), "--patches.saliency", "random", "--patches.reconstruct", "off", "--progress", "false"]
    )  # fmt: skip
    files = ["--data_dir", "pixel", "--select_indices", "rows.npy"]
    assert "last epoch" in run("cifar10.py", "--data", str(tmp_path), *files, *SMALL, cwd=tmp_path)


@pytest.mark.slow
def test_cifar10_names_images_that_are_missing(tmp_path):
    write_small_cifar10(tmp_path)
    np.save(tmp_path / "rows.npy", np.array([1, 2, 3]))
    (tmp_path / "pixel" / "cat").mkdir(parents=True)
    files = ["--data_dir", "pixel", "--select_indices", "rows.npy"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(EXAMPLES.parent)])}
    done = warm_processes.run([EXAMPLES / "cifar10.py", "--data", ".", *files, *SMALL], environment, tmp_path)
    assert done.returncode != 0
    assert "index.npy is missing: make the folder with" in done.stderr


@pytest.fixture
def photos(shared_dir, tmp_path):
    """12 training and 4 validation photos of each of three classes."""
    for split, count in (("train", 12), ("val", 4)):
        for folder in sorted((shared_dir / "data" / "imagenette_224_small" / split).iterdir())[:3]:
            (tmp_path / "photos" / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, tmp_path / "photos" / split / folder.name)
    return tmp_path / "photos"


def test_imagenet_recipe_on_small_photos(photos, tmp_path):
    """The command of docs/published.md, at a small size."""
    np.save(tmp_path / "rows.npy", np.arange(0, 36, 3))
    photos.rename(tmp_path / "data_imagenet")
    # the images of the file alone, as `dq-lightning reconstruct` writes them; photos need no encoder for that, and no network
    cli.main(
        ["reconstruct", str(tmp_path / "results" / "pixel_quantized_imagenet"), "--dataset", "ImageNet", "--data_path",
         str(tmp_path / "data_imagenet"), "--indices", str(tmp_path / "rows.npy"), "--patches.saliency", "variance",
         "--patches.reconstruct", "off", "--progress", "false"]
    )  # fmt: skip
    python, script, *arguments = words("distributed_train.sh 8", tmp_path, FILE=tmp_path / "rows.npy")
    assert (python, script) == ("python", "examples/imagenet.py")
    small = ["--devices", "1", "--model", "resnet18", "--img_size", "64", "--warmup_epochs", "1", "--batch_size", "4"]
    small += ["--precision", "32-true", "--output", "logs", *QUIET]
    run("imagenet.py", *arguments, *small, "--epochs", "1", cwd=tmp_path)
    printed = run("imagenet.py", *arguments, *small, "--epochs", "2", "--resume", cwd=tmp_path)
    saved = torch.load(tmp_path / "logs" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (1, 6)
    assert re.search(r"accuracy after the last epoch: \d+\.\d\d % \(12 training images\)", printed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["imagenet.py", "photos", "--select_indices", "rows.npy"], "fill no batch of 128"),
        (["cifar10.py", "--data", ".", "--select_indices", "twice.npy"], "with 1 of them repeated"),
        (["cifar10.py", "--data", "nowhere", "--select_indices", "rows.npy"], "nowhere holds no CIFAR-10"),
    ],
)
def test_examples_say_what_is_wrong(arguments, said, photos, tmp_path):
    np.save(tmp_path / "rows.npy", np.arange(8))
    np.save(tmp_path / "twice.npy", np.array([1, 2, 2]))
    write_small_cifar10(tmp_path)
    name, *rest = arguments
    small = ["--model", "resnet18", "--img_size", "64", *QUIET] if name == "imagenet.py" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(EXAMPLES.parent)])}
    done = warm_processes.run([EXAMPLES / name, *rest, *small], environment, tmp_path)
    assert done.returncode != 0
    assert said in done.stderr.splitlines()[-1]


def test_lightning_cli_example(tmp_path):
    write_small_cifar10(tmp_path, every=10)
    trainer = {
        "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "accelerator": "cpu",
        "enable_progress_bar": "false", "default_root_dir": tmp_path,
    }  # fmt: skip
    settings = [f"--trainer.{name}={value}" for name, value in trainer.items()]
    settings += ["--data.init_args.batch_size=16", "--data.init_args.num_workers=0"]
    # the file as it is, but for the folder of the data
    text = (EXAMPLES / "lightning_cli" / "cifar10.yaml").read_text(encoding="utf-8")
    (tmp_path / "cifar10.yaml").write_text(text.replace("root: data", f"root: {tmp_path}"), encoding="utf-8")
    run("lightning_cli/train.py", "fit", "--config", "cifar10.yaml", *settings, cwd=tmp_path)
    assert list(tmp_path.rglob("*.ckpt"))


def test_slurm_script_starts_torchrun_with_its_arguments(tmp_path):
    """On one machine, and through stand-ins of srun and scontrol on two."""
    tools = tmp_path / "tools"
    tools.mkdir()
    scripts = {"torchrun": 'echo torchrun "$@"', "srun": 'echo srun; "$@"', "scontrol": "echo first; echo second"}
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "GPUS": "2"}
    command = ["bash", str(EXAMPLES / "slurm.sh"), "data", "--keep_ratio", "0.1"]

    def printed() -> str:
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert printed().startswith("torchrun --nnodes 1 --nproc_per_node 2 --standalone examples/imagenet.py data ")
    assert printed().rstrip().endswith("--keep_ratio 0.1 --num_nodes 1 --devices 2")
    environment |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert printed().startswith("srun\ntorchrun --nnodes 2")
    assert "--rdzv_endpoint first:29500" in printed()


def test_the_published_folder_of_reconstructed_images(tmp_path):
    """Class folders are labels, as numbers; the names of the files are positions; what tells no position is an error."""
    for label, position in ((9, 4), (10, 2), (10, 7), (100, 11)):
        (tmp_path / "pixel" / str(label)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (position, 0, 0)).save(tmp_path / "pixel" / str(label) / f"{position}.png")
    images, positions = pickle.loads(pickle.dumps(open_image_folder(tmp_path / "pixel")))
    seen = {
        position: (np.asarray(image)[0, 0, 0], label)
        for position, (image, label) in zip(positions, images, strict=True)
    }
    assert seen == {4: (4, 9), 2: (2, 10), 7: (7, 10), 11: (11, 100)}
    assert images.targets == [label for _, label in images.samples]
    (tmp_path / "pixel" / "9" / "x.png").write_bytes((tmp_path / "pixel" / "9" / "4.png").read_bytes())
    with pytest.raises(StoreError, match=r"9/x\.png is not a position"):
        open_image_folder(tmp_path / "pixel")
    np.save(tmp_path / "pixel" / "index.npy", np.arange(4))
    with pytest.raises(StoreError, match="5 images, but 4 different positions"):
        open_image_folder(tmp_path / "pixel")
    with pytest.raises(StoreError, match="no class folders with images"):
        open_image_folder(tmp_path / "nowhere")


def test_cifar10_saves_and_goes_on(tmp_path):
    """The second start trains the second epoch alone; a third one only measures. The images are those of a published folder."""
    write_small_cifar10(tmp_path)
    rows = np.arange(0, 2000, 50)
    np.save(tmp_path / "rows.npy", rows)
    for row in rows.tolist():
        image, label = SampleCIFAR10()[row]
        (tmp_path / "pixel" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "pixel" / str(label) / f"{row}.png")
    arguments = ["--data", str(tmp_path), "--data_dir", "pixel", "--select_indices", "rows.npy", "--output", "logs"]
    small = [*SMALL, "--limit_batches", "2", "--batch_size", "4", "--eval_batch_size", "4"]
    run("cifar10.py", *arguments, *small, "--epochs", "1", cwd=tmp_path)
    saved = tmp_path / "logs" / "rows_seed0" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 2
    for _ in range(2):
        printed = run("cifar10.py", *arguments, *small, "--epochs", "2", "--resume", cwd=tmp_path)
        assert torch.load(saved, weights_only=True)["global_step"] == 4
        assert "after the last epoch" in printed
