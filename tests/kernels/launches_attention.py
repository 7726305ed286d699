"""The launches of the attention kernels that tests/kernels/compiling.py compiles: all tables, both kinds of masks."""

from __future__ import annotations

from unittest import mock

import torch

from spectralar.kernels.attention import launch

# Length, image rows, width: the tokenizer's, which has tails; one without; the generator's; wide heads, with tails and
# without; narrow ones of an odd width.
SHAPES = (
    (321, 257, 64), (320, 256, 64), (64, 0, 64), (321, 257, 128), (64, 0, 128), (65, 33, 24), (97, 33, 24)
)  # fmt: skip


def sample_launches(capability: int = 90) -> None:
    """Launches what runs on a GPU of that compute capability."""
    with mock.patch.object(launch, "_capability", lambda device: capability):
        for length, n_image, width in SHAPES:
            q, k, v = torch.zeros(2, length, 3, 2, width, dtype=torch.bfloat16).unbind(2)
            prefix = torch.ones(2, dtype=torch.int64) if n_image == 33 else None
            ends = None if n_image else launch.group_ends((length,), q.device)
            out, lse = launch.forward(q, k, v, prefix, ends, n_image, 7, 0.125)
            launch.backward(out, q, k, v, out, lse, prefix, ends, n_image, 7, 0.125)
