"""What a run of the training benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from spectralar.bench.cases import Rival
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.report import calls, milliseconds, new_table, print_absent, print_parts, print_verdict, ratio
from spectralar.bench.timing import Timing
from spectralar.bench.training import TrainingCase
from spectralar.bench.training_measure import TrainingMeasurement, Variant

_COLUMNS = ("", "median", "p20 - p80", "images/s", "of GEMM", "memory", "error", "ratio", "first call", "steps")


def print_training(m: TrainingMeasurement, ceilings: Ceilings, console: Console) -> None:
    """Times of all variants and peers, what was right about them, and where the time goes."""
    told = next(v.verdict for v in m.variants if v.verdict is not None)
    console.print(
        f"  plain PyTorch in bf16 is off fp32 by {told.plain_gradient:.2g} of the gradients and {told.plain_loss:.2g} "
        "of the losses",
        highlight=False,
    )
    table = new_table(_COLUMNS)
    for variant in m.variants:
        if variant.verdict is not None:
            table.add_row(*_variant(m, variant, ceilings))
    for rival in m.rivals:
        if rival.timing is not None:
            table.add_row(*_rival(m, rival, rival.timing, ceilings))
    console.print(table)
    missing = [(v.settings.name, v.reason) for v in m.variants if v.verdict is None]
    missing += [(r.name, r.reason) for r in m.rivals if r.timing is None]
    print_absent(missing, console)
    print_verdict(m, console)
    if not m.right or m.ours is None:
        return
    if m.stages:
        whole = next(v.timing for v in m.variants if v.settings.name == m.stages_of)
        assert whole is not None
        print_parts(f"one step by stage, {m.stages_of}", m.stages, whole.median, console, "ms")
    print_parts("one step by kernel", m.kernels, m.ours.median, console, "ms")


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
    return [name, *figures, f"{variant.verdict.error:.2g}", "", *calls(variant.timing)]


def _rival(m: TrainingMeasurement, rival: Rival, timing: Timing, ceilings: Ceilings) -> list[str]:
    memory = dict(m.peer_memory).get(rival.name)
    figures = _figures(m, timing, memory, ceilings)
    return [f"  {rival.name}", *figures, f"{rival.error:.2g}", ratio(m, rival), *calls(timing)]


def _figures(m: TrainingMeasurement, timing: Timing, memory: int | None, ceilings: Ceilings) -> list[str]:
    assert isinstance(m.case, TrainingCase)
    rate = m.case.batch / timing.median
    share = m.case.flops() / ceilings.gemm[m.case.arithmetic] / timing.median
    held = "" if memory is None else f"{memory / 1e9:.3g} GB"
    return [*milliseconds(timing), f"{rate:,.1f}", f"{share:.1%}", held]
