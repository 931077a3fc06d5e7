"""The console script: every command by itself and one after the other, on real images and rows."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import ImageFolder

from dq_lightning import cli
from dq_lightning.cache.lock import host_name
from dq_lightning.demo.sample_data import SampleCIFAR10
from dq_lightning.pipeline.compact import load_selection
from dq_lightning.selection.given import read_index
from tests import warm_processes

pytestmark = pytest.mark.usefixtures("few_bundled_images")
SAMPLE = ["--dataset", "dq_lightning.demo.sample_data.SampleCIFAR10", "--progress", "false"]
ROWS = [{"instruction": f"Say {i} in words.", "input": "", "output": "x" * (i % 7 + 1)} for i in range(40)]


def run(*arguments: object) -> None:
    cli.main([str(one) for one in arguments])


def fails(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code not in (0, None)
    return capsys.readouterr().err


@pytest.fixture
def ready(tmp_path):
    """Features of the bundled images that cost nothing: their pixels, shrunk."""
    pixels = SampleCIFAR10().data.reshape(400, 8, 4, 8, 4, 3).mean((2, 4)).reshape(400, -1)
    np.save(tmp_path / "ready.npy", (pixels / 255 - 0.5).astype(np.float32))
    return ["--encoder", str(tmp_path / "ready.npy")]


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    np.save(tmp_path / "embeds.npy", np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))
    return path


def test_quantize_repeats_from_its_resolved_config(tmp_path, ready, capsys):
    out = tmp_path / "out"
    run("quantize", *SAMPLE, *ready, "--keep_ratio", "0.1", "--bins.lam", "0.5", "--output", out)
    assert "40 of 400 samples (10.00%)" in capsys.readouterr().out
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["selection"]["keep_ratio"], settings["bins"]["lam"]) == (0.1, 0.5)
    assert json.loads((out / "info.json").read_text())["num_samples"] == 40
    index = read_index(out / "select_indices_SampleCIFAR10_0.1.npy", 400)
    assert torch.equal(load_selection(out / "compact").index, torch.from_numpy(index))
    run("quantize", "--config", out / "config.yaml", "--output", tmp_path / "again", "--progress", "false")
    again = json.loads((tmp_path / "again" / "info.json").read_text())
    assert again["reused"]
    assert again["content_hash"] == json.loads((out / "info.json").read_text())["content_hash"]


def test_stations_one_by_one_agree_with_all_at_once(tmp_path, ready):
    run("quantize", *SAMPLE, *ready, "--num_bins", "5", "--output", tmp_path / "whole")
    run("bins", tmp_path / "bins", *SAMPLE, *ready, "--num_bins", "5")
    run("sample", tmp_path / "bins", "--output", tmp_path / "sample")
    name = "select_indices_SampleCIFAR10_0.125.npy"
    assert (tmp_path / "sample" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    parts = [np.load(tmp_path / "bins" / f"select_indices_SampleCIFAR10_exp{k}.npy") for k in range(5)]
    assert [len(part) for part in parts] == [80] * 5
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(400))


def test_classes_of_clusters_come_from_the_dataset(tmp_path, ready, caplog):
    """Each of ten classes of 40 images keeps its share, which clusters alone do not see."""
    run("bins", tmp_path / "bins", *SAMPLE, *ready, "--num_bins", "2", "--bins.clusters", "7")
    counts = {}
    for named in ((), SAMPLE[:2]):
        caplog.clear()
        run(
            "sample",
            tmp_path / "bins",
            *named,
            "--keep_ratio",
            "0.2",
            "--balance",
            "equal",
            "--output",
            tmp_path / "out",
        )
        index = np.load(tmp_path / "out" / "select_indices_SampleCIFAR10_0.2.npy")
        counts[bool(named)] = np.bincount(np.array(SampleCIFAR10().targets)[index]).tolist()
        assert ("every cluster counts as a class" in caplog.text) != bool(named)
    assert counts[True] == [8] * 10
    assert counts[False] != [8] * 10


def test_selection_epochs_and_gradients(tmp_path):
    """Published: the encoder is trained on the data first, and samples compare by the gradient of the last layer."""
    source = SampleCIFAR10()
    for position in range(0, 400, 8):
        place = tmp_path / "photos" / source.classes[source.targets[position]]
        place.mkdir(parents=True, exist_ok=True)
        source[position][0].save(place / f"{position:04}.png")
    training = ["--features.selection_epochs", "2", "--features.selection_batch_size", "10", "--progress", "false"]
    for kind, trained in (("embedding", []), ("embedding", training), ("gradient", training)):
        out = tmp_path / f"{kind} {len(trained)}"
        run("bins", out, "--data_path", tmp_path / "photos", "--num_bins", "5", "--features.kind", kind, *trained)
        assert len(list(out.glob("select_indices_photos_exp*.npy"))) == 5
    settings = yaml.safe_load((tmp_path / "gradient 6" / "config.yaml").read_text())["features"]
    assert (settings["kind"], settings["selection_epochs"], settings["selection_train"]) == ("gradient", 2, "all")
    gains = [np.load(path)["gain"] for path in tmp_path.glob("*/bins.npz")]
    # three different sets of features
    assert len({gain.tobytes() for gain in gains}) == 3


def test_near_duplicates_are_listed_with_what_they_are_near_to(tmp_path, ready, capsys):
    """Inside a dataset those that deduplicate= leaves out; of another one, what is near to any sample of it."""
    command = ["duplicates", *SAMPLE[1:], *ready, "--threshold", "0.93", "--output", tmp_path / "near.csv"]
    run(*command)
    rows = list(csv.DictReader((tmp_path / "near.csv").open()))
    values, classes = np.load(tmp_path / "ready.npy").astype(float), SampleCIFAR10().targets
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    assert rows
    for row in rows:
        position, near = int(row["position"]), int(row["near"])
        assert near < position
        assert classes[near] == classes[position]
        assert float(row["cosine"]) == pytest.approx(values[near] @ values[position], abs=1e-5)
    run("bins", tmp_path / "bins", *SAMPLE, *ready, "--bins.deduplicate", "0.93")
    left_out = np.flatnonzero(np.load(tmp_path / "bins" / "bins.npz")["assignment"] == -1)
    assert sorted(int(row["position"]) for row in rows) == left_out.tolist()

    def against(*more, folder=None):
        """What is listed against every fourth sample, in folders of two sizes."""
        return [*command, "--threshold", "1.0", "--against_path", folder or tmp_path / "other", *more]

    source = SampleCIFAR10()
    chosen = list(range(0, 400, 4))
    for position in chosen:
        for side, name in ((32, "other"), (96, "large")):
            place = tmp_path / name / f"{source.targets[position]}"
            place.mkdir(parents=True, exist_ok=True)
            source[position][0].resize((side, side)).save(place / f"{position:04}.png")
    order = sorted(chosen, key=lambda position: (f"{source.targets[position]}", position))
    np.save(tmp_path / "others.npy", np.load(tmp_path / "ready.npy")[order])
    run(*against("--against_encoder", tmp_path / "others.npy"))
    rows = list(csv.DictReader((tmp_path / "near.csv").open()))
    assert sorted(int(row["position"]) for row in rows) == chosen
    assert all(order[int(row["near"])] == int(row["position"]) for row in rows)

    auto = ["--encoder", "auto"]
    for wrong, said in (
        (against(), "two .npy files"),
        (against(*auto, "--against_encoder", tmp_path / "others.npy"), "two .npy files"),
        (against(*auto, "--features.selection_epochs", "1"), "selection_epochs trains the encoder on each"),
        (against(*auto, folder=tmp_path / "large"), "stands for bundled for the one dataset and resnet50"),
        ([*command, "--against_split", "train", "--against_encoder", tmp_path / "ready.npy"], "the same data"),
        (against(*auto, "--labels", "class"), "leave labels= out"),
        ([*command, "--against_encoder", tmp_path / "others.npy"], "name it as against="),
        ([*command, "--threshold", "95"], "95 % is 0.95"),
    ):
        assert said in fails(capsys, *wrong)


def test_published_bin_files_alone_give_the_same_counts(tmp_path, ready):
    run("bins", tmp_path, *SAMPLE, *ready)
    (tmp_path / "bins.npz").unlink()
    run("sample", tmp_path, "--dataset", SAMPLE[1], "--keep_ratio", "0.25")
    chosen = read_index(tmp_path / "select_indices_SampleCIFAR10_0.25.npy", 400)
    assert np.bincount(np.array(SampleCIFAR10().targets)[chosen]).tolist() == [10] * 10
    for number in range(10):
        part = np.load(tmp_path / f"select_indices_SampleCIFAR10_exp{number}.npy")
        assert len(np.intersect1d(part, chosen)) == 10


def test_fewer_bins_replace_more(tmp_path, ready):
    run("bins", tmp_path, *SAMPLE, *ready, "--num_bins", "4")
    run("bins", tmp_path, *SAMPLE, *ready, "--num_bins", "2")
    assert len(list(tmp_path.glob("*_exp*.npy"))) == 2
    run("sample", tmp_path)


def test_reconstruct_writes_the_selected_images_with_their_labels(tmp_path):
    chosen = np.array([3, 40, 399, 170])
    np.save(tmp_path / "chosen.npy", chosen)
    run(
        "reconstruct", tmp_path / "out", *SAMPLE, "--indices", tmp_path / "chosen.npy", "--drop_ratio", "0.25",
        "--patches.saliency", "variance", "--patches.reconstruct", "off",
    )  # fmt: skip
    folder, source = ImageFolder(tmp_path / "out", allow_empty=True), SampleCIFAR10()
    positions = np.load(tmp_path / "out" / "index.npy")
    assert sorted(positions) == sorted(chosen)
    for (image, label), position in zip(folder, positions, strict=True):
        assert label == source.targets[position]
        same = (np.asarray(image) == source.data[position]).all(2).reshape(8, 4, 8, 4).all((1, 3))
        # 64 patches of 4 x 4; 48 are kept to the pixel
        assert 48 <= same.sum() < 64


def test_embed_in_pieces_and_sample(tmp_path, rows_file):
    embeds = tmp_path / "embeds.npy"
    for piece in range(3):
        np.save(
            tmp_path / f"alpaca_embeds_{piece}.npy", np.load(embeds)[piece * 15 : piece * 15 + 15].astype(np.float64)
        )
    run("embed", rows_file, "--output", tmp_path, "--merge")
    assert np.array_equal(np.load(tmp_path / "alpaca_embeds.npy"), np.load(embeds))
    run(
        "sample-text", rows_file, tmp_path / "dq.json", "--embeds", tmp_path / "alpaca_embeds.npy", "--ratio", "0.25",
        "--k", "5",
    )  # fmt: skip
    run("sample-text", rows_file, tmp_path / "random.json", "--ratio", "0.25", "--random")
    for name in ("dq", "random"):
        chosen = np.load(tmp_path / f"{name}.npy")
        assert len(chosen) == 10
        assert json.loads((tmp_path / f"{name}.json").read_text()) == [ROWS[i] for i in chosen]
    assert not np.array_equal(np.load(tmp_path / "dq.npy"), np.load(tmp_path / "random.npy"))


def test_embed_by_a_model_in_pieces_is_embed_at_once(tmp_path, rows_file):
    from tests.features.text_models import save_model

    save_model(tmp_path / "model")
    options = ["--encoder", tmp_path / "model", "--device", "cpu", "--progress", "false"]
    run("embed", rows_file, "--output", tmp_path / "once", *options)
    for piece in (2, 0, 1):
        run("embed", rows_file, "--output", tmp_path / "parts", "--index", piece, "--nums", "15", *options)
    run("embed", rows_file, "--output", tmp_path / "parts", "--merge")
    merged = np.load(tmp_path / "parts" / "alpaca_embeds.npy")
    assert merged.shape == (40, 16)
    np.testing.assert_allclose(merged, np.load(tmp_path / "once" / "alpaca_embeds_0.npy"), atol=1e-6)


def test_missing_pieces_are_named(tmp_path, rows_file, capsys):
    np.save(tmp_path / "alpaca_embeds_0.npy", np.ones((10, 4), np.float32))
    np.save(tmp_path / "alpaca_embeds_2.npy", np.ones((10, 4), np.float32))
    assert "alpaca_embeds_1.npy is missing" in fails(capsys, "embed", rows_file, "--output", tmp_path, "--merge")
    np.save(tmp_path / "alpaca_embeds_1.npy", np.ones((10, 4), np.float32))
    assert "have 30 rows" in fails(capsys, "embed", rows_file, "--output", tmp_path, "--merge")
    assert not (tmp_path / "alpaca_embeds.npy").exists()


def test_info_and_verify(tmp_path, ready, capsys):
    out = tmp_path / "out"
    run("quantize", *SAMPLE, *ready, "--output", out, "--store", "packed")
    capsys.readouterr()
    run("info", out / "compact")
    assert json.loads(capsys.readouterr().out)["num_samples"] == 50
    # the folder of the results will do as well
    run("info", out)
    assert json.loads(capsys.readouterr().out)["config"]["selection"]["keep_ratio"] == 0.125
    run("verify", out)
    assert "1 entry is intact" in capsys.readouterr().out
    run("export", out, "indices", tmp_path / "indices.npy")
    assert len(np.load(tmp_path / "indices.npy")) == 50
    capsys.readouterr()
    run("verify", out / "compact")
    assert capsys.readouterr().out.startswith("ok")
    column = next((out / "compact").glob("column-0.npy"))
    data = bytearray(column.read_bytes())
    data[len(data) // 2] ^= 1
    column.write_bytes(data)
    said = fails(capsys, "verify", out / "compact")
    assert "column-0.npy has another content than was written" in said
    cache = os.environ["DQ_LIGHTNING_CACHE"]
    run("verify", cache)
    assert "4 entries are intact" in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys):
    for arguments in ([], ["--help"]):
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        assert not stopped.value.code
        said = capsys.readouterr().out
        assert all(command in said for command in cli.COMMANDS)
    run("--version")
    assert capsys.readouterr().out.startswith("dq-lightning 0.")


def test_prune_by_age_and_size(tmp_path, ready, capsys):
    from dq_lightning.cache.entries import Cache, default_cache_dir
    from dq_lightning.cache.lock import FileLock

    run("quantize", *SAMPLE, *ready)
    cache = Cache(default_cache_dir())
    entries = cache.entries()
    assert len(entries) == 4
    run("prune", "--older_than_days", "0")
    assert "in use" in capsys.readouterr().out
    assert len(cache.entries()) == 4
    age(entries, days=2)
    run("prune", "--older_than_days", "1", "--dry_run")
    assert capsys.readouterr().out.count("would remove") == 4
    run("prune", "--older_than_days", "3")
    assert len(cache.entries()) == 4
    # the features were used last
    os.utime(entries[0].path / "tensors.safetensors")
    age(entries[:1], days=1)
    run("prune", "--max_size", f"{entries[0].bytes + 10}B")
    assert [entry.key for entry in cache.entries()] == [entries[0].key]
    with FileLock(cache.root / ".locks" / f"{entries[0].station}-{entries[0].key}"):
        run("prune", "--max_size", "0")
    assert len(cache.entries()) == 1
    run("prune", "--max_size", "0")
    assert not cache.entries()
    run("quantize", *SAMPLE, *ready)
    assert len(cache.entries()) == 4


def age(entries, days: float) -> None:
    """Let entries look as if they had been made and used some days ago."""
    then = time.time() - 86400 * days
    for entry in entries:
        manifest = entry.path / "manifest.json"
        from dq_lightning.cache import files

        values = files.read_sealed(manifest)
        values["created"] = "2020-01-01T00:00:00+00:00"
        manifest.write_bytes(files.seal(values))
        for path in entry.path.iterdir():
            os.utime(path, (then, then))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "--dataset", "CIFAR11", "--data_path", "."], "there is no torchvision.datasets.CIFAR11"),
        (["quantize", "--dataset", "CIFAR10", "--data_path", "nowhere"], "nowhere does not exist"),
        (["quantize", "--dataset", "CIFAR10", "--data_path", "."], "CIFAR10 cannot be opened"),
        (["quantize"], "no dataset was named: pass dataset=, data_path="),
        (["quantize", *SAMPLE, "--device", "gpu7"], "is not a device of torch: pass auto, cpu"),
        (["quantize", *SAMPLE, "--output", "/dev/null/results"], "cannot be written"),
        (["quantize", *SAMPLE, "--keep_ratio", "2"], "must be in (0, 1]"),
        (
            ["bins", "out", *SAMPLE, "--features.selection_epochs", "1", "--features.selection_train", "head"],
            "changes no embedding",
        ),
        (["sample", "."], "select_indices_NAME_exp0.npy"),
        (["info", "."], "no compact set"),
        (["verify", "."], "neither a compact set nor a cache"),
        (["prune"], "prune has no limit"),
        (["prune", "--max_size", "much"], "is not a size"),
        (["reconstruct", "out", *SAMPLE, "--drop_ratio", "0"], "drops no patches"),
        (["export", "no.npy", "parquet", "out.parquet"], "cannot be read as row numbers"),
        (["embed", "rows.txt"], "does not exist"),
    ],
)
def test_failures_say_what_to_do_and_leave_nothing(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_loads_no_heavy_library():
    """Loaded modules, not seconds: these don't depend on the machine."""
    code = (
        "import sys\n"
        "from dq_lightning.cli import COMMANDS, main\n"
        "for command in ([], *([name] for name in COMMANDS)):\n"
        "    try:\n        main([*command, '--help'])\n"
        "    except SystemExit as stop:\n        assert not stop.code\n"
        "print(' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "torchvision", "lightning", "timm", "transformers", "datasets", "pyarrow", "openai"}
    assert not heavy & set(done.stdout.splitlines()[-1].split())
    assert done.stdout.count("usage: dq-lightning") == len(cli.COMMANDS) + 1


def test_bins_that_do_not_tell_the_classes(tmp_path, ready, caplog):
    """Published files alone: said, with what to pass; silent when the dataset is named, or the bins know it."""
    run("bins", tmp_path / "bins", *SAMPLE, *ready, "--num_bins", "2")
    draw = ["sample", tmp_path / "bins", "--keep_ratio", "0.1"]
    run(*draw)
    (tmp_path / "bins" / "bins.npz").unlink()
    run(*draw, "--dataset", "dq_lightning.demo.sample_data.SampleCIFAR10")
    assert "classes of the samples are not known" not in caplog.text
    run(*draw)
    assert "classes of the samples are not known" in caplog.text


@pytest.mark.parametrize(("command", "function"), cli.COMMANDS.items())
def test_help_explains_every_option(command, function):
    import inspect

    documented = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert f"    {name}: " in documented, f"{command} does not explain {name}"
    assert "lightning" not in {name.split(".")[0] for name in function.__globals__}


@pytest.fixture
def folder(tmp_path):
    """Class folders of small images."""
    for number in range(18):
        place = tmp_path / "photos" / "abc"[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number:02}.png")
    np.save(tmp_path / "eighteen.npy", np.random.default_rng(0).normal(size=(18, 4)).astype(np.float32))
    return [
        "--data_path", tmp_path / "photos", "--encoder", tmp_path / "eighteen.npy", "--num_bins", "2", "--progress", "false",
    ]  # fmt: skip


def test_the_command_line_overrides_a_saved_config(tmp_path, folder, capsys):
    run("quantize", *folder, "--keep_ratio", "0.5", "--seed", "3", "--output", tmp_path / "out")
    for given, kept in (("0.125", 2), ("0.25", 5), ("1.0", 18)):
        run("quantize", "--config", tmp_path / "out" / "config.yaml", "--keep_ratio", given, "--seed", "0")
        assert f"{kept} of 18 samples" in capsys.readouterr().out
    run("bins", tmp_path / "bins", *folder)
    run("bins", tmp_path / "ten", "--config", tmp_path / "bins" / "config.yaml", "--num_bins", "3")
    assert len(list((tmp_path / "ten").glob("*_exp*.npy"))) == 3
    assert len(list((tmp_path / "bins").glob("*_exp*.npy"))) == 2


def test_no_groups_by_a_word(tmp_path, folder):
    run("bins", tmp_path / "bins", *folder, "--labels", "false")
    with np.load(tmp_path / "bins" / "bins.npz") as bins:
        assert not bins["group"].any()


def test_an_exported_folder_is_read_back(tmp_path, folder, capsys):
    run("quantize", *folder, "--keep_ratio", "0.5", "--output", tmp_path / "out")
    run("export", tmp_path / "out", "imagefolder", tmp_path / "images", *folder[:2])
    np.save(tmp_path / "nine.npy", np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32))
    capsys.readouterr()
    run("quantize", "--data_path", tmp_path / "images", "--encoder", tmp_path / "nine.npy", "--num_bins", "1")
    assert "1 of 9 samples" in capsys.readouterr().out


def test_positions_are_not_exported_from_other_data(tmp_path, folder, capsys):
    run("quantize", *folder, "--keep_ratio", "0.5", "--output", tmp_path / "out")
    images = sorted((tmp_path / "photos").rglob("*.png"))
    images[0].rename(images[0].with_name("zz.png"))
    said = fails(capsys, "export", tmp_path / "out", "imagefolder", tmp_path / "images", *folder[:2])
    assert "was made from other" in said
    assert "pass the dataset as it was then, or quantize again" in said
    assert not (tmp_path / "images").exists()


def test_what_is_in_the_way_of_an_output(tmp_path, folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for output in ("file/results", "/proc/nowhere/results"):
        assert "cannot be written" in fails(capsys, "bins", output, *folder)
    run("quantize", *folder, "--output", "out")
    assert "is a folder" in fails(capsys, "export", "out", "parquet", "folder", *folder[:2])
    assert not list(tmp_path.glob(".*"))


def test_merging_looks_at_the_rows(tmp_path, rows_file, capsys):
    np.save(tmp_path / "more.npy", np.zeros((40, 8), np.float32))
    run("embed", rows_file, "--output", tmp_path / "pieces", "--encoder", tmp_path / "embeds.npy")
    other = tmp_path / "other.json"
    other.write_text(json.dumps([row | {"output": "another"} for row in ROWS]))
    assert "does not belong to these pieces" in fails(
        capsys, "embed", other, "--output", tmp_path / "pieces", "--merge"
    )
    assert not (tmp_path / "pieces" / "alpaca_embeds.npy").exists()
    small = ["--encoder", tmp_path / "embeds.npy", "--nums", "10"]
    assert "nums=10 was given" in fails(capsys, "embed", rows_file, "--output", tmp_path / "pieces", *small)
    run("embed", rows_file, "--output", tmp_path / "pieces", "--merge")


def test_rows_are_written_under_names_that_fit(tmp_path, rows_file, capsys):
    ready = ["--embeds", tmp_path / "embeds.npy"]
    assert "must end in .json or .jsonl" in fails(capsys, "sample-text", rows_file, tmp_path / "out.npy", *ready)
    assert "leave embeds= out" in fails(capsys, "sample-text", rows_file, tmp_path / "o.json", *ready, "--random")


def test_a_signal_ends_a_command_without_leftovers(tmp_path, folder):
    code = (
        "import os, signal, sys\n"
        "from dq_lightning import cli\n"
        "from dq_lightning.exports import images\n"
        "images.write_index = lambda *given: os.kill(os.getpid(), signal.SIGTERM) or signal.pause()\n"
        "cli.main(sys.argv[1:])\n"
    )
    run("quantize", *folder, "--keep_ratio", "0.5", "--output", tmp_path / "out")
    arguments = ["export", tmp_path / "out", "imagefolder", tmp_path / "images", *folder[:2]]
    (tmp_path / "stopped.py").write_text(code)
    done = warm_processes.run([tmp_path / "stopped.py", *arguments], os.environ)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stderr.strip().endswith("finished work stays in the cache, and the next run uses it")
    assert not list(tmp_path.glob(".images*"))
    assert not (tmp_path / "images").exists()


def test_what_a_killed_command_left_of_an_output_goes(tmp_path, folder):
    run("quantize", *folder, "--keep_ratio", "0.5", "--output", tmp_path / "out")
    left = tmp_path / f".images.{host_name()}-{2**22 + 1}-abc"
    left.mkdir()
    run("export", tmp_path / "out", "imagefolder", tmp_path / "images", *folder[:2])
    assert not left.exists()
