"""Is what a sampler drew right? Its draws against those of fp32, and its pictures likewise.

The logits that fp32 gives along the very tokens that were drawn say what each draw should have been, so that one
different draw does not make all later ones different. How far plain PyTorch in the sampler's dtype strays from them is
the measure of what rounding explains; more than twice as much is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spectralar.bench.ceilings import tf32
from spectralar.generator import SpectralGenerator
from spectralar.images import to_uint8
from spectralar.kernels.draw import reference
from spectralar.sampling import SamplingSettings, WeightFormat
from spectralar.sampling.rounding import round_to_fp8
from spectralar.tokenizer import SpectralTokenizer

IMAGES = 64
"""Of a larger batch, so many images are judged, spread evenly."""

_PART = 16
# Rounding to 8 bits alone: the root of 1/12 of a level squared, for each of two pictures.
_ROUNDING = 0.4


class Drawn(NamedTuple):
    """What a sampler made: tokens `[B, N]`, pictures `[B, 3, S, S]` uint8 or None, and with which settings."""

    tokens: Tensor
    images: Tensor | None
    settings: SamplingSettings


@dataclass(frozen=True)
class Verdict:
    """How a result differs from fp32's; `error` is the largest of all ratios to what rounding explains.

    Attributes:
        error: right up to 2; NaN or infinite for what is no result at all.
        unlike: share of the draws that are not those of fp32.
        plain_unlike: the same for plain PyTorch in the sampler's dtype.
        regret: greedy draws only: by how much at worst the logit that was taken lies below fp32's best.
        logit_error: largest difference of plain PyTorch's guided logits to fp32's.
        levels: root mean square difference of the pictures to fp32's, in 8-bit levels.
        plain_levels: the same for plain PyTorch.
    """

    error: float
    unlike: float
    plain_unlike: float
    regret: float | None
    logit_error: float
    levels: float | None = None
    plain_levels: float | None = None


class Judge:
    """Judges what samplers draw from these models for these classes and seeds.

    Args:
        generator: in the sampler's dtype.
        tokenizer: likewise, or None where no pictures are made.
        classes: of the images.
        seeds: of the images.
        weights: of the sampler; those of fp8 are what is exact, and plain PyTorch has them in the generator's dtype.
    """

    def __init__(
        self,
        generator: SpectralGenerator,
        tokenizer: SpectralTokenizer | None,
        classes: Sequence[int],
        seeds: Sequence[int],
        weights: WeightFormat = "same",
    ) -> None:
        device, batch = generator.device, len(classes)
        self._plain, self._exact = generator, copy.deepcopy(generator).float()
        if weights == "fp8":
            round_to_fp8(self._exact)
            self._plain = copy.deepcopy(self._exact).to(generator.positions.dtype)
        self._plain_decoder, self._exact_decoder = tokenizer, copy.deepcopy(tokenizer)
        if self._exact_decoder is not None:
            self._exact_decoder.float()
        self._chosen = torch.arange(min(batch, IMAGES), device=device) * batch // min(batch, IMAGES)
        self._classes, self._seeds = (torch.tensor(x, device=device)[self._chosen] for x in (classes, seeds))

    @torch.inference_mode()
    def __call__(self, drawn: Drawn) -> Verdict:
        config = self._plain.config
        tokens = drawn.tokens[self._chosen]
        if not bool(((tokens >= 0) & (tokens < config.codebook_size)).all()):
            return Verdict(float("inf"), 1.0, 0.0, None, 0.0)
        unlike = plain_unlike = 0
        regret = logit_error = 0.0
        for part in torch.arange(len(tokens), device=tokens.device).split(_PART):
            exact, plain = (self._guided(model, tokens, part, drawn.settings) for model in (self._exact, self._plain))
            truth = _draws(exact, self._seeds[part], drawn.settings)
            unlike += int((tokens[part] != truth).sum())
            plain_unlike += int((_draws(plain, self._seeds[part], drawn.settings) != truth).sum())
            taken = exact.gather(-1, tokens[part][..., None])[..., 0]
            regret = max(regret, float((exact.amax(-1) - taken).amax()))
            logit_error = max(logit_error, float((plain - exact).abs().amax()))
        # A hundredth of the draws and one more are no evidence, however seldom plain PyTorch differs.
        ratios = [unlike / (plain_unlike + tokens.numel() / 100 + 1)]
        if drawn.settings.greedy:
            # Two logits, each wrong by so much, can change places.
            ratios.append(regret / max(2 * logit_error, 1e-6))
        levels = plain_levels = None
        if drawn.images is not None:
            levels, plain_levels = self._levels(tokens, drawn.images[self._chosen])
            ratios.append(levels / max(plain_levels, _ROUNDING))
        return Verdict(
            max(ratios),
            unlike / tokens.numel(),
            plain_unlike / tokens.numel(),
            regret if drawn.settings.greedy else None,
            logit_error,
            levels,
            plain_levels,
        )

    def _guided(self, model: SpectralGenerator, tokens: Tensor, part: Tensor, settings: SamplingSettings) -> Tensor:
        """fp32 logits `[b, N, K]` along the tokens, guided as their steps are."""
        config, classes = model.config, self._classes[part]
        scales = torch.tensor(settings.guidance_scales(config.steps), device=tokens.device)
        with tf32(False):
            conditional = model(classes, tokens[part])
            unconditional = model(torch.full_like(classes, config.classes), tokens[part])
        each = scales.repeat_interleave(config.group)[:, None]
        return torch.where(each == 1, conditional, unconditional + each * (conditional - unconditional))

    def _levels(self, tokens: Tensor, images: Tensor) -> tuple[float, float]:
        """Root mean square differences to fp32's pictures of the same tokens: of the images, and of plain PyTorch's."""
        assert self._exact_decoder is not None and self._plain_decoder is not None
        squares = [0.0, 0.0]
        for some, given in zip(tokens.split(_PART), images.split(_PART), strict=True):
            with tf32(False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                exact = to_uint8(self._exact_decoder.decode(some)).float()
            for i, ours in enumerate((given, to_uint8(self._plain_decoder.decode(some)))):
                squares[i] += float((ours.float() - exact).square().sum())
        ours, plain = ((square / images.numel()) ** 0.5 for square in squares)
        return ours, plain


def _draws(logits: Tensor, seeds: Tensor, settings: SamplingSettings) -> Tensor:
    """What the plain definition draws from `[b, N, K]` logits."""

    def columns() -> Iterator[Tensor]:
        for position, column in enumerate(logits.unbind(1)):
            yield reference.draw_tokens(
                column,
                seeds,
                position,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
                greedy=settings.greedy,
            )

    return torch.stack(list(columns()), dim=1)
