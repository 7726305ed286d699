"""One writer per run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

import pytest

from spectralar.training.lock import LOCK_FILE, RunLock, RunLockedError
from tests.training.jobs import CONTEXT


def _hold(directory: Path) -> None:
    with RunLock(directory):
        if os.fork():
            (directory / "ready").touch()
        # Both go on: the child is as a loader's worker, which outlives a kill of its parent.
        until = time.monotonic() + 60
        while not (directory / "over").exists() and time.monotonic() < until:
            time.sleep(0.01)


def test_the_holder_is_named_and_its_death_frees_the_directory(tmp_path: Path) -> None:
    holder = CONTEXT.Process(target=_hold, args=(tmp_path,))
    holder.start()
    until = time.monotonic() + 60
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    with pytest.raises(RunLockedError) as refused, RunLock(tmp_path):
        pass
    expected = f"process {holder.pid} on {socket.gethostname()} writes to {tmp_path}: wait for it, end it, or choose"
    assert str(refused.value).startswith(expected)
    holder.kill()
    holder.join()
    with RunLock(tmp_path):  # though a process forked from the holder still has the file open
        assert (tmp_path / LOCK_FILE).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    with RunLock(tmp_path):
        pass
    (tmp_path / "over").touch()


def test_two_runs_of_one_process_do_not_share_a_directory(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(RunLockedError, match="another run of this process writes to"), RunLock(tmp_path):
            pass
        with pytest.raises(RunLockedError), RunLock(tmp_path / "x" / ".."):
            pass
    with RunLock(tmp_path):
        pass


def test_a_file_system_without_locks_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with RunLock(tmp_path):
        pass
