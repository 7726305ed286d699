"""The launches of the decoding step that tests/kernels/compiling.py compiles: few rows."""

from __future__ import annotations

from unittest import mock

import torch

from spectralar.kernels.decode import DecodeState, DecodeWeights, launch, quantized
from spectralar.kernels.decode.config import StepConfig

RING_SIZES = (
    (1024, 1, torch.bfloat16, False),
    (1024, 4, torch.bfloat16, False),
    (1024, 1, torch.float16, False),
    (1280, 1, torch.bfloat16, False),
    (1536, 1, torch.bfloat16, False),
    (1920, 1, torch.bfloat16, False),
    (1024, 1, torch.bfloat16, True),
    (1024, 4, torch.bfloat16, True),
    (1024, 1, torch.float16, True),
    (1536, 1, torch.bfloat16, True),
)
"""Width, tokens of a group, dtype, and whether matrices are fp8, of what the kernel with the ring is compiled for."""


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
    """Launches of a step: d16, one image with guidance, and in groups of four; for a GPU of that compute capability.

    On Hopper with both kernels, and with the ring d20, d24 and d30, too, fp16 and fp8.
    """
    hopper = capability == 90
    with (
        mock.patch.object(launch, "_bulk_prefetch", lambda device: hopper),
        mock.patch.object(launch, "_hopper", lambda device: hopper),
    ):
        for group in (1, 4):
            weights = empty_weights(1024, group=group)
            launch.launch(weights, DecodeState.allocate(weights, 1, 2), config=StepConfig(ring=False))
        if not hopper:
            return
        for width, group, dtype, fp8 in RING_SIZES:
            weights = empty_weights(width, group=group, dtype=dtype)
            weights = quantized(weights) if fp8 else weights
            launch.launch(weights, DecodeState.allocate(weights, 1, 2))
