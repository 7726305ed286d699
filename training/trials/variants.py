"""Quantizers, beginnings, a decoder, a curriculum and a loss that the tokenizer itself lacks, as changes to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralar.config import TokenizerConfig
from spectralar.kernels.vq import VectorQuantized, nearest_code
from spectralar.tokenizer import SpectralTokenizer, TokenizerOutput
from spectralar.tokenizer.model import Decoder
from spectralar.training.runs import TokenizerRun
from spectralar.training.tokenizer import TokenizerTask

Validation = Callable[[], Iterable[Any]]


def _need_unit_length(config: TokenizerConfig, what: str) -> None:
    if not config.normalize_codes:
        raise ValueError(f"normalize_codes must be true for {what}")


class RotatedTokenizer(SpectralTokenizer):
    """The rotation trick (Fifty et al., arXiv:2410.06424) in place of the straight-through gradient.

    The code is the latent times the rotation that takes one to the other, held constant: so the gradient turns with it.
    Latents and codes must have unit length (`normalize_codes`).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        _need_unit_length(config, "the rotation trick")
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


class MovingAverageTokenizer(SpectralTokenizer):
    """Codes as moving averages of the latents that took them (van den Oord et al., arXiv:1711.00937, appendix A.1).

    No gradient moves them. Of a code that no latent of a batch takes, nothing changes. Latents and codes must have unit
    length (`normalize_codes`), so that a code is the direction of a sum.
    """

    decay = 0.99
    sums: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        _need_unit_length(config, "moving averages")
        super().__init__(config)
        self.codebook.requires_grad_(False)
        self.register_buffer("sums", self.codebook.detach().clone())

    def quantize(self, latents: Tensor) -> VectorQuantized:
        if self.training:
            with torch.no_grad():
                vectors = F.normalize(latents.flatten(0, 1).to(self.sums.dtype), dim=-1)
                chosen = nearest_code(vectors, self.codebook)
                batch = torch.zeros_like(self.sums).index_add_(0, chosen, vectors)
                taken = torch.zeros_like(self.sums[:, :1]).index_fill_(0, chosen, 1)
                self.sums.lerp_(batch, (1 - self.decay) * taken)
                self.codebook.copy_(F.normalize(self.sums, dim=-1))
        return super().quantize(latents)


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
    if config.dead_codes == "restart":
        raise ValueError(
            "dead_codes must be keep for simvq, as a restarted code would be written where nothing is kept"
        )
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


class LatentStartTokenizer(SpectralTokenizer):
    """Codes that begin as latents of the first batch, as many of every position, in place of random directions.

    Latents and codes must have unit length (`normalize_codes`).
    """

    begun: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        _need_unit_length(config, "codes that begin as latents")
        super().__init__(config)
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool))

    def quantize(self, latents: Tensor) -> VectorQuantized:
        if self.training:
            with torch.no_grad():
                all_ = self._joined(latents.detach()).to(self.codebook.dtype)
                vectors = F.normalize(all_.transpose(0, 1).flatten(0, 1), dim=-1)
                # Position by position; some twice where there are fewer latents than codes.
                places = torch.arange(len(self.codebook), device=vectors.device) * len(vectors) // len(self.codebook)
                self.codebook.copy_(torch.where(self.begun, self.codebook, vectors[places]))
                self.begun.fill_(True)
        return super().quantize(latents)


class _Times(nn.Module):
    """A parameter kept divided by a factor: AdamW, whose steps have a length of their own, turns it so much faster."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, kept: Tensor) -> Tensor:
        return kept * self.factor

    def right_inverse(self, value: Tensor) -> Tensor:
        """What is kept of a value."""
        return value / self.factor


def fast_queries(config: TokenizerConfig) -> SpectralTokenizer:
    """The encoder's queries and the decoder's token positions with five times the learning rate of the rest."""
    model = SpectralTokenizer(config)
    parametrize.register_parametrization(model.encoder, "queries", _Times(5.0))
    parametrize.register_parametrization(model.decoder, "token_positions", _Times(5.0))
    return model


def embedding_norm(config: TokenizerConfig) -> SpectralTokenizer:
    """The decoder's token embedding normalised: what a code says begins as loud as where it stands, not a third."""
    model = SpectralTokenizer(config)
    width = config.decoder.width
    norm = nn.LayerNorm(width)
    nn.init.constant_(norm.weight, width**-0.5)
    model.decoder.from_code = _NormedLinear(model.decoder.from_code, norm)
    return model


class _NormedLinear(nn.Linear):
    """A linear layer that gives what a norm makes of its result."""

    def __init__(self, linear: nn.Linear, norm: nn.LayerNorm) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.norm = norm

    def forward(self, codes: Tensor) -> Tensor:
        return self.norm(super().forward(codes))


class _ResidualDecoder(Decoder):
    """Adds what a prefix rebuilds to what its first quarter of all tokens rebuilds, which is held constant."""

    def forward(self, codes: Tensor, prefix_lengths: Tensor | None = None) -> Tensor:
        rebuilt = super().forward(codes, prefix_lengths)
        quarter = max(1, len(self.token_positions) // 4)
        if codes.shape[1] <= quarter:
            return rebuilt
        with torch.no_grad():
            if prefix_lengths is None:
                return rebuilt + super().forward(codes[:, :quarter])
            below = super().forward(codes[:, :quarter], prefix_lengths.clamp(max=quarter))
            longer = (prefix_lengths > quarter).to(below.device)[:, None, None, None]
        return rebuilt + below * longer


class ResidualTokenizer(SpectralTokenizer):
    """Residual decoding: tokens after the first quarter are trained on what those leave over, at one decoding more."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        decoder = _ResidualDecoder(config)
        decoder.load_state_dict(self.decoder.state_dict())
        self.decoder = decoder


class PerceptualTask(TokenizerTask):
    """A perceptual loss beside that of the pixels (L_P of equation 4), between features of a frozen random network.

    Pretrained features cannot be had without other people's weights; those of random convolutions tell textures apart,
    too (He et al., arXiv:1606.04801). As in LPIPS (arXiv:1801.03924) they are scaled to unit length at every place and
    their squared differences are summed over channels, averaged over places, and averaged over three resolutions.

    Args:
        model, run, validation: see `TokenizerTask`.
    """

    weight = 0.1

    def __init__(self, model: SpectralTokenizer, run: TokenizerRun, validation: Validation | None) -> None:
        super().__init__(model, run.loss, validation=validation)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            stages = [nn.Conv2d(c, d, 5, stride=2, padding=2) for c, d in ((3, 32), (32, 64), (64, 64))]
            for stage in stages:
                nn.init.kaiming_normal_(stage.weight)
        self.stages = nn.ModuleList(stages).requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Of images `[B, 3, S, S]` in [0, 1]: `[B, C, S / 2^i, S / 2^i]` fp32 of unit length, i = 1, 2, 3."""
        self.stages.to(images.device)
        found, x = [], 2 * images - 1
        for stage in self.stages:
            x = stage(x).relu()
            found.append(F.normalize(x.float(), dim=1))
        return found

    def objective(
        self, model: SpectralTokenizer, images: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, TokenizerOutput]:
        total, pixel, out = super().objective(model, images, lengths)
        repeated = images.repeat(len(lengths) // len(images), 1, 1, 1).to(out.images.device)
        with torch.no_grad():
            wanted = self.features(model.targets(repeated, lengths))
        pairs = zip(self.features(out.images), wanted, strict=True)
        distance = torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()
        return total + self.weight * distance, pixel, out


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
