"""Hostile stores, entries and images: an error of the package, and memory that stays small."""

from pathlib import Path

from tests import warm_processes

SCRIPT = Path(__file__).with_name("hostile.py")
MOST_MEBIBYTES = 128
# any one sample may take a gibibyte
MOST_OF_A_SAMPLE = 2048


def test_what_lies_is_an_error_in_little_memory_and_a_large_sample_in_bounded_memory(tmp_path: Path) -> None:
    done = warm_processes.run([SCRIPT, tmp_path / "h"], warm_processes.environment())
    assert done.returncode == 0, done.stderr[-2000:]
    small, large = map(int, done.stdout.split()[-2:])
    assert small < MOST_MEBIBYTES
    assert large < MOST_OF_A_SAMPLE
