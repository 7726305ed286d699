"""What a run prints: the device and its ceilings first, then every case with its rivals below it."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spectralar.bench.cases import Measurement, Rival
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.record import Provenance, driver
from spectralar.bench.timing import Timing

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


def print_measurement(m: Measurement, console: Console) -> None:
    """One case: ours in the first row, then the rivals."""
    title = f"[bold]{m.case.target}[/] {m.case.name}" if m.case.target else m.case.name
    if m.ours is None:
        console.print(
            f"{title}\n  [red]wrong[/]: error {m.error:.3g}, allowed {m.case.budget:.3g}; not timed", highlight=False
        )
        return
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2), highlight=False)
    for column in ("", "median", "p20 - p80", "rate", "of the ceiling", "error", "ratio", "timed by"):
        table.add_column(column, justify="left" if column in ("", "timed by") else "right", no_wrap=True)
    fraction = f"{m.floor / m.ours.median:.0%} of {m.ceiling}"
    table.add_row("[bold]spectralar[/]", *_times(m.ours), _rate(m), fraction, f"{m.error:.2g}", "", _how(m.ours))
    for rival in m.rivals:
        table.add_row(*_rival(m, rival))
    console.print(table)
    if m.case.condition:
        met = "[green]met[/]" if m.met else "[red]not met[/]"
        console.print(f"  {m.case.target}: {m.case.condition.text}: {met}", highlight=False)


def _rival(m: Measurement, rival: Rival) -> list[str]:
    name = rival.name + _ROLES[rival.role]
    if rival.timing is None:
        return [name, "", "", "", "", "", "", escape(rival.reason)]
    ratio = m.ratio(rival)
    error = "" if rival.role == "bound" else f"{rival.error:.2g}"
    best = "[bold]" if rival is m.best_peer else ""
    told = f"{best}{ratio:.2f} x" if ratio is not None else "wrong"
    return [name, *_times(rival.timing), "", "", error, told, _how(rival.timing)]


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
