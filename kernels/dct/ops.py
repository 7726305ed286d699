"""The cosine transform and sub-images as PyTorch operators: Triton kernels on a GPU, the reference elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import config, kernel, reference


def runs_kernels(images: Tensor, exact: bool) -> bool:
    """Whether the Triton kernels take these images: on a GPU, of at most 32 bits and 256 pixels a side, not `exact`."""
    return images.is_cuda and not exact and images.dtype != torch.float64 and max(images.shape[-2:]) <= config.LARGEST


def _exact(function: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, *by_sample: Tensor) -> Tensor:
    """`function` of planes in the reference's arithmetic; on a GPU in fp64, some samples at a time, rounded once.

    A sum of a few hundred products in fp32 may be off by 3e-6 of the largest value; and the tensor cores of an A100 or
    H100 take fp64 products as fast as the other cores take fp32.
    """
    if not x.is_cuda:
        return function(x, *by_sample).to(dtype).contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    planes = x.reshape(-1, *x.shape[-2:]) if not by_sample else x
    parts = zip(*(t.split(config.EXACT) for t in (planes, *by_sample, out.view(planes.shape))), strict=True)
    for part, *rest, result in parts:
        wide = part.double() / 255 if part.dtype == torch.uint8 else part.double()
        result.copy_(function(wide, *rest))
    return out


@torch.library.custom_op("spectralar::sub_images", mutates_args=())
def sub_images(images: Tensor, cutoffs: Tensor, out_dtype: torch.dtype, exact: bool) -> Tensor:
    if runs_kernels(images, exact):
        with torch.cuda.device_of(images):
            return kernel.sub_images(images.contiguous(), cutoffs.contiguous(), out_dtype)
    return _exact(reference.spectral_targets, images, out_dtype, cutoffs.clamp_min(1))


@sub_images.register_fake
def _(images: Tensor, cutoffs: Tensor, out_dtype: torch.dtype, exact: bool) -> Tensor:
    return torch.empty(images.shape, dtype=out_dtype, device=images.device)


def _save_sub_images(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, cutoffs, _, _ = inputs
    ctx.save_for_backward(cutoffs)
    ctx.dtype = images.dtype


def _sub_images_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    # A projection is its own adjoint. Gradients may be far smaller than pixels, so they never go through fp16.
    (cutoffs,) = ctx.saved_tensors
    return sub_images(gradient, cutoffs, ctx.dtype, True), None, None, None


sub_images.register_autograd(_sub_images_backward, setup_context=_save_sub_images)


@torch.library.custom_op("spectralar::spectral_mse", mutates_args=())
def spectral_mse(
    prediction: Tensor, images: Tensor, cutoffs: Tensor, exact: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient with respect to `prediction`."""
    if runs_kernels(images, exact) and prediction.dtype != torch.float64:
        with torch.cuda.device_of(images):
            return kernel.compare(prediction.contiguous(), images.contiguous(), cutoffs.contiguous(), weights)
    targets = _exact(reference.spectral_targets, images, reference.work_dtype(prediction, images), cutoffs.clamp_min(1))
    weighted = difference = prediction.to(targets.dtype) - targets
    if weights is not None:
        weighted = _exact(partial(reference.weigh_frequencies, weights=weights), difference, difference.dtype)
    return reference.mse_and_gradient(difference, weighted, prediction.dtype)


@spectral_mse.register_fake
def _(
    prediction: Tensor, images: Tensor, cutoffs: Tensor, exact: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=reference.work_dtype(prediction, images), device=images.device)
    return loss, torch.empty(prediction.shape, dtype=prediction.dtype, device=images.device)


def _save_spectral_mse(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, images, cutoffs, _, _ = inputs
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(cutoffs, gradient)
    ctx.dtype = images.dtype


def _spectral_mse_backward(ctx: Any, loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    cutoffs, saved = ctx.saved_tensors
    gradient = (saved * loss).to(saved.dtype)
    to_images = None
    if ctx.needs_input_grad[1]:
        to_images = sub_images(-gradient, cutoffs, ctx.dtype, True)
    return gradient, to_images, None, None, None


spectral_mse.register_autograd(_spectral_mse_backward, setup_context=_save_spectral_mse)


@torch.library.custom_op("spectralar::dct2", mutates_args=())
def transform(x: Tensor, inverse: bool) -> Tensor:
    return _exact(reference.idct2 if inverse else reference.dct2, x, x.dtype)


@transform.register_fake
def _(x: Tensor, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save_transform(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _transform_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    # The matrices are orthonormal: the adjoint is the inverse.
    return transform(gradient, not ctx.inverse), None


transform.register_autograd(_transform_backward, setup_context=_save_transform)
