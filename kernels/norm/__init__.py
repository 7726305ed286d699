"""Layer norm with a per-image scale and shift, the AdaLN of VAR's blocks.

The function runs the plain PyTorch reference today, on any device.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import reference

__all__ = ["modulated_layer_norm"]


def modulated_layer_norm(x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * (1 + scale) + shift`, mean and (biased) variance over the channels.

    The layer norm has no weights of its own; `scale` and `shift` come from the class (VAR's AdaLN).

    Args:
        x: `[B, T, C]` floating, C at least 1; B and T may be zero.
        scale: `[B, C]` for one row per image, or three dimensions broadcastable to `[B, T, C]`; floating.
        shift: likewise.
        eps: added to the variance; finite and positive.

    Returns:
        `[B, T, C]` in the dtype of `x`. Computed in fp32 (fp64 for fp64 `x`) whatever autocast says, rounded once.
        Differentiable in `x`, `scale` and `shift`.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not agree, or `eps` is not finite and positive.
    """
    for name, tensor in (("x", x), ("scale", scale), ("shift", shift)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape [B, T, C] with C at least 1, got {list(x.shape)}")
    batch, length, channels = x.shape
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.ndim == 2:
            fits = tensor.shape == (batch, channels)
        else:
            fits = tensor.ndim == 3 and all(
                size in (1, whole) for size, whole in zip(tensor.shape, x.shape, strict=True)
            )
        if not fits:
            raise ValueError(
                f"{name} must have shape [{batch}, {channels}] or be broadcastable to "
                f"[{batch}, {length}, {channels}], got {list(tensor.shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be finite and positive, got {eps}")
    return reference.modulated_layer_norm(x, scale, shift, eps=eps)
