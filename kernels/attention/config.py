"""Launch tables of the attention kernels; `launch.py` reads them, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

# The widest heads that the kernels take. Wider ones would need tiles of their own.
MAX_WIDTH = 128


@dataclass(frozen=True)
class TileConfig:
    """One launch.

    Attributes:
        rows: queries of a tile; they divide `launch.ROUND`.
        keys: keys of a tile.
        warps: warps of a program.
        stages: depth of the pipeline that brings tiles to shared memory.
        registers: most registers of a thread; None leaves it to the compiler.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# One warpgroup for 64 queries; 128 registers let four programs share an SM.
# 366 us for 256 x 12 heads of 321 x 64 on an H100; 467 with two stages and registers as the compiler likes, 444 to 667
# in larger tiles, 433 and more with all keys and values of a head kept in shared memory.
_FORWARD = TileConfig(rows=64, keys=64, warps=4, stages=3, registers=128)
# The sums of wide heads alone take half of 128 registers.
_FORWARD_WIDE = TileConfig(rows=64, keys=64, warps=4, stages=2)
# Two sums and two tiles of scores in fp32 lie in registers, 32 each in a thread.
# 1204 us for the same heads; 1457 with two stages, 1253 with heads kept in shared memory, twice as long in larger
# tiles.
_BACKWARD = TileConfig(rows=64, keys=64, warps=4, stages=3)
# Wide heads have larger sums, and the A100's products take both operands from registers: twice the warps, or half the
# tile.
_BACKWARD_WIDE = TileConfig(rows=64, keys=64, warps=8, stages=2)
_BACKWARD_A100 = TileConfig(rows=64, keys=32, warps=4, stages=2)


def padded_width(width: int) -> int:
    """The next power of two of at least 16, the least depth of a tensor-core product."""
    return max(16, 1 << (width - 1).bit_length())


def forward_config(width: int) -> TileConfig:
    """The tiles of a forward launch over heads of a padded width, in 16 bits."""
    return _FORWARD if width <= 64 else _FORWARD_WIDE


def backward_config(width: int, capability: int) -> TileConfig:
    """The tiles of both backward launches likewise."""
    if width > 64:
        return _BACKWARD_WIDE
    return _BACKWARD if capability >= 90 else _BACKWARD_A100
