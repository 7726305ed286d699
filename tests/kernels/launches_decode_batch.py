"""The launches of the decoding step for many rows that tests/kernels/compiling.py compiles: every table entry."""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor

from spectralar.kernels.decode import DecodeState, DecodeWeights, batch_kernel, quantized
from spectralar.kernels.decode.batch_config import WHOLE


def random_weights(
    depth: int, width: int, heads: int, length: int, group: int, codes: int, dtype: torch.dtype, device: str = "cpu"
) -> DecodeWeights:
    """Weights by which activations keep their size."""
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * size).to(dtype)

    w, inner = width, width**-0.5
    qkv_bias = normal(depth, 3 * w, size=0.1)
    qkv_bias[:, w : 2 * w] = 0
    return DecodeWeights(
        tokens=normal(codes, w),
        positions=normal(length, w),
        starts=normal(group, w),
        qkv=normal(depth, 3 * w, w, size=inner),
        qkv_bias=qkv_bias,
        query_scale=normal(depth, heads).abs().to(torch.promote_types(dtype, torch.float32)) * 4,
        proj=normal(depth, w, w, size=inner),
        proj_bias=normal(depth, w, size=0.1),
        fc1=normal(depth, 4 * w, w, size=inner),
        fc1_bias=normal(depth, 4 * w, size=0.1),
        fc2=normal(depth, w, 4 * w, size=inner / 2),
        fc2_bias=normal(depth, w, size=0.1),
        head=normal(codes, w, size=inner),
        head_bias=normal(codes, size=0.1),
    )


def sample_launches(capability: int = 90) -> None:
    """Launches what runs on a GPU of that compute capability."""
    with mock.patch.object(batch_kernel, "_starts_early", lambda device: capability >= 90):
        for rows in WHOLE:
            a, weight = (torch.zeros(size, 1024, dtype=torch.bfloat16) for size in (rows, 4096))
            # GELU needs the most registers.
            hidden = torch.empty(rows, 1, 4096, dtype=torch.bfloat16)
            batch_kernel._product(a[:, None], weight, weight[:, 0].contiguous(), hidden, weight, gelu=True)
            batch_kernel._product_parts(hidden, weight.view(1024, 4096), weight)
            if capability >= 89:
                scale, bias = torch.ones(4096), weight[:, 0].contiguous()
                for scaled in (weight, weight.to(torch.float8_e4m3fn)):
                    batch_kernel._product(a[:, None], scaled, bias, hidden, scaled, scale, gelu=True)
                    batch_kernel._product_parts(hidden, scaled.view(1024, 4096), scaled, scale)
        _launch(16, 1024, 64, 1, torch.bfloat16)
        _launch(6, 1536, 256, 4, torch.float16)
        _launch(2, 128, 256, 16, torch.bfloat16)
        _launch(48, 256, 64, 1, torch.float32)
        weights = random_weights(1, 128, 2, 64, 1, 96, torch.bfloat16)
        batch_kernel._attend(weights, DecodeState.allocate(weights, 65, 130), 0)
        if capability >= 89:
            _launch(2, 1024, 64, 1, torch.float16, fp8=True)
            _launch(2, 256, 64, 1, torch.float32, fp8=True)


def _launch(rows: int, width: int, length: int, group: int, dtype: torch.dtype, fp8: bool = False) -> None:
    weights = random_weights(1, width, width // 64, length, group, 96, dtype)
    weights = quantized(weights) if fp8 else weights
    state = DecodeState.allocate(weights, rows // 2, rows)
    batch_kernel.launch_step(weights, state)
