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
    chosen = [torch.addmm(bias, rows.double(), codes.T).argmax(-1) for rows in vectors.split(rows_at_once)]
    return torch.cat(chosen).view(z.shape[:-1])


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


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _masked_mean(errors: Tensor, token_mask: Tensor | None) -> Tensor:
    # [..., D]; the mean over nothing is zero, so that an empty batch or mask leaves the total loss alone.
    if token_mask is None:
        return errors.sum() / max(1, errors.numel())
    count = token_mask.sum() * errors.shape[-1]
    return torch.where(token_mask.unsqueeze(-1), errors, 0.0).sum() / count.clamp_min(1)
