"""What a run of the loader's benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape

from spectralar.bench.cases import Rival
from spectralar.bench.loader import LARGEST_MEAN, LARGEST_PIXEL, LoaderCase, StepCase
from spectralar.bench.loader_measure import BARE, RESIDENT, LoaderMeasurement
from spectralar.bench.report import milliseconds, new_table, print_absent, print_verdict, ratio
from spectralar.bench.timing import Timing

_COLUMNS = ("", "images/s", "p20 - p80", "a batch", "of bare DALI", "processors", "ratio", "windows")


def print_bare(bare: Rival, case: LoaderCase, console: Console) -> None:
    """The ceiling, before anything else is measured."""
    if bare.timing is None:
        told = f"without {BARE}: {escape(bare.reason)}"
    else:
        low, middle, high = _rates(case, bare.timing)
        told = f"{BARE}, its own reader and order: {middle} images/s ({low} - {high})"
    console.print(told, highlight=False, soft_wrap=True)


def print_loader(m: LoaderMeasurement, console: Console) -> None:
    """One case: how near its pictures are to Pillow's, then its rates beside the others', or what a step waits."""
    assert isinstance(m.case, LoaderCase)
    target = f"[bold]{m.case.target}[/] " if m.case.target else ""
    console.print(f"\n{target}{m.case.name}", highlight=False)
    console.print(f"  {_judged(m)}", highlight=False, soft_wrap=True)
    if m.ours is not None and isinstance(m.case, StepCase):
        console.print(f"  {_waits(m, m.ours)}", highlight=False, soft_wrap=True)
    elif m.ours is not None:
        table = new_table(_COLUMNS)
        table.add_row("  [bold]spectralar[/]", *_figures(m, m.ours), _busy(m, "spectralar"), "", _windows(m.ours))
        for rival in m.rivals:
            if rival.timing is not None:
                row = (*_figures(m, rival.timing), _busy(m, rival.name), ratio(m, rival), _windows(rival.timing))
                table.add_row(f"  {rival.name}", *row)
        console.print(table)
        print_absent([(r.name, r.reason) for r in m.rivals if r.timing is None], console)
    print_verdict(m, console)


def summary_of(measured: Sequence[LoaderMeasurement], bare: Rival) -> dict[str, Any]:
    """Of a run: which targets were met, rates, shares of bare DALI, busy processors and what a step waits."""
    timed = [(m.case, m, m.ours) for m in measured if m.ours is not None]
    loading = [(c, m, t) for c, m, t in timed if isinstance(c, LoaderCase) and not isinstance(c, StepCase)]
    steps = [(c, m, t) for c, m, t in timed if isinstance(c, StepCase)]
    rates = {c.name: round(c.batch / t.median, 1) for c, _, t in loading}
    first = next((c for c, _, _ in loading), None)
    if bare.timing is not None and first is not None:
        rates[BARE] = round(first.batch / bare.timing.median, 1)
    ours = "spectralar"
    return {
        "met": {c.target: m.met for c, m, _ in loading if c.target and m.met is not None},
        "images_per_second": rates,
        "of_bare_dali": {c.name: round(m.floor / t.median, 4) for c, m, t in loading} if bare.timing else {},
        "processors": {c.name: round(m.processors[ours], 2) for c, m, _ in timed if ours in m.processors},
        "wait_ms": {c.name: round(1e3 * (t.median - m.floor), 3) for c, m, t in steps},
        "pixel": {m.case.name: m.verdict.pixel for m in measured if m.verdict},
        "mean": {m.case.name: round(m.verdict.mean, 4) for m in measured if m.verdict},
    }  # fmt: skip


def _judged(m: LoaderMeasurement) -> str:
    assert m.verdict is not None
    v = m.verdict
    told = (
        f"against Pillow: at most {v.pixel:.0f} of 255 in a pixel ({LARGEST_PIXEL} allowed), {v.mean:.3f} on average "
        f"({LARGEST_MEAN} allowed)"
    )
    labels = "same labels" if v.labels else "[red]other labels[/]"
    repeated = "the same bits when decoded again" if v.repeated else "[red]other bits when decoded again[/]"
    return f"{told}, {labels}, {repeated}"


def _waits(m: LoaderMeasurement, fed: Timing) -> str:
    alone = next(r.timing for r in m.rivals if r.name == RESIDENT)
    assert alone is not None
    return (
        f"{1e3 * fed.median:.4g} ms a step ({1e3 * fed.p20:.4g} - {1e3 * fed.p80:.4g}), {1e3 * alone.median:.4g} ms "
        f"({1e3 * alone.p20:.4g} - {1e3 * alone.p80:.4g}) on one resident batch: it waits "
        f"{1e3 * (fed.median - alone.median):.3g} ms; {_busy(m, 'spectralar') or 'unknown'} processors busy"
    )


def _figures(m: LoaderMeasurement, timing: Timing) -> tuple[str, str, str, str]:
    assert isinstance(m.case, LoaderCase)
    low, middle, high = _rates(m.case, timing)
    share = f"{m.floor / timing.median:.1%}" if m.floor == m.floor else ""
    return middle, f"{low} - {high}", milliseconds(timing)[0], share


def _rates(case: LoaderCase, timing: Timing) -> tuple[str, str, str]:
    low, middle, high = (f"{case.batch / seconds:,.0f}" for seconds in (timing.p80, timing.median, timing.p20))
    return low, middle, high


def _busy(m: LoaderMeasurement, name: str) -> str:
    return f"{m.processors[name]:.1f}" if name in m.processors else ""


def _windows(timing: Timing) -> str:
    return f"{timing.samples} x {timing.calls}"
