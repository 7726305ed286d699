"""Normalisations: the modulated layer norm of VAR's blocks, and the group norm with SiLU of convolutional decoders.

The layer norm is plain PyTorch on any device. The group norm is Triton on a GPU, for powers of two of channels (16 to
512) and groups and up to 32 bits; everything else runs the plain PyTorch reference.
"""

from __future__ import annotations

import math

from torch import Tensor

from . import ops, reference

__all__ = ["group_norm_silu", "group_norm_silu_to_pixels", "join_group_norm_silu", "modulated_layer_norm"]


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
    _check_eps(eps)
    return reference.modulated_layer_norm(x, scale, shift, eps=eps)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int, eps: float = 1e-6) -> Tensor:
    """`silu(y)` with `y = (x - mean) / sqrt(var + eps) * weight + bias`, mean and (biased) variance of each group.

    For inference: no gradient.

    Args:
        x: `[B, C, H, W]` floating, channels-last (other layouts are copied); B may be zero, H and W not.
        weight: `[C]` floating.
        bias: likewise.
        groups: number of groups of neighbouring channels; divides C.
        eps: added to the variance; finite and positive.

    Returns:
        `[B, C, H, W]` channels-last in the dtype of `x`. Computed in fp32 (fp64 for fp64 `x`), rounded once. An image's
        result does not depend on its batch.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes, groups or devices do not agree, or `eps` is not finite and positive.
    """
    _check_map(x, weight, bias, groups, eps, channels=1)
    return ops.group_norm_silu(x, weight, bias, groups, eps)


def join_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    residual: Tensor | None = None,
    offset: Tensor | None = None,
    interleave: bool = False,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The sum `z = x + offset + residual` and `group_norm_silu(z)`, with one pass less over memory than one by one.

    With `interleave` the map comes as the four phases of one twice as large, as one convolution gives them that stands
    for nearest-neighbour doubling and a 3x3 convolution: for i and j of 0 and 1,
    `z[b, c, 2 y + i, 2 x + j] = x[b, (2 i + j) C + c, y + i, x + j]`. For inference: no gradient.

    Args:
        x: `[B, C, H, W]` floating, or `[B, 4 C, H / 2 + 1, W / 2 + 1]` to interleave; channels-last (other layouts are
            copied); B may be zero, H and W not.
        weight: `[C]` floating.
        bias: likewise.
        groups: number of groups of neighbouring channels; divides C.
        residual: `[B, C, H, W]` in the dtype of `x`, or None for zero.
        offset: `[C]` floating, or None for zero.
        interleave: whether `x` holds phases.
        eps: added to the variance; finite and positive.

    Returns:
        z, rounded to the dtype of `x`, and `group_norm_silu` of that; both `[B, C, H, W]` channels-last. Where there is
        nothing to join, z is `x` itself.

    Raises:
        TypeError: an argument is not a floating tensor, or `residual` is of another dtype than `x`.
        ValueError: shapes, groups or devices do not agree, or `eps` is not finite and positive.
    """
    _check_map(x, weight, bias, groups, eps, channels=4 if interleave else 1)
    batch, _, height, width = x.shape
    if interleave:
        if min(height, width) < 2:
            raise ValueError(f"x must have height and width of at least 2 to interleave, got {list(x.shape)}")
        height, width = 2 * height - 2, 2 * width - 2
    _check_residual(residual, x, (batch, weight.shape[0], height, width))
    if offset is not None:
        _check_like("offset", offset, x, (weight.shape[0],))
    if residual is None and offset is None and not interleave:
        return x, ops.group_norm_silu(x, weight, bias, groups, eps)
    return ops.join_group_norm_silu(x, residual, offset, interleave, weight, bias, groups, eps)


def group_norm_silu_to_pixels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    *,
    groups: int,
    residual: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The end of a decoder: `group_norm_silu(x + residual)`, a 3x3 convolution to three colours, 8-bit pixels.

    Colours are clamped to [0, 1] and rounded to the nearest of 256 levels, ties to even. For inference: no gradient.

    Args:
        x: `[B, C, H, W]` floating, channels-last (other layouts are copied); B may be zero, H and W not.
        weight: `[C]` floating, of the norm.
        bias: likewise.
        conv_weight: `[3, C, 3, 3]` floating; outside the map lie zeros.
        conv_bias: `[3]` floating.
        groups: number of groups of neighbouring channels; divides C.
        residual: `[B, C, H, W]` in the dtype of `x`, or None for zero.
        eps: added to the variance; finite and positive.

    Returns:
        `[B, 3, H, W]` uint8. For 16-bit maps of up to 256 channels a GPU takes the products in fp16 and sums in fp32.

    Raises:
        TypeError: an argument is not a floating tensor, or `residual` is of another dtype than `x`.
        ValueError: shapes, groups or devices do not agree, or `eps` is not finite and positive.
    """
    _check_map(x, weight, bias, groups, eps, channels=1)
    _check_residual(residual, x, tuple(x.shape))
    _check_like("conv_weight", conv_weight, x, (3, x.shape[1], 3, 3))
    _check_like("conv_bias", conv_bias, x, (3,))
    return ops.to_pixels(x, residual, weight, bias, groups, eps, conv_weight, conv_bias)


def _check_map(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, channels: int) -> None:
    """`x` has `channels` channels for each of the norm's."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x must be a floating tensor, got {getattr(x, 'dtype', type(x))}")
    if x.ndim != 4 or 0 in x.shape[1:] or x.shape[1] % channels:
        wanted = "C" if channels == 1 else f"{channels} C"
        raise ValueError(f"x must have shape [B, {wanted}, H, W] with C, H and W at least 1, got {list(x.shape)}")
    width = x.shape[1] // channels
    if groups < 1 or width % groups:
        raise ValueError(f"groups must be positive and divide {width} channels, got {groups}")
    _check_like("weight", weight, x, (width,))
    _check_like("bias", bias, x, (width,))
    _check_eps(eps)


def _check_residual(residual: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    if residual is None:
        return
    _check_like("residual", residual, x, shape)
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")


def _check_like(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(tensor, 'dtype', type(tensor))}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _check_eps(eps: float) -> None:
    if not (math.isfinite(eps) and eps > 0):
        raise ValueError(f"eps must be finite and positive, got {eps}")
