"""Checks and conversions of image tensors, in one place for every public function that takes or gives images."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(images: Tensor, *, name: str = "images", size: int | None = None, check_range: bool = True) -> Tensor:
    """Images as float in [0, 1].

    Args:
        images: `[B, 3, H, W]` uint8, or floating in [0, 1].
        name: what error messages call the argument.
        size: required height and width in pixels, or None for any.
        check_range: look at the values of floating images. Reading them waits for a GPU, so loops that know their
            data switch it off.

    Returns:
        `[B, 3, H, W]`: fp32 for uint8, otherwise the input itself.

    Raises:
        TypeError: not a tensor, or neither uint8 nor floating.
        ValueError: wrong shape, or values outside [0, 1].
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(images).__name__}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must have shape [B, 3, H, W], not {list(images.shape)}")
    if size is not None and tuple(images.shape[2:]) != (size, size):
        raise ValueError(f"{name} must be {size} x {size} pixels, not {images.shape[2]} x {images.shape[3]}")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.dtype.is_floating_point:
        raise TypeError(f"{name} must be uint8 or floating in [0, 1], not {images.dtype}")
    if check_range and images.numel():
        low, high = images.aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name} must be in [0, 1] when floating, not {low.item():.4g}..{high.item():.4g}")
    return images


def to_uint8(images: Tensor) -> Tensor:
    """Clamps to [0, 1] and rounds to the nearest of 256 levels; `[..., H, W]` floating to uint8."""
    return (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, for values in [0, 1]; infinite where equal.

    Args:
        images: `[B, C, H, W]` floating or uint8.
        targets: the same shape.

    Returns:
        `[B]` fp32: 10 log10(1 / MSE), after clamping `images` to [0, 1] as a screen would.
    """
    if images.shape != targets.shape:
        raise ValueError(f"images {list(images.shape)} and targets {list(targets.shape)} must have one shape")
    a, b = (x.float() / 255 if x.dtype == torch.uint8 else x.float().clamp(0, 1) for x in (images, targets))
    return -10 * (a - b).square().flatten(1).mean(1).log10()
