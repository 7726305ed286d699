"""Attention: the spectral causal mask of the tokenizer, the causal masks of the generator, and cached decoding.

One seam for every model of this package. The backends: `triton`, our kernels for GPUs, heads of up to 128 in bf16 and
fp16; `sdpa`, PyTorch's fused attention; `flash2` and `flash4`, the packages flash-attn and flash-attn-4 where
installed; `reference`, an explicit softmax in fp32. None lets `backends.py` choose by its table of what has been
measured and tested (`triton` on Hopper), else `sdpa`. The logger `spectralar.kernels.attention.backends` tells once
what was chosen and why.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import backends, ops, reference
from .backends import Backend

__all__ = [
    "cached_attention",
    "causal_attention",
    "group_causal_attention",
    "packed_spectral_attention",
    "spectral_attention",
]

MASKS = ("figure", "strict", "none")
ROLES = ("encoder", "decoder")


def spectral_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    n_image: int,
    prefix_lengths: Tensor | None = None,
    mask: Literal["figure", "strict", "none"] = "figure",
    role: Literal["encoder", "decoder"] = "encoder",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Self-attention over `[image, spectral]` with the spectral causal mask (SpectralAR section 3.2, Figure 3).

    `figure`: image rows see everything, spectral rows see the image and the spectral tokens up to themselves.
    `strict`: information flows one way between the kinds: in the encoder image rows see image keys only, in the
    decoder spectral rows see spectral keys only; spectral rows are causal in both. `none`: everything sees everything.

    A prefix length n hides the spectral keys n+1..N of its sample, which for the image rows equals dropping those
    tokens; output rows of hidden tokens are meaningless (finite, never to be read), and so are gradients from them.

    Args:
        q: queries `[B, T, H, D]`, floating; T = n_image + N. k and v have the same shape.
        k: keys.
        v: values.
        n_image: number of image rows, the class token included; they come first.
        prefix_lengths: integer `[B]` in 1..N, or None for all tokens. The values are not checked on CUDA,
            because reading them would stall the stream, nor within torch.compile; the kernels clamp them.
        mask: kind of mask.
        role: which side of the tokenizer; matters to `strict` only.
        backend: see above; `flash2` and `flash4` take no prefix lengths.

    Returns:
        `[B, T, H, D]` in v's dtype. The scores are scaled by `D ** -0.5`.

    Raises:
        TypeError: q, k and v are not floating tensors of one dtype.
        ValueError: a shape, mask, role, prefix length or backend that is not allowed, or a forced backend that is not
            installed or can't compute this.
    """
    _check_spectral(q, k, v, n_image, prefix_lengths, mask, role)
    length = q.shape[1]
    if prefix_lengths is not None:
        prefix_lengths = prefix_lengths.to(q.device)
    scale = q.shape[-1] ** -0.5
    backend = _choose(backend, q, k, v, "plain" if prefix_lengths is None else "prefixes")
    if backend == "reference":
        return reference.spectral_attention(q, k, v, n_image, prefix_lengths, mask, role)
    if backend == "triton":
        return ops.attention(q, k, v, prefix_lengths, (), n_image, mask, role, scale)[0]

    full = backends.attention_of(backend)
    if prefix_lengths is not None:
        position = torch.arange(length, device=q.device)
        keys_visible = (position[None] < n_image + prefix_lengths[:, None])[:, None, None]  # [B, 1, 1, T]
        full = functools.partial(backends.sdpa, visible=keys_visible)
    if mask == "none":
        return full(q, k, v, False, scale)
    attend = backends.attention_of(backend)
    image, spectral = slice(0, n_image), slice(n_image, length)
    if mask == "strict" and role == "encoder":
        image_out = attend(q[:, image], k[:, image], v[:, image], False, scale)
    else:
        image_out = full(q[:, image], k, v, False, scale)
    # Bottom-right causal: row i of the spectral block sees the keys before the block and spectral keys 0..i.
    seen = spectral if mask == "strict" and role == "decoder" else slice(0, length)
    spectral_out = attend(q[:, spectral], k[:, seen], v[:, seen], True, scale)
    return torch.cat([image_out, spectral_out], dim=1)


def packed_spectral_attention(
    qkv: Tensor,
    n_image: int,
    prefix_lengths: Tensor | None = None,
    mask: Literal["figure", "strict", "none"] = "figure",
    role: Literal["encoder", "decoder"] = "encoder",
    *,
    backend: Backend | None = None,
) -> Tensor:
    """`spectral_attention` of queries, keys and values in one tensor, as a projection leaves them.

    With `triton` their gradients are written into one tensor too, which spares the copy of `[B, T, 3, H, D]` that
    follows three gradients.

    Args:
        qkv: `[B, T, 3, H, D]`, floating.
        n_image: as for `spectral_attention`, like the rest.
        prefix_lengths: integer `[B]` or None.
        mask: kind of mask.
        role: which side of the tokenizer.
        backend: see above.

    Raises:
        TypeError, ValueError: a shape that is not `[B, T, 3, H, D]`, and what `spectral_attention` raises.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [B, T, 3, H, D], not {tuple(qkv.shape)}")
    q, k, v = qkv.unbind(2)
    _check_spectral(q, k, v, n_image, prefix_lengths, mask, role)
    backend = _choose(backend, q, k, v, "plain" if prefix_lengths is None else "prefixes")
    if backend != "triton":
        return spectral_attention(q, k, v, n_image, prefix_lengths, mask, role, backend=backend)
    if prefix_lengths is not None:
        prefix_lengths = prefix_lengths.to(qkv.device)
    return ops.attention_packed(qkv, prefix_lengths, (), n_image, mask, role, q.shape[-1] ** -0.5)[0]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, *, backend: Backend | None = None) -> Tensor:
    """Causal self-attention: position t sees positions 0..t. Tensors `[B, T, H, D]`; softmax(scale q k^T) v.

    Raises:
        TypeError: q, k and v are not floating tensors of one dtype.
        ValueError: shapes that differ, a scale that is not positive, or a backend that is unknown, not installed or
            can't compute this.
    """
    _check_qkv(q, k, v)
    _check_scale(scale)
    backend = _choose(backend, q, k, v, "plain")
    if backend == "reference":
        return reference.causal_attention(q, k, v, scale)
    if backend == "triton":
        return ops.attention(q, k, v, None, (), 0, "figure", "encoder", scale)[0]
    return backends.attention_of(backend)(q, k, v, True, scale)


def group_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, group_sizes: Sequence[int], scale: float, *, backend: Backend | None = None
) -> Tensor:
    """Block-causal self-attention: a position sees its whole group and all earlier groups (VAR's mask in 1D).

    Args:
        q: queries `[B, T, H, D]`; k and v likewise.
        k: keys.
        v: values.
        group_sizes: positive sizes of the consecutive groups; they sum to T. All ones is plain causal attention.
        scale: factor of the scores.
        backend: see above; `flash2` and `flash4` take groups of one only.

    Raises:
        TypeError: q, k and v are not floating tensors of one dtype.
        ValueError: shapes that differ, sizes that do not sum to T, a scale that is not positive, or a backend that is
            unknown, not installed or can't compute this.
    """
    _check_qkv(q, k, v)
    _check_scale(scale)
    if min(group_sizes, default=1) < 1 or sum(group_sizes) != q.shape[1]:
        raise ValueError(f"group_sizes must be positive and sum to {q.shape[1]}, not {tuple(group_sizes)}")
    if all(size == 1 for size in group_sizes):
        return causal_attention(q, k, v, scale, backend=backend)
    backend = _choose(backend, q, k, v, "groups")
    if backend == "reference":
        return reference.group_causal_attention(q, k, v, group_sizes, scale)
    if backend == "triton":
        return ops.attention(q, k, v, None, tuple(group_sizes), 0, "figure", "encoder", scale)[0]
    return backends.sdpa(q, k, v, False, scale, reference.group_causal_mask(group_sizes, q.device))


def cached_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int,
    scale: float,
    *,
    backend: Literal["sdpa", "reference"] = "sdpa",
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
        ValueError: shapes that differ, a length outside the cache, a scale that is not positive, or an unknown backend.
    """
    if backend not in ("sdpa", "reference"):
        raise ValueError(f"backend must be one of sdpa, reference, not {backend!r}")
    _check_scale(scale)
    if k_cache.shape != v_cache.shape or q.shape[0] != k_cache.shape[0] or q.shape[2:] != k_cache.shape[2:]:
        raise ValueError(f"q {tuple(q.shape)} does not fit caches {tuple(k_cache.shape)}, {tuple(v_cache.shape)}")
    if not 1 <= length <= k_cache.shape[1]:
        raise ValueError(f"length must be 1..{k_cache.shape[1]} (the cache), not {length}")
    if backend == "reference":
        return reference.cached_attention(q, k_cache, v_cache, length, scale)
    return backends.sdpa(q, k_cache[:, :length], v_cache[:, :length], False, scale)


def _choose(backend: Backend | None, q: Tensor, k: Tensor, v: Tensor, case: backends.Case) -> Backend:
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return backends.choose(backend, q, case, training)


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, not {scale}")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k, v must share one shape [B, T, H, D], not {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k, v must share one floating dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k, v must be on one device, not {q.device}, {k.device}, {v.device}")


def _check_spectral(
    q: Tensor, k: Tensor, v: Tensor, n_image: int, prefix_lengths: Tensor | None, mask: str, role: str
) -> None:
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


def _check_prefix_lengths(prefix_lengths: Tensor, batch: int, tokens: int) -> None:
    if prefix_lengths.shape != (batch,) or prefix_lengths.dtype.is_floating_point or prefix_lengths.dtype == torch.bool:
        raise ValueError(
            f"prefix_lengths must be integers of shape [{batch}], not {prefix_lengths.dtype} "
            f"{tuple(prefix_lengths.shape)}"
        )
    if prefix_lengths.device.type == "cpu" and batch and not torch.compiler.is_compiling():
        low, high = int(prefix_lengths.min()), int(prefix_lengths.max())
        if low < 1 or high > tokens:
            raise ValueError(f"prefix_lengths must be 1..{tokens}, not {low}..{high}")
