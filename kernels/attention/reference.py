"""Attention of SpectralAR in plain PyTorch: explicit softmax over a dense mask, in fp32 (fp64 for fp64 inputs).

The contract for every faster backend. Tensors are `[B, T, H, D]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def spectral_mask(
    length: int, n_image: int, prefix_lengths: Tensor | None, mask: str, role: str, device: torch.device
) -> Tensor:
    """Boolean `[B or 1, T, T]`, true where a query row may see a key (SpectralAR section 3.2, Figure 3)."""
    position = torch.arange(length, device=device)
    spectral = position >= n_image
    row, key = position[:, None], position[None, :]
    row_spectral, key_spectral = spectral[:, None], spectral[None, :]
    if mask == "none":
        visible = torch.ones(length, length, dtype=torch.bool, device=device)
    else:
        visible = ~(row_spectral & key_spectral) | (key <= row)
        if mask == "strict" and role == "encoder":
            visible &= row_spectral | ~key_spectral
        elif mask == "strict":
            visible &= ~row_spectral | key_spectral
    visible = visible[None]
    if prefix_lengths is None:
        return visible
    # Under a causal mask the rows beyond the prefix are never read, so limiting every row's keys is the same as
    # dropping the hidden tokens; the diagonal stays open so that no row is empty.
    hidden = position[None, :] >= n_image + prefix_lengths.to(device)[:, None]  # [B, T]
    return visible & (~hidden[:, None, :] | torch.eye(length, dtype=torch.bool, device=device))


def group_causal_mask(group_sizes: Sequence[int], device: torch.device) -> Tensor:
    """Boolean `[T, T]`: a position sees its own group and all earlier groups (VAR's block-causal mask)."""
    sizes = torch.tensor(list(group_sizes), dtype=torch.int64, device=device)
    # The length is given, since torch.compile could not know it from the sizes.
    group = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes, output_size=sum(group_sizes))
    return group[:, None] >= group[None, :]


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v where `visible` `[.., T, S]` is true; q `[B, T, H, D]`, k and v `[B, S, H, D]`."""
    with torch.autocast(q.device.type, enabled=False):
        p = _masked_scores(q, k, visible, scale).softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", p, v.to(p.dtype))
    return out.to(v.dtype)


def spectral_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_image: int,
    prefix_lengths: Tensor | None = None,
    mask: str = "figure",
    role: str = "encoder",
) -> Tensor:
    visible = spectral_mask(q.shape[1], n_image, prefix_lengths, mask, role, q.device)
    return masked_attention(q, k, v, visible, q.shape[-1] ** -0.5)


def attention_with_sums(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`masked_attention`, and the base-2 logarithms of the softmax sums `[B, H, T]`."""
    scores = _masked_scores(q, k, visible, scale)
    return masked_attention(q, k, v, visible, scale), scores.logsumexp(-1) / math.log(2)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `masked_attention` by q, k and v."""
    p = _masked_scores(q, k, visible, scale).softmax(-1)
    grad = grad.to(p.dtype)
    d_p = torch.einsum("bthd,bshd->bhts", grad, v.to(p.dtype))
    d_s = scale * p * (d_p - (p * d_p).sum(-1, keepdim=True))
    d_q = torch.einsum("bhts,bshd->bthd", d_s, k.to(p.dtype))
    d_k = torch.einsum("bhts,bthd->bshd", d_s, q.to(p.dtype))
    d_v = torch.einsum("bhts,bthd->bshd", p, grad)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def _masked_scores(q: Tensor, k: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), k.to(dtype)) * scale
    if visible is not None:
        visible = visible if visible.dim() == 2 else visible[:, None]
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    position = torch.arange(q.shape[1], device=q.device)
    return masked_attention(q, k, v, position[:, None] >= position[None, :], scale)


def group_causal_attention(q: Tensor, k: Tensor, v: Tensor, group_sizes: Sequence[int], scale: float) -> Tensor:
    return masked_attention(q, k, v, group_causal_mask(group_sizes, q.device), scale)


def cached_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, scale: float) -> Tensor:
    return masked_attention(q, k_cache[:, :length], v_cache[:, :length], None, scale)
