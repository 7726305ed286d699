"""The launches of the decoding step that tests/kernels/compiling.py compiles: few rows."""

from __future__ import annotations

from unittest import mock

import torch

from spectralar.kernels.decode import DecodeState, DecodeWeights, launch


def empty_weights(
    width: int, depth: int = 2, heads: int = 0, group: int = 1, length: int = 64, codes: int = 4096,
    dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
) -> DecodeWeights:  # fmt: skip
    """Uninitialised weights of a generator."""
    heads = heads or width // 64

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return DecodeWeights(
        tokens=empty(codes, width),
        positions=empty(length, width),
        starts=empty(group, width),
        qkv=empty(depth, 3 * width, width),
        qkv_bias=empty(depth, 3 * width),
        query_scale=empty(depth, heads).float(),
        proj=empty(depth, width, width),
        proj_bias=empty(depth, width),
        fc1=empty(depth, 4 * width, width),
        fc1_bias=empty(depth, 4 * width),
        fc2=empty(depth, width, 4 * width),
        fc2_bias=empty(depth, width),
        head=empty(codes, width),
        head_bias=empty(codes),
    )


def sample_launches(capability: int = 90) -> None:
    """Launches of a step: d16, one image with guidance, and in groups of four; for a GPU of that compute capability."""
    with mock.patch.object(launch, "_bulk_prefetch", lambda device: capability >= 90):
        for group in (1, 4):
            weights = empty_weights(1024, group=group)
            launch.launch(weights, DecodeState.allocate(weights, 1, 2))
