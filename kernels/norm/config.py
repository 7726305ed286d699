"""Launch tables of the group normalisation's kernels; `kernel.py` reads them, nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass

# The widest maps that the kernels take: a scale and a shift for each channel lie in registers.
MAX_CHANNELS = 512

# The widest maps that go to pixels in one kernel: it holds a tile and all weights of the convolution.
MAX_PROJECTED = 256

# A map is cut into at most so many chunks, one for each program of an image. Every program that normalises reads the
# statistics of all chunks of its image: 16 KB for 64 chunks and 32 groups, against 256 KB of a large map's chunk.
# The number must not depend on the batch, or an image's sums would.
CHUNKS = 64


@dataclass(frozen=True)
class TileConfig:
    """One launch.

    Attributes:
        elements: of a tile, the part of a chunk in registers at a time; all its loads are under way together.
        warps: warps of a program; elements / (32 warps) elements lie in a thread.
    """

    elements: int
    warps: int


# 16 elements a thread, as two sums for each of them also lie in registers.
STATISTICS = TileConfig(elements=4096, warps=8)

# 32 elements a thread are four 16-byte loads in bf16.
NORM = TileConfig(elements=8192, warps=8)

# The tile goes through the tensor cores: 64 pixels of 128 channels are one product of four warps on Hopper.
PROJECT = TileConfig(elements=8192, warps=4)

# Pixels of a program, each the sum of nine loads.
GATHER = TileConfig(elements=1024, warps=4)


def chunk_pixels(pixels: int, channels: int) -> int:
    """Pixels of a chunk: whole tiles of every kernel."""
    tile = NORM.elements // channels
    return tile * -(-pixels // (tile * CHUNKS))
