"""The launches of the group normalisation's kernels that tests/kernels/compiling.py compiles: all widths, all parts."""

from __future__ import annotations

import torch

from spectralar.kernels.norm import kernel
from spectralar.kernels.norm.config import MAX_PROJECTED


def sample_launches(capability: int = 90) -> None:
    """Launches what runs on a GPU of that compute capability: the same on all."""
    per_channel = torch.zeros(512)
    for channels, size, dtype in (
        (128, 256, torch.bfloat16),
        (256, 64, torch.bfloat16),
        (512, 16, torch.bfloat16),
        (512, 16, torch.float32),
    ):
        x = torch.zeros(1, channels, size, size, dtype=dtype)
        for residual, offset in ((None, None), (x, None), (None, per_channel)):
            found = kernel.statistics(x, residual, offset, False, 32)[1]
        kernel.normalize(x, found, per_channel, per_channel, 1e-6)
        if dtype != torch.float32:
            phases = torch.zeros(1, 4 * channels, size + 1, size + 1, dtype=dtype)
            kernel.statistics(phases, None, per_channel, True, 32)
        if channels <= MAX_PROJECTED:
            taps = torch.zeros(3, channels, 3, 3)
            kernel.to_pixels(x, found, per_channel, per_channel, 1e-6, taps, torch.zeros(3))
