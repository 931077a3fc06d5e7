"""torchrun and the other commands of the README: restarts, nodes without a shared disk, and equal sets in every situation."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lightning_scripts import sharing_ranks
from tests.lightning_scripts.common import photos
from tests.lightning_scripts.sharing_ranks import COUNT
from tests.warm_processes import environment, run

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process reported, without any other."""
    folder = tmp_path_factory.mktemp("alone")
    done = run([sharing_ranks.__file__, folder, "alone"], environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "alone" / "report-0.json").read_text())


def reports(folder):
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in (0, 1)]


def test_elastic_restart(tmp_path, alone):
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=1", sharing_ranks.__file__]
    done = subprocess.run(
        [*command, str(tmp_path), "restart"], env=environment(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = reports(tmp_path / "restart")
    assert [report["content"] for report in found] == [alone["content"]] * 2
    assert any("samples are done already" in line for report in found for line in report["log"])
    assert sum(report["seen"] for report in found) < COUNT


@pytest.fixture
def nodes():
    """Two network namespaces, which reach each other through one cable, and the addresses of their ends."""
    names = [f"dq{os.getpid()}{end}" for end in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    lines = [f"netns add {name}" for name in names]
    lines.append(f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
    for name, address in zip(names, addresses, strict=True):
        lines += [
            f"-n {name} address add {address}/24 dev {name}",
            f"-n {name} link set {name} up",
            f"-n {name} link set lo up",
        ]
    try:
        for line in lines:
            if subprocess.run(["ip", *line.split()], capture_output=True).returncode:
                pytest.skip(f"this machine does not allow: ip {line}")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def test_nodes_without_a_shared_disk(tmp_path, nodes, alone):
    first = nodes[0][1]
    running = []
    for name, address in nodes:
        options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={first}:29500"]
        options += [f"--rdzv_conf=is_host={str(address == first).lower()}", f"--local_addr={address}"]
        command = [*TORCHRUN, *options, sharing_ranks.__file__, str(tmp_path), "apart"]
        inside = ["ip", "netns", "exec", name, *command]
        running.append(subprocess.Popen(inside, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=400)[0].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)
    found = reports(tmp_path / "apart")
    assert {report["hash"] for report in found} == {alone["hash"]}
    assert sum(report["seen"] for report in found) == COUNT
    assert all(report["seen"] for report in found)


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (image, label) in enumerate(photos(600, transform=None)):
        (folder / str(label)).mkdir(exist_ok=True)
        image.save(folder / str(label) / f"{number}.png")
    return folder


def commands_of_the_readme():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    table = readme.split("| situation | command |")[1].split("\n\n")[0]
    return {row.split("|")[1].strip(): re.search("`(.*)`", row)[1] for row in table.splitlines() if "`" in row}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def started(command, place, node, **variables):
    """Start a command of the README on one of two nodes that this machine stands for, with a process or two on each."""
    words = {
        "--nproc_per_node=8": "--nproc_per_node=1" if "nnodes" in command else "--nproc_per_node=2",
        "--nnodes=4": "--nnodes=2",
        "HOST:29500": f"127.0.0.1:{variables.pop('port', 0)}",
        "~/cache": str(place / "cache"), "/shared/cache": str(place / "cache"),
        "/local/cache": str(place / f"cache of node {node}"), "results/set": str(place / f"set of node {node}"),
    }  # fmt: skip
    parts = [words.get(part, part) for part in shlex.split(command)]
    parts = [part.replace("HOST:29500", words["HOST:29500"]) for part in parts]
    starts = {"dq-lightning": [sys.executable, "-m", "dq_lightning"], "torchrun": TORCHRUN, "python": [sys.executable]}
    running = environment() | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [*starts[parts[0]], *parts[1:]], env=running, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def on_a_laptop(tmp_path_factory, folder_of_images):
    """The content hash of the set that the first command makes."""
    place = tmp_path_factory.mktemp("laptop")
    command = next(iter(commands_of_the_readme().values())).replace("~/data", str(folder_of_images))
    running = started(command, place, 0)
    said = running.communicate(timeout=300)[0]
    assert running.returncode == 0, said
    return content(place / "set of node 0")


def content(made):
    return json.loads((made / "info.json").read_text())["content_hash"]


@pytest.mark.parametrize("situation", list(commands_of_the_readme())[1:])
def test_commands_of_the_readme_give_one_set(situation, tmp_path, folder_of_images, on_a_laptop):
    command = re.sub(r"(~|/shared|/local)/data", str(folder_of_images), commands_of_the_readme()[situation])
    if situation == "SLURM":
        srun, command = command.split(" python ")
        assert srun == "srun --ntasks-per-node=8"
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
        step |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0"}
        tasks = [step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in (0, 1)]
        running = [started(f"python {command}", tmp_path, node, **task) for node, task in enumerate(tasks)]
    else:
        port, nodes = free_port(), 2 if "--nnodes" in command else 1
        running = [started(command, tmp_path, node, port=port) for node in range(nodes)]
    said = [process.communicate(timeout=400)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), "\n".join(said)
    assert "features: other ranks did" in "".join(said)
    assert content(tmp_path / "set of node 0") == on_a_laptop
    for cache in tmp_path.glob("cache*"):
        assert list(cache.glob("5-store/*/compact.json")), f"{cache} has no finished set"
    assert len(list(tmp_path.glob("cache*"))) == (2 if "no shared disk" in situation else 1)
