"""Attention as a PyTorch operator: the Triton kernels on a GPU, the reference elsewhere and for 32 and 64 bits.

A mask is `figure`, `strict` or `none` with a role, `n_image` rows of the image and a prefix length for each sample; the
generator's masks are `figure` without image rows, and with groups where `group_sizes` is not empty. Only first
derivatives are defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import launch, reference
from .config import MAX_WIDTH

_DTYPES = (torch.bfloat16, torch.float16)


def runs_kernels(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the Triton kernels take heads like these: on a GPU, 16 bits, no wider than 128."""
    return device.type == "cuda" and dtype in _DTYPES and width <= MAX_WIDTH


@torch.library.custom_op("spectralar::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lengths: Tensor | None,
    group_sizes: Sequence[int],
    n_image: int,
    mask: str,
    role: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`[B, T, H, D]`, and the base-2 logarithms of the softmax sums `[B, H, T]`, T in whole tiles."""
    return _forward(q, k, v, prefix_lengths, group_sizes, n_image, mask, role, scale)


@torch.library.custom_op("spectralar::attention_packed", mutates_args=())
def attention_packed(
    qkv: Tensor,
    prefix_lengths: Tensor | None,
    group_sizes: Sequence[int],
    n_image: int,
    mask: str,
    role: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The same of one tensor `[B, T, 3, H, D]`; its gradient is computed where it belongs, without a copy."""
    q, k, v = qkv.unbind(2)
    return _forward(q, k, v, prefix_lengths, group_sizes, n_image, mask, role, scale)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lengths: Tensor | None,
    group_sizes: Sequence[int],
    n_image: int,
    mask: str,
    role: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if not runs_kernels(q.device, q.dtype, q.shape[-1]):
        visible = _visible(q, prefix_lengths, group_sizes, n_image, mask, role)
        out, sums = reference.attention_with_sums(q, k, v, visible, scale)
        return out.contiguous(), F.pad(sums.float(), (0, launch.padded_length(q.shape[1]) - q.shape[1]))
    with torch.cuda.device_of(q):
        return launch.forward(
            _rows(q), _rows(k), _rows(v), _flat(prefix_lengths), launch.group_ends(tuple(group_sizes), q.device),
            n_image, launch.rules_of(mask, role), scale,
        )  # fmt: skip


@attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _width = q.shape
    sums = q.new_empty((batch, heads, launch.padded_length(length)), dtype=torch.float32)
    return q.new_empty(q.shape), sums


@attention_packed.register_fake
def _(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, length, _three, heads, width = qkv.shape
    sums = qkv.new_empty((batch, heads, launch.padded_length(length)), dtype=torch.float32)
    return qkv.new_empty((batch, length, heads, width)), sums


@torch.library.custom_op("spectralar::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    prefix_lengths: Tensor | None,
    group_sizes: Sequence[int],
    n_image: int,
    mask: str,
    role: str,
    scale: float,
) -> Tensor:
    """The gradients of q, k and v, packed: `[B, T, 3, H, D]`."""
    if not runs_kernels(q.device, q.dtype, q.shape[-1]):
        visible = _visible(q, prefix_lengths, group_sizes, n_image, mask, role)
        return torch.stack(reference.attention_backward(grad, q, k, v, visible, scale), dim=2)
    with torch.cuda.device_of(q):
        return launch.backward(
            grad.contiguous(), _rows(q), _rows(k), _rows(v), out, sums, _flat(prefix_lengths),
            launch.group_ends(tuple(group_sizes), q.device), n_image, launch.rules_of(mask, role), scale,
        )  # fmt: skip


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, *_: Any) -> Tensor:
    batch, length, heads, width = q.shape
    return q.new_empty((batch, length, 3, heads, width))


def _visible(
    q: Tensor, prefix_lengths: Tensor | None, group_sizes: Sequence[int], n_image: int, mask: str, role: str
) -> Tensor:
    if group_sizes:
        return reference.group_causal_mask(group_sizes, q.device)
    return reference.spectral_mask(q.shape[1], n_image, prefix_lengths, mask, role, q.device)


def _rows(x: Tensor) -> Tensor:
    # A slice of packed queries, keys and values is read where it lies. The kernels number the rows in 32 bits.
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    # A column of a matrix is a view with gaps, which a kernel would not see.
    return None if x is None else x.contiguous()


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, prefix_lengths, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, *output, prefix_lengths)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    grads = attention_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (*grads.unbind(2), *(None,) * 6)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, prefix_lengths, *ctx.rest = inputs
    ctx.save_for_backward(qkv, *output, prefix_lengths)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradient_packed(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    qkv, *saved = ctx.saved_tensors
    return attention_backward(grad, *qkv.unbind(2), *saved, *ctx.rest), *(None,) * 6


attention.register_autograd(_gradient, setup_context=_save)
attention_packed.register_autograd(_gradient_packed, setup_context=_save_packed)
