"""Launch tables of the vector quantiser's kernels; `launch.py` reads them, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

# The widest vectors that the kernels take: two fp16 copies of a tile of this width fill an A100's shared memory.
MAX_WIDTH = 256


@dataclass(frozen=True)
class ScanConfig:
    """One launch of the search over all codes.

    Attributes:
        rows: vectors of a program; every codeword that it reads is used so many times.
        codes: codes of a tile, a multiple of four groups.
        group: neighbouring codes under one maximum, scored again in fp64 if the maximum is the largest.
        warps: warps of a program; rows x codes / (32 warps) scores lie in a thread's registers.
        stages: depth of the pipeline that brings code tiles to shared memory.
    """

    rows: int
    codes: int
    group: int
    warps: int
    stages: int


# By padded width. Wider vectors take more shared memory for the same tile, so the tiles shrink: the largest entry
# must leave room under the 163 KB of an A100. A warp has 16 or 32 whole rows: only then are a thread's columns whole
# groups.
SCAN = {
    # 30.6, 69.3 and 194 us for the cases of the README on an H100; 29.7, 72.1 and 222 with tiles of 64 codes.
    16: ScanConfig(rows=128, codes=128, group=16, warps=8, stages=3),
    32: ScanConfig(rows=128, codes=64, group=16, warps=8, stages=3),
    64: ScanConfig(rows=128, codes=64, group=16, warps=8, stages=2),
    128: ScanConfig(rows=128, codes=64, group=16, warps=8, stages=2),
    256: ScanConfig(rows=64, codes=32, group=4, warps=8, stages=2),
}

# Tiles between two looks at the running maxima, a power of two: a tile's number takes six bits of a score.
CHUNK = 64

# Two programs for each SM of an H100, as many as its registers hold with tiles of 128 codes, so that one's maxima run
# while the other's products do. With fewer blocks of rows the codes are split over several programs.
PROGRAMS = 264


@dataclass(frozen=True)
class SettleConfig:
    """One launch of the exact decision.

    Attributes:
        rows: vectors of a program.
        elements: products of a step in fp32, over all rows and the codes of a group.
        codes: codes of a step in fp64, at least two groups.
        splits: splits of the scan that are merged in a step.
        warps: warps of a program.
    """

    rows: int
    elements: int
    codes: int
    splits: int
    warps: int


# One warp: its lanes share a group, and no maximum crosses warps. Eight rows give each thread 64 products, whose loads
# are all under way together, and leave room for 17 programs on a multiprocessor. 11.4 us for 65,536 vectors on an H100;
# 14.5 with 4 rows and 14.6 with 16, and 25.4 when doubtful vectors held up the others of their program. For 16,384
# vectors, 4 rows take 1 us less of 24 on an H200.
SETTLE = SettleConfig(rows=8, elements=2048, codes=32, splits=4, warps=1)

# Elements of a program of the kernels that pass once over rows; 16 a thread keep the loads wide.
ROW_ELEMENTS = 2048

# Elements of a program that prepares rows in fp64: few, as all their roots and quotients are waited for. The search of
# 16,384 vectors takes 23.9 us on an H200; 24.1 with half or twice as many elements, 25.8 with four times as many.
PREPARED_ELEMENTS = 512


def padded_width(width: int) -> int:
    """The next power of two of at least 16, the least depth of a tensor-core product."""
    return max(16, 1 << (width - 1).bit_length())


def rows_of_a_program(width: int) -> int:
    """Rows of a program of the kernels that pass once over rows of this width."""
    return max(1, ROW_ELEMENTS // padded_width(width))
