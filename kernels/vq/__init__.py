"""Vector quantiser: nearest codeword, straight-through gradients, the two losses, and codebook statistics.

On an NVIDIA GPU the search, the lookup and the gradients are Triton kernels, for vectors of 16 or 32 bits and up to 256
components; everything else runs the plain PyTorch reference.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops, reference
from .reference import VectorQuantized

__all__ = [
    "CodeAssignment",
    "VectorQuantized",
    "assign_codes",
    "code_usage",
    "lookup",
    "nearest_code",
    "perplexity",
    "restart_dead_codes",
    "update_usage",
    "vector_quantize",
]


class CodeAssignment(NamedTuple):
    """What `assign_codes` returns.

    indices: `[...]` int64, the nearest codes.
    quantized: `[..., D]` their (normalised) codewords.
    squared_distances: `[...]` squared Euclidean distances of the (normalised) vectors to them.
    usage: `[K]` int64, how often each code was chosen.
    """

    indices: Tensor
    quantized: Tensor
    squared_distances: Tensor
    usage: Tensor


def nearest_code(z: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """The code whose codeword lies nearest to each vector.

    Equal scores go to the lowest index. Scores are compared in fp64, so that a vector's code depends neither on the
    batch around it nor on its place there. Vectors that hold NaN or infinity get an unspecified but valid code, and so
    does every vector where the codebook holds them.

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
    return ops.nearest_code(z.detach(), codebook.detach(), normalize)


def assign_codes(z: Tensor, codebook: Tensor, *, normalize: bool = True) -> CodeAssignment:
    """The nearest codes with their codewords, distances and counts; what `vector_quantize` does without gradients.

    Args:
        z: `[..., D]` floating; any leading dimensions including none or of size zero.
        codebook: `[K, D]` floating, K at least 1.
        normalize: as in `nearest_code`; True also returns codewords of unit length and distances between unit vectors.

    Returns:
        `CodeAssignment(indices, quantized, squared_distances, usage)`. `quantized`, bit for bit that of `lookup`, and
        the distances are float32 (float64 if `z` or `codebook` is). No gradient.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not agree.
    """
    _check_codebook(codebook)
    _check_vectors(z, codebook)
    indices, quantized, distances = ops.assign_codes(z.detach(), codebook.detach(), normalize)
    return CodeAssignment(indices, quantized, distances, reference.code_usage(indices, len(codebook)))


def lookup(indices: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    """The codewords of given codes; for fp32 or lower `z`, bit for bit the `quantized` of `vector_quantize`.

    Args:
        indices: `[...]` of any integer dtype, in `[0, K)`. Checked only in CPU memory, since reading the values
            would stall another device; there the kernels return NaN for a code out of range.
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
    return ops.lookup(indices, codebook, normalize)


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
    by the length or by 1e-12 where that is larger. The same inputs give the same gradients to the last bit: those of
    the codewords are summed in fixed point on a GPU, exact to 2^-(61 - log2 N) of the largest component of `z`. They
    are first derivatives only.

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
    return VectorQuantized(*ops.vector_quantize(z, codebook, token_mask, normalize, float(commitment)))


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


def update_usage(average: Tensor, usage: Tensor, *, decay: float = 0.99) -> Tensor:
    """Move the running share of each code towards its share of this batch, as clustering VQ does.

        average' = decay * average + (1 - decay) * usage / sum(usage)

    Nothing is counted, nothing moves. Call it after `vector_quantize` with `code_usage(indices, K)`, summed over ranks;
    start from zeros, or from ones over K so that no code counts as dead in the beginning.

    Args:
        average: `[K]` floating, not negative (not checked).
        usage: `[K]` counts of the batch, not negative (not checked).
        decay: share of the old average that stays, at least 0 and less than 1.

    Returns:
        `[K]` in the dtype of `average`; a new tensor.

    Raises:
        TypeError: `average` is not a floating tensor or `usage` is not a real tensor.
        ValueError: shapes or devices do not agree, or `decay` is outside [0, 1).
    """
    _check_average(average, decay)
    if not isinstance(usage, Tensor) or usage.is_complex():
        raise TypeError(f"usage must be a real tensor, got {getattr(usage, 'dtype', type(usage))}")
    if usage.shape != average.shape:
        raise ValueError(f"usage must have shape {list(average.shape)} as average, got {list(usage.shape)}")
    if usage.device != average.device:
        raise ValueError(f"usage must be on average's device {average.device}, got {usage.device}")
    return reference.update_usage(average, usage, decay=decay)


def restart_dead_codes(
    codebook: Tensor, average: Tensor, z: Tensor, *, normalize: bool = True, decay: float = 0.99
) -> Tensor:
    """Draw codes that are hardly used towards the vectors nearest to them (clustering VQ, arXiv:2307.15139).

        alpha_k    = exp(-10 K average_k / (1 - decay) - 0.001)
        codebook_k = (1 - alpha_k) * codebook_k + alpha_k * z_j    with z_j the vector nearest to codeword k

    A code that is never used is replaced (alpha 0.999); one with a hundredth of its fair share 1 / K, at a decay of
    0.99, moves by 5e-5, so codes in use stay. With `normalize` the nearest vector is that of the largest cosine, and is
    taken with its own length. Copy the result into the codebook after the optimiser's step, on every rank with the same
    `average` and the same `z`.

    Args:
        codebook: `[K, D]` floating.
        average: `[K]` floating, the running shares of `update_usage`.
        z: `[..., D]` floating, the vectors of the batch; with none of them nothing moves.
        normalize: as in `nearest_code`.
        decay: that of `update_usage`.

    Returns:
        `[K, D]` in the dtype of `codebook`; a new tensor without gradient.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: shapes or devices do not agree, or `decay` is outside [0, 1).
    """
    _check_codebook(codebook)
    _check_average(average, decay)
    _check_vectors(z, codebook)
    if average.shape != codebook.shape[:1]:
        raise ValueError(f"average must have shape [{len(codebook)}] as the codebook, got {list(average.shape)}")
    if average.device != codebook.device:
        raise ValueError(f"average must be on the codebook's device {codebook.device}, got {average.device}")
    vectors = z.detach().reshape(-1, z.shape[-1])
    if len(vectors) == 0:
        return codebook.detach().clone()
    nearest = ops.nearest_code(codebook.detach(), vectors, normalize)
    return reference.restart_dead_codes(codebook.detach(), average.detach(), vectors[nearest], decay=decay)


def _check_average(average: object, decay: float) -> None:
    _check_floating("average", average)
    assert isinstance(average, Tensor)
    if average.ndim != 1:
        raise ValueError(f"average must have shape [K], got {list(average.shape)}")
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be at least 0 and less than 1, got {decay}")


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
