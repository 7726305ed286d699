"""Quantizers and a curriculum that the tokenizer itself does not have, as changes to a `SpectralTokenizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralar.config import TokenizerConfig
from spectralar.kernels.vq import VectorQuantized
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.runs import TokenizerRun
from spectralar.training.tokenizer import TokenizerTask

Validation = Callable[[], Iterable[Any]]


class RotatedTokenizer(SpectralTokenizer):
    """The rotation trick (Fifty et al., arXiv:2410.06424) in place of the straight-through gradient.

    The code is the latent times the rotation that takes one to the other, held constant: so the gradient turns with it.
    Latents and codes must have unit length (`normalize_codes`).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        if not config.normalize_codes:
            raise ValueError("normalize_codes must be true for the rotation trick")
        super().__init__(config)

    def quantize(self, latents: Tensor) -> VectorQuantized:
        out = super().quantize(latents)
        with torch.autocast(latents.device.type, enabled=False):
            vectors = F.normalize(latents.to(out.quantized.dtype), dim=-1)
            here, there = vectors.detach(), out.quantized.detach()
            middle = F.normalize(here + there, dim=-1)
            # R = I - 2 m m^T + 2 e v^T: mirrored at the middle, then with the latent's own part on the code.
            mirrored = vectors - 2 * middle * (middle * vectors).sum(-1, keepdim=True)
            rotated = mirrored + 2 * there * (here * vectors).sum(-1, keepdim=True)
        return out._replace(quantized=rotated)


class EntropyTokenizer(SpectralTokenizer):
    """An entropy term (as in MAGVIT-v2, arXiv:2310.05737): each latent sure of its code, each position using many.

    With p the softmax of the cosines over the codes, adds `weight * (mean entropy of p - entropy of the mean of p)` to
    the commitment loss; the mean runs over the batch and the entropies are averaged over positions.
    """

    weight = 0.01
    temperature = 0.05

    def quantize(self, latents: Tensor) -> VectorQuantized:
        out = super().quantize(latents)
        cosines = F.normalize(latents, dim=-1) @ F.normalize(self.codebook, dim=-1).T  # [B, N, K]
        shares = (cosines.float() / self.temperature).softmax(-1)
        term = _entropy(shares).mean() - _entropy(shares.mean(0)).mean()
        return out._replace(commitment_loss=out.commitment_loss + self.weight * term)


def _entropy(shares: Tensor) -> Tensor:
    return -torch.xlogy(shares, shares.clamp_min(1e-12)).sum(-1)


class _Projected(nn.Module):
    """A learned linear map of all codes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(size))

    def forward(self, codes: Tensor) -> Tensor:
        with torch.autocast(codes.device.type, enabled=False):
            return codes @ self.weight.T


def simvq(config: TokenizerConfig) -> SpectralTokenizer:
    """SimVQ (Zhu et al., arXiv:2411.02038): random codes that stay, behind a learned linear map that moves them all."""
    model = SpectralTokenizer(config)
    model.codebook.requires_grad_(False)
    parametrize.register_parametrization(model, "codebook", _Projected(config.code_dim))
    return model


def fsq(config: TokenizerConfig) -> SpectralTokenizer:
    """Finite scalar quantization (Mentzer et al., arXiv:2309.15505) on four coordinates of eight levels each.

    Rounding a bounded latent to a grid is the search for the nearest of 4,096 codes that are the grid's points: the
    codes do not move and no loss pulls latents to them.
    """
    levels, size = 8, 4
    model = SpectralTokenizer(
        replace(config, codebook_size=levels**size, code_dim=size, normalize_codes=False, commitment=0.0)
    )
    grid = torch.cartesian_prod(*[torch.linspace(-1, 1, levels)] * size)
    model.codebook.data.copy_(grid)
    model.codebook.requires_grad_(False)
    model.encoder.add_module("latent_norm", nn.Sequential(model.encoder.latent_norm, nn.Tanh()))
    return model


class FullFirstTask(TokenizerTask):
    """All prefixes are full at first; their share falls to `prefixes.full` by half of the run.

    Args:
        model, run, validation: see `TokenizerTask`; `run.loop.steps` is the length of the run.
    """

    def __init__(self, model: SpectralTokenizer, run: TokenizerRun, validation: Validation | None) -> None:
        super().__init__(model, run.loss, validation=validation)
        self.ramp = run.loop.steps / 2
        self._done: Tensor | None = None

    def draw_lengths(self, images: Tensor) -> Tensor:
        prefixes = self.weights.prefixes
        if self._done is None:
            self._done = torch.zeros((), device=images.device)
        full = 1 - (1 - prefixes.full) * (self._done / self.ramp).clamp(max=1)
        self._done += 1
        quantiles = prefixes.draw_quantiles(len(images), images.device)
        return prefixes.lengths_at(quantiles, self.model.config.tokens, full=full).flatten()


def plain_task(model: SpectralTokenizer, run: TokenizerRun, validation: Validation | None) -> TokenizerTask:
    """The task that `spectralar train tokenizer` trains."""
    return TokenizerTask(model, run.loss, validation=validation)
