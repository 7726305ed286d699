"""Processes that prepare batches: they end with the training process, and warn without waiting for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spectralar.training.data.workers import answers, processors

# What every program here begins with.
IMPORTS = "from tests.training.data.test_workers import REQUESTS, Large, answers\n"
REQUESTS = [(0, np.arange(4)) for _ in range(100)]


class Large:
    """Answers of which a few fill a pipe."""

    def __getitem__(self, request):
        return np.zeros(100_000, np.uint8)


class Streams:
    def __getitem__(self, request):
        return sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__


class Hung:
    """In place of a stream whose lock nobody will ever give back."""


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(program: str) -> tuple[int, str, str]:
    """Exit status, output and complaints of a program in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", IMPORTS + program], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_when_the_training_process_is_killed():
    program = (
        "import time\n"
        "stream = iter(answers(Large(), REQUESTS, 4, persistent=True, pinned=False))\n"
        "print(*[worker.pid for worker in stream._workers], flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", IMPORTS + program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        time.sleep(0.5)  # they stand before a full pipe
        assert len(workers) == 4 and all(running(worker) for worker in workers)
        process.kill()
    until = time.monotonic() + 30
    while any(running(worker) for worker in workers):
        assert time.monotonic() < until, "workers outlive the training process"
        time.sleep(0.1)


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="needs to know who sends a signal")
def test_sigterm_is_for_the_training_process_alone():
    """A cluster sends it to every process; what is left at the end of the interpreter is ended by its own."""
    program = (
        "import subprocess\n"
        "stream = iter(answers(Large(), REQUESTS, 2, persistent=False, pinned=False))\n"
        "next(stream), next(stream)  # of both workers, which have begun\n"
        "for worker in stream._workers:\n"
        "    subprocess.run(['kill', '-TERM', str(worker.pid)], check=True)\n"
        "print(sum(1 for _ in stream))\n"
        "stream = iter(answers(Large(), REQUESTS, 2, persistent=False, pinned=False))\n"
        "next(stream)\n"
    )
    assert run(program) == (0, "98\n", "")


def test_workers_of_a_loader_that_is_still_held_end_first_when_the_interpreter_ends():
    program = (
        "import atexit, multiprocessing, time\n"
        "atexit.register(lambda: print(len(multiprocessing.active_children()), time.monotonic() - ended < 4))\n"
        "held = answers(Large(), REQUESTS, 2, persistent=True, pinned=True)\n"
        "for _ in range(2):\n"
        "    stream = iter(held)\n"
        "    next(stream)\n"
        "ended = time.monotonic()\n"
    )
    assert run(program) == (0, "0 True\n", "")


def test_a_worker_has_streams_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Hung())
    monkeypatch.setattr(sys, "stderr", Hung())
    assert next(iter(answers(Streams(), REQUESTS, 1, persistent=False, pinned=False))) == (True, True)


def test_processors_are_shared_by_the_ranks_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert 1 <= processors() <= (os.cpu_count() or 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert processors() == 1
