"""What all commands share: ceilings first, then case after case until time is up, each recorded once it is measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from spectralar.bench.cases import C, Measurement
from spectralar.bench.ceilings import measure_ceilings
from spectralar.bench.record import RESULTS, append, line_of, provenance
from spectralar.bench.report import print_case, print_ceilings
from spectralar.bench.timing import release
from spectralar.devices import auto_device

M = TypeVar("M", bound=Measurement)


class WrongResultError(RuntimeError):
    """A result was outside of its error budget, or a case could not be run."""


class Run:
    """One run of a benchmark.

    Args:
        bench: its name, and that of the file of results.
        device: auto, cpu or cuda.
        seconds: about how long it may take.
        out: file to append lines to; on a GPU the one in `bench/results` of the checkout unless given.
        commit: recorded where git can't be asked.

    Attributes:
        device, console, origin, ceilings: where, onto what, with what, and the device's rates.
        path: of the lines, if they go anywhere.
        lines: recorded so far.

    Raises:
        ValueError: seconds that are not positive, or an unknown device.
    """

    def __init__(self, bench: str, device: str, seconds: float, out: Path | None, commit: str) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self._bench, self._seconds, self._started = bench, seconds, time.monotonic()
        self.device = auto_device(device)
        self.console = Console()
        # The columns need this much; a narrower terminal breaks the lines itself.
        self.console.width = max(self.console.width, 150)
        self.origin = provenance(self.device, commit)
        self.path = out or (RESULTS / f"{bench}.jsonl" if self.on_gpu and RESULTS.is_dir() else None)
        self.lines: list[dict[str, Any]] = []
        self._wrong: list[str] = []
        self._failed: list[str] = []
        self._left_out: list[str] = []
        self.ceilings = measure_ceilings(self.device, min(2.0, seconds / 10))
        print_ceilings(self.ceilings, self.origin, self.device, self.console)

    @property
    def on_gpu(self) -> bool:
        """Whether figures count; on a CPU they are of small sizes."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds; negative once time is up."""
        return self._seconds - (time.monotonic() - self._started)

    @property
    def early(self) -> bool:
        """Whether there is time for what takes long, as compilers do."""
        return self.left > self._seconds / 2

    def suited(self, cases: Sequence[C]) -> list[C]:
        """The cases as this device can take them."""
        # Several cases may become the same small one.
        return list(cases) if self.on_gpu else list(dict.fromkeys(case.small() for case in cases))

    def measure(self, cases: Sequence[C], measure: Callable[[C, float], M], show: Callable[[M], None]) -> list[M]:
        """Measures the cases in order and shows each; a case that fails says nothing of the others.

        Args:
            cases: as `suited` gave them.
            measure: takes a case and its share of the seconds that are left.
            show: prints a measurement.
        """
        done: list[M] = []
        quickest: dict[float, float] = {}
        for i, case in enumerate(cases):
            # With less time a case drops what it can, but hardly more than half.
            if self.left < quickest.get(case.weight, 0.0) / 2:
                self._left_out.append(case.name)
                continue
            self._release()
            if case.costs:
                print_case(case, self.ceilings, self.console)
            began = time.monotonic()
            try:
                m = measure(case, self.left * case.weight / sum(later.weight for later in cases[i:]))
            except (RuntimeError, ValueError) as failure:
                self._failed.append(case.name)
                self.console.print(f"  failed: {failure}", highlight=False, soft_wrap=True, markup=False)
                continue
            took = time.monotonic() - began
            quickest[case.weight] = min(took, quickest.get(case.weight, took))
            self.record(m)
            done.append(m)
            show(m)
        self._release()
        return done

    def record(self, m: Measurement) -> None:
        """Writes a line at once, so that a run that is stopped has all that it measured."""
        self.lines.append(line_of(m, self.origin))
        if self.path is not None:
            append(self.lines[-1:], self.path)
        if not m.right:
            self._wrong.append(m.case.name)

    def close(self, cases: int, summary: dict[str, Any], **files: Path | None) -> None:
        """Names what was left out and prints the last line, one JSON object.

        Raises:
            WrongResultError: a result was wrong, or a case failed.
        """
        if self._left_out:
            told = f"left out after {self._seconds:g} s: {'; '.join(self._left_out)}"
            self.console.print(told, highlight=False, soft_wrap=True)
        found = {"wrong": self._wrong, "failed": self._failed, "left_out": self._left_out}
        paths = {name: path and str(path) for name, path in {"out": self.path, **files}.items()}
        print(json.dumps({"bench": self._bench, "cases": cases} | found | summary | paths))
        if self._wrong or self._failed:
            wrong, failed = ("; ".join(names) or "none" for names in (self._wrong, self._failed))
            raise WrongResultError(f"wrong results: {wrong}; failed: {failed}")

    def _release(self) -> None:
        # Captured graphs hold their memory, and the next case may need all of it. A compiler that has seen one function
        # with too many shapes gives up on it without a word.
        torch.compiler.reset()
        release(self.device)
