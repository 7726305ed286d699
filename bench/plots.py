"""The roofline picture: time against batch, cutoff and codebook size, beside what the device allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from spectralar.bench.cases import Case, Measurement, measure
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.kernels_dct import COPY, TargetsCase
from spectralar.bench.kernels_vq import NearestCase
from spectralar.bench.record import Provenance


@dataclass(frozen=True)
class Sweep:
    """One panel: a case at growing `values` of one of its numbers, with some of its peers."""

    title: str
    axis: str
    values: tuple[int, ...]
    case: Callable[[int], Case]
    peers: tuple[str, ...]
    doubling: bool = True


SWEEPS = (
    Sweep(
        "spectral_targets, 3x256x256 fp32",
        "pictures, eq. 9 cutoffs",
        (1, 4, 16, 64, 256),
        lambda batch: TargetsCase(batch=batch),
        (COPY, "projection tf32"),
    ),
    Sweep(
        "spectral_targets, 256x3x256x256 fp32",
        "cutoff of all pictures",
        (8, 32, 64, 96, 128, 160, 192, 224, 256),
        lambda cutoff: TargetsCase(cutoffs=cutoff),
        (COPY, "projection tf32"),
        doubling=False,
    ),
    Sweep(
        "nearest_code, N=16384, D=16 fp32",
        "codebook size",
        (256, 1024, 4096, 16384, 65536, 262144),
        lambda codes: NearestCase(width=16, codes=codes),
        ("matmul + argmin tf32",),
    ),
)

_OURS, _FLOOR, _OTHERS = "#0b6e99", "#888888", ("#c4622d", "#6b9a3f")


def measure_sweep(sweep: Sweep, device: torch.device, ceilings: Ceilings, seconds: float) -> list[Measurement]:
    """All points of a panel, each for about `seconds`; small ones on a CPU."""
    cases = [sweep.case(value) for value in sweep.values]
    if device.type != "cuda":
        cases = [case.small() for case in cases]
    return [measure(case, device, ceilings, seconds, peers=sweep.peers) for case in cases]


def draw(panels: list[tuple[Sweep, list[Measurement]]], origin: Provenance, path: Path) -> None:
    """Writes the picture; its format follows the name. Points whose result was wrong are not drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    for axes, (sweep, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        kept = [(value, m, m.ours) for value, m in zip(sweep.values, points, strict=True) if m.ours]
        values = [value for value, _, _ in kept]
        low, middle, high = ([1e6 * getattr(t, at) for *_, t in kept] for at in ("p20", "median", "p80"))
        axes.fill_between(values, low, high, color=_OURS, alpha=0.2)
        axes.plot(values, middle, "o-", color=_OURS, markersize=4, label="spectralar")
        for name, color in zip(sweep.peers, _OTHERS, strict=False):
            rivals = [(value, r) for value, m, _ in kept for r in m.rivals if r.name == name and r.timing]
            times = [1e6 * r.timing.median for _, r in rivals if r.timing]
            axes.plot([value for value, _ in rivals], times, ".-", color=color, label=name)
        floors = [1e6 * m.floor for _, m, _ in kept]
        axes.plot(values, floors, "--", color=_FLOOR, label="least by measured rates")
        axes.set(yscale="log", xlabel=sweep.axis)
        if sweep.doubling:
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values], fontsize=8)
        axes.set_title(sweep.title, fontsize=9)
        axes.grid(alpha=0.3, which="major")
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("microseconds")
    small = ", small sizes" if origin.gpu.startswith("none") else ""
    figure.supxlabel(
        f"{origin.gpu}, torch {origin.torch}, {origin.commit}, {origin.date}{small}", fontsize=7, color=_FLOOR
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
