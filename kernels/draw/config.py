"""Launch table of the sampling head's kernel; `launch` in `kernel.py` reads it, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DrawConfig:
    """One launch: a program for each row.

    Attributes:
        block: codes that a program holds in registers, a power of two; longer rows are read again in each pass.
        warps: warps of a program; block / (32 warps) codes lie in a thread.
        registers: the most that a thread may take; None leaves it to the compiler.
    """

    block: int
    warps: int
    registers: int | None = None


# By the largest number of codes that an entry is meant for. Passes wait for a sum over the block, so few warps are
# better than many as long as a thread's codes fit: with top-p each takes four registers. For 4096 codes 128
# registers are enough, and two programs then share a multiprocessor: one works while the other waits.
DRAW = {
    256: DrawConfig(block=256, warps=2),
    1024: DrawConfig(block=1024, warps=4),
    2048: DrawConfig(block=2048, warps=8),
    4096: DrawConfig(block=4096, warps=8, registers=128),
    8192: DrawConfig(block=8192, warps=16),
}

# Longer rows go through in chunks: 16,384 codes on 16 warps would spill a kilobyte a thread. So would chunks of 8192
# on 16 warps, half of that, for the addresses.
CHUNKED = DrawConfig(block=4096, warps=16)

# Two scores closer than this are compared again with fp64 logarithms, as the reference has them: the largest error of
# a difference of scores is 1.1e-5 (README.md).
MARGIN = 2.0**-16


def draw_config(codes: int) -> DrawConfig:
    """The launch for rows of so many codes."""
    for most, config in DRAW.items():
        if codes <= most:
            return config
    return CHUNKED
