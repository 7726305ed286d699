"""The offline tuner of launch tables: `spectralar bench tune dct|vq`. Nothing is tuned at run time.

A row of a table in `kernels/<op>/config.py` is a frozen dataclass, and the kernel's launch function takes one as an
argument. The tuner tries rows around the present one on the cases that the row serves, judges every result like any
other, and prints the best rows with the figures that go onto the line above them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from tyro.conf import Positional

from spectralar.bench.cases import Case
from spectralar.bench.kernels_dct import TargetsCase
from spectralar.bench.kernels_vq import NearestCase
from spectralar.bench.record import Provenance, provenance
from spectralar.bench.timing import Call, Sampler, prepare, rotating_sets, take_turns
from spectralar.devices import auto_device

# The present row and this many others go into the last, long comparison.
_FINALISTS = 5
_FIRST_LOOK = 5

# What is tried for a field of a row; fields of other names stay as they are.
_VALUES = {
    "rows": (32, 64, 128),
    "columns": (16, 32, 64),
    "codes": (64, 128),
    "group": (8, 16, 32),
    "warps": (4, 8),
    "stages": (1, 2, 3, 4),
    "spread": (2, 3, 4),
}


@dataclass(frozen=True)
class Tunable:
    """A row of a launch table.

    Attributes:
        name: where the row stands, such as `TWO_SIDED["pixel"]`.
        present: the row as it is.
        choices: values to try for some of its fields.
        cases: what the row is measured on; rows are ranked by the geometric mean of their times.
        launch: the call that a case times, made with a given row.
    """

    name: str
    present: Any
    choices: Mapping[str, tuple[int, ...]]
    cases: tuple[Case, ...]
    launch: Callable[[Case, Any], Call]

    def candidates(self) -> list[Any]:
        """Every combination of the choices but the present row; those that differ in the fewest fields come first."""
        names = list(self.choices)
        rows = [
            dataclasses.replace(self.present, **dict(zip(names, values, strict=True)))
            for values in itertools.product(*self.choices.values())
        ]
        return sorted((row for row in rows if row != self.present), key=self._distance)

    def _distance(self, row: Any) -> int:
        return sum(getattr(row, name) != getattr(self.present, name) for name in self.choices)


@dataclass(frozen=True)
class Outcome:
    """A row that ran: its seconds on each case (median, p20, p80), and their geometric mean over the present row's."""

    row: Any
    times: tuple[tuple[float, float, float], ...]
    relative: float


class _Tried:
    """A row made ready on every case."""

    def __init__(self, row: Any, samplers: list[Sampler]) -> None:
        self.row, self.samplers = row, samplers
        looks = [sorted(s.sample() for _ in range(_FIRST_LOOK))[_FIRST_LOOK // 2] for s in samplers]
        self.score = _mean(looks)


def tune(tunable: Tunable, device: torch.device, seconds: float, report: Callable[[str], None]) -> list[Outcome]:
    """The present row and the best others, fastest first; tries new rows for about two thirds of `seconds`.

    Raises:
        RuntimeError: the present row gives a wrong result.
    """
    started = time.monotonic()
    works = [case.workload(device) for case in tunable.cases]
    rings = [rotating_sets(work.inputs, device) for work in works]

    def ready(row: Any) -> _Tried:
        samplers = []
        for case, work, ring in zip(tunable.cases, works, rings, strict=True):
            call = tunable.launch(case, row)
            error = work.error(call(*work.inputs))
            if not error <= case.budget:
                raise RuntimeError(f"wrong result, error {error:.3g}, on {case.name}")
            samplers.append(prepare(call, ring, device))
        return _Tried(row, samplers)

    present = ready(tunable.present)
    best: list[_Tried] = []
    for row in tunable.candidates():
        if time.monotonic() - started > seconds * 2 / 3:
            report(f"time is up; not tried: {row} and what follows")
            break
        try:
            tried = ready(row)
        except Exception as failure:  # too much shared memory, no registers, a shape that the compiler refuses
            report(f"{row}: {type(failure).__name__}: {str(failure).strip()[:100]}")
            continue
        report(f"{row}: {tried.score / present.score:.3f} of the present row's time")
        # What falls out of the list frees its graphs, each of which holds its own output.
        best = sorted([*best, tried], key=lambda t: t.score)[:_FINALISTS]
    return _final([present, *best], seconds / 3)


def _final(finalists: list[_Tried], seconds: float) -> list[Outcome]:
    cases = len(finalists[0].samplers)
    timings = [
        take_turns({str(i): tried.samplers[case] for i, tried in enumerate(finalists)}, seconds / cases)
        for case in range(cases)
    ]
    medians = [[timing[str(i)].median for timing in timings] for i in range(len(finalists))]
    outcomes = [
        Outcome(
            tried.row,
            tuple((t[str(i)].median, t[str(i)].p20, t[str(i)].p80) for t in timings),
            _mean(medians[i]) / _mean(medians[0]),
        )
        for i, tried in enumerate(finalists)
    ]
    return sorted(outcomes, key=lambda outcome: outcome.relative)


def table_lines(tunable: Tunable, outcomes: list[Outcome], origin: Provenance) -> Iterator[str]:
    """The rows as they would stand in the table, each under the figures that speak for it."""
    yield f"{tunable.name}, on {origin.gpu}, triton {origin.triton}, {origin.date}"
    for outcome in outcomes:
        figures = "; ".join(
            f"{1e6 * median:.4g} us ({1e6 * low:.4g} - {1e6 * high:.4g}) {case.name}"
            for case, (median, low, high) in zip(tunable.cases, outcome.times, strict=True)
        )
        mark = ", the present row" if outcome.row == tunable.present else ""
        yield f"  # {outcome.relative:.3f}{mark}: {figures}"
        yield f"  {outcome.row}"


def tunables(op: Literal["dct", "vq"]) -> list[Tunable]:
    """The tables of a room."""
    return list(_dct() if op == "dct" else _vq())


def bench_tune_command(
    op: Positional[Literal["dct", "vq"]], table: str = "", seconds: float = 120, device: str = "auto"
) -> None:
    """Try other rows of the launch tables and print the best ones, ready for kernels/<op>/config.py.

    Changes no file. The last line of the output is one JSON object.

    Args:
        op: dct or vq.
        table: part of the name of a row, such as SCAN[16]; all rows unless given.
        seconds: about how long one row may take.
        device: auto, cpu or cuda.
    """
    place = auto_device(device)
    chosen = [tunable for tunable in tunables(op) if table in tunable.name]
    if not chosen:
        raise ValueError(f"table must be part of one of {[t.name for t in tunables(op)]}, got {table!r}")
    if place.type != "cuda":
        raise ValueError(f"device must be a GPU to tune for, got {place}")
    console = Console(highlight=False, soft_wrap=True, markup=False)
    origin = provenance(place)
    summary = {}
    for tunable in chosen:
        console.print(tunable.name)
        outcomes = tune(tunable, place, seconds, lambda line: console.print(f"    {line}"))
        for line in table_lines(tunable, outcomes, origin):
            console.print(line)
        summary[tunable.name] = {"best": str(outcomes[0].row), "relative": round(outcomes[0].relative, 4)}
    print(json.dumps({"bench": "tune", "op": op, "rows": summary}))


def _dct() -> Iterator[Tunable]:
    from spectralar.kernels.dct import config, kernel

    def launcher(argument: str) -> Callable[[Case, Any], Call]:
        def with_row(case: Case, row: Any) -> Call:
            assert isinstance(case, TargetsCase)
            out_dtype = case.out_dtype
            return lambda images, cutoffs: kernel.sub_images(images, cutoffs, out_dtype, **{argument: row})

        return with_row

    cases = {
        1: TargetsCase(in_dtype=torch.uint8, out_dtype=torch.bfloat16),
        2: TargetsCase(in_dtype=torch.bfloat16, out_dtype=torch.bfloat16),
        4: TargetsCase(),
    }
    for size, case in cases.items():
        for name, row in (("low_rank", config.LOW_RANK[size]), ("projection", config.PROJECTION[size])):
            yield Tunable(f"{name.upper()}[{size}]", row, _choices(row), (case,), launcher(name))


def _vq() -> Iterator[Tunable]:
    from spectralar.kernels.vq import config, launch

    def launcher(argument: str) -> Callable[[Case, Any], Call]:
        def with_row(case: Case, row: Any) -> Call:
            assert isinstance(case, NearestCase)
            normalize = case.normalize
            return lambda z, codebook: launch.nearest_code(z, codebook, normalize, **{argument: row})

        return with_row

    targets = (NearestCase(), NearestCase(tokens=65536), NearestCase(width=16, codes=65536))
    cases: dict[int, tuple[Case, ...]] = {16: targets, 32: (NearestCase(tokens=174080, width=32),)}
    for padded, row in config.SCAN.items():
        measured = cases.get(padded, (NearestCase(width=padded),))
        yield Tunable(f"SCAN[{padded}]", row, _choices(row), measured, launcher("config"))
    choices = {"rows": (8, 16, 32), "warps": (1, 2, 4)}
    yield Tunable("SETTLE", config.SETTLE, choices, targets, launcher("settle"))


def _choices(row: Any) -> dict[str, tuple[int, ...]]:
    return {field.name: _VALUES[field.name] for field in dataclasses.fields(row) if field.name in _VALUES}


def _mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
