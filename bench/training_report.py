"""What a run of the training benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spectralar.bench.cases import Rival
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.sampler_split import Part
from spectralar.bench.timing import Timing
from spectralar.bench.training import TrainingCase
from spectralar.bench.training_measure import TrainingMeasurement, Variant

_ROWS = 14
_COLUMNS = ("", "median", "p20 - p80", "images/s", "of GEMM", "memory", "error", "ratio", "first call", "steps")


def print_case(case: TrainingCase, ceilings: Ceilings, console: Console) -> None:
    """Title, cost and floor, before anything is measured."""
    floor, ceiling = ceilings.floor(case.bytes(), case.flops(), case.arithmetic)
    title = f"[bold]{case.target}[/] {case.name}" if case.target else case.name
    console.print(f"\n{title}", highlight=False)
    console.print(
        f"  at least {floor * 1e3:.4g} ms, by {ceiling}: {case.flops() / 1e12:.3g} TFLOP, three times the forward "
        f"pass's; {case.bytes() / 1e9:.3g} GB for the optimizer",
        highlight=False,
    )


def print_training(m: TrainingMeasurement, ceilings: Ceilings, console: Console) -> None:
    """Times of all variants and peers, what was right about them, and where the time goes."""
    told = next(v.verdict for v in m.variants if v.verdict is not None)
    console.print(
        f"  plain PyTorch in bf16 is off fp32 by {told.plain_gradient:.2g} of the gradients and {told.plain_loss:.2g} "
        "of the losses",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 2), highlight=False)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for variant in m.variants:
        if variant.verdict is not None:
            table.add_row(*_variant(m, variant, ceilings))
    for rival in m.rivals:
        if rival.timing is not None:
            table.add_row(*_rival(m, rival, rival.timing, ceilings))
    console.print(table)
    missing = [(v.settings.name, v.reason) for v in m.variants if v.verdict is None]
    missing += [(r.name, r.reason) for r in m.rivals if r.timing is None]
    for name, reason in missing:
        console.print(f"  without {name}: {escape(reason)}", highlight=False, soft_wrap=True)
    if not m.right:
        console.print(
            f"  [red]wrong[/]: error {m.error:.3g}, allowed {m.case.budget:g}; its time does not count", highlight=False
        )
        return
    if m.ours is None:
        return
    if m.case.condition:
        met = "[green]met[/]" if m.met else "[red]not met[/]"
        console.print(f"  {m.case.target}: {m.case.condition.text}: {met}", highlight=False)
    if m.stages:
        whole = next(v.timing for v in m.variants if v.settings.name == m.stages_of)
        assert whole is not None
        _print_parts(f"one step by stage, {m.stages_of}", m.stages, whole.median, console)
    if m.kernels:
        _print_parts("one step by kernel", m.kernels, m.ours.median, console)


def summary_of(measured: Sequence[TrainingMeasurement]) -> dict[str, Any]:
    """Of a run: which targets were met, times, throughput, shares of the GEMM rate and memory."""
    timed = [(m.case, m, m.ours) for m in measured if m.ours is not None]
    return {
        "met": {case.target: m.met for case, m, _ in timed if case.target and m.met is not None},
        "median_ms": {case.name: round(1e3 * ours.median, 3) for case, _, ours in timed},
        "images_per_second": {
            case.name: round(case.batch / ours.median, 1)
            for case, _, ours in timed
            if isinstance(case, TrainingCase)
        },
        "of_gemm": {case.name: round(m.floor / ours.median, 4) for case, m, ours in timed},
        "settings": {case.name: m.best.settings.name for case, m, _ in timed if m.best},
        "memory_bytes": {
            case.name: {v.settings.name: v.memory for v in m.variants if v.memory is not None} for case, m, _ in timed
        },
    }  # fmt: skip


def _variant(m: TrainingMeasurement, variant: Variant, ceilings: Ceilings) -> list[str]:
    assert variant.verdict is not None
    name = f"  spectralar, {variant.settings.name}"
    if variant.timing is None:
        return [name, *[""] * 5, f"{variant.verdict.error:.2g}", "[red]wrong[/]", "", ""]
    name = f"  [bold]spectralar, {variant.settings.name}[/]" if variant is m.best else name
    figures = _figures(m, variant.timing, variant.memory, ceilings)
    return [name, *figures, f"{variant.verdict.error:.2g}", "", *_calls(variant.timing)]


def _rival(m: TrainingMeasurement, rival: Rival, timing: Timing, ceilings: Ceilings) -> list[str]:
    ratio = m.ratio(rival)
    told = "wrong" if ratio is None else f"{ratio:.2f} x"
    told = f"[bold]{told}[/]" if rival is m.best_peer else told
    memory = dict(m.peer_memory).get(rival.name)
    return [f"  {rival.name}", *_figures(m, timing, memory, ceilings), f"{rival.error:.2g}", told, *_calls(timing)]


def _figures(m: TrainingMeasurement, timing: Timing, memory: int | None, ceilings: Ceilings) -> list[str]:
    assert isinstance(m.case, TrainingCase)
    low, middle, high = (f"{1e3 * x:.4g}" for x in (timing.p20, timing.median, timing.p80))
    rate = m.case.batch / timing.median
    share = m.case.flops() / ceilings.gemm[m.case.arithmetic] / timing.median
    held = "" if memory is None else f"{memory / 1e9:.3g} GB"
    return [f"{middle} ms", f"{low} - {high}", f"{rate:,.1f}", f"{share:.1%}", held]


def _calls(timing: Timing) -> tuple[str, str]:
    return f"{timing.first_call:.1f} s", str(timing.samples)


def _print_parts(title: str, parts: Sequence[Part], whole: float, console: Console) -> None:
    table = Table(title=f"  {title}", title_justify="left", box=None, padding=(0, 2), highlight=False)
    for column in ("", "runs", "ms", "share"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for part in parts[:_ROWS]:
        table.add_row(
            f"  {escape(part.name)}", f"{part.count}", f"{1e3 * part.seconds:.4g}", f"{part.seconds / whole:.1%}"
        )
    if rest := parts[_ROWS:]:
        spent = sum(part.seconds for part in rest)
        runs = sum(part.count for part in rest)
        table.add_row(f"  {len(rest)} more", f"{runs}", f"{1e3 * spent:.4g}", f"{spent / whole:.1%}")
    idle = whole - sum(part.seconds for part in parts)
    if idle > 0:
        table.add_row("  all else, and waiting", "", f"{1e3 * idle:.4g}", f"{idle / whole:.1%}")
    console.print(table)
