"""The commands `spectralar bench kernels`, `spectralar bench sampler` and `spectralar bench training`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spectralar.bench import kernels_attention, kernels_dct, kernels_vq
from spectralar.bench.cases import Case, Measurement, measure, select
from spectralar.bench.ceilings import measure_ceilings
from spectralar.bench.plots import SWEEPS, draw, measure_sweep
from spectralar.bench.record import RESULTS, append, line_of, provenance
from spectralar.bench.report import print_ceilings, print_measurement
from spectralar.bench.sampler import BATCHES, PRESETS, sampling_cases
from spectralar.bench.sampler_measure import SamplingMeasurement, measure_sampling
from spectralar.bench.sampler_report import draw_latency, print_case, print_sampling, summary_of
from spectralar.bench.timing import release
from spectralar.bench.training import CASES as TRAINING_CASES
from spectralar.bench.training import TrainingCase
from spectralar.bench.training_measure import TrainingMeasurement, measure_training
from spectralar.bench.training_ranks import ScalingCase, measure_scaling, scaling_cases, summary_of_scaling, told
from spectralar.bench.training_report import print_case as print_training_case
from spectralar.bench.training_report import print_training
from spectralar.bench.training_report import summary_of as summary_of_training
from spectralar.devices import auto_device
from spectralar.sampling import BackendName

CASES: tuple[Case, ...] = (*kernels_dct.CASES, *kernels_vq.CASES, *kernels_attention.CASES)


class WrongResultError(RuntimeError):
    """A result was outside of its error budget."""


def bench_kernels_command(
    cases: tuple[str, ...] = (),
    quick: bool = False,
    seconds: float = 90,
    out: Path | None = None,
    plot: Path | None = None,
    device: str = "auto",
    commit: str = "",
) -> None:
    """Time the kernels against the ceilings of this device and against their peers.

    Every result is compared with the fp64 reference before it is timed; a wrong one gets no time and no ratio, and
    the exit status is 1. The last line of the output is one JSON object. On a CPU the sizes are small and the figures
    are no measure of any target.

    Args:
        cases: parts of names or targets, such as P1 or nearest_code; all cases unless given.
        quick: only the cases of the targets, without peers that need torch.compile.
        seconds: about how long the whole may take; the cases of the targets come first, and what does not fit is
            left out and named.
        out: file to append the results to; on a GPU bench/results/kernels.jsonl of the checkout unless given.
        plot: also measure the sweeps over batch, cutoff and codebook size, and draw them into this file.
        device: auto, cpu or cuda.
        commit: recorded with the results where git can't be asked.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    started = time.monotonic()
    place = auto_device(device)
    on_gpu = place.type == "cuda"
    chosen = sorted(select(CASES, cases), key=lambda case: case.target is None)
    if quick:
        chosen = [case for case in chosen if case.target]
    if not on_gpu:
        chosen = [case.small() for case in chosen]
    console = Console()
    # The columns need this much; a narrower terminal breaks the lines itself.
    console.width = max(console.width, 150)
    origin = provenance(place, commit)
    # Most of the time goes into inputs, compilation and warm-up; a third of it is left for the rounds themselves.
    share = seconds / 3 / max(1, len(chosen))
    ceilings = measure_ceilings(place, min(2.0, seconds / 10))
    print_ceilings(ceilings, origin, place, console)
    done: list[Measurement] = []
    left_out: list[str] = []
    for case in chosen:
        if time.monotonic() - started > seconds:
            left_out.append(case.name)
            continue
        done.append(measure(case, place, ceilings, share, compiled=on_gpu and case.target is not None and not quick))
        print_measurement(done[-1], console)
        _release(place)
    if left_out:
        console.print(f"left out after {seconds:g} s: {'; '.join(left_out)}", highlight=False, soft_wrap=True)
    swept: list[Measurement] = []
    if plot is not None:
        panels = [(sweep, measure_sweep(sweep, place, ceilings, share)) for sweep in SWEEPS]
        swept = [m for _, points in panels for m in points]
        draw(panels, origin, plot)
    path = out or (RESULTS / "kernels.jsonl" if on_gpu and RESULTS.is_dir() else None)
    if path is not None:
        append([line_of(m, origin) for m in (*done, *swept)], path)
    wrong = [m.case.name for m in (*done, *swept) if not m.right]
    print(json.dumps(_summary(done, left_out, wrong) | {"out": path and str(path), "plot": plot and str(plot)}))
    if wrong:
        raise WrongResultError(f"wrong results: {'; '.join(wrong)}")


def bench_sampler_command(
    presets: tuple[str, ...] = PRESETS,
    batches: tuple[int, ...] = BATCHES,
    backend: BackendName = "auto",
    quick: bool = False,
    seconds: float = 120,
    out: Path | None = None,
    plot: Path | None = None,
    device: str = "auto",
    commit: str = "",
) -> None:
    """Time whole generations with guidance, class to tokens and class to pixels, against this device's ceilings.

    What was drawn is judged by fp32 before it is timed; a wrong result gets no time and no ratio, and the exit status
    is 1. Other samplers run in turns with ours, and tables say where the time of a step goes. The last line of the
    output is one JSON object. On a CPU the models are tiny and the figures are no measure of any target.

    Args:
        presets: of the generator; pixels are measured for the first, and for the targets.
        batches: images at once, 1 to 1024.
        backend: of our sampler: auto, reference, graph or fused.
        quick: only the cases of the targets, without the peer that needs torch.compile.
        seconds: about how long the whole may take; the cases of the targets come first, and what does not fit is
            left out and named.
        out: file to append the results to; on a GPU bench/results/sampler.jsonl of the checkout unless given.
        plot: draw latency against batch into this file.
        device: auto, cpu or cuda.
        commit: recorded with the results where git can't be asked.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    started = time.monotonic()
    place = auto_device(device)
    on_gpu = place.type == "cuda"
    chosen = sampling_cases(presets, batches, backend)
    if quick:
        chosen = [case for case in chosen if case.target]
    if not on_gpu:
        # Several batches may become the same small one.
        chosen = list(dict.fromkeys(case.small() for case in chosen))
    console = Console()
    console.width = max(console.width, 150)
    origin = provenance(place, commit)
    ceilings = measure_ceilings(place, min(2.0, seconds / 10))
    print_ceilings(ceilings, origin, place, console)
    path = out or (RESULTS / "sampler.jsonl" if on_gpu and RESULTS.is_dir() else None)
    done: list[SamplingMeasurement] = []
    left_out: list[str] = []
    failed: list[str] = []
    # Most of the time goes into models, recording and judging.
    share = seconds / 4 / max(1, len(chosen))
    for case in chosen:
        left = seconds - (time.monotonic() - started)
        if left < 0:
            left_out.append(case.name)
            continue
        print_case(case, ceilings, console)
        try:
            m = measure_sampling(case, place, ceilings, share, compiled=not quick and left > seconds / 2)
        except (RuntimeError, ValueError) as failure:
            # One batch that does not fit says nothing of the others.
            failed.append(case.name)
            console.print(f"  failed: {failure}", highlight=False, soft_wrap=True, markup=False)
        else:
            done.append(m)
            print_sampling(m, ceilings, console)
            if path is not None:
                append([line_of(m, origin)], path)
        _release(place)
    if left_out:
        console.print(f"left out after {seconds:g} s: {'; '.join(left_out)}", highlight=False, soft_wrap=True)
    if plot is not None and not draw_latency(done, origin, plot):
        console.print("no picture: nothing was measured that it shows")
        plot = None
    wrong = [m.case.name for m in done if not m.right]
    told = {"bench": "sampler", "cases": len(done), "wrong": wrong, "failed": failed, "left_out": left_out}
    print(json.dumps(told | summary_of(done) | {"out": path and str(path), "plot": plot and str(plot)}))
    if wrong or failed:
        raise WrongResultError(f"wrong results: {'; '.join(wrong) or 'none'}; failed: {'; '.join(failed) or 'none'}")


def bench_training_command(
    cases: tuple[str, ...] = (),
    ranks: int = 1,
    quick: bool = False,
    seconds: float = 300,
    out: Path | None = None,
    device: str = "auto",
    commit: str = "",
) -> None:
    """Time training steps of the tokenizer and the generator against this device's GEMM rate and plain PyTorch.

    The first steps are judged by fp32 before anything is timed; a wrong result gets no time and no ratio, and the exit
    status is 1. All settings of the trainer are measured, with the memory that they take, and tables say where the
    time of a step goes. The last line of the output is one JSON object. On a CPU the models are tiny and the figures
    are no measure of any target.

    Args:
        cases: parts of names or targets, such as P10 or d16; all cases unless given.
        ranks: more than 1: train on so many GPUs of this machine and compare with one, in place of all else.
        quick: only the cases of the targets, without the peer that needs torch.compile.
        seconds: about how long the whole may take; the cases of the targets come first, and what does not fit is
            left out and named.
        out: file to append the results to; on a GPU bench/results/training.jsonl of the checkout unless given.
        device: auto, cpu or cuda.
        commit: recorded with the results where git can't be asked.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    started = time.monotonic()
    place = auto_device(device)
    on_gpu = place.type == "cuda"
    most = torch.cuda.device_count() if on_gpu else 8
    if not 1 <= ranks <= most:
        raise ValueError(f"ranks must be 1..{most}, not {ranks}")
    everything: list[TrainingCase] = list(TRAINING_CASES) if ranks == 1 else list(scaling_cases(ranks))
    chosen = [case for case in select(everything, cases) if isinstance(case, TrainingCase)]
    if quick:
        chosen = [case for case in chosen if case.target]
    if not on_gpu:
        chosen = list(dict.fromkeys(case.small() for case in chosen))
    console = Console()
    console.width = max(console.width, 150)
    origin = provenance(place, commit)
    ceilings = measure_ceilings(place, min(2.0, seconds / 10))
    print_ceilings(ceilings, origin, place, console)
    path = out or (RESULTS / "training.jsonl" if on_gpu and RESULTS.is_dir() else None)
    done: list[TrainingMeasurement] = []
    scaled: list[Measurement] = []
    left_out: list[str] = []
    failed: list[str] = []
    # Most of the time goes into models, judging and compiling.
    share = min(4.0, seconds / 20 / max(1, len(chosen)))
    for case in chosen:
        left = seconds - (time.monotonic() - started)
        if left < 0:
            left_out.append(case.name)
            continue
        print_training_case(case, ceilings, console)
        _release(place)
        try:
            m: Measurement
            if isinstance(case, ScalingCase):
                m = measure_scaling(case, place, share)
                scaled.append(m)
                console.print(f"  {told(m)}", highlight=False)
            else:
                m = measure_training(case, place, ceilings, share, compiled=not quick and left > seconds / 2)
                done.append(m)
                print_training(m, ceilings, console)
        except (RuntimeError, ValueError) as failure:
            failed.append(case.name)
            console.print(f"  failed: {failure}", highlight=False, soft_wrap=True, markup=False)
        else:
            if path is not None:
                append([line_of(m, origin)], path)
    _release(place)
    if left_out:
        console.print(f"left out after {seconds:g} s: {'; '.join(left_out)}", highlight=False, soft_wrap=True)
    wrong = [m.case.name for m in (*done, *scaled) if not m.right]
    report = {"bench": "training", "cases": len(done) + len(scaled), "wrong": wrong, "failed": failed}
    summary = summary_of_training(done) if ranks == 1 else summary_of_scaling(scaled)
    print(json.dumps(report | {"left_out": left_out} | summary | {"out": path and str(path)}))
    if wrong or failed:
        raise WrongResultError(f"wrong results: {'; '.join(wrong) or 'none'}; failed: {'; '.join(failed) or 'none'}")


def _summary(done: list[Measurement], left_out: list[str], wrong: list[str]) -> dict[str, Any]:
    targets: dict[str, bool] = {}
    for m in done:
        if m.case.target and m.met is not None:
            # A target with several cases is met when all of them are.
            targets[m.case.target] = targets.get(m.case.target, True) and m.met
    return {
        "bench": "kernels",
        "cases": len(done),
        "wrong": wrong,
        "left_out": left_out,
        "met": targets,
        "median_ms": {m.case.name: round(1e3 * m.ours.median, 5) for m in done if m.ours},
    }


def _release(device: torch.device) -> None:
    # Captured graphs hold their memory, and the next case may need all of it. A compiler that has seen one function
    # with too many shapes gives up on it without a word.
    torch.compiler.reset()
    release(device)
