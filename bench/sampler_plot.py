"""The picture of the sampler's latency against the batch, from recorded lines; it needs no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from spectralar.bench.ceilings import Ceilings
from spectralar.bench.sampler import CURVE, SamplingCase, case_named

_COLORS = ("#0b6e99", "#6b9a3f", "#c4622d", "#8a5a9e", "#b8912e", "#555555")
_GREY = "#888888"
# Operations a byte, below which the copy rate binds a case on every GPU, and above which the GEMM rate may.
_FEW, _MANY = 20, 100


@dataclass(frozen=True)
class Rates:
    """Bytes and bf16 operations per second; None where nobody knows."""

    copy: float | None
    gemm: float | None

    @classmethod
    def measured(cls, ceilings: Ceilings) -> Rates:
        """Of a device."""
        return cls(ceilings.copy, ceilings.gemm["bf16"])

    @classmethod
    def of_lines(cls, points: Sequence[tuple[SamplingCase, dict[str, Any]]]) -> Rates:
        """What the floors of lines tell: those of small batches the copy rate, those with many operations the other."""
        copy = gemm = None
        for case, line in points:
            if case.flops() < _FEW * case.bytes():
                copy = 1e3 * case.bytes() / line["ceiling"]
        for case, line in points:
            # Above what the copy rate asks for; the figures are rounded, and rates differ from run to run.
            bound = copy is not None and line["ceiling"] > 1.1e3 * case.bytes() / copy
            if bound and case.flops() > _MANY * case.bytes():
                gemm = 1e3 * case.flops() / line["ceiling"]
        return cls(copy, gemm)


def draw_latency(lines: Sequence[dict[str, Any]], path: Path, ceilings: Ceilings | None = None) -> bool:
    """Draws class -> tokens of every preset; the format follows the name.

    A case is shown as it was measured last, on the GPU of the last line. The preset with the most batches has its
    floors: the weights alone, keys and values too, and the arithmetic.

    Args:
        lines: as `record.line_of` makes them; those of other benchmarks and wrong results are passed over.
        path: of the picture.
        ceilings: rates for the floors; by the lines' own floors unless given.

    Returns:
        Whether there was anything to draw; nothing is written otherwise.
    """
    from matplotlib.figure import Figure

    named = [(case_named(line["case"]), line) for line in lines if line["median"] is not None]
    points = [(case, line) for case, line in named if case is not None]
    latest = {case: line for case, line in points if line["gpu"] == points[-1][1]["gpu"]}
    tokens = (case for case in latest if case.pixels == "none" and case.weights == "same")
    shown = sorted(tokens, key=lambda case: case.batch)
    if not shown:
        return False
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    presets = [preset for preset, _ in Counter(case.preset for case in shown).most_common()]
    for i, preset in enumerate(presets):
        color = _COLORS[i % len(_COLORS)]
        _draw_preset(axes, [(case.batch, latest[case]) for case in shown if case.preset == preset], preset, color)
    first = [case for case in shown if case.preset == presets[0]]
    rates = Rates.of_lines(list(latest.items())) if ceilings is None else Rates.measured(ceilings)
    _draw_floors(axes, first, rates)
    ticks = sorted({case.batch for case in shown})
    axes.set(xscale="log", yscale="log", xlabel="images at once", ylabel="milliseconds, class -> tokens, guided")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    # The arithmetic of one image lies a hundred times lower than all else.
    axes.set_ylim(bottom=min(latest[case]["ceiling"] for case in shown) / 2)
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    line = points[-1][1]
    small = ", tiny models" if shown[0].tiny else ""
    figure.supxlabel(
        f"{line['gpu']}, torch {line['torch']}, {line['commit']}, {line['date']}{small}", fontsize=7, color=_GREY
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return True


def _draw_preset(axes: Any, points: Sequence[tuple[int, dict[str, Any]]], name: str, color: str) -> None:
    """Medians with their spread by batch, and the peers that were measured beside them."""
    batches = [batch for batch, _ in points]
    low, middle, high = ([line[at] for _, line in points] for at in ("p20", "median", "p80"))
    axes.fill_between(batches, low, high, color=color, alpha=0.2)
    axes.plot(batches, middle, "o-", color=color, markersize=4, label=name)
    peers = [(batch, line["peer_median"]) for batch, line in points if line["peer"] is not None]
    if peers:
        axes.plot(*zip(*peers, strict=True), "x", color=color, markersize=5, label=f"{name}, best peer of the run")


def _draw_floors(axes: Any, cases: Sequence[SamplingCase], rates: Rates) -> None:
    """The least times of a preset by batch, each by one thing alone."""
    case, least, most = cases[0], cases[0].batch, cases[-1].batch
    grid = sorted({least, most, *(batch for batch in CURVE if least < batch < most)})
    filled = [replace(case, batch=batch) for batch in grid]
    weights = case.generator_config.steps * case.generator_config.decode_weight_bytes()
    floors = (
        ("weights", ":", rates.copy, [weights for _ in filled]),
        ("weights, keys and values", "--", rates.copy, [each.bytes() for each in filled]),
        ("arithmetic", "-.", rates.gemm, [each.flops() for each in filled]),
    )
    for name, style, rate, amounts in floors:
        if rate is not None:
            times = [1e3 * amount / rate for amount in amounts]
            axes.plot(grid, times, style, color=_GREY, linewidth=1, label=f"{case.preset} at least: {name}")
