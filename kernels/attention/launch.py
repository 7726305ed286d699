"""Starts the Triton kernels of attention; the arguments have been checked."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from .config import TileConfig, backward_config, forward_config, padded_width
from .kernel import (
    IMAGE_SEES_SPECTRAL,
    SPECTRAL_IS_CAUSAL,
    SPECTRAL_SEES_IMAGE,
    attention_bwd_keys_kernel,
    attention_bwd_queries_kernel,
    attention_fwd_kernel,
)

_LOG2_E = 1.4426950408889634
# Every tile of rows divides this.
ROUND = 64


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
            ROWS=config.rows, KEYS=config.keys, WIDTH=width, PADDED=padded,
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
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; `grad` and `out` are contiguous, D has stride 1 in q, k and v."""
    batch, length, heads, width = q.shape
    padded = padded_width(width)
    dq, dk, dv = (torch.empty(q.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    config = config or backward_config(padded, _capability(q.device))
    # The keys' kernel reads the sums that the queries' kernel leaves in delta.
    launches: list[tuple[Any, int, tuple[Tensor, ...]]] = [
        (attention_bwd_queries_kernel, triton.cdiv(length, config.rows), (out, grad, dq)),
        (attention_bwd_keys_kernel, triton.cdiv(length, config.keys), (grad, dk, dv)),
    ]
    if dq.numel():
        for kernel, programs, tensors in launches:
            kernel[(batch * heads * programs,)](
                q, k, v, *tensors, lse, delta, prefix_lengths, ends,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
                lse.stride(1), n_image, length, heads, rules, programs, scale * _LOG2_E,
                ROWS=config.rows, KEYS=config.keys, WIDTH=width, PADDED=padded,
                num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
            )  # fmt: skip
    return dq, dk, dv


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
