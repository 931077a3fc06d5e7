"""torchrun itself: an elastic restart goes on with what is sealed, and nodes without a shared disk end with equal sets."""

import json
import os
import subprocess
import sys

import pytest

from tests.lightning_scripts import sharing_ranks
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
