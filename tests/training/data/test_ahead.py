"""Answers made ahead in a thread: the same ones, not too many, errors in their place, and an end of everything."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch

from spectralar.training.data.ahead import Ahead
from spectralar.training.data.unreadable import Reasons
from spectralar.training.data.workers import Answer, Batch

CPU = torch.device("cpu")


class Source:
    """Answers 0, 1, ... up to `end`, then an error or the end; knows how many it made and whether it was closed."""

    def __init__(self, end=10**6, error=None):
        self.end, self.error, self.made, self.closed = end, error, 0, threading.Event()

    def __iter__(self):
        try:
            while self.made < self.end:
                self.made += 1
                yield Answer(Batch(torch.full((1, 3, 2, 2), self.made - 1), torch.tensor([self.made - 1])), Reasons())
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()


def numbers(answers):
    return [int(answer.batch.labels) for answer in answers]


def wait_until(condition):
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "spectralar loader"]


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_same_answers_then_the_end_again_and_again(depth):
    source = Source(20)
    stream = Ahead(iter(source), CPU, depth=depth)
    assert numbers(stream) == list(range(20))
    assert source.closed.is_set()
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(stream)


@pytest.mark.parametrize("depth", [1, 3])
def test_no_more_than_depth_are_made_ahead(depth):
    source = Source()
    stream = Ahead(iter(source), CPU, depth=depth)
    for taken in range(5):
        wait_until(lambda taken=taken: source.made == taken + depth)
        time.sleep(0.01)
        assert source.made == taken + depth
        next(stream)


def test_an_error_comes_in_its_place_and_stays():
    source = Source(3, RuntimeError("the fourth"))
    stream = Ahead(iter(source), CPU, depth=5)
    wait_until(source.closed.is_set)
    assert [int(next(stream).batch.labels) for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the fourth"):
            next(stream)


def test_a_collected_iterator_ends_its_thread_and_closes_the_source_there():
    source = Source()
    stream = Ahead(iter(source), CPU, depth=2)
    next(stream)
    del stream
    gc.collect()
    assert source.closed.is_set() and not loader_threads()


def test_the_interpreter_ends_with_an_iterator_at_work():
    program = (
        "from tests.training.data.test_ahead import Ahead, CPU, Source\n"
        "stream = Ahead(iter(Source()), CPU, depth=2); print(int(next(stream).batch.labels))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
