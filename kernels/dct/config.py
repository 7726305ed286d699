"""Launch tables of the DCT kernels: how much of a picture a program holds, and with how many warps."""

from __future__ import annotations

from dataclasses import dataclass

LOW = 64
"""Cutoffs up to this one take the low-rank kernel, those above it the projection kernel."""

LARGEST = 256
"""The longest side that the kernels take; longer ones take the reference."""

EXACT = 32
"""Samples of sub-images, or planes of a transform, at a time in fp64 on a GPU."""


@dataclass(frozen=True)
class LowRankConfig:
    """`rows` of the picture are in flight at a time; one program makes a whole plane."""

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ProjectionConfig:
    """A piece of work is `rows` rows of a plane, made from `columns` columns at a time.

    Where a share s of the pictures is this kernel's, a share `spread * s` of the processors works on it, and the other
    kernel has the rest from the start.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    spread: float


# By bytes of a pixel; measured on an H100 at 256 pictures of 3x256x256 with the cutoffs of eq. 9.
LOW_RANK = {
    # 82 us with the projections below; 86 with one stage, 88 with three
    1: LowRankConfig(rows=64, warps=4, stages=2),
    2: LowRankConfig(rows=64, warps=4, stages=2),
    # 167 us; 172 with two stages, 188 with one, which lets more programs fight for the memory
    4: LowRankConfig(rows=64, warps=4, stages=3),
}

PROJECTION = {
    # 82 us; 91 with 32 columns, 92 with two stages, 95 with the whole GPU (spread 4)
    1: ProjectionConfig(rows=128, columns=64, warps=8, stages=3, spread=2),
    # 64 columns do not fit
    2: ProjectionConfig(rows=128, columns=32, warps=8, stages=3, spread=2),
    # 167 us; the same with spread 2.5, 168 with 3
    4: ProjectionConfig(rows=128, columns=32, warps=8, stages=3, spread=2),
}

# The A100 has 64 KB less of shared memory a processor. Not measured there.
SMALL_LOW_RANK = {size: LowRankConfig(rows=64, warps=4, stages=1) for size in (1, 2, 4)}

SMALL_PROJECTION = {size: ProjectionConfig(rows=128, columns=32, warps=8, stages=2, spread=4) for size in (1, 2, 4)}
