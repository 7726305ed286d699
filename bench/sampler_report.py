"""What a run of the sampler's benchmark prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from spectralar.bench.cases import Rival
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.report import (
    calls,
    met,
    milliseconds,
    new_table,
    print_absent,
    print_parts,
    print_verdict,
    ratio,
    targets_met,
)
from spectralar.bench.sampler import BF16, ONE_TOKEN, SamplingCase, count_bytes
from spectralar.bench.sampler_measure import SamplingMeasurement
from spectralar.bench.timing import Timing

_OTHER = {ONE_TOKEN: "other steps", BF16: "other weights"}
_COLUMNS = "|median|p20 - p80|images/s|of copy|of GEMM|error|ratio|first call|calls".split("|")


def print_sampling(m: SamplingMeasurement, ceilings: Ceilings, console: Console) -> None:
    """Times of ours and its rivals, what was right about them, memory, and where the time goes."""
    case = sampling_case(m)
    console.print(f"  {_verdicts(m)}", highlight=False, soft_wrap=True)
    if m.weight_error is not None:
        console.print(f"  {m.weight_error}", highlight=False, soft_wrap=True)
    if m.ours is None:
        print_verdict(m, console)
        return
    table = new_table(_COLUMNS)
    name = f"  [bold]spectralar[/], {m.backend}"
    table.add_row(name, *_figures(m, m.ours, ceilings), f"{m.error:.2g}", "", *calls(m.ours))
    for rival in m.rivals:
        if rival.timing is not None:
            table.add_row(*_rival(m, rival, rival.timing, ceilings))
    console.print(table)
    print_absent(((r.name, r.reason) for r in m.rivals if r.timing is None), console)
    if m.dropped:
        console.print(f"  left out for lack of time: {', '.join(m.dropped)}", highlight=False)
    if m.memory is not None:
        said = "" if m.estimate is None else f"; the sampler's own estimate is {count_bytes(m.estimate)}"
        console.print(f"  memory beside the models: {count_bytes(m.memory)} at most{said}", highlight=False)
    aim = "" if case.aim is None else f", then {case.aim.text}: {met(bool(aim_reached(m)))}"
    print_verdict(m, console, aim)
    steps = case.generator_config.steps
    print_parts("one generation by kernel", m.kernels, m.ours.median, console)
    print_parts("one step by operation, all blocks", m.operations, m.ours.median / steps, console)


def aim_reached(m: SamplingMeasurement) -> bool | None:
    """Whether what the target asks for beyond its condition was reached; None where it asks for no more."""
    aim = sampling_case(m).aim
    return None if aim is None else m.ours is not None and aim.holds(m)


def sampling_case(m: SamplingMeasurement) -> SamplingCase:
    """The case, by its own type."""
    assert isinstance(m.case, SamplingCase)
    return m.case


def summary_of(measured: Sequence[SamplingMeasurement]) -> dict[str, Any]:
    """Of a run: which targets were met, latencies, throughput and memory."""
    targets = targets_met(measured)
    for m in measured:
        if (aim := sampling_case(m).aim) is not None:
            targets[f"{m.case.target} {aim.text}"] = bool(aim_reached(m))
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
        told = _OTHER.get(rival.name, "other model")
        return [f"  {rival.name}", *_figures(m, timing, None), "", told, *calls(timing)]
    figures = _figures(m, timing, ceilings)
    return [f"  {rival.name}", *figures, f"{rival.error:.2g}", ratio(m, rival), *calls(timing)]


def _figures(m: SamplingMeasurement, timing: Timing, ceilings: Ceilings | None) -> list[str]:
    fractions = ["", ""]
    if ceilings is not None:
        rates = (m.case.bytes() / ceilings.copy, m.case.flops() / ceilings.gemm[m.case.arithmetic])
        fractions = [f"{least / timing.median:.1%}" for least in rates]
    return [*milliseconds(timing), f"{sampling_case(m).batch / timing.median:,.1f}", *fractions]
