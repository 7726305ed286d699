"""The reference backend: eager PyTorch, one cached step after the other. Every faster backend must equal it."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.kernels.draw import draw_tokens
from spectralar.sampling.settings import SamplingSettings


class ReferenceBackend:
    """Draws groups of tokens for a batch; guidance runs conditional and unconditional rows as one batch."""

    def __init__(self, generator: SpectralGenerator) -> None:
        self.generator = generator

    @torch.inference_mode()
    def steps(
        self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor
    ) -> Generator[Tensor, None, None]:
        """Yields the tokens so far `[B, n]` after each group, until the sequence ends or the caller stops.

        Args:
            classes: `[B]` int64.
            seeds: `[B]` int64.
            settings: see `SamplingSettings`.
            prefix: `[B, m]` int64 tokens that are given instead of drawn; m may be 0.
        """
        config, device = self.generator.config, self.generator.device
        classes, seeds = classes.to(device), seeds.to(device)
        batch, given = prefix.shape
        guided = settings.guidance != 1.0
        rows = torch.cat([classes, torch.full_like(classes, config.classes)]) if guided else classes
        state = self.generator.start(rows)
        tokens = torch.empty(batch, config.tokens, dtype=torch.int64, device=device)
        tokens[:, :given] = prefix
        previous: Tensor | None = None
        for step, scale in enumerate(settings.guidance_scales(config.steps)):
            logits = self.generator.step(state, previous)  # [B or 2B, group, K]
            first, end = step * config.group, (step + 1) * config.group
            for position in range(max(first, given), end):
                conditional, unconditional = logits[:batch, position - first], logits[batch:, position - first]
                tokens[:, position] = draw_tokens(
                    conditional,
                    seeds,
                    position,
                    unconditional=unconditional if guided else None,
                    guidance=scale if guided else 1.0,
                    temperature=settings.temperature,
                    top_k=settings.top_k,
                    top_p=settings.top_p,
                    greedy=settings.greedy,
                )
            yield tokens[:, :end]
            previous = tokens[:, first:end].repeat(2 if guided else 1, 1)

    def draw(self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor) -> Tensor:
        """All tokens `[B, N]`; arguments as `steps`."""
        *_, tokens = self.steps(classes, seeds, settings, prefix)
        return tokens
