"""What a run of the sampler's benchmark prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spectralar.bench.cases import Rival
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.record import Provenance
from spectralar.bench.sampler import ONE_TOKEN, SamplingCase
from spectralar.bench.sampler_measure import SamplingMeasurement
from spectralar.bench.sampler_split import Part
from spectralar.bench.timing import Timing

_ROWS = 12
_COLORS = ("#0b6e99", "#6b9a3f", "#c4622d", "#8a5a9e", "#b8912e", "#555555")
_GREY = "#888888"


def print_case(case: SamplingCase, ceilings: Ceilings, console: Console) -> None:
    """Title, costs and floor, before anything is measured."""
    config, rows = case.generator_config, 2 * case.batch
    floor, ceiling = ceilings.floor(case.bytes(), case.flops(), case.arithmetic)
    title = f"[bold]{case.target}[/] {case.name}" if case.target else case.name
    console.print(f"\n{title}", highlight=False)
    console.print(
        f"  at least {floor * 1e3:.4g} ms, by {ceiling}: {config.steps} x {_bytes(config.decode_weight_bytes())} of "
        f"weights, {_bytes(config.cache_traffic(rows))} of keys and values, {case.flops() / 1e12:.3g} TFLOP",
        highlight=False,
    )


def print_sampling(m: SamplingMeasurement, ceilings: Ceilings, console: Console) -> None:
    """Times of ours and its rivals, what was right about them, memory, and where the time goes."""
    case = sampling_case(m)
    console.print(f"  {_verdicts(m)}", highlight=False, soft_wrap=True)
    if m.ours is None:
        console.print(f"  [red]wrong[/]: error {m.error:.3g}, allowed {case.budget:g}; not timed", highlight=False)
        return
    table = Table(box=None, padding=(0, 2), highlight=False)
    for column in (
        "",
        "median",
        "p20 - p80",
        "images/s",
        "of copy",
        "of GEMM",
        "error",
        "ratio",
        "first call",
        "calls",
    ):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    name = f"  [bold]spectralar[/], {m.backend}"
    table.add_row(name, *_figures(m, m.ours, ceilings), f"{m.error:.2g}", "", *_calls(m.ours))
    for rival in m.rivals:
        if rival.timing is not None:
            table.add_row(*_rival(m, rival, rival.timing, ceilings))
    console.print(table)
    for rival in m.rivals:
        if rival.timing is None:
            console.print(f"  without {rival.name}: {escape(rival.reason)}", highlight=False, soft_wrap=True)
    if m.memory is not None:
        said = "" if m.estimate is None else f"; the sampler's own estimate is {_bytes(m.estimate)}"
        console.print(f"  memory beside the models: {_bytes(m.memory)} at most{said}", highlight=False)
    if case.condition:
        console.print(f"  {case.target}: {case.condition.text}: {_met(bool(m.met))}{_aim(m)}", highlight=False)
    if m.kernels:
        _print_parts("one generation by kernel", m.kernels, m.ours.median, console)
    if m.operations:
        steps = case.generator_config.steps
        _print_parts("one step by operation, all blocks", m.operations, m.ours.median / steps, console)


def aim_reached(m: SamplingMeasurement) -> bool | None:
    """Whether what the target asks for beyond its condition was reached; None where it asks for no more."""
    aim = sampling_case(m).aim
    return None if aim is None else m.ours is not None and aim.holds(m)


def sampling_case(m: SamplingMeasurement) -> SamplingCase:
    """The case, by its own type."""
    assert isinstance(m.case, SamplingCase)
    return m.case


def draw_latency(measured: Sequence[SamplingMeasurement], origin: Provenance, path: Path) -> bool:
    """Latency of class -> tokens against batch, a line for every preset with its floor; the format follows the name.

    Returns:
        Whether there was anything to draw; nothing is written otherwise.
    """
    from matplotlib.figure import Figure

    points = [m for m in measured if m.ours is not None and sampling_case(m).pixels == "none"]
    if not points:
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    presets = list(dict.fromkeys(sampling_case(m).preset for m in points))
    for i, preset in enumerate(presets):
        color = _COLORS[i % len(_COLORS)]
        line = sorted((m for m in points if sampling_case(m).preset == preset), key=lambda m: sampling_case(m).batch)
        batches = [sampling_case(m).batch for m in line]
        low, middle, high = ([1e3 * getattr(m.ours, at) for m in line] for at in ("p20", "median", "p80"))
        axes.fill_between(batches, low, high, color=color, alpha=0.2)
        axes.plot(batches, middle, "o-", color=color, markersize=4, label=preset)
        axes.plot(batches, [1e3 * m.floor for m in line], "--", color=color, linewidth=1)
    axes.plot([], [], "--", color=_GREY, label="least by measured rates")
    ticks = sorted({sampling_case(m).batch for m in points})
    axes.set(xscale="log", yscale="log", xlabel="images at once", ylabel="milliseconds, class -> tokens, guided")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    small = ", tiny models" if origin.gpu.startswith("none") else ""
    figure.supxlabel(
        f"{origin.gpu}, torch {origin.torch}, {origin.commit}, {origin.date}{small}", fontsize=7, color=_GREY
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return True


def summary_of(measured: Sequence[SamplingMeasurement]) -> dict[str, Any]:
    """Of a run: which targets were met, latencies, throughput and memory."""
    targets: dict[str, bool] = {}
    for m in measured:
        case = sampling_case(m)
        if case.target and m.met is not None:
            # A target with several cases is met when all of them are.
            targets[case.target] = targets.get(case.target, True) and m.met
        if case.aim is not None:
            targets[f"{case.target} {case.aim.text}"] = bool(aim_reached(m))
    timed = [(sampling_case(m), m, m.ours) for m in measured if m.ours is not None]
    return {
        "met": targets,
        "median_ms": {case.name: round(1e3 * ours.median, 4) for case, _, ours in timed},
        "images_per_second": {case.name: round(case.batch / ours.median, 1) for case, _, ours in timed},
        "memory_bytes": {case.name: m.memory for case, m, _ in timed if m.memory is not None},
    }


def _verdicts(m: SamplingMeasurement) -> str:
    def unlike(kind: str, share: float, plain: float) -> str:
        return f"{kind} {share:.2%} (plain PyTorch {plain:.2%})"

    told = (
        f"draws unlike fp32's: {unlike('sampled', m.sampled.unlike, m.sampled.plain_unlike)}, "
        f"{unlike('greedy', m.greedy.unlike, m.greedy.plain_unlike)}"
    )
    if m.greedy.regret is not None:
        told += f"; at worst {m.greedy.regret:.3g} below the best logit, plain logits off by {m.greedy.logit_error:.3g}"
    if m.sampled.levels is not None:
        told += f"; pixels off by {m.sampled.levels:.2g} levels (plain PyTorch {m.sampled.plain_levels:.2g})"
    return told


def _rival(m: SamplingMeasurement, rival: Rival, timing: Timing, ceilings: Ceilings) -> list[str]:
    if rival.role == "bound":
        # Another model: its time is shown, and nothing is said of what it drew.
        told = "other steps" if rival.name == ONE_TOKEN else "other model"
        return [f"  {rival.name}", *_figures(m, timing, None), "", told, *_calls(timing)]
    ratio = m.ratio(rival)
    told = "wrong" if ratio is None else f"{ratio:.2f} x"
    told = f"[bold]{told}[/]" if rival is m.best_peer else told
    return [f"  {rival.name}", *_figures(m, timing, ceilings), f"{rival.error:.2g}", told, *_calls(timing)]


def _figures(m: SamplingMeasurement, timing: Timing, ceilings: Ceilings | None) -> list[str]:
    low, middle, high = (f"{1e3 * x:.4g}" for x in (timing.p20, timing.median, timing.p80))
    fractions = ["", ""]
    if ceilings is not None:
        rates = (m.case.bytes() / ceilings.copy, m.case.flops() / ceilings.gemm[m.case.arithmetic])
        fractions = [f"{least / timing.median:.1%}" for least in rates]
    return [f"{middle} ms", f"{low} - {high}", f"{sampling_case(m).batch / timing.median:,.1f}", *fractions]


def _calls(timing: Timing) -> tuple[str, str]:
    return f"{timing.first_call:.1f} s", str(timing.samples)


def _met(holds: bool) -> str:
    return "[green]met[/]" if holds else "[red]not met[/]"


def _aim(m: SamplingMeasurement) -> str:
    aim, reached = sampling_case(m).aim, aim_reached(m)
    return "" if aim is None else f", then {aim.text}: {_met(bool(reached))}"


def _print_parts(title: str, parts: Sequence[Part], whole: float, console: Console) -> None:
    """A table of shares of `whole` seconds; what no part explains is in the last row."""
    table = Table(title=f"  {title}", title_justify="left", box=None, padding=(0, 2), highlight=False)
    for column in ("", "runs", "us", "share", "weights at copy speed"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for part in parts[:_ROWS]:
        floor = "" if part.floor is None else f"{1e6 * part.floor:.4g} us"
        table.add_row(
            f"  {escape(part.name)}", f"{part.count}", f"{1e6 * part.seconds:.4g}", f"{part.seconds / whole:.1%}", floor
        )
    if rest := parts[_ROWS:]:
        spent = sum(part.seconds for part in rest)
        table.add_row(
            f"  {len(rest)} more", f"{sum(p.count for p in rest)}", f"{1e6 * spent:.4g}", f"{spent / whole:.1%}", ""
        )
    # Kernels that start before those ahead of them have ended add up to more than the whole.
    idle = whole - sum(part.seconds for part in parts)
    if idle > 0:
        table.add_row("  all else, and waiting", "", f"{1e6 * idle:.4g}", f"{idle / whole:.1%}", "")
    console.print(table)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
