"""Launch choices of the persistent decoding step; `launch.py` reads them, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepConfig:
    """One launch of the persistent step.

    Attributes:
        warps: warps of a program; each has 32 of every 32 x warps inputs, and all columns.
        ahead: tiles of weights on their way to a thread, 16 bytes each.
        prefetch: products whose weights come to the L2 cache before a product, on Hopper; 0 for none.
        ring: whether weights come through a ring in shared memory where `launch.rings`; then nothing else here matters.
            The other kernel has no fp8.
    """

    warps: int = 8
    ahead: int = 16
    prefetch: int = 1
    ring: bool = True


STEP = StepConfig()

# Of a program of the kernel with the ring.
RING_WARPS = 8

# A tensor core's tile has 8 lines for rows, and 8 take the same instructions as one.
MAX_ROWS = 8

# int32 counters, each in a cache line of its own.
COUNTERS = 64

# What a mailbox's word holds before it is written. Arithmetic gives no such number: the NaN of a GPU is 0x7fffffff, or
# 0x7fff in 16 bits.
EMPTY = -1
