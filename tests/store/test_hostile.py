"""Hostile stores, entries and images: an error of the package, and memory that stays small."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("hostile.py")
MOST_MEBIBYTES = 64


def test_what_lies_is_an_error_in_little_memory(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "h")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < MOST_MEBIBYTES
