"""Shared by the tests of the benchmark room: measurements with made-up times, and one with a known wrong result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from spectralar.bench.cases import Case, Measurement, Missing, Peer, Rival, Role, Workload
from spectralar.bench.timing import Timing

CPU = torch.device("cpu")


def timing(median: float) -> Timing:
    return Timing(median, 0.9 * median, 1.2 * median, samples=9, calls=3, how="clock", first_call=0.5)


def rival(name: str, median: float | None, *, role: Role = "peer", error: float = 0.0) -> Rival:
    return Rival(name, role, error, timing(median)) if median else Rival(name, role, reason="not installed")


@dataclass(frozen=True, kw_only=True)
class DoubleCase(Case):
    """Twice a vector; `off` is added by our implementation, and by the peer "off by one"."""

    off: float = 0.0

    name = "double"
    budget = 1e-6
    peer_budget = 1e-3
    arithmetic = "fp16"

    def bytes(self) -> int:
        return 8_000

    def flops(self) -> int:
        return 1_000

    def small(self) -> Self:
        return self

    def workload(self, device: torch.device) -> Workload:
        x = torch.arange(1000.0, device=device)

        def error(result: object) -> float:
            assert isinstance(result, Tensor)
            return float((result - 2 * x).abs().amax())

        return Workload((x,), lambda x: 2 * x + self.off, error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        def broken() -> Missing:
            raise ZeroDivisionError("by [design]\nand more")

        return (
            Peer("sum", lambda: lambda x: x + x),
            Peer("off by one", lambda: lambda x: x + x + 1),
            Peer("copy", lambda: torch.clone, "bound"),
            Peer("coarse", lambda: lambda x: (2 * x.half()).float(), "reduced"),
            Peer("absent", lambda: Missing("absent is not installed")),
            Peer("broken", broken),
            Peer("compiled", lambda: lambda x: x + x, compiled=True),
        )


def measurement(case: Case, ours: float, *rivals: Rival, floor: float = 1e-5) -> Measurement:
    return Measurement(case, 0.0, timing(ours), rivals, floor, "copy")
