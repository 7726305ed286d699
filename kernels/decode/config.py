"""Launch choices of the persistent decoding step; `launch.py` reads them, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepConfig:
    """One launch of the persistent step.

    Attributes:
        warps: warps of a program; each has 32 of every 32 x warps inputs, and all columns.
        programs: programs of a multiprocessor.
        columns: eights of columns that a program makes together, at most; more are done in turns.
        ahead: tiles of weights on their way to a thread, 16 bytes each, across the barrier before an operation too.
    """

    warps: int = 8
    programs: int = 1
    columns: int = 8
    ahead: int = 16


STEP = StepConfig()

# A tensor core's tile has 8 lines for rows, and 8 take the same instructions as one.
MAX_ROWS = 8

# int32 counters of the barrier, each in a cache line of its own.
COUNTERS = 64
