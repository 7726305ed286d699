"""Plain PyTorch definition of the modulated layer norm. No argument is checked here."""

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
