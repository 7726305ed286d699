"""How tokens are drawn: guidance and its schedule, filters, temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

GuidanceSchedule = Literal["ramp", "constant", "cosine"]


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of one generation.

    Classifier-free guidance mixes logits as `unconditional + s (conditional - unconditional)`. The scale s of step i
    of S is, by `guidance_schedule`: `ramp` 1 + (g - 1) i / (S - 1), VAR's rule (VAR's "cfg c" is g = 1 + c here);
    `constant` g; `cosine` 1 + (g - 1) (1 - cos(pi i / (S - 1))) / 2, RAR's rule with power 1.

    Attributes:
        guidance: final scale g; 1 means no guidance.
        guidance_schedule: `ramp`, `constant` or `cosine`.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches p; 0 or 1 keeps all.
        temperature: divides the logits before filtering and drawing.
        greedy: always the likeliest token; seeds do not matter.
    """

    guidance: float = 1.0
    guidance_schedule: GuidanceSchedule = "ramp"
    top_k: int = 0
    top_p: float = 0.0
    temperature: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ValueError(f"guidance must be a number of at least 0, not {self.guidance}")
        if self.guidance_schedule not in ("ramp", "constant", "cosine"):
            raise ValueError(f"guidance_schedule must be ramp, constant or cosine, not {self.guidance_schedule!r}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, not {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be in [0, 1], not {self.top_p}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be a positive number, not {self.temperature}")

    def guidance_scales(self, steps: int) -> list[float]:
        """The scale of every step."""
        progress = [i / (steps - 1) if steps > 1 else 1.0 for i in range(steps)]
        if self.guidance_schedule == "constant":
            progress = [1.0] * steps
        elif self.guidance_schedule == "cosine":
            progress = [(1 - math.cos(math.pi * p)) / 2 for p in progress]
        return [1 + (self.guidance - 1) * p for p in progress]
