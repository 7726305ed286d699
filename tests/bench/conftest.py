"""Shared by the tests of the benchmark room: measurements with made-up times, and one with a known wrong result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from spectralar.bench import frame
from spectralar.bench.cases import Case, Measurement, Missing, Peer, Rival, Role, Workload
from spectralar.bench.timing import Timing

CPU = torch.device("cpu")


@pytest.fixture
def short_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = frame.measure_ceilings
    monkeypatch.setattr(frame, "measure_ceilings", lambda device, seconds: measured(device, 0.02))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_line(printed: str) -> dict[str, Any]:
    """The JSON object that a command prints."""
    found: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return found


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
