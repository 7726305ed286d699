"""Launch tables of the decoding step for many rows: how the products are cut into programs, by the number of rows."""

from __future__ import annotations

from dataclasses import dataclass

PROGRAMS = 132
"""Programs that run side by side: the processors of an H100."""

PARTS = 8
"""The most parts of a product's sum: the kernel after it reads every one of them."""

SHORTEST = 256
"""The shortest part of the inner dimension."""

PART_COST = 64
"""A part written and read again takes as long as so many channels of the inner dimension."""


@dataclass(frozen=True)
class ProductConfig:
    """One program makes `rows` x `columns` outputs, `step` of the inner dimension at a time, `stages` in flight.

    With `prefetch` a product asks for its weights before it waits for its rows (Hopper only).
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    prefetch: bool = True


# By the most rows (rows of the batch times tokens of a group). Every program reads its weights and its rows once, from
# the second-level cache at best, so tiles grow as long as enough of them are left to fill the processors, and long
# steps win, since every step costs a barrier. Times are of 64 steps of d16 on an H100.
PRODUCT = {
    # Up to 32 rows on the warps' own tensor instructions. 27.2 ms; with prefetch 28.9, and 28.4 to 33.6 in other tiles.
    16: ProductConfig(rows=16, columns=32, step=128, warps=4, stages=8, prefetch=False),
    32: ProductConfig(rows=32, columns=32, step=128, warps=4, stages=6),
    64: ProductConfig(rows=64, columns=32, step=128, warps=4, stages=4),
    # 41.5 ms, in steps of 64 47.5. 64 x 64 took 42.8 (d24 104.3 against 99.7), without prefetch 44.4.
    128: ProductConfig(rows=128, columns=64, step=128, warps=8, stages=3),
    # With all products so 63.8 ms; 69.8 with 128 x 128, which leaves too few tiles.
    256: ProductConfig(rows=128, columns=64, step=64, warps=8, stages=4),
}

# More rows than that. With three stages all products so took 92.9 ms at 512 rows, with four 84.3.
LARGEST = ProductConfig(rows=128, columns=128, step=64, warps=8, stages=4)

# fp32 does without tensor cores, so any more would only need more registers.
FP32 = ProductConfig(rows=32, columns=32, step=32, warps=4, stages=2)

# At 512 rows PyTorch's took 5.3 us (projection) and 10.8 (second of the MLP), ours 7.6 and 16.9. The others are ours:
# queries, keys and values 8.7 us against 9.8, the first product of the MLP with its GELU 10.9 against 11.2.
LIBRARY_ROWS = 257
"""From so many rows on the products that end in the residual stream are PyTorch's."""

# At 16 rows 28.9 ms against 31.0 without, at 128 42.8 against 42.9; at 512, where they are up to 134 MB a block and all
# products were PyTorch's, 82.2 against 79.1.
KEYS_AHEAD_ROWS = 256
"""Up to so many rows attention asks for earlier keys and values before it waits for its queries (Hopper only)."""

NORM_WARPS = 4
"""Of the programs that hold one row of the residual stream."""

# At 512 rows two tiles took as long.
ATTEND_TILES = 4
"""Loads of keys, and as many of values, that a thread of the attention has in flight."""


def product_config(rows: int, element_size: int) -> ProductConfig:
    """The launch for so many rows of elements of so many bytes."""
    if element_size > 2:
        return FP32
    return next((config for most, config in PRODUCT.items() if rows <= most), LARGEST)


def from_library(rows: int, element_size: int) -> bool:
    """Whether the products that end in the residual stream are PyTorch's."""
    return rows >= LIBRARY_ROWS and element_size == 2


def parts(tiles: int, inner: int, step: int) -> int:
    """In how many equal parts of whole steps `tiles` tiles' sums over `inner` channels are taken: the fastest way."""
    most = min(PARTS, inner // SHORTEST)
    counts = [count for count in range(1, most + 1) if inner % (count * step) == 0] or [1]
    return min(counts, key=lambda count: -(-tiles * count // PROGRAMS) * inner // count + PART_COST * count)


def attend_heads(heads: int) -> int:
    """Heads of a program, a warp each: at most four, which share the cost of starting a program."""
    return min(4, heads & -heads)


def attend_slots(channels: int) -> int:
    """Keys that a warp reads at once, 16 bytes a thread."""
    return max(1, 256 // channels)
