"""What a run prints: the device and its ceilings first, then every case with its rivals below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spectralar.bench.cases import Case, Measurement, Rival
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.record import Provenance, driver
from spectralar.bench.split import Part
from spectralar.bench.timing import Timing

_ROWS = 12
_ROLES = {"peer": "", "reduced": " (lower precision)", "bound": " (bound)"}


def print_ceilings(ceilings: Ceilings, origin: Provenance, device: torch.device, console: Console) -> None:
    """Device, versions and measured rates."""
    on_cpu = device.type != "cuda"
    cache = ""
    if not on_cpu:
        cache = f", L2 {torch.cuda.get_device_properties(device).L2_cache_size / 2**20:.0f} MiB, driver {driver()}"
    console.print(
        f"[bold]{origin.gpu}[/]{cache}, torch {origin.torch}, triton {origin.triton}, commit {origin.commit}",
        highlight=False,
    )
    gemm = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings.gemm.items())
    console.print(
        f"measured ceilings: copy {ceilings.copy / 1e12:.3g} TB/s (read + written), read {ceilings.read / 1e12:.3g} "
        f"TB/s, GEMM {gemm} TFLOP/s",
        highlight=False,
    )
    if on_cpu:
        console.print("no GPU: small sizes, plain PyTorch, wall clock; these figures are no measure of any target")


def print_case(case: Case, ceilings: Ceilings, console: Console) -> None:
    """Title, floor and costs, before anything is measured."""
    floor, ceiling = ceilings.floor(case.bytes(), case.flops(), case.arithmetic)
    console.print(f"\n{_title(case)}", highlight=False)
    console.print(f"  at least {floor * 1e3:.4g} ms, by {ceiling}: {case.costs}", highlight=False)


def print_measurement(m: Measurement, console: Console) -> None:
    """One case: ours in the first row, then the rivals."""
    if m.ours is None:
        console.print(_title(m.case), highlight=False)
        print_verdict(m, console)
        return
    columns = ("", "median", "p20 - p80", "rate", "of the ceiling", "error", "ratio", "timed by")
    table = new_table(columns, _title(m.case))
    fraction = f"{m.floor / m.ours.median:.0%} of {m.ceiling}"
    table.add_row("[bold]spectralar[/]", *_times(m.ours), _rate(m), fraction, f"{m.error:.2g}", "", _how(m.ours))
    for rival in m.rivals:
        table.add_row(*_rival(m, rival))
    console.print(table)
    print_verdict(m, console)


def print_verdict(m: Measurement, console: Console, more: str = "") -> None:
    """Whether the target was met; or that the result was wrong."""
    if not m.right:
        told = f"[red]wrong[/]: error {m.error:.3g}, allowed {m.case.budget:.3g}; it gets no time"
    elif m.case.condition is not None and m.ours is not None:
        told = f"{m.case.target}: {m.case.condition.text}: {met(bool(m.met))}{more}"
    else:
        return
    console.print(f"  {told}", highlight=False)


def print_absent(absent: Iterable[tuple[str, str]], console: Console) -> None:
    """What was not measured, by name and reason."""
    for name, reason in absent:
        console.print(f"  without {name}: {escape(reason)}", highlight=False, soft_wrap=True)


def print_parts(
    title: str, parts: Sequence[Part], whole: float, console: Console, unit: Literal["us", "ms"] = "us"
) -> None:
    """A table of shares of `whole` seconds; what no part explains is in the last row."""
    if not parts:
        return
    scale = 1e6 if unit == "us" else 1e3
    floors = ("weights at copy speed",) if any(part.floor is not None for part in parts) else ()
    table = new_table(("", "runs", unit, "share", *floors), f"  {title}")

    def add(name: str, runs: int | str, seconds: float, floor: float | None = None) -> None:
        least = "" if floor is None else f"{scale * floor:.4g} {unit}"
        table.add_row(f"  {escape(name)}", f"{runs}", f"{scale * seconds:.4g}", f"{seconds / whole:.1%}", least)

    for part in parts[:_ROWS]:
        add(part.name, part.count, part.seconds, part.floor)
    if rest := parts[_ROWS:]:
        add(f"{len(rest)} more", sum(part.count for part in rest), sum(part.seconds for part in rest))
    # Kernels that start before those ahead of them have ended add up to more than the whole.
    idle = whole - sum(part.seconds for part in parts)
    if idle > 0:
        add("all else, and waiting", "", idle)
    console.print(table)


def new_table(columns: Sequence[str], title: str | None = None) -> Table:
    """Names to the left, figures to the right."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2), highlight=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "timed by") else "right", no_wrap=True)
    return table


def met(holds: bool) -> str:
    """Of a condition."""
    return "[green]met[/]" if holds else "[red]not met[/]"


def ratio(m: Measurement, rival: Rival) -> str:
    """How many times longer a rival takes; the best peer stands out."""
    times = m.ratio(rival)
    told = "wrong" if times is None else f"{times:.2f} x"
    return f"[bold]{told}[/]" if rival is m.best_peer else told


def milliseconds(timing: Timing) -> tuple[str, str]:
    """Median and spread."""
    low, middle, high = (f"{1e3 * x:.4g}" for x in (timing.p20, timing.median, timing.p80))
    return f"{middle} ms", f"{low} - {high}"


def calls(timing: Timing) -> tuple[str, str]:
    """Seconds of the first call, and how many were timed."""
    return f"{timing.first_call:.1f} s", str(timing.samples)


def targets_met(measured: Iterable[Measurement]) -> dict[str, bool]:
    """Whether each target's condition holds; that of a target with several cases, for all of them."""
    targets: dict[str, bool] = {}
    for m in measured:
        if m.case.target and m.met is not None:
            targets[m.case.target] = targets.get(m.case.target, True) and m.met
    return targets


def _title(case: Case) -> str:
    return f"[bold]{case.target}[/] {case.name}" if case.target else case.name


def _rival(m: Measurement, rival: Rival) -> list[str]:
    name = rival.name + _ROLES[rival.role]
    if rival.timing is None:
        return [name, "", "", "", "", "", "", escape(rival.reason)]
    error = "" if rival.role == "bound" else f"{rival.error:.2g}"
    return [name, *_times(rival.timing), "", "", error, ratio(m, rival), _how(rival.timing)]


def _times(timing: Timing) -> tuple[str, str]:
    scale, unit = (1e6, "us") if timing.median < 1e-3 else (1e3, "ms")
    low, middle, high = (f"{scale * x:.4g}" for x in (timing.p20, timing.median, timing.p80))
    return f"{middle} {unit}", f"{low} - {high}"


def _rate(m: Measurement) -> str:
    assert m.ours is not None
    if m.ceiling == "copy":
        return f"{m.case.bytes() / m.ours.median / 1e9:.4g} GB/s"
    return f"{m.case.flops() / m.ours.median / 1e12:.3g} TFLOP/s"


def _how(timing: Timing) -> str:
    compiled = f", first call {timing.first_call:.1f} s" if timing.first_call >= 1 else ""
    return f"{escape(timing.how)}, {timing.samples} x {timing.calls}{compiled}"
