"""What fp8 weights change: how far weights are off, and the distributions that tokens are drawn from."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.kernels.decode import dequantize, quantize
from spectralar.sampling.packing import matrices

_PART = 16


@dataclass(frozen=True)
class WeightError:
    """How a generator with fp8 weights differs from its own, all else equal, in fp32.

    Distributions are those of the next token without guidance, filters or temperature, at every position of the given
    sequences. A divergence is KL(own || fp8) in nats: what an unlike draw costs in log-likelihood, on average.

    Attributes:
        matrices: by name (`decode.MATRICES`), the root mean square of the weights' errors over that of the weights.
        divergence: mean over positions.
        worst_divergence: the largest.
        entropy: of the own distributions in nats, on average; what a divergence may be compared with.
        unlike: mean over positions of the probability that fp8 draws another token, if as few as possible differ (the
            distributions' total variation).
        unlike_best: share of the positions whose likeliest token is another.
        positions: how many.
    """

    matrices: dict[str, float]
    divergence: float
    worst_divergence: float
    entropy: float
    unlike: float
    unlike_best: float
    positions: int

    def __str__(self) -> str:
        each = ", ".join(f"{name} {error:.2%}" for name, error in self.matrices.items())
        return (
            f"fp8 weights: off by {each} (rms); over {self.positions:,} next tokens the distribution moves by KL "
            f"{self.divergence:.2g} nats on average, {self.worst_divergence:.2g} at most (entropy {self.entropy:.2g}), "
            f"{self.unlike:.2%} of the draws and {self.unlike_best:.2%} of the likeliest tokens are others"
        )


@torch.inference_mode()
def weight_error(generator: SpectralGenerator, classes: Sequence[int] | Tensor, tokens: Tensor) -> WeightError:
    """Measures what fp8 weights would change, along sequences such as a sampler draws.

    Takes memory for a copy of the generator in fp32 and for the logits of all sequences.

    Args:
        generator: with its own weights, in any dtype; it is not changed.
        classes: B class numbers, those of the sequences.
        tokens: `[B, N]`, whole sequences.

    Raises:
        ValueError: no sequences, or values that the generator does not take.
    """
    classes, tokens = torch.as_tensor(classes, device=generator.device), tokens.to(generator.device)
    if len(classes) == 0:
        raise ValueError("classes must be one or more, not none")
    model = copy.deepcopy(generator).float().eval()
    parts = list(zip(classes.split(_PART), tokens.split(_PART), strict=True))
    own = [model(*part).log_softmax(-1) for part in parts]
    errors = round_to_fp8(model)
    sums, worst, positions = torch.zeros(4, dtype=torch.float64, device=generator.device), 0.0, 0
    for part, p in zip(parts, own, strict=True):
        q = model(*part).log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1)
        entropy = -(p.exp() * p).sum(-1)
        unlike = (p.exp() - q.exp()).abs().sum(-1) / 2
        unlike_best = (p.argmax(-1) != q.argmax(-1)).float()
        sums += torch.stack([x.double().sum() for x in (divergence, entropy, unlike, unlike_best)])
        worst, positions = max(worst, float(divergence.max())), positions + divergence.numel()
    mean, entropy_mean, unlike_mean, unlike_best_mean = (sums / positions).tolist()
    return WeightError(errors, mean, worst, entropy_mean, unlike_mean, unlike_best_mean, positions)


@torch.no_grad()
def round_to_fp8(generator: SpectralGenerator) -> dict[str, float]:
    """Replaces the weights of products by what fp8 stands for, in place; gives their relative errors by name.

    Args:
        generator: in fp32, as the values are not exact in less.
    """
    errors = {}
    for name, layers in matrices(generator).items():
        off = whole = 0.0
        for weight in layers:
            values, scale = quantize([weight])
            rounded = dequantize(values[0], scale[0])
            off += float((rounded - weight).square().sum(dtype=torch.float64))
            whole += float(weight.square().sum(dtype=torch.float64))
            weight.copy_(rounded)
        errors[name] = (off / whole) ** 0.5 if whole else 0.0
    return errors
