"""Whole-image cosine transform and the sub-images that SpectralAR's tokens are taught to rebuild.

Every function runs the plain PyTorch reference today, on any device.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from . import reference

__all__ = ["dct2", "dct_matrix", "idct2", "spectral_pyramid", "spectral_targets"]


def dct_matrix(n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The orthonormal DCT-II matrix `A [n, n]`; row `k` is frequency `k`, `A @ A.T` is the identity.

    `A[k, i] = s_k * cos(pi * (2i + 1) * k / (2n))` with `s_0 = sqrt(1/n)` and `s_k = sqrt(2/n)` otherwise: the
    one-dimensional factor of the basis in SpectralAR eq. 1. Computed in fp64, rounded once to `dtype`.

    Args:
        n: number of samples, at least 1.
        dtype: a floating dtype.
        device: where the matrix lies; None means PyTorch's default device.

    Returns:
        `[n, n]`, a copy that the caller may change.

    Raises:
        TypeError: `n` is not an int or `dtype` is not floating.
        ValueError: `n` is less than 1.
    """
    [n] = _integers("n", [n])
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    _check_floating_dtype("dtype", dtype)
    return reference.dct_matrix(n, dtype=dtype, device=device)


def dct2(images: Tensor) -> Tensor:
    """The orthonormal two-dimensional DCT-II over whole images (SpectralAR eq. 1): `D = A_H @ I @ A_W.T`.

    Args:
        images: `[..., H, W]` floating, any leading dimensions including none or of size zero; H and W at least 1.

    Returns:
        Coefficients `[..., H, W]` in the input's dtype; `[..., u, v]` holds vertical frequency `u` and horizontal
        frequency `v`. The transform keeps the sum of squares. bf16 and fp16 are computed in fp32 and rounded once.
        Differentiable.

    Raises:
        TypeError: `images` is not a floating tensor.
        ValueError: `images` has fewer than two dimensions, or H or W is zero.
    """
    _check_plane("images", images)
    return reference.dct2(images)


def idct2(coefficients: Tensor) -> Tensor:
    """The inverse of `dct2` (SpectralAR eq. 2): `I = A_H.T @ D @ A_W`.

    Args:
        coefficients: `[..., H, W]` floating, any leading dimensions including none or of size zero; H and W at
            least 1.

    Returns:
        Images `[..., H, W]` in the input's dtype. bf16 and fp16 are computed in fp32 and rounded once.
        Differentiable.

    Raises:
        TypeError: `coefficients` is not a floating tensor.
        ValueError: `coefficients` has fewer than two dimensions, or H or W is zero.
    """
    _check_plane("coefficients", coefficients)
    return reference.idct2(coefficients)


def spectral_targets(
    images: Tensor, cutoffs: int | Sequence[int] | Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Each image with only its lowest `w x w` frequencies: the sub-image `I'` of SpectralAR eq. 5.

    A coefficient at row `u` and column `v` is kept when `u < w` and `v < w`, also for images that are not square.
    `w >= max(H, W)` keeps everything and returns the image itself, bit for bit; `w = 0` gives zeros.

    The map is a projection: linear, idempotent, equal to its own adjoint, so the gradient with respect to `images`
    is the sub-image of the incoming gradient. A sub-image of pixels in [0, 1] may leave that range at sharp edges;
    by about a quarter in photographs. Nothing is clipped, as that would end linearity.

    Args:
        images: `[B, C, H, W]`, uint8 (divided by 255) or floating; H and W at least 1.
        cutoffs: `w`, one int for the batch or integers `[B]`, one per image, each from 0 to `max(H, W)`. The values
            of a tensor that is not in CPU memory are not checked, since reading them would stall the device; values
            out of range there act as the nearest allowed one.
        out_dtype: floating dtype of the result; None means float32 for uint8 images, else the images' own dtype.

    Returns:
        `[B, C, H, W]`. Computed in fp32 (fp64 for fp64 images) whatever autocast says, rounded once.

    Raises:
        TypeError: `images` is neither uint8 nor floating, `cutoffs` are not integers, `out_dtype` is not floating.
        ValueError: wrong shape of `images` or `cutoffs`, or a cutoff out of range.
    """
    _check_images(images)
    if out_dtype is not None:
        _check_floating_dtype("out_dtype", out_dtype)
    largest = max(images.shape[-2:])
    if isinstance(cutoffs, Tensor):
        if cutoffs.is_floating_point() or cutoffs.is_complex() or cutoffs.dtype == torch.bool:
            raise TypeError(f"cutoffs must be integers, got a tensor of {cutoffs.dtype}")
        if cutoffs.shape != images.shape[:1]:
            raise ValueError(f"cutoffs must have shape [{images.shape[0]}], one per image, got {list(cutoffs.shape)}")
        cutoffs = cutoffs.long()
        if cutoffs.device.type == "cpu":
            _check_range(cutoffs.tolist(), largest)
    elif isinstance(cutoffs, Sequence):
        cutoffs = _integers("cutoffs", cutoffs)
        if len(cutoffs) != images.shape[0]:
            raise ValueError(f"cutoffs must hold {images.shape[0]} values, one per image, got {len(cutoffs)}")
        _check_range(cutoffs, largest)
        cutoffs = torch.tensor(cutoffs, dtype=torch.int64)
    else:
        [cutoffs] = _integers("cutoffs", [cutoffs])
        _check_range([cutoffs], largest)
    return reference.spectral_targets(images, cutoffs, out_dtype=out_dtype)


def spectral_pyramid(images: Tensor, cutoffs: Sequence[int]) -> Tensor:
    """All sub-images of every image, from blurred to sharp (SpectralAR eq. 5, figure 2).

    Args:
        images: `[B, C, H, W]`, uint8 (divided by 255) or floating; H and W at least 1.
        cutoffs: the N cutoffs, shared by the batch, each from 0 to `max(H, W)`; N at least 1.

    Returns:
        `[B, N, C, H, W]`, float32 for uint8 images, else in the images' dtype; level `n` equals
        `spectral_targets(images, cutoffs[n])` up to rounding. Differentiable.

    Raises:
        TypeError: `images` is neither uint8 nor floating, or `cutoffs` is not a sequence of ints.
        ValueError: wrong shape of `images`, no cutoffs, or a cutoff out of range.
    """
    _check_images(images)
    levels = _integers("cutoffs", cutoffs)
    if not levels:
        raise ValueError("cutoffs must hold at least one value, got none")
    _check_range(levels, max(images.shape[-2:]))
    return reference.spectral_pyramid(images, levels)


def _check_floating_dtype(name: str, dtype: object) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating dtype, got {dtype}")


def _check_plane(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating, got {x.dtype}")
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"{name} must have shape [..., H, W] with H and W at least 1, got {list(x.shape)}")


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images must be uint8 or floating, got {images.dtype}")
    if images.ndim != 4 or 0 in images.shape[-2:]:
        raise ValueError(f"images must have shape [B, C, H, W] with H and W at least 1, got {list(images.shape)}")


def _integers(name: str, values: Iterable[SupportsIndex]) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be integral, got {values!r}") from None


def _check_range(cutoffs: Sequence[int], largest: int) -> None:
    for cutoff in cutoffs:
        if not 0 <= cutoff <= largest:
            raise ValueError(f"cutoffs must lie from 0 to max(H, W) = {largest}, got {cutoff}")
