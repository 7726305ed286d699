"""Plain PyTorch definitions of the normalisations. No argument is checked here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    # [B, T, C]; scale, shift [B, C] or broadcastable [B, T, C]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(device_type=x.device.type, enabled=False):
        scale, shift = (m.unsqueeze(1) if m.ndim == 2 else m for m in (scale.to(dtype), shift.to(dtype)))
        normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
        return (normed * (1 + scale) + shift).to(x.dtype)


def join(x: Tensor, residual: Tensor | None, offset: Tensor | None, interleave: bool) -> Tensor:
    # x [B, C, H, W], or [B, 4 C, H / 2 + 1, W / 2 + 1] to interleave; residual [B, C, H, W]; offset [C]
    dtype = torch.promote_types(x.dtype, torch.float32)
    joined = x.to(dtype)
    if interleave:
        channels, height, width = x.shape[1] // 4, x.shape[2] - 1, x.shape[3] - 1
        phases = joined.unflatten(1, (2, 2, channels))
        rows = [
            torch.stack([phases[:, a, b, :, a : a + height, b : b + width] for b in (0, 1)], dim=-1) for a in (0, 1)
        ]
        joined = torch.stack(rows, dim=3).flatten(4, 5).flatten(2, 3)  # [B, C, H/2, 2, W/2, 2] -> [B, C, H, W]
    if offset is not None:
        joined = joined + offset.to(dtype)[:, None, None]
    if residual is not None:
        joined = joined + residual.to(dtype)
    return joined.to(x.dtype).contiguous(memory_format=torch.channels_last)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    # [B, C, H, W]; weight, bias [C]
    return _group_norm_silu(x, weight, bias, groups, eps).to(x.dtype).contiguous(memory_format=torch.channels_last)


def to_pixels(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, conv_weight: Tensor, conv_bias: Tensor
) -> Tensor:
    # [B, C, H, W]; weight, bias [C]; conv_weight [3, C, 3, 3], conv_bias [3]
    y = _group_norm_silu(x, weight, bias, groups, eps)
    with torch.autocast(device_type=x.device.type, enabled=False):
        images = F.conv2d(y, conv_weight.to(y.dtype), conv_bias.to(y.dtype), padding=1)
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def _group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)  # or the sums would have another order
    with torch.autocast(device_type=x.device.type, enabled=False):
        return F.silu(F.group_norm(x.to(dtype), groups, weight.to(dtype), bias.to(dtype), eps))
