"""Rows that cost money: what was recorded is found again, and what is damaged is never taken for a row."""

import errno
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dq_lightning.cache import files
from dq_lightning.cache.api_embeddings import API_FOLDER, StoredEmbeddings
from dq_lightning.commands.cache_care import prune
from dq_lightning.core.errors import CacheError
from tests.robustness.worlds import ended, forked, paid_run
from tests.store.calls import at_call

KEYS = [bytes([i]) * 32 for i in range(6)]
ROWS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def model(root: Path) -> StoredEmbeddings:
    return StoredEmbeddings(root / "openai-model")


def recorded(root: Path) -> Path:
    """Rows of the first four texts; the file."""
    model(root).record(KEYS[:4], ROWS[:4])
    (path,) = root.rglob("*.rows")
    return path


def assert_right(found: StoredEmbeddings, expected: range | None = None) -> None:
    for number, (key, row) in enumerate(zip(KEYS, ROWS, strict=True)):
        if key in found:
            np.testing.assert_array_equal(found[key], row)
        assert expected is None or (key in found) == (number in expected)


def test_rows_are_found_by_the_next_run(tmp_path: Path) -> None:
    assert_right(model(tmp_path), range(0))
    recorded(tmp_path)
    model(tmp_path).record(KEYS[4:], ROWS[4:])
    model(tmp_path).record(KEYS[4:], ROWS[4:])
    assert len(list(tmp_path.rglob("*.rows"))) == 2
    found = model(tmp_path)
    assert_right(found, range(6))
    assert found[KEYS[0]].dtype == np.float32
    assert KEYS[0] not in StoredEmbeddings(tmp_path / "openai-another-model")


def test_no_flipped_bit_gives_a_row(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        assert_right(model(tmp_path), range(0))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert_right(model(tmp_path), range(0))
    # recorded again, it takes the place of the damaged one
    recorded(tmp_path)
    assert_right(model(tmp_path), range(4))


def test_a_file_of_another_model_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = recorded(tmp_path)
    other = tmp_path / "another" / path.name
    other.parent.mkdir()
    path.rename(other)
    assert_right(StoredEmbeddings(tmp_path / "another"), range(0))
    assert str(other) in caplog.text


def test_killed_or_failing_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(files, "observer", lambda operation, path: seen.append(operation))
    recorded(tmp_path / "undisturbed")
    assert seen.index("fsync") < seen.index("replace") < len(seen) - 1
    assert seen[-1] == "fsync"

    def kill(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    for number in range(len(seen)):
        root = tmp_path / str(number)
        expected = range(4 if number > seen.index("replace") else 0)
        child = forked(lambda root=root, number=number: disturbed(root / "killed", at_call(number, kill)))
        assert ended(child) == -signal.SIGKILL
        with pytest.raises(CacheError, match=r"No space left.*make room"):
            disturbed(root / "failed", at_call(number, fail))
        files.observer = None
        assert not list((root / "failed").rglob(".tmp-*"))
        for place in ("killed", "failed"):
            assert_right(model(root / place), expected)
            recorded(root / place)
            assert_right(model(root / place), range(4))


def disturbed(root: Path, observer) -> None:
    files.observer = observer
    recorded(root)


def test_prune_sweeps_up_after_the_killed_and_leaves_what_was_paid_for(tmp_path: Path) -> None:
    path = recorded(tmp_path / API_FOLDER)
    left = path.with_name(".tmp-another-host-1-ab")
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 30 * 86400,) * 2)
    prune(tmp_path, older_than_days=0)
    assert not left.exists()
    assert_right(model(tmp_path / API_FOLDER), range(4))


def test_nothing_is_paid_twice_after_a_kill_but_what_was_under_way(tmp_path: Path) -> None:
    asked = tmp_path / "asked"

    def pay(texts: list[str], last: int) -> None:
        with asked.open("a") as file:
            file.writelines(f"{text!r}\n" for text in texts)
        if len(asked.read_text().splitlines()) > last:
            os.kill(os.getpid(), signal.SIGKILL)

    child = forked(lambda: paid_run(tmp_path / "cache", lambda texts: pay(texts, 8)))
    assert ended(child) == -signal.SIGKILL
    assert paid_run(tmp_path / "cache", lambda texts: pay(texts, 99)).num_samples == 4
    lines = asked.read_text().splitlines()
    assert (len(lines), len(set(lines))) == (16, 12)
