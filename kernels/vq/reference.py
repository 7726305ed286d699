"""Plain PyTorch definition of the vector quantiser.

No argument is checked here; the public functions in `__init__.py` do that. Values and losses are fp32, or fp64 where
an input is fp64, whatever autocast says. The choice of the code is made in fp64: then it depends on the vector alone,
and not on how a matrix product of that batch size happens to round, nor on TF32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORE_BYTES = 64 * 2**20
_LEAST_LENGTH = 1e-12


class VectorQuantized(NamedTuple):
    """What `vector_quantize` returns.

    quantized: `[..., D]` the chosen codewords; gradients pass straight through to `z`.
    indices: `[...]` int64, the chosen codes.
    commitment_loss: scalar, pulls `z` to its codeword; already multiplied by the commitment weight.
    codebook_loss: scalar, pulls the codeword to `z`.
    """

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


@torch.no_grad()
def nearest_code(z: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    # [..., D], [K, D] -> [...]
    codes = codebook.double()
    if normalize:
        # The length of z scales all its scores alike, so only the codewords need unit length.
        codes = F.normalize(codes, dim=-1)
        bias = codes.new_zeros(len(codes))
    else:
        # |z - e|^2 is smallest where z.e - |e|^2 / 2 is largest.
        bias = codes.square().sum(-1) / -2
    vectors = z.reshape(-1, z.shape[-1])
    rows_at_once = max(1, _SCORE_BYTES // (8 * len(codes)))
    return torch.cat([_first_best(rows.double(), codes, bias) for rows in vectors.split(rows_at_once)]).view(
        z.shape[:-1]
    )


def _first_best(vectors: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """The lowest code among those of the largest score, up to the rounding of fp64.

    A matrix product may add up equal columns in different orders, on some processors, and give them different sums.
    """
    scores = torch.addmm(bias, vectors, codes.T)
    largest, best = scores.max(-1)
    slack = 4 * torch.finfo(torch.float64).eps * (vectors.norm(dim=-1) * codes.norm(dim=-1)[best] + bias[best].abs())
    # Of a vector with NaN, whose scores all are, none is large enough.
    return (scores >= (largest - slack)[:, None]).to(torch.uint8).argmax(-1)


def lookup(indices: Tensor, codebook: Tensor, *, normalize: bool = True) -> Tensor:
    # [...], [K, D] -> [..., D]
    with torch.autocast(device_type=codebook.device.type, enabled=False):
        codewords = F.embedding(indices.long(), codebook.to(_work_dtype(codebook)))
        return F.normalize(codewords, dim=-1) if normalize else codewords


def vector_quantize(
    z: Tensor,
    codebook: Tensor,
    *,
    normalize: bool = True,
    commitment: float = 0.25,
    token_mask: Tensor | None = None,
) -> VectorQuantized:
    # [..., D], [K, D]
    dtype = torch.promote_types(_work_dtype(z), _work_dtype(codebook))
    with torch.autocast(device_type=z.device.type, enabled=False):
        vectors = z.to(dtype)
        if normalize:
            vectors = F.normalize(vectors, dim=-1)
        indices = nearest_code(z, codebook, normalize=normalize)
        codewords = lookup(indices, codebook.to(dtype), normalize=normalize)
        commitment_loss = commitment * _masked_mean((codewords.detach() - vectors).square(), token_mask)
        codebook_loss = _masked_mean((codewords - vectors.detach()).square(), token_mask)
        # The difference is exactly zero: the value is the codeword to the last bit, the gradient that of `vectors`.
        quantized = codewords.detach() + (vectors - vectors.detach())
    return VectorQuantized(quantized, indices, commitment_loss, codebook_loss)


def assign_codes(z: Tensor, codebook: Tensor, *, normalize: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    # [..., D], [K, D] -> indices [...], quantized [..., D], squared distances [...]
    result = vector_quantize(z, codebook, normalize=normalize)
    vectors = z.to(result.quantized.dtype)
    if normalize:
        vectors = F.normalize(vectors, dim=-1)
    return result.indices, result.quantized, (result.quantized - vectors).square().sum(-1)


def vectors_backward(
    grad_quantized: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    indices: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
) -> Tensor:
    """The gradient into `z`: straight through, plus `weight * (vector - codeword)` where the mask is true."""
    dtype = torch.promote_types(_work_dtype(z), _work_dtype(codebook))
    vectors = F.normalize(z.to(dtype), dim=-1) if normalize else z.to(dtype)
    grad = torch.zeros_like(vectors) if grad_quantized is None else grad_quantized.to(dtype, copy=True)
    if weight is not None:
        pull = weight.to(dtype) * (vectors - lookup(indices, codebook.to(dtype), normalize=normalize))
        grad = grad + (pull if token_mask is None else torch.where(token_mask.unsqueeze(-1), pull, 0.0))
    return (_through_length(grad, z.to(dtype)) if normalize else grad).to(z.dtype)


def codebook_backward(
    rows: Tensor,
    weight: Tensor,
    codebook: Tensor,
    indices: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
    pull: bool,
) -> Tensor:
    """The gradient into `codebook`: `weight` times each code's sum of rows, or with `pull` of (codeword - vector)."""
    dtype = torch.promote_types(_work_dtype(rows), _work_dtype(codebook))
    codewords = codebook.to(dtype)
    rows = rows.to(dtype)
    if pull:
        vectors = F.normalize(rows, dim=-1) if normalize else rows
        rows = lookup(indices, codewords, normalize=normalize) - vectors
    if token_mask is not None:
        rows = torch.where(token_mask.unsqueeze(-1), rows, 0.0)
    rows = rows.reshape(-1, rows.shape[-1])
    total = torch.zeros_like(codewords).index_put((indices.reshape(-1).long(),), rows, accumulate=True)
    grad = weight.to(dtype) * total
    return (_through_length(grad, codewords) if normalize else grad).to(codebook.dtype)


def code_usage(indices: Tensor, codebook_size: int) -> Tensor:
    # [...] -> [K]; unlike bincount, a scatter needs no look at the values, so it does not stall a device.
    flat = indices.reshape(-1).long()
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=indices.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


def perplexity(usage: Tensor) -> Tensor:
    # [K] -> []
    counts = usage.double()
    total = counts.sum()
    share = counts / total.clamp_min(torch.finfo(torch.float64).tiny)
    entropy = -torch.xlogy(share, share).sum()
    return torch.where(total > 0, entropy.exp(), 0.0).float()


@torch.no_grad()
def update_usage(average: Tensor, usage: Tensor, *, decay: float = 0.99) -> Tensor:
    # [K], [K] -> [K]
    counts = usage.to(average.dtype)
    total = counts.sum()
    moved = decay * average + (1 - decay) * counts / total.clamp_min(1)
    return torch.where(total > 0, moved, average)


def restart_dead_codes(codebook: Tensor, average: Tensor, anchors: Tensor, *, decay: float = 0.99) -> Tensor:
    # [K, D], [K], [K, D] the vectors nearest to the codewords -> [K, D]
    share = torch.exp(-(average.double() * len(codebook) * 10 / (1 - decay)) - 1e-3).unsqueeze(-1)
    return torch.lerp(codebook.double(), anchors.double(), share).to(codebook.dtype)


def _through_length(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient before `x / max(|x|, 1e-12)`: the part tangent to the sphere, or all of it where 1e-12 divides."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    divisor = length.clamp_min(_LEAST_LENGTH)
    unit = x / divisor
    along = torch.where(length > _LEAST_LENGTH, (unit * grad).sum(-1, keepdim=True), 0.0)
    return (grad - unit * along) / divisor


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _masked_mean(errors: Tensor, token_mask: Tensor | None) -> Tensor:
    # [..., D]; the mean over nothing is zero, so that an empty batch or mask leaves the total loss alone.
    if token_mask is None:
        return errors.sum() / max(1, errors.numel())
    count = token_mask.sum() * errors.shape[-1]
    return torch.where(token_mask.unsqueeze(-1), errors, 0.0).sum() / count.clamp_min(1)
