"""The launches of the DCT kernels that tests/kernels/compiling.py compiles: the tuned sizes and every kind of task."""

from __future__ import annotations

from unittest import mock

import torch

from spectralar.kernels.dct import kernel


def sample_launches(capability: int = 90) -> None:
    """Launches what runs on a GPU of that compute capability."""
    cutoffs = torch.tensor([1])
    with mock.patch.object(kernel, "_device", lambda device: (132, capability >= 90)):
        for size in (128, 256):
            images = torch.zeros(1, 3, size, size)
            kernel.sub_images(images, cutoffs, torch.float32)
            kernel.sub_images(images.byte(), cutoffs, torch.bfloat16)
            kernel.sub_images(images.bfloat16(), cutoffs, torch.bfloat16)
            kernel.compare(images, images, cutoffs)
            kernel.compare(images.bfloat16(), images.byte(), cutoffs)
            kernel.compare(images.bfloat16(), images.byte(), cutoffs, torch.ones(size, size))
