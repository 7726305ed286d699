"""Whole-image cosine transform and the sub-images that SpectralAR's tokens are taught to rebuild.

On a GPU, `spectral_targets` and `spectral_mse` run fused Triton kernels; everything else, and every other device, runs
the plain PyTorch reference.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from . import ops, reference

__all__ = ["Precision", "dct2", "dct_matrix", "idct2", "spectral_mse", "spectral_pyramid", "spectral_targets"]

Precision = Literal["pixel", "exact"]
"""How exact a sub-image is on a GPU.

`pixel`: within a quarter of one 8-bit step on 8-bit photographs, by fp16 products; for values up to about 200 in size.
`exact`: fp32 rounding, for values of any size.
"""


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
        frequency `v`. The transform keeps the sum of squares. bf16 and fp16 are computed in fp32, never in TF32, and
        rounded once. Differentiable.

    Raises:
        TypeError: `images` is not a floating tensor.
        ValueError: `images` has fewer than two dimensions, or H or W is zero.
    """
    _check_plane("images", images)
    return ops.transform(images, False)


def idct2(coefficients: Tensor) -> Tensor:
    """The inverse of `dct2` (SpectralAR eq. 2): `I = A_H.T @ D @ A_W`.

    Args:
        coefficients: `[..., H, W]` floating, any leading dimensions including none or of size zero; H and W at
            least 1.

    Returns:
        Images `[..., H, W]` in the input's dtype. bf16 and fp16 are computed in fp32, never in TF32, and
        rounded once. Differentiable.

    Raises:
        TypeError: `coefficients` is not a floating tensor.
        ValueError: `coefficients` has fewer than two dimensions, or H or W is zero.
    """
    _check_plane("coefficients", coefficients)
    return ops.transform(coefficients, True)


def spectral_targets(
    images: Tensor,
    cutoffs: int | Sequence[int] | Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    precision: Precision = "pixel",
) -> Tensor:
    """Each image with only its lowest `w x w` frequencies: the sub-image `I'` of SpectralAR eq. 5.

    A coefficient at row `u` and column `v` is kept when `u < w` and `v < w`, also for images that are not square.
    `w >= max(H, W)` keeps everything and returns the image itself, bit for bit.

    The map is a projection: linear, idempotent, equal to its own adjoint, so the gradient with respect to `images`
    is the sub-image of the incoming gradient. A sub-image of pixels in [0, 1] may leave that range at sharp edges;
    by about a quarter in photographs. Nothing is clipped, as that would end linearity. NaN and infinity spread over
    their channel of their image, and no further.

    On a GPU one pass reads the images and writes the sub-images, sides of at most 256 pixels given; longer sides,
    fp64 and `precision="exact"` run as four matrix products in fp64.

    Args:
        images: `[B, C, H, W]`, uint8 (divided by 255) or floating; H and W at least 1.
        cutoffs: `w`, one int for the batch or integers `[B]`, one per image, each from 1 to `max(H, W)`. The values
            of a tensor that is not in CPU memory are not checked, since reading them would stall the device; values
            out of range there act as the nearest allowed one.
        out_dtype: floating dtype of the result; None means float32 for uint8 images, else the images' own dtype.
        precision: see `Precision`; on a CPU, and for gradients, the result is always exact.

    Returns:
        `[B, C, H, W]`, rounded once to `out_dtype`, whatever autocast and the settings for TF32 say.

    Raises:
        TypeError: `images` is neither uint8 nor floating, `cutoffs` are not integers, `out_dtype` is not floating.
        ValueError: wrong shape of `images` or `cutoffs`, a cutoff out of range, cutoffs on another GPU than the
            images, or an unknown `precision`.
    """
    _check_images(images)
    if out_dtype is None:
        out_dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    _check_floating_dtype("out_dtype", out_dtype)
    _check_precision(precision)
    return ops.sub_images(images, _cutoffs(cutoffs, images), out_dtype, precision == "exact")


def spectral_mse(
    prediction: Tensor,
    images: Tensor,
    cutoffs: int | Sequence[int] | Tensor,
    *,
    weights: Tensor | None = None,
    precision: Precision = "pixel",
) -> Tensor:
    """`mean((prediction - spectral_targets(images, cutoffs))^2)`, with its gradient, in one pass on a GPU.

    The sub-images are never written to memory; the gradient with respect to `prediction` is, once. With weights it is
    `mean(weights * dct2(prediction - spectral_targets(images, cutoffs))^2)`: on a GPU the same pass leaves the
    differences in fp16, and matrix products in fp16 weigh them.

    Args:
        prediction: `[B, C, H, W]` floating, on the images' device.
        images, cutoffs, precision: as in `spectral_targets`.
        weights: `[H, W]` floating, not negative, on the images' device: how much the squared error at vertical
            frequency u and horizontal frequency v counts; no gradient reaches them. None is 1, since the transform
            keeps squares. Signs are not checked, since reading them would stall the device. With `precision="pixel"` on
            a GPU differences must be below 65504 / sqrt(H * W), 256 at 256 pixels; and weights may differ by a factor
            of about a thousand: the roundings of fp16 where they are largest cover what is said where they are least.

    Returns:
        Scalar float32 (float64 if `prediction` or `images` are), 0 for an empty batch. Differentiable once, in
        `prediction` and in floating `images`.

    Raises:
        TypeError: as `spectral_targets`, or `prediction` or `weights` is not a floating tensor.
        ValueError: as `spectral_targets`, or `prediction` has another shape or device than `images`, or `weights` are
            not `[H, W]` there.
    """
    _check_images(images)
    if not isinstance(prediction, Tensor) or not prediction.is_floating_point():
        raise TypeError(
            f"prediction must be a floating tensor, got {getattr(prediction, 'dtype', type(prediction).__name__)}"
        )
    if prediction.shape != images.shape or prediction.device != images.device:
        raise ValueError(
            f"prediction must be {list(images.shape)} on {images.device} as images, got {list(prediction.shape)} on "
            f"{prediction.device}"
        )
    _check_precision(precision)
    if weights is not None:
        _check_weights(weights, images)
    loss, _ = ops.spectral_mse(prediction, images, _cutoffs(cutoffs, images), precision == "exact", weights)
    return loss


def spectral_pyramid(images: Tensor, cutoffs: Sequence[int]) -> Tensor:
    """All sub-images of every image, from blurred to sharp (SpectralAR eq. 5, figure 2).

    Args:
        images: `[B, C, H, W]`, uint8 (divided by 255) or floating; H and W at least 1.
        cutoffs: the N cutoffs, shared by the batch, each from 1 to `max(H, W)`; N at least 1.

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


def _cutoffs(cutoffs: int | Sequence[int] | Tensor, images: Tensor) -> Tensor:
    """Checked cutoffs, one per image, on the images' device."""
    batch, largest = len(images), max(images.shape[-2:])
    if isinstance(cutoffs, Tensor):
        if cutoffs.is_floating_point() or cutoffs.is_complex() or cutoffs.dtype == torch.bool:
            raise TypeError(f"cutoffs must be integers, got a tensor of {cutoffs.dtype}")
        if cutoffs.shape != (batch,):
            raise ValueError(f"cutoffs must have shape [{batch}], one per image, got {list(cutoffs.shape)}")
        if cutoffs.device.type == "cpu":
            if not torch.compiler.is_compiling():
                _check_range(cutoffs.tolist(), largest)
        elif cutoffs.device != images.device:
            raise ValueError(f"cutoffs must be on the images' device {images.device}, got {cutoffs.device}")
        return cutoffs.to(images.device)
    if isinstance(cutoffs, Sequence):
        values = _integers("cutoffs", cutoffs)
        if len(values) != batch:
            raise ValueError(f"cutoffs must hold {batch} values, one per image, got {len(values)}")
        _check_range(values, largest)
        return torch.tensor(values, dtype=torch.int64, device=images.device)
    [value] = _integers("cutoffs", [cutoffs])
    _check_range([value], largest)
    return torch.full((batch,), value, dtype=torch.int64, device=images.device)


def _check_precision(precision: object) -> None:
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")


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


def _check_weights(weights: object, images: Tensor) -> None:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights must be a floating tensor, got {getattr(weights, 'dtype', type(weights).__name__)}")
    if weights.shape != images.shape[-2:] or weights.device != images.device:
        raise ValueError(
            f"weights must be {list(images.shape[-2:])} on {images.device} as images, got {list(weights.shape)} on "
            f"{weights.device}"
        )


def _integers(name: str, values: Iterable[SupportsIndex]) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise TypeError(f"{name} must be integral, got {values!r}") from None


def _check_range(cutoffs: Sequence[int], largest: int) -> None:
    for cutoff in cutoffs:
        if not 1 <= cutoff <= largest:
            raise ValueError(f"cutoffs must lie from 1 to max(H, W) = {largest}, got {cutoff}")
