"""How far drawn tokens are from those of an exact model: which draws differ, and how near a tie they were."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.kernels.draw import reference as draw
from spectralar.sampling import SamplingSettings


@dataclass(frozen=True)
class Differing:
    """Draws of a run that differ from those of the exact model, given the same tokens before.

    Attributes:
        count: how many.
        share: of all draws.
        gap: the largest lead, in noisy log-probability, of the exact model's choice over the run's.
        gap_of_probability: the largest difference of the two codes' probabilities.
    """

    count: int
    share: float
    gap: float
    gap_of_probability: float


@torch.no_grad()
def differing(
    generator: SpectralGenerator, tokens: Tensor, classes: list[int], seeds: list[int], settings: SamplingSettings
) -> Differing:
    """Follows the tokens `[B, N]` through the generator in fp64 and draws every one again; without filters."""
    assert not settings.top_k and not settings.top_p and not settings.greedy
    exact = copy.deepcopy(generator).double()
    config, device, batch = exact.config, exact.device, len(tokens)
    numbers = torch.tensor(seeds, device=device)
    rows = torch.tensor(classes + [config.classes] * batch, device=device)
    state, previous, gaps, probability_gaps = exact.start(rows), None, [], []
    for step, scale in enumerate(settings.guidance_scales(config.steps)):
        logits = exact.step(state, previous)
        first = step * config.group
        mixed = draw.mix_guidance(logits[:batch], logits[batch:], scale) / settings.temperature
        for j in range(config.group):
            found = tokens[:, first + j, None]
            shares = mixed[:, j].log_softmax(-1)
            scores = shares + draw.gumbel_noise(numbers, first + j, config.codebook_size)
            best = scores.argmax(-1, keepdim=True)
            other = (best != found)[:, 0]
            gaps.append((scores.gather(1, best) - scores.gather(1, found))[other])
            probability_gaps.append((shares.gather(1, best).exp() - shares.gather(1, found).exp())[other].abs())
        previous = tokens[:, first : first + config.group].repeat(2, 1)
    gap, probability_gap = torch.cat(gaps), torch.cat(probability_gaps)
    largest = (float(x.max()) if len(x) else 0.0 for x in (gap, probability_gap))
    return Differing(len(gap), len(gap) / tokens.numel(), *largest)
