"""The vector quantiser as PyTorch operators: the Triton kernels on a GPU, the reference elsewhere and for fp64.

Only first derivatives are defined.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import launch, reference
from .config import MAX_WIDTH

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernels(codebook: Tensor, *others: Tensor) -> bool:
    """Whether the Triton kernels take these tensors: on a GPU, of 16 or 32 bits, no wider than 256."""
    return codebook.is_cuda and codebook.shape[1] <= MAX_WIDTH and all(x.dtype in _DTYPES for x in (codebook, *others))


def _result_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _rows(x: Tensor) -> Tensor:
    # [..., D] -> [N, D]
    return x.reshape(-1, x.shape[-1]).contiguous()


def _flat(x: Tensor) -> Tensor:
    # [...] -> [N]. A column of a matrix reshapes to a view with gaps, which a kernel would not see.
    return x.reshape(-1).contiguous()


@torch.library.custom_op("spectralar::nearest_code", mutates_args=())
def nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    if not runs_kernels(codebook, z):
        return reference.nearest_code(z, codebook, normalize=normalize)
    with torch.cuda.device_of(codebook):
        return launch.nearest_code(_rows(z), codebook.contiguous(), normalize).view(z.shape[:-1])


@nearest_code.register_fake
def _(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return z.new_empty(z.shape[:-1], dtype=torch.int64)


@torch.library.custom_op("spectralar::assign_codes", mutates_args=())
def assign_codes(z: Tensor, codebook: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Indices `[...]`, codewords `[..., D]` and squared distances `[...]`; no gradients."""
    if not runs_kernels(codebook, z):
        indices, quantized, distances = reference.assign_codes(z, codebook, normalize=normalize)
        return indices, quantized.contiguous(), distances.contiguous()
    rows, codebook = _rows(z), codebook.contiguous()
    with torch.cuda.device_of(codebook):
        prepared = launch.prepare(codebook, normalize, rows)
        index = launch.nearest_code(rows, codebook, normalize, prepared)
        quantized, distance = launch.quantize(index, codebook, normalize, prepared, rows)
    return index.view(z.shape[:-1]), quantized.view(z.shape), distance.view(z.shape[:-1])


@assign_codes.register_fake
def _(z: Tensor, codebook: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _result_dtype(z, codebook)
    indices = z.new_empty(z.shape[:-1], dtype=torch.int64)
    return indices, z.new_empty(z.shape, dtype=dtype), z.new_empty(z.shape[:-1], dtype=dtype)


@torch.library.custom_op("spectralar::codebook_lookup", mutates_args=())
def lookup(indices: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    if not runs_kernels(codebook):
        return reference.lookup(indices, codebook, normalize=normalize)
    with torch.cuda.device_of(codebook):
        quantized, _ = launch.quantize(_flat(indices).long(), codebook.contiguous(), normalize)
    return quantized.view(*indices.shape, codebook.shape[1])


@lookup.register_fake
def _(indices: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return codebook.new_empty((*indices.shape, codebook.shape[1]), dtype=_result_dtype(codebook))


@torch.library.custom_op("spectralar::vector_quantize", mutates_args=())
def vector_quantize(
    z: Tensor, codebook: Tensor, token_mask: Tensor | None, normalize: bool, commitment: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codewords `[..., D]`, indices `[...]`, commitment loss and codebook loss."""
    if not runs_kernels(codebook, z):
        result = reference.vector_quantize(
            z, codebook, normalize=normalize, commitment=commitment, token_mask=token_mask
        )
        return result.quantized.contiguous(), result.indices, result.commitment_loss, result.codebook_loss
    indices, quantized, distances = assign_codes(z, codebook, normalize)
    if token_mask is not None:
        distances = torch.where(token_mask, distances, 0.0)
    loss = distances.sum(dtype=torch.float64) / _elements(z, token_mask)
    return quantized, indices, (commitment * loss).float(), loss.float()


@vector_quantize.register_fake
def _(
    z: Tensor, codebook: Tensor, token_mask: Tensor | None, normalize: bool, commitment: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = _result_dtype(z, codebook)
    indices = z.new_empty(z.shape[:-1], dtype=torch.int64)
    return z.new_empty(z.shape, dtype=dtype), indices, z.new_empty((), dtype=dtype), z.new_empty((), dtype=dtype)


def _elements(z: Tensor, token_mask: Tensor | None) -> Tensor | int:
    """Elements under the mean of the losses, at least one."""
    if token_mask is None:
        return max(1, z.numel())
    return (token_mask.sum() * z.shape[-1]).clamp_min(1)


@torch.library.custom_op("spectralar::vector_quantize_backward_z", mutates_args=())
def vectors_backward(
    grad_quantized: Tensor | None,
    grad_commitment: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
    commitment: float,
) -> Tensor:
    weight = None
    if grad_commitment is not None:
        weight = grad_commitment.double() * (2 * commitment) / _elements(z, token_mask)
    if not runs_kernels(codebook, z):
        grad = reference.vectors_backward(grad_quantized, weight, z, codebook, indices, token_mask, normalize)
        return grad.contiguous()
    straight = None if grad_quantized is None else _rows(grad_quantized)
    mask = None if token_mask is None else _flat(token_mask)
    with torch.cuda.device_of(codebook):
        grad = launch.vectors_backward(
            straight, weight, _rows(z), codebook.contiguous(), _flat(indices), mask, normalize
        )
    return grad.view(z.shape)


@vectors_backward.register_fake
def _(grad_quantized: Tensor | None, grad_commitment: Tensor | None, z: Tensor, *_: Any) -> Tensor:
    return z.new_empty(z.shape)


@torch.library.custom_op("spectralar::vector_quantize_backward_codebook", mutates_args=())
def codebook_backward(
    grad_loss: Tensor, z: Tensor, codebook: Tensor, indices: Tensor, token_mask: Tensor | None, normalize: bool
) -> Tensor:
    weight = grad_loss.double() * 2 / _elements(z, token_mask)
    return _codebook_gradient(z, weight, codebook, indices, token_mask, normalize, pull=True)


@codebook_backward.register_fake
def _(grad_loss: Tensor, z: Tensor, codebook: Tensor, *_: Any) -> Tensor:
    return codebook.new_empty(codebook.shape)


@torch.library.custom_op("spectralar::codebook_lookup_backward", mutates_args=())
def lookup_backward(grad: Tensor, indices: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    weight = torch.ones((), dtype=torch.float64, device=grad.device)
    return _codebook_gradient(grad, weight, codebook, indices, None, normalize, pull=False)


@lookup_backward.register_fake
def _(grad: Tensor, indices: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    return codebook.new_empty(codebook.shape)


def _codebook_gradient(
    rows: Tensor,
    weight: Tensor,
    codebook: Tensor,
    indices: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
    pull: bool,
) -> Tensor:
    if not runs_kernels(codebook, rows):
        grad = reference.codebook_backward(rows, weight, codebook, indices, token_mask, normalize, pull)
        return grad.contiguous()
    mask = None if token_mask is None else _flat(token_mask)
    index = _flat(indices).long()
    with torch.cuda.device_of(codebook):
        return launch.codebook_backward(_rows(rows), weight, codebook.contiguous(), index, mask, normalize, pull)


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, codebook, ctx.normalize = inputs
    ctx.save_for_backward(indices, codebook)


def _lookup_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    indices, codebook = ctx.saved_tensors
    return None, lookup_backward(grad, indices, codebook, ctx.normalize), None


def _save_vector_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, codebook, token_mask, ctx.normalize, ctx.commitment = inputs
    ctx.save_for_backward(z, codebook, token_mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _vector_quantize_gradient(
    ctx: Any,
    grad_quantized: Tensor | None,
    grad_indices: None,
    grad_commitment: Tensor | None,
    grad_codebook_loss: Tensor | None,
) -> tuple[Tensor | None, ...]:
    z, codebook, token_mask, indices = ctx.saved_tensors
    grad_z = grad_codebook = None
    if ctx.needs_input_grad[0] and not (grad_quantized is None and grad_commitment is None):
        grad_z = vectors_backward(
            grad_quantized, grad_commitment, z, codebook, indices, token_mask, ctx.normalize, ctx.commitment
        )
    if ctx.needs_input_grad[1] and grad_codebook_loss is not None:
        grad_codebook = codebook_backward(grad_codebook_loss, z, codebook, indices, token_mask, ctx.normalize)
    return grad_z, grad_codebook, None, None, None


lookup.register_autograd(_lookup_gradient, setup_context=_save_lookup)
vector_quantize.register_autograd(_vector_quantize_gradient, setup_context=_save_vector_quantize)
