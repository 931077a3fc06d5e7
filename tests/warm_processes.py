"""Scripts that run in processes of their own and do not pay seconds for importing the same libraries again.

One process a test session imports the heavy libraries when it is first asked for something, and forks for each script. A
script finds what a fresh interpreter has: its own arguments, environment, folder and output, and a `__main__` module. The
modules that are loaded are not fresh; tests of those start an interpreter instead. The seed of hashes is another one than that
of the tests.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "DQ_LIGHTNING_TESTS_WARM_PROCESSES"
# beside the socket: what the data module loads
OF_DATA_MODULE = "modules.json"
# set by what launches several processes
OF_LAUNCHERS = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")
HEAVY = (
    "lightning", "torchvision.datasets", "torchvision.transforms.v2", "timm", "transformers.models.llama.modeling_llama",
    "transformers.models.vit_mae.modeling_vit_mae", "dq_lightning.datamodule", "dq_lightning.pipeline.build",
    "dq_lightning.cli",
)  # fmt: skip


def begin() -> subprocess.Popen[bytes]:
    """Start the process that forks; it imports nothing before it is asked, and ends with the process that started it."""
    folder = tempfile.mkdtemp(prefix="dq_warm_")
    os.environ[ADDRESS] = f"{folder}/socket"
    command = [sys.executable, str(Path(__file__)), os.environ[ADDRESS]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


class Process:
    """A script at work.

    Args:
        command: path of the script and its arguments.
        env: its whole environment.
        cwd: the folder that it runs in; None is the present one.
    """

    def __init__(self, command: Sequence[Any], env: Mapping[str, str], cwd: Path | None = None) -> None:
        self.args = list(map(str, command))
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self._connection = socket.socket(socket.AF_UNIX)
        # the first one waits for the imports
        self._connection.settimeout(300)
        self._connection.connect(os.environ[ADDRESS])
        wanted = json.dumps({"argv": self.args, "env": dict(env), "cwd": str(cwd or Path.cwd())}).encode()
        socket.send_fds(self._connection, [len(wanted).to_bytes(4, "big")], [file.fileno() for file in self._files])
        self._connection.sendall(wanted)
        self._answers = self._connection.makefile("r")
        self._pid = int(self._answers.readline())
        self._status: int | None = None

    def wait(self, timeout: float) -> subprocess.CompletedProcess[str]:
        """Wait until it has ended and return what it printed; after so many seconds it is killed, which is an error."""
        self._connection.settimeout(timeout)
        try:
            self._status = int(self._answers.readline())
        except TimeoutError:
            raise subprocess.TimeoutExpired(self.args, timeout, *self._printed()) from None
        finally:
            self.kill()
        return subprocess.CompletedProcess(self.args, self._status, *self._printed())

    def kill(self) -> None:
        """End it, if it still runs."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        self._connection.close()

    def _printed(self) -> tuple[str, str]:
        for file in self._files:
            file.seek(0)
        return self._files[0].read(), self._files[1].read()


def run(
    command: Sequence[Any], env: Mapping[str, str], cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end, like `subprocess.run` with an interpreter before the command."""
    return Process(command, env, cwd).wait(timeout)


def environment(**more: str) -> dict[str, str]:
    """The environment without what a launcher around the tests has put there."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_LAUNCHERS}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | more


def run_ranks(command: Sequence[Any], count: int = 2, timeout: float = 240) -> list[subprocess.CompletedProcess[str]]:
    """Run a script as so many ranks of one node, as a launcher would; every one has to end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "NODE_RANK": "0"}
    ranks = [Process(command, environment(LOCAL_RANK=str(rank), **common)) for rank in range(count)]
    try:
        done = [rank.wait(timeout) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [one.returncode for one in done] == [0] * count, "\n".join(one.stdout + one.stderr for one in done)
    return done


def before_and_after_the_data_module() -> list[set[str]]:
    """The modules that a process has loaded after `import lightning`, and those after the data module was imported too."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        # that process has imported everything once it has run something
        assert run([file.name], environment()).returncode == 0
    found = json.loads(Path(os.environ[ADDRESS]).with_name(OF_DATA_MODULE).read_text())
    return [set(modules) for modules in found]


def _load(path: str) -> None:
    """Import the heavy libraries; what the data module alone loads is written down before the others come."""
    loaded = []
    for name in ("lightning", "dq_lightning.lightning"):
        __import__(name)
        loaded.append(sorted(sys.modules))
    Path(path).with_name(OF_DATA_MODULE).write_text(json.dumps(loaded))
    for name in HEAVY:
        __import__(name)
    __import__("tests.shortcuts").shortcuts.install()


def _serve(path: str) -> None:
    """Accept connections until standard input ends, each in a child."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        loaded = False
        while True:
            # nothing is ever written to standard input: it ends with the session
            if sys.stdin in select.select([listening, sys.stdin], [], [])[0]:
                break
            _reap(os.WNOHANG)
            connection, _ = listening.accept()
            if not loaded:
                _load(path)
                # the scripts do not look through the objects of the libraries, which would also copy their memory
                gc.collect()
                gc.freeze()
                loaded = True
            if os.fork() == 0:
                listening.close()
                _handle(connection)
            connection.close()
    shutil.rmtree(Path(path).parent, ignore_errors=True)
    _reap(0)


def _reap(options: int) -> None:
    """Take notice of children that have ended; with options 0 wait for all."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _handle(connection: socket.socket) -> None:
    """Start one script, tell its number and then how it ended."""
    head, output, _, _ = socket.recv_fds(connection, 4, 2)
    length, received = int.from_bytes(head, "big"), b""
    while len(received) < length:
        received += connection.recv(length - len(received))
    wanted = json.loads(received)
    child = os.fork()
    if child == 0:
        connection.close()
        _become(wanted, output)
    connection.sendall(f"{child}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _become(wanted: dict[str, Any], output: list[int]) -> None:
    """Run the script in this process and end with its status."""
    for number, descriptor in zip((1, 2), output, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    script, sys.argv = wanted["argv"][0], wanted["argv"]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = [str(Path(script).parent), *folders, *(p for p in sys.path if Path(p) not in (ROOT, ROOT / "tests"))]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__dict__.update(__file__=script, __builtins__=__builtins__)
    status: Any = 0
    try:
        for folder in folders:
            if (beside := Path(folder) / "sitecustomize.py").is_file():
                runpy.run_path(str(beside))
        exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            sys.stderr.write(f"{status}\n")
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == "__main__":
    _serve(sys.argv[1])
