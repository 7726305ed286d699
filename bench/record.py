"""A measurement as one line of `bench/results/*.jsonl`, with everything that it takes to place the figure."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spectralar.bench.cases import Measurement, timed

# The folder of the checkout; an installed package has none.
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Provenance:
    """Where and with what a figure was measured."""

    gpu: str
    torch: str
    triton: str | None
    commit: str
    date: str


def provenance(device: torch.device, commit: str = "") -> Provenance:
    """Of this process; `commit` replaces what git says, for a copy of the tree without its history."""
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return Provenance(
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else f"none ({_processor()})",
        torch=torch.__version__,
        triton=triton,
        commit=commit or git_commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def driver() -> str:
    """Version of the NVIDIA driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, check=True, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]


def git_commit(folder: Path = RESULTS.parent) -> str:
    """Short hash of the checkout, with "-dirty" when a tracked file outside `bench/results` differs; or "unknown"."""
    try:
        commit = _git(folder, "rev-parse", "--short=7", "HEAD")
        changed = _git(
            folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)bench/results"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def line_of(m: Measurement, origin: Provenance) -> dict[str, Any]:
    """The line of one measurement. Times are in milliseconds.

    `ceiling` is the time that the measured rates of the device allow, so that `fraction` is `ceiling / median`. A
    result that was wrong has no times and no ratio.
    """
    ours, best = m.ours, m.best_peer
    return {
        "target": m.case.target,
        "case": m.case.name,
        "gpu": origin.gpu,
        "torch": origin.torch,
        "triton": origin.triton,
        "commit": origin.commit,
        "date": origin.date,
        "median": _ms(ours.median) if ours else None,
        "p20": _ms(ours.p20) if ours else None,
        "p80": _ms(ours.p80) if ours else None,
        "unit": "ms",
        "ceiling": _ms(m.floor),
        "fraction": _digits(m.floor / ours.median) if ours else None,
        "peer": best.name if best else None,
        "peer_median": _ms(timed(best).median) if best else None,
        "ratio": _digits(m.ratio(best)) if best else None,
        "error": _digits(m.error),
        "met": m.met,
    }


def append(lines: Iterable[dict[str, Any]], path: Path) -> None:
    """Adds lines to a file, which is made with its folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def _digits(value: float | None) -> float | None:
    # JSON knows no NaN and no infinity; an error that is neither is a number that four digits describe.
    return None if value is None or not abs(value) < float("inf") else float(f"{value:.4g}")


def _ms(seconds: float) -> float | None:
    return _digits(1e3 * seconds)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _processor() -> str:
    return platform.processor() or platform.machine()
