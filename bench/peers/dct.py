"""Other ways to cut pictures off in frequency. Each `setup_*` gives a callable `(images, cutoffs)`, or `Missing`.

Images arrive as the case has them and leave in its output dtype, so a conversion is part of the time, as in ours.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor

from spectralar.bench.cases import Missing
from spectralar.bench.ceilings import tf32
from spectralar.kernels.dct import dct_matrix

P = ParamSpec("P")
Arithmetic = Literal["fp32", "tf32", "bf16", "fp16"]
Targets = Callable[[Tensor, Tensor], Tensor]
Transform = Callable[[Tensor], Tensor]

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def setup_four_matmuls(
    size: int, device: torch.device, out_dtype: torch.dtype, arithmetic: Arithmetic, *, compiled: bool = False
) -> Targets:
    """`A I A^T`, the mask, `A^T D A`: four batched products."""
    matrix = dct_matrix(size, dtype=_DTYPES[arithmetic], device=device)
    inverse = matrix.T.contiguous()
    index = torch.arange(size, device=device)
    order = torch.maximum(index[:, None], index)

    def targets(images: Tensor, cutoffs: Tensor) -> Tensor:
        coefficients = matrix @ pixels_of(images, matrix.dtype) @ inverse
        kept = torch.where(order < cutoffs.view(-1, 1, 1, 1), coefficients, 0.0)
        return (inverse @ kept @ matrix).to(out_dtype)

    return _finish(targets, arithmetic, compiled)


def setup_projection(
    size: int, device: torch.device, out_dtype: torch.dtype, arithmetic: Arithmetic, *, compiled: bool = False
) -> Targets:
    """`P I P` with `P_w = A_w^T A_w` gathered from a table of all cutoffs: two batched products."""
    matrix = dct_matrix(size, dtype=torch.float64, device=device)
    parts = matrix[:, :, None] * matrix[:, None, :]  # [w, size, size], each frequency's share
    table = torch.cat([torch.zeros_like(parts[:1]), parts.cumsum(0)]).to(_DTYPES[arithmetic])

    def targets(images: Tensor, cutoffs: Tensor) -> Tensor:
        projection = table[cutoffs]  # [B, size, size], symmetric
        pixels = pixels_of(images, table.dtype)
        # All channels of a picture are one matrix from the right; from the left they are not.
        rows = torch.bmm(pixels.flatten(1, 2), projection).view_as(pixels)
        return (projection[:, None] @ rows).to(out_dtype)

    return _finish(targets, arithmetic, compiled)


def setup_fft(size: int, device: torch.device, out_dtype: torch.dtype) -> Targets:
    """A fast transform of length `size` along each side, from a real FFT of the reordered samples (Makhoul 1980)."""
    forward, inverse = fft_dct2(size, device)
    return _filter(forward, inverse, size, device, out_dtype)


def setup_torch_dct(size: int, device: torch.device, out_dtype: torch.dtype) -> Targets | Missing:
    """The package torch-dct, if installed."""
    package = installed("torch_dct")
    if isinstance(package, Missing):
        return package
    forward = functools.partial(package.dct_2d, norm="ortho")
    return _filter(forward, functools.partial(package.idct_2d, norm="ortho"), size, device, out_dtype)


def setup_dctorch(size: int, device: torch.device, out_dtype: torch.dtype) -> Targets | Missing:
    """The package dctorch, if installed."""
    package = installed("dctorch.functional")
    if isinstance(package, Missing):
        return package
    return _filter(package.dct2, package.idct2, size, device, out_dtype)


def setup_two_matmuls(size: int, device: torch.device, arithmetic: Arithmetic, *, compiled: bool = False) -> Transform:
    """`A I A^T` alone, the peer of `dct2`."""
    matrix = dct_matrix(size, dtype=_DTYPES[arithmetic], device=device)

    def transform(images: Tensor) -> Tensor:
        return matrix @ images @ matrix.T

    return _finish(transform, arithmetic, compiled)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient becomes `factor` times as large."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


def setup_torch_dct2() -> Transform | Missing:
    """The transform of the package torch-dct, if installed."""
    package = installed("torch_dct")
    return package if isinstance(package, Missing) else functools.partial(package.dct_2d, norm="ortho")


def fft_dct2(size: int, device: torch.device) -> tuple[Transform, Transform]:
    """The orthonormal two-dimensional DCT-II and its inverse by FFT, for square pictures."""
    index = torch.arange(size, device=device)
    # Even samples upwards, then odd ones downwards.
    order = torch.cat([index[::2], index[1::2].flip(0)])
    back = order.argsort()
    phase = torch.polar(torch.ones(size, device=device), -math.pi * index / (2 * size))
    scale = torch.full((size,), math.sqrt(2 / size), device=device)
    scale[0] = math.sqrt(1 / size)
    half = size // 2 + 1

    def forward(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x[..., order]) * phase[:half]
        # Coefficient k is the real part, coefficient size - k minus the imaginary one.
        return torch.cat([spectrum.real, -spectrum.imag[..., 1 : size - half + 1].flip(-1)], dim=-1) * scale

    def inverse(y: Tensor) -> Tensor:
        y = y / scale
        mirrored = torch.cat([torch.zeros_like(y[..., :1]), y[..., 1:].flip(-1)], dim=-1)
        spectrum = torch.complex(y, -mirrored)[..., :half] * phase[:half].conj()
        return torch.fft.irfft(spectrum, n=size)[..., back]

    def both_sides(one: Transform) -> Transform:
        return lambda x: one(one(x).mT).mT

    return both_sides(forward), both_sides(inverse)


def installed(name: str) -> ModuleType | Missing:
    """A package that may be measured where it is installed, and is needed by nothing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return Missing(f"{name.split('.')[0]} is not installed")


def _filter(forward: Transform, inverse: Transform, size: int, device: torch.device, out_dtype: torch.dtype) -> Targets:
    index = torch.arange(size, device=device)
    order = torch.maximum(index[:, None], index)

    def targets(images: Tensor, cutoffs: Tensor) -> Tensor:
        coefficients = forward(pixels_of(images, torch.float32))
        return inverse(torch.where(order < cutoffs.view(-1, 1, 1, 1), coefficients, 0.0)).to(out_dtype)

    return targets


def pixels_of(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 from 0 to 255 as values from 0 to 1, anything else as it is, in `dtype`."""
    return (images.float() / 255 if images.dtype == torch.uint8 else images).to(dtype)


def _finish(call: Callable[P, Tensor], arithmetic: Arithmetic, compiled: bool) -> Callable[P, Tensor]:
    inner = torch.compile(call, dynamic=False) if compiled else call

    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with tf32(arithmetic == "tf32"):
            return inner(*args, **kwargs)

    return run
