"""Starts the Triton kernels of attention; the arguments have been checked."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from .config import ROUND, TileConfig, backward_configs, forward_config, padded_width, tail_width
from .kernel import (
    IMAGE_SEES_SPECTRAL,
    SPECTRAL_IS_CAUSAL,
    SPECTRAL_SEES_IMAGE,
    attention_bwd_head_kernel,
    attention_bwd_keys_kernel,
    attention_bwd_queries_kernel,
    attention_fwd_kernel,
)

_LOG2_E = 1.4426950408889634


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_lengths: Tensor | None,
    ends: Tensor | None,
    n_image: int,
    rules: int,
    scale: float,
    *,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`[B, T, H, D]` and the base-2 logarithms of the softmax sums `[B, H, T]`; D has stride 1 in q, k and v."""
    batch, length, heads, width = q.shape
    padded = padded_width(width)
    out = torch.empty(q.shape, dtype=v.dtype, device=v.device)
    lse = torch.empty(batch, heads, padded_length(length), dtype=torch.float32, device=q.device)
    config = config or forward_config(padded)
    programs = triton.cdiv(length, config.rows)
    if out.numel():
        attention_fwd_kernel[(batch * heads * programs,)](
            q, k, v, out, lse, prefix_lengths, ends,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            lse.stride(1), n_image, length, heads, rules, programs, scale * _LOG2_E,
            ROWS=config.rows, KEYS=config.keys, TAIL=tail_width(length, padded), WIDTH=width, PADDED=padded,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    prefix_lengths: Tensor | None,
    ends: Tensor | None,
    n_image: int,
    rules: int,
    scale: float,
    *,
    configs: tuple[TileConfig, ...] | None = None,
) -> Tensor:
    """Gradients of q, k and v, packed `[B, T, 3, H, D]`; `grad` and `out` are contiguous, D has stride 1 in q, k, v.

    One config is a launch over whole heads, two are the launches for queries and for keys.
    """
    batch, length, heads, width = q.shape
    padded = padded_width(width)
    grads = torch.empty(batch, length, 3, heads, width, dtype=q.dtype, device=q.device)
    dq, dk, dv = grads.unbind(2)
    if not grads.numel():
        return grads
    configs = configs or backward_configs(length, padded, _capability(q.device))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dq.stride()[:3], lse.stride(1))
    scale = scale * _LOG2_E
    if len(configs) == 1:
        (config,) = configs
        attention_bwd_head_kernel[(batch * heads,)](
            q, k, v, out, grad, dq, dk, dv, lse, prefix_lengths, ends, *strides, n_image, length, heads, rules, scale,
            ROWS=config.rows, WIDTH=width, PADDED=padded,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
        return grads
    # The keys' kernel reads the sums that the queries' kernel leaves in delta.
    delta = torch.empty_like(lse)
    launches: list[tuple[Any, int, tuple[Tensor, ...]]] = [
        (attention_bwd_queries_kernel, configs[0].rows, (out, grad, dq)),
        (attention_bwd_keys_kernel, configs[1].keys, (grad, dk, dv)),
    ]
    for (kernel, tile, tensors), config in zip(launches, configs, strict=True):
        programs = triton.cdiv(length, tile)
        kernel[(batch * heads * programs,)](
            q, k, v, *tensors, lse, delta, prefix_lengths, ends, *strides,
            n_image, length, heads, rules, programs, scale,
            ROWS=config.rows, KEYS=config.keys, TAIL=tail_width(length, padded), WIDTH=width, PADDED=padded,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip
    return grads


@lru_cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def group_ends(sizes: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Where the group of each position ends, `[T]` int32; None without groups."""
    if not sizes:
        return None
    ends = [end for end, size in zip(accumulate(sizes), sizes, strict=True) for _ in range(size)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def rules_of(mask: str, role: str) -> int:
    """A mask and a role as the kernels know them."""
    image, spectral, causal = IMAGE_SEES_SPECTRAL.value, SPECTRAL_SEES_IMAGE.value, SPECTRAL_IS_CAUSAL.value
    rules = {
        "figure": image | spectral | causal,
        "strict": causal | (spectral if role == "encoder" else image),
        "none": image | spectral,
    }
    return int(rules[mask])


def padded_length(length: int) -> int:
    """Rows of which one number each is kept: whole tiles, which spares the kernels masks."""
    return triton.cdiv(length, ROUND) * ROUND
