"""Weights in eight bits: e4m3 numbers, and a scale for every output channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .state import MATRICES, DecodeWeights

FP8 = torch.float8_e4m3fn
"""Four bits of exponent, three of mantissa: bf16 and fp16 hold each of its numbers exactly."""


def quantized(weights: DecodeWeights) -> DecodeWeights:
    """The same with its matrices in fp8; see `quantize`. They take half of what 16 bits take, and 0.3 % for scales."""
    found: dict[str, Tensor] = {}
    for name in MATRICES:
        matrix = getattr(weights, name)
        values, scale = quantize(matrix.view(-1, *matrix.shape[-2:]).unbind())
        found |= {name: values.view(matrix.shape), f"{name}_scale": scale.view(matrix.shape[:-1])}
    return replace(weights, **found)


def widened(weights: DecodeWeights) -> DecodeWeights:
    """The same with its fp8 matrices' numbers, exactly, in the dtype of the other weights, and with their scales.

    Products then read more bytes and convert none: faster above `config.MAX_ROWS` rows times tokens of a group.
    """
    return replace(weights, **{name: getattr(weights, name).to(weights.dtype) for name in MATRICES})


def quantize(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The nearest fp8 numbers to the matrices' elements over a scale for each row.

    A scale is the row's largest magnitude over fp8's largest, 448. Elements down to 2^-14 of the row's largest are off
    by a sixteenth of themselves at most.

    Args:
        matrices: L of `[O, K]`, one shape, dtype and device. One after the other is read.

    Returns:
        `[L, O, K]` fp8 and `[L, O]` fp32. A row of zeros is zeros, with a positive scale.
    """
    first = matrices[0]
    values = torch.empty(len(matrices), *first.shape, dtype=FP8, device=first.device)
    scales = torch.empty(len(matrices), len(first), dtype=torch.float32, device=first.device)
    for matrix, value, scale in zip(matrices, values, scales, strict=True):
        largest = torch.linalg.vector_norm(matrix, torch.inf, dim=1).float()
        scale.copy_((largest / torch.finfo(FP8).max).clamp_min(torch.finfo(torch.float32).tiny))
        value.copy_(matrix / scale[:, None])
    return values, scales


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """The matrices that fp8 `[..., O, K]` with scales `[..., O]` stand for, fp32."""
    return values.float() * scale[..., None]
