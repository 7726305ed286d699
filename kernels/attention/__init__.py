"""Attention: the spectral causal mask of the tokenizer, the causal masks of the generator, and cached decoding.

One seam for every model of this package. Each function has a `backend`: `reference` (explicit softmax in fp32) or
`sdpa` (PyTorch's fused kernels, the default). The spectral mask is split by kind of row, so that no call needs a
dense mask unless prefixes differ between samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.kernels.attention import reference

__all__ = ["causal_attention", "cached_attention", "group_causal_attention", "spectral_attention"]

Backend = Literal["sdpa", "reference"]
MASKS = ("figure", "strict", "none")
ROLES = ("encoder", "decoder")
BACKENDS = ("sdpa", "reference")


def spectral_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_image: int,
    prefix_lengths: Tensor | None = None,
    mask: Literal["figure", "strict", "none"] = "figure",
    role: Literal["encoder", "decoder"] = "encoder",
    *,
    backend: Backend = "sdpa",
) -> Tensor:
    """Self-attention over `[image, spectral]` with the spectral causal mask (SpectralAR section 3.2, Figure 3).

    `figure`: image rows see everything, spectral rows see the image and the spectral tokens up to themselves.
    `strict`: information flows one way between the kinds: in the encoder image rows see image keys only, in the
    decoder spectral rows see spectral keys only; spectral rows are causal in both. `none`: everything sees everything.

    A prefix length n hides the spectral keys n+1..N of its sample, which for the image rows equals dropping those
    tokens; output rows of hidden tokens are meaningless (finite, never to be read).

    Args:
        q: queries `[B, T, H, D]`, floating; T = n_image + N. k and v have the same shape.
        k: keys.
        v: values.
        n_image: number of image rows, the class token included; they come first.
        prefix_lengths: integer `[B]` in 1..N, or None for all tokens. On CUDA the values are not checked, because
            reading them would stall the stream.
        mask: kind of mask.
        role: which side of the tokenizer; matters to `strict` only.
        backend: `sdpa` or `reference`.

    Returns:
        `[B, T, H, D]` in v's dtype.

    Raises:
        ValueError: a shape, mask, role, prefix length or backend that is not allowed.
    """
    _check_backend(backend)
    _check_qkv(q, k, v)
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(MASKS)}, not {mask!r}")
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, not {role!r}")
    length = q.shape[1]
    if not 0 <= n_image <= length:
        raise ValueError(f"n_image must be 0..{length} (the sequence length), not {n_image}")
    if prefix_lengths is not None:
        _check_prefix_lengths(prefix_lengths, q.shape[0], length - n_image)
    if backend == "reference":
        return reference.spectral_attention(q, k, v, n_image, prefix_lengths, mask, role)

    keys_visible = None
    if prefix_lengths is not None:
        position = torch.arange(length, device=q.device)
        keys_visible = (position[None] < n_image + prefix_lengths.to(q.device)[:, None])[:, None, None]  # [B, 1, 1, T]
    if mask == "none":
        return _sdpa(q, k, v, keys_visible)
    image, spectral = slice(0, n_image), slice(n_image, length)
    if mask == "strict" and role == "encoder":
        image_out = _sdpa(q[:, image], k[:, image], v[:, image])
    else:
        image_out = _sdpa(q[:, image], k, v, keys_visible)
    if mask == "strict" and role == "decoder":
        spectral_out = _sdpa(q[:, spectral], k[:, spectral], v[:, spectral], causal=True)
    else:
        # Bottom-right causal: row i of the spectral block sees all image keys and spectral keys 0..i.
        row = torch.arange(n_image, length, device=q.device)
        visible = row[:, None] >= torch.arange(length, device=q.device)[None]
        spectral_out = _sdpa(q[:, spectral], k, v, visible)
    return torch.cat([image_out, spectral_out], dim=1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, backend: Backend = "sdpa") -> Tensor:
    """Causal self-attention: position t sees positions 0..t. Tensors `[B, T, H, D]`; softmax(scale q k^T) v.

    Raises:
        ValueError: shapes that differ, or an unknown backend.
    """
    _check_backend(backend)
    _check_qkv(q, k, v)
    if backend == "reference":
        return reference.causal_attention(q, k, v, scale)
    return _sdpa(q, k, v, causal=True, scale=scale)


def group_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, group_sizes: Sequence[int], scale: float, *, backend: Backend = "sdpa"
) -> Tensor:
    """Block-causal self-attention: a position sees its whole group and all earlier groups (VAR's mask in 1D).

    Args:
        q: queries `[B, T, H, D]`; k and v likewise.
        k: keys.
        v: values.
        group_sizes: positive sizes of the consecutive groups; they sum to T. All ones is plain causal attention.
        scale: factor of the scores.
        backend: `sdpa` or `reference`.

    Raises:
        ValueError: shapes that differ, sizes that do not sum to T, or an unknown backend.
    """
    _check_backend(backend)
    _check_qkv(q, k, v)
    if min(group_sizes, default=1) < 1 or sum(group_sizes) != q.shape[1]:
        raise ValueError(f"group_sizes must be positive and sum to {q.shape[1]}, not {tuple(group_sizes)}")
    if backend == "reference":
        return reference.group_causal_attention(q, k, v, group_sizes, scale)
    if all(size == 1 for size in group_sizes):
        return _sdpa(q, k, v, causal=True, scale=scale)
    return _sdpa(q, k, v, reference.group_causal_mask(group_sizes, q.device), scale=scale)


def cached_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int, scale: float, *, backend: Backend = "sdpa"
) -> Tensor:
    """Attention of new positions over a key/value cache; every query sees the first `length` cached positions.

    Args:
        q: queries of the newest group `[B, G, H, D]`, whose own keys and values are in the cache already.
        k_cache: `[B, N, H, D]`.
        v_cache: `[B, N, H, D]`.
        length: number of valid cached positions, 1..N.
        scale: factor of the scores.
        backend: `sdpa` or `reference`.

    Raises:
        ValueError: shapes that differ, a length outside the cache, or an unknown backend.
    """
    _check_backend(backend)
    if k_cache.shape != v_cache.shape or q.shape[0] != k_cache.shape[0] or q.shape[2:] != k_cache.shape[2:]:
        raise ValueError(f"q {tuple(q.shape)} does not fit caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)}")
    if not 1 <= length <= k_cache.shape[1]:
        raise ValueError(f"length must be 1..{k_cache.shape[1]} (the cache), not {length}")
    if backend == "reference":
        return reference.cached_attention(q, k_cache, v_cache, length, scale)
    return _sdpa(q, k_cache[:, :length], v_cache[:, :length], scale=scale)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v must share one shape [B, T, H, D], not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )


def _check_prefix_lengths(prefix_lengths: Tensor, batch: int, tokens: int) -> None:
    if prefix_lengths.shape != (batch,) or prefix_lengths.dtype.is_floating_point or prefix_lengths.dtype == torch.bool:
        raise ValueError(
            f"prefix_lengths must be integers of shape [{batch}], not {prefix_lengths.dtype} "
            f"{tuple(prefix_lengths.shape)}"
        )
    if prefix_lengths.device.type == "cpu" and batch:
        low, high = int(prefix_lengths.min()), int(prefix_lengths.max())
        if low < 1 or high > tokens:
            raise ValueError(f"prefix_lengths must be 1..{tokens}, not {low}..{high}")
