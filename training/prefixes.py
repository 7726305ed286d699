"""Which prefix lengths a training step rebuilds: their distribution, and how many of one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixConfig:
    """How prefix lengths n = 1..N are drawn. The defaults are algorithm 1: one prefix of every image, n uniform.

    Attributes:
        per_image: prefixes of every image in a step, one from each of so many equally likely parts of the distribution.
            The image is encoded once; the decoder's work grows.
        tilt: the probability of n grows about as n ** tilt; 0 is uniform, 1 is linear.
        full: share of the prefixes that are all N tokens; the rest is drawn as above.
    """

    per_image: int = 1
    tilt: float = 0.0
    full: float = 0.0

    def __post_init__(self) -> None:
        for name, good in {
            "per_image must be at least 1": self.per_image >= 1,
            "tilt must not be negative": self.tilt >= 0,
            "full must be in [0, 1]": 0 <= self.full <= 1,
        }.items():
            if not good:
                raise ValueError(f"{name}, not {getattr(self, name.split()[0])}")

    def lengths_at(self, quantiles: Tensor, tokens: int, *, full: Tensor | float | None = None) -> Tensor:
        """The prefix lengths at given quantiles of the distribution.

        Args:
            quantiles: floating, any shape, in [0, 1].
            tokens: N.
            full: in place of the field of that name; a tensor may change from step to step of a captured graph.

        Returns:
            int64 of the same shape in 1..N, on the same device.
        """
        # No constant travels to the device here: a step that is recorded as a CUDA graph must not copy from the host.
        rest = 1 - (self.full if full is None else full)
        inside = (quantiles / (rest + 1e-9)).clamp(max=1)
        # Rounding may take the last quantile to N itself.
        drawn = (tokens * inside ** (1 / (1 + self.tilt))).long().clamp(max=tokens - 1) + 1
        return drawn.masked_fill(quantiles >= rest, tokens)

    def draw_quantiles(self, images: int, device: torch.device) -> Tensor:
        """Random quantiles `[per_image, images]`: uniform in each of `per_image` equal parts of [0, 1)."""
        part = torch.arange(self.per_image, device=device)[:, None]
        return (part + torch.rand(self.per_image, images, device=device)) / self.per_image

    def even_quantiles(self, images: int, device: torch.device) -> Tensor:
        """Quantiles `[per_image, images]` without chance, as even over all of them as they can be."""
        # Multiples of the golden ratio: neighbours, often of one class, get quantiles far from each other.
        place = torch.arange(images, device=device, dtype=torch.float64) * 0.6180339887498949 % 1
        part = torch.arange(self.per_image, device=device)[:, None]
        return ((part + place) / self.per_image).float()
