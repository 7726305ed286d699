"""Group normalisation with SiLU as PyTorch operators: Triton on a GPU, the reference elsewhere and for fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernel, reference
from .config import MAX_CHANNELS, MAX_PROJECTED

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernels(x: Tensor, channels: int, groups: int) -> bool:
    """Whether the Triton kernels take this map: on a GPU, 16 or 32 bits, powers of two of channels and of groups."""
    fits = 16 <= channels <= MAX_CHANNELS and channels & (channels - 1) == 0 and groups & (groups - 1) == 0
    return x.is_cuda and x.dtype in _DTYPES and fits


@torch.library.custom_op("spectralar::group_norm_silu", mutates_args=())
def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    if not runs_kernels(x, x.shape[1], groups):
        return reference.group_norm_silu(x, weight, bias, groups, eps)
    with torch.cuda.device_of(x):
        x, found = kernel.statistics(_channels_last(x), None, None, False, groups)
        return kernel.normalize(x, found, weight.contiguous(), bias.contiguous(), eps)


@group_norm_silu.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@torch.library.custom_op("spectralar::join_group_norm_silu", mutates_args=())
def join_group_norm_silu(
    x: Tensor,
    residual: Tensor | None,
    offset: Tensor | None,
    interleave: bool,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if not runs_kernels(x, weight.shape[0], groups):
        joined = reference.join(x, residual, offset, interleave)
        return joined, reference.group_norm_silu(joined, weight, bias, groups, eps)
    with torch.cuda.device_of(x):
        joined, found = kernel.statistics(*_parts(x, residual, offset), interleave, groups)
        return joined, kernel.normalize(joined, found, weight.contiguous(), bias.contiguous(), eps)


@join_group_norm_silu.register_fake
def _(x: Tensor, residual: Tensor | None, offset: Tensor | None, interleave: bool, *_: Any) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    shape = (batch, channels // 4, 2 * height - 2, 2 * width - 2) if interleave else x.shape
    joined = x.new_empty(shape).contiguous(memory_format=torch.channels_last)
    return joined, torch.empty_like(joined)


@torch.library.custom_op("spectralar::to_pixels", mutates_args=())
def to_pixels(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    conv_weight: Tensor,
    conv_bias: Tensor,
) -> Tensor:
    channels = x.shape[1]
    if not runs_kernels(x, channels, groups) or channels > MAX_PROJECTED or x.dtype == torch.float32:
        joined = reference.join(x, residual, None, False)
        return reference.to_pixels(joined, weight, bias, groups, eps, conv_weight, conv_bias)
    with torch.cuda.device_of(x):
        joined, found = kernel.statistics(*_parts(x, residual, None), False, groups)
        taps = _channels_last(conv_weight)
        return kernel.to_pixels(
            joined, found, weight.contiguous(), bias.contiguous(), eps, taps, conv_bias.contiguous()
        )


@to_pixels.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], 3, *x.shape[2:]), dtype=torch.uint8)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _parts(x: Tensor, residual: Tensor | None, offset: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return (
        _channels_last(x),
        None if residual is None else _channels_last(residual),
        None if offset is None else offset.contiguous(),
    )
