"""The reference backend: eager PyTorch, one cached step after the other. Every faster backend must equal it."""

from __future__ import annotations

from collections.abc import Iterator

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
    def steps(self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor) -> Iterator[Tensor]:
        """Yields the tokens of each group, `[B, group]`, until the sequence ends or the caller stops.

        Args:
            classes: `[B]` int64.
            seeds: `[B]` int64.
            settings: see `SamplingSettings`.
            prefix: `[B, m]` int64 tokens that are given instead of drawn; m may be 0.
        """
        config = self.generator.config
        batch, given = prefix.shape
        guided = settings.guidance != 1.0
        rows = torch.cat([classes, torch.full_like(classes, config.classes)]) if guided else classes
        state = self.generator.start(rows)
        previous: Tensor | None = None
        for step, scale in enumerate(settings.guidance_scales(config.steps)):
            logits = self.generator.step(state, previous)  # [B or 2B, group, K]
            tokens = torch.empty(batch, config.group, dtype=torch.int64, device=classes.device)
            for j in range(config.group):
                position = step * config.group + j
                tokens[:, j] = (
                    prefix[:, position]
                    if position < given
                    else draw_tokens(
                        logits[:batch, j],
                        seeds,
                        position,
                        unconditional=logits[batch:, j] if guided else None,
                        guidance=scale if guided else 1.0,
                        temperature=settings.temperature,
                        top_k=settings.top_k,
                        top_p=settings.top_p,
                        greedy=settings.greedy,
                    )
                )
            yield tokens
            previous = torch.cat([tokens, tokens]) if guided else tokens
