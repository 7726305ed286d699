"""Launch tables of the decoding step for many rows: how the products are cut into programs, by the number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

    Before it waits for its rows (Hopper only), a product asks for its `own` weights or those of the `next` product; the
    last product, which has no next, for its own.
    """

    rows: int
    columns: int
    step: int
    warps: int
    stages: int
    prefetch: Literal["own", "next"] | None = "own"


# By the most rows (rows of the batch times tokens of a group). Every program reads its weights and its rows once, from
# the second-level cache at best, so tiles grow as long as enough of them are left to fill the processors, and long
# steps win, since every step costs a barrier. Within 1 % the fastest of 3 to 11 that were tried on an H200 at each size
# but 32. 64 steps with the next product's weights asked for and `releases_early`: 26.8 ms against 28.3 at 32 rows, 24.3
# against 26.3 at 64; at 16 rows a step took 371 us against 345, at 256 731 against 708. At 128 and 512 see README.md.
WHOLE = {
    16: ProductConfig(rows=16, columns=32, step=128, warps=4, stages=8, prefetch=None),
    32: ProductConfig(rows=32, columns=32, step=128, warps=4, stages=6, prefetch="next"),
    64: ProductConfig(rows=64, columns=32, step=128, warps=4, stages=6, prefetch="next"),
    128: ProductConfig(rows=64, columns=64, step=128, warps=4, stages=4),
    256: ProductConfig(rows=128, columns=64, step=64, warps=8, stages=6),
    512: ProductConfig(rows=128, columns=128, step=64, warps=8, stages=3),
}
"""Products that one program sums up to the end: queries, keys and values, the first of the MLP, the head."""

# Fewer columns than those, so tiles can be larger: parts of their sums fill the processors.
PARTIAL = {
    16: WHOLE[16],
    32: WHOLE[32],
    64: ProductConfig(rows=64, columns=64, step=128, warps=4, stages=4, prefetch="next"),
    128: WHOLE[128],
    256: ProductConfig(rows=128, columns=128, step=64, warps=8, stages=5),
    512: ProductConfig(rows=128, columns=128, step=64, warps=8, stages=4),
}
"""Products that end in the residual stream, in parts."""

# fp32 does without tensor cores, so any more would only need more registers.
FP32 = ProductConfig(rows=32, columns=32, step=32, warps=4, stages=2)

# A step of 512 rows at 4 earlier tokens took 791 us with parts in bf16, 855 in fp32; 64 steps of 256 rows 41.4 ms in
# bf16 and, in another run, 45.4 in fp32.
NARROW_PARTS = 129
"""From so many rows on parts of a product's sum are kept in the dtype of the weights, below in fp32."""

# 64 steps: 28.1 ms against 28.6 without at 32 rows; nothing from 128 rows on.
KEYS_AHEAD = 256
"""So many programs of the attention ask for all earlier keys and values before they wait for queries (Hopper only)."""

NORM_WARPS = 4
"""Of the programs that hold one row of the residual stream."""


def product_config(rows: int, element_size: int, partial: bool) -> ProductConfig:
    """The launch for so many rows of elements of so many bytes; above the table its last entry."""
    if element_size > 2:
        return FP32
    table = PARTIAL if partial else WHOLE
    return next((config for most, config in table.items() if rows <= most), table[max(table)])


def parts(tiles: int, inner: int, step: int) -> int:
    """In how many equal parts of whole steps `tiles` tiles' sums over `inner` channels are taken: the fastest way."""
    most = min(PARTS, inner // SHORTEST)
    counts = [count for count in range(1, most + 1) if inner % (count * step) == 0] or [1]
    return min(counts, key=lambda count: -(-tiles * count // PROGRAMS) * inner // count + PART_COST * count)


def shares(size: int, threads: int) -> tuple[int, int]:
    """Bytes of a piece, and how many, when so many threads at most ask for one piece each of `size` bytes together."""
    # At least a line of the cache; what is left over after whole pieces is not worth a request.
    piece = max(128, 1 << (-(-size // threads) - 1).bit_length())
    return piece, size // piece


def releases_early(rows: int) -> bool:
    """Whether the residual kernel lets the next product start before its own wait (Hopper only)."""
    # 64 steps: 30.4 ms against 31.0 at 128 rows, 61.7 against 61.5 at 512. For 32 and 64 rows see WHOLE.
    return 16 < rows <= 128


def attend_tiles(rows: int) -> int:
    """Loads of keys, and as many of values, that a thread of the attention has in flight."""
    # At 1, 31 and 62 earlier tokens: 128 rows 421, 473 and 544 us a step with four and 419, 490 and 556 with two, 512
    # rows 784, 952 and 1202 with four and 735, 944 and 1209 with two.
    return 4 if rows <= 128 else 2


def attend_heads(heads: int) -> int:
    """Heads of a program, a warp each: at most four, which share the cost of starting a program."""
    return min(4, heads & -heads)


def attend_slots(channels: int) -> int:
    """Keys that a warp reads at once, 16 bytes a thread."""
    return max(1, 256 // channels)
