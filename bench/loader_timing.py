"""Rates of what works ahead in other processes and threads, and the processors that it keeps busy."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from spectralar.bench.timing import Timing

_WINDOW = 0.1
_FEWEST = 3


def time_batches(
    take: Callable[[], object], seconds: float, *, warm: int, group: int = 1
) -> tuple[Timing, float | None]:
    """Takes batches for about `seconds`, one right after the other.

    A window is made of as many batches as take 0.1 s, in whole groups, and no fewer than three are timed.

    Args:
        take: returns once the next batch is there.
        seconds: apart from the warm-up.
        warm: batches that are taken first, at least 1: those that wait in queues were made while nobody asked.
        group: batches that come at once, where each of several processes makes whole ones.

    Returns:
        Seconds per batch, with median, p20 and p80 over the windows, and the processors that were busy.
    """
    began = time.perf_counter()
    take()
    first = time.perf_counter() - began
    for _ in range(warm - 1):
        take()
    busy = Busy()
    marks = [time.perf_counter()]
    while marks[-1] - marks[0] < seconds or len(marks) <= _FEWEST * group:
        take()
        marks.append(time.perf_counter())
    return timing_of(marks, group, first), busy.processors()


def timing_of(marks: Sequence[float], group: int, first: float) -> Timing:
    """Seconds per batch from the times at which they came."""
    batches = len(marks) - 1
    each = (marks[-1] - marks[0]) / batches
    whole = group * max(1, min(math.ceil(_WINDOW / (group * each)), batches // (_FEWEST * group)))
    windows = np.diff(np.asarray(marks)[::whole]) / whole
    p20, median, p80 = (float(value) for value in np.quantile(windows, (0.2, 0.5, 0.8)))
    return Timing(median, p20, p80, len(windows), whole, "clock", first)


class Busy:
    """Processor time of this process and of the worker processes that it has now, from the construction on."""

    def __init__(self) -> None:
        self._workers = [process.pid for process in multiprocessing.active_children()]
        self._began, self._spent = time.perf_counter(), self._seconds()

    def processors(self) -> float | None:
        """How many were busy, on average; None where /proc does not say, or a worker has ended."""
        spent = self._seconds()
        if spent is None or self._spent is None:
            return None
        return (spent - self._spent) / (time.perf_counter() - self._began)

    def _seconds(self) -> float | None:
        ticks = 0
        try:
            for worker in self._workers:
                # The name, in brackets, may hold anything; user and system time are the 12th and 13th field behind it.
                fields = Path(f"/proc/{worker}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        except OSError:
            return None
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
