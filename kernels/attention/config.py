"""Launch tables of the attention kernels; `launch.py` reads them, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

# The widest heads that the kernels take. Wider ones would need tiles of their own.
MAX_WIDTH = 128

# Every streamed tile divides this: a length says whether all launches have a tail.
ROUND = 64
# A head's last tile of rows and of keys is this wide where that is enough, the least depth of a tensor-core product.
# 344 instead of 371 us forward and 1,041 instead of 1,145 backward for 256 x 12 heads of 321 x 64 on an H200.
TAIL = 16


@dataclass(frozen=True)
class TileConfig:
    """One launch.

    Attributes:
        rows: queries of a tile; a head of one launch has at most as many. The others divide `ROUND`, those of the
            keys' launch also the forward's.
        keys: keys of a tile, which divide `ROUND`.
        warps: warps of a program.
        stages: depth of the pipeline that brings tiles to shared memory.
        registers: most registers of a thread; None leaves it to the compiler.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# One warpgroup for 64 queries; 128 registers let four programs share an SM. 344 us for the heads above, 376 with two
# stages; without tails, on an H100, 366, 467 as the compiler likes registers, 444 to 667 in larger tiles.
_FORWARD = TileConfig(rows=64, keys=64, warps=4, stages=3, registers=128)
# The sums of wide heads alone take half of 128 registers.
_FORWARD_WIDE = TileConfig(rows=64, keys=64, warps=4, stages=2)
# 415 of the 1,041 us above; 70 more with two stages, 4 more with 128 registers.
_QUERIES = TileConfig(rows=64, keys=64, warps=4, stages=3)
# Two sums of 32 registers a thread are kept; half a tile of queries leaves room within 128. With the queries' launch
# 997 us; 1,023 with 168 registers, 1,116 as the compiler likes, with 64 queries 1,031 and 1,041.
_KEYS = TileConfig(rows=32, keys=64, warps=4, stages=3, registers=128)
# Wide heads have larger sums, and the A100's products take both operands from registers: twice the warps, or half the
# tile. Unmeasured on an A100.
_BACKWARD_WIDE = TileConfig(rows=64, keys=64, warps=8, stages=2)
_BACKWARD_A100 = TileConfig(rows=64, keys=32, warps=4, stages=2)
# A whole head in one launch: 81 us for 256 x 16 causal heads of 64 x 64 on an H200 with 168 registers, which let three
# programs share an SM; 99 without a limit, 111 with 128, 115 and 154 with 8 warps, 141 in two launches.
_HEAD = TileConfig(rows=64, keys=64, warps=4, stages=1, registers=168)


def padded_width(width: int) -> int:
    """The next power of two of at least 16, the least depth of a tensor-core product."""
    return max(16, 1 << (width - 1).bit_length())


def tail_width(length: int, width: int) -> int:
    """How wide the last tile of heads of a padded width is where that is less than whole, else 0."""
    # Wide heads have none: with one the keys' launch spills 680 bytes a thread on an A100.
    return TAIL if width <= 64 and 0 < length % ROUND <= TAIL else 0


def forward_config(width: int) -> TileConfig:
    """The tiles of a forward launch over heads of a padded width, in 16 bits."""
    return _FORWARD if width <= 64 else _FORWARD_WIDE


def backward_configs(length: int, width: int, capability: int) -> tuple[TileConfig, ...]:
    """Those of the backward likewise: one launch over whole heads, or two, for queries and for keys."""
    if width > 64:
        return _BACKWARD_WIDE, _BACKWARD_WIDE
    if capability < 90:
        return _BACKWARD_A100, _BACKWARD_A100
    return (_HEAD,) if length <= _HEAD.rows else (_QUERIES, _KEYS)
