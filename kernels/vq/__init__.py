"""Vector quantiser: nearest codeword, straight-through gradients, the two losses, and codebook statistics.

Every function runs the plain PyTorch reference today, on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .reference import VectorQuantized

__all__ = ["VectorQuantized", "code_usage", "lookup", "nearest_code", "perplexity", "vector_quantize"]


def nearest_code(z: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """The code whose codeword lies nearest to each vector.

    Equal scores go to the lowest index. Scores are compared in fp64, so that a vector's code depends neither on the
    batch around it nor on its place there. Vectors that hold NaN or infinity get an unspecified but valid code.

    Args:
        z: `[..., D]` floating; any leading dimensions including none or of size zero.
        codebook: `[K, D]` floating, K at least 1.
        normalize: True takes the largest cosine, where a zero vector has cosine 0 with everything and a codeword
            shorter than 1e-12 counts as if divided by 1e-12; False takes the smallest Euclidean distance.

    Returns:
        `[...]` int64 in `[0, K)`. No gradient.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not agree.
    """
    _check_codebook(codebook)
    _check_vectors(z, codebook)
    return reference.nearest_code(z, codebook, normalize=normalize)


def lookup(indices: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """The codewords of given codes; for fp32 or lower `z`, bit for bit the `quantized` of `vector_quantize`.

    Args:
        indices: `[...]` of any integer dtype, in `[0, K)`. Checked only in CPU memory, since reading the values
            would stall another device.
        codebook: `[K, D]` floating, K at least 1.
        normalize: True scales each codeword to unit Euclidean length, or by 1e12 where it is shorter than 1e-12, so
            that a zero codeword stays zero.

    Returns:
        `[..., D]` float32 (float64 for a float64 codebook), differentiable in `codebook`.

    Raises:
        TypeError: `indices` are not integers or `codebook` is not floating.
        ValueError: wrong shape or device, or an index out of range.
    """
    _check_codebook(codebook)
    _check_indices(indices, len(codebook))
    if indices.device != codebook.device:
        raise ValueError(f"indices must be on the codebook's device {codebook.device}, got {indices.device}")
    return reference.lookup(indices, codebook, normalize=normalize)


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    normalize: bool = True,
    commitment: float = 0.25,
    token_mask: Tensor | None = None,
) -> VectorQuantized:
    """Replace each vector by its nearest codeword, with straight-through gradients (the VQ-VAE objective).

    With `v` the (normalised) vector, `e` its (normalised) codeword and `sg` stop-gradient:

        quantized       = e in value, v in gradient
        commitment_loss = commitment * mean((sg(e) - v)^2)
        codebook_loss   = mean((e - sg(v))^2)

    The means run over the elements of all tokens, or of those that `token_mask` selects; over nothing they are zero.
    The mask touches the losses only: every token is quantised. Gradients pass through the normalisation, which divides
    by the length or by 1e-12 where that is larger.

    Args:
        z: `[..., D]` floating; any leading dimensions including none or of size zero.
        codebook: `[K, D]` floating, K at least 1.
        normalize: True compares and returns vectors of unit length.
        commitment: weight of the commitment loss, finite and not negative.
        token_mask: `[...]` bool, True where a token enters the losses; None means everywhere.

    Returns:
        `VectorQuantized(quantized, indices, commitment_loss, codebook_loss)`. `quantized` and the losses are float32
        (float64 if `z` or `codebook` is), whatever the dtype of `z` and autocast.

    Raises:
        TypeError: `z` or `codebook` is not a floating tensor, or `token_mask` is not a bool tensor.
        ValueError: shapes or devices do not agree, or `commitment` is negative or not finite.
    """
    _check_codebook(codebook)
    _check_vectors(z, codebook)
    if not (math.isfinite(commitment) and commitment >= 0):
        raise ValueError(f"commitment must be finite and not negative, got {commitment}")
    if token_mask is not None:
        if not isinstance(token_mask, Tensor) or token_mask.dtype != torch.bool:
            raise TypeError(f"token_mask must be a bool tensor, got {getattr(token_mask, 'dtype', type(token_mask))}")
        if token_mask.shape != z.shape[:-1]:
            raise ValueError(f"token_mask must have shape {list(z.shape[:-1])} as z, got {list(token_mask.shape)}")
        if token_mask.device != z.device:
            raise ValueError(f"token_mask must be on z's device {z.device}, got {token_mask.device}")
    return reference.vector_quantize(z, codebook, normalize=normalize, commitment=commitment, token_mask=token_mask)


def code_usage(indices: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs.

    Args:
        indices: `[...]` of any integer dtype, in `[0, codebook_size)`; checked only in CPU memory.
        codebook_size: K, at least 1.

    Returns:
        `[K]` int64 counts on the device of `indices`; add them over batches and ranks.

    Raises:
        TypeError: `indices` are not integers.
        ValueError: `codebook_size` is less than 1 or an index is out of range.
    """
    if codebook_size < 1:
        raise ValueError(f"codebook_size must be at least 1, got {codebook_size}")
    _check_indices(indices, codebook_size)
    return reference.code_usage(indices, codebook_size)


def perplexity(usage: Tensor) -> Tensor:
    """The effective number of codes in use: `exp(-sum p log p)` with `p = usage / sum(usage)`.

    Args:
        usage: `[K]` counts or weights, not negative (not checked).

    Returns:
        Scalar float32 tensor from 1 (one code) to K (all alike), or 0 where nothing was counted.

    Raises:
        TypeError: `usage` is not a real tensor.
        ValueError: `usage` is not one-dimensional.
    """
    if not isinstance(usage, Tensor) or usage.is_complex():
        raise TypeError(f"usage must be a real tensor, got {getattr(usage, 'dtype', type(usage))}")
    if usage.ndim != 1:
        raise ValueError(f"usage must have shape [K], got {list(usage.shape)}")
    return reference.perplexity(usage)


def _check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x))}")


def _check_codebook(codebook: Tensor) -> None:
    _check_floating("codebook", codebook)
    if codebook.ndim != 2 or 0 in codebook.shape:
        raise ValueError(f"codebook must have shape [K, D] with K and D at least 1, got {list(codebook.shape)}")


def _check_vectors(z: Tensor, codebook: Tensor) -> None:
    _check_floating("z", z)
    if z.ndim < 1 or z.shape[-1] != codebook.shape[1]:
        raise ValueError(f"z must have shape [..., {codebook.shape[1]}] as the codebook's rows, got {list(z.shape)}")
    if z.device != codebook.device:
        raise ValueError(f"z must be on the codebook's device {codebook.device}, got {z.device}")


def _check_indices(indices: object, codes: int) -> None:
    if (
        not isinstance(indices, Tensor)
        or indices.is_floating_point()
        or indices.is_complex()
        or indices.dtype == torch.bool
    ):
        raise TypeError(f"indices must be an integer tensor, got {getattr(indices, 'dtype', type(indices))}")
    if indices.device.type == "cpu" and indices.numel():
        low, high = (int(bound) for bound in torch.aminmax(indices.long()))
        if low < 0 or high >= codes:
            raise ValueError(f"indices must lie in [0, {codes}), got {low if low < 0 else high}")
