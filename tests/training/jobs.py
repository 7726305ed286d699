"""Training jobs in processes of their own, one per rank, that tests can kill; forked from a server that has imported
everything, so that a job starts in milliseconds."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Imported once, in the server: what PyTorch would otherwise import in every job, at its first step or sharding.
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor

import spectralar.training.runs  # noqa: F401
from spectralar.cli import main

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.jobs"])


class Job:
    """`world` processes that each call `target(*arguments)`; what they print goes to `folder/rank-N.txt`."""

    def __init__(self, folder: Path, world: int, target: Callable[..., Any], *arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.printed = [folder / f"rank-{rank}.txt" for rank in range(world)]
        port = _free_port()
        self.processes = [
            CONTEXT.Process(target=_enter, args=(rank, world, port, self.printed[rank], target, arguments))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 60) -> list[int | None]:
        """Exit codes by rank; what is still running after `seconds` is killed and fails the test."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in late:
            os.kill(self.processes[rank].pid or 0, signal.SIGUSR1)  # to print where it hangs
            self.processes[rank].join(1)
        self.kill()
        assert not late, f"ranks {late} hang: {self.texts()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def texts(self) -> list[str]:
        return [path.read_text() if path.exists() else "" for path in self.printed]

    def succeed(self, seconds: float = 60) -> None:
        codes = self.wait(seconds)
        assert codes == [0] * len(codes), f"{codes}: {self.texts()}"


def wait_for(log: Path, lines: int, seconds: float = 60) -> None:
    """Until a run's log has so many lines."""
    until = time.monotonic() + seconds
    while not (log.exists() and log.read_bytes().count(b"\n") >= lines):
        assert time.monotonic() < until, f"{log} has not grown"
        time.sleep(0.002)


def command(*arguments: str) -> None:
    """`spectralar ARGUMENTS` as a process of its own runs it."""
    sys.exit(main(arguments))


def _enter(rank: int, world: int, port: int, printed: Path, target: Callable[..., Any], arguments: Any) -> None:
    if world > 1:  # what torchrun sets
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})
    os.environ["COLUMNS"] = "300"
    torch.set_num_threads(1)
    handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    faulthandler.register(signal.SIGUSR1, file=handle)
    sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1)
    try:
        target(*arguments)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
