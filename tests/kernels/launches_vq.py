"""The launches of the quantiser's kernels that tests/kernels/compiling.py compiles: every table entry, both metrics."""

from __future__ import annotations

from unittest import mock

import torch

from spectralar.kernels.vq import launch

# Two splits of several chunks: none of the kernels' integers is 1, which would be compiled as a constant.
VECTORS, CODES = 16384, 4096


def sample_launches(capability: int = 90) -> None:
    """Launches what runs on a GPU of that compute capability."""
    with mock.patch.object(launch, "_starts_early", lambda device: capability >= 90):
        for width in (12, 32, 64, 128, 256):
            for normalize in (True, False):
                launch.nearest_code(torch.zeros(VECTORS, width), torch.zeros(CODES, width), normalize)
        launch.nearest_code(torch.zeros(VECTORS, 12).bfloat16(), torch.zeros(CODES, 12).bfloat16(), True)

        one = torch.ones((), dtype=torch.float64)
        index = torch.zeros(VECTORS, dtype=torch.int64)
        mask = torch.zeros(VECTORS, dtype=torch.bool)
        for width in (12, 256):
            z, codebook = torch.zeros(VECTORS, width), torch.zeros(CODES, width)
            for normalize in (True, False):
                launch.quantize(index, codebook, normalize, z=z)
                launch.vectors_backward(z, one, z, codebook, index, mask, normalize)
                launch.codebook_backward(z, one, codebook, index, mask, normalize, pull=True)
                launch.codebook_backward(z, one, codebook, index, None, normalize, pull=False)
