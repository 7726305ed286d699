"""One writer per run directory: a lock that dies with its process, whatever kills it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

LOCK_FILE = "lock"


class RunLockedError(RuntimeError):
    """Another job writes to the directory."""


# Directories that this process holds: the kernel's lock is the process's, and gives it to a second one here.
_held: set[Path] = set()


class RunLock:
    """Holds `directory/lock`, which names the process and its host; on a file system without locks it does nothing.

    The lock is the kernel's (POSIX record lock), not the file's existence: it ends with the process, even where workers
    forked from it live on, and what a killed job leaves behind holds nobody up.

    Args:
        directory: must exist.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE
        self._directory = directory.resolve()
        self._handle = -1

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            RunLockedError: another process has it, or another run of this one.
        """
        if self._directory in _held:
            raise RunLockedError(f"another run of this process writes to {self.path.parent}: choose another directory")
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        _held.add(self._directory)
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return self
            holder = os.read(self._handle, 1000).decode(errors="replace").strip()
            self.__exit__(None, None, None)
            raise RunLockedError(
                f"{holder or 'another process'} writes to {self.path.parent}: wait for it, end it, or choose another "
                "directory"
            ) from error
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _held.discard(self._directory)
        os.close(self._handle)
