"""The commands `spectralar bench kernels`, `sampler`, `training` and `loader`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tyro.conf import Positional

from spectralar.bench import kernels_attention, kernels_dct, kernels_vq
from spectralar.bench.cases import Case, Measurement, measure, select
from spectralar.bench.frame import Run
from spectralar.bench.loader import LoaderCase, loader_cases
from spectralar.bench.loader_measure import Bench, LoaderMeasurement
from spectralar.bench.loader_report import print_bare, print_loader
from spectralar.bench.loader_report import summary_of as summary_of_loader
from spectralar.bench.plots import SWEEPS, draw, measure_sweep
from spectralar.bench.report import print_measurement, targets_met
from spectralar.bench.sampler import BATCHES, PRESETS, SamplingCase, sampling_cases, with_curve
from spectralar.bench.sampler_ahead import compile_ahead
from spectralar.bench.sampler_measure import SamplingMeasurement, measure_sampling
from spectralar.bench.sampler_plot import draw_latency
from spectralar.bench.sampler_report import print_sampling
from spectralar.bench.sampler_report import summary_of as summary_of_sampler
from spectralar.bench.training import CASES as TRAINING_CASES
from spectralar.bench.training import TrainingCase
from spectralar.bench.training_measure import TrainingMeasurement, measure_training
from spectralar.bench.training_ranks import ScalingCase, measure_scaling, scaling_cases, summary_of_scaling, told
from spectralar.bench.training_report import print_training
from spectralar.bench.training_report import summary_of as summary_of_training
from spectralar.devices import auto_device
from spectralar.sampling import BackendName
from spectralar.training.data import ImageLoader

CASES: tuple[Case, ...] = (*kernels_dct.CASES, *kernels_vq.CASES, *kernels_attention.CASES)

# Of the time of a run; what is not compiled by then is compiled where it is needed.
_AHEAD = 0.4


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
    wanted = sorted(select(CASES, cases, targets_only=quick), key=lambda case: case.target is None)
    run = Run("kernels", device, seconds, out, commit)
    chosen = run.suited(wanted)
    # Most of the time goes into inputs, compilation and warm-up; a third of it is left for the rounds themselves.
    share = seconds / 3 / max(1, len(chosen))

    def measured(case: Case, _: float) -> Measurement:
        compiled = run.on_gpu and case.target is not None and not quick
        return measure(case, run.device, run.ceilings, share, compiled=compiled)

    done = run.measure(chosen, measured, lambda m: print_measurement(m, run.console))
    if plot is not None:
        panels = [(sweep, measure_sweep(sweep, run.device, run.ceilings, share)) for sweep in SWEEPS]
        draw(panels, run.origin, plot)
        for _, points in panels:
            for m in points:
                run.record(m)
    times = {m.case.name: round(1e3 * m.ours.median, 5) for m in done if m.ours}
    run.close(len(done), {"met": targets_met(done), "median_ms": times}, plot=plot)


def bench_sampler_command(
    cases: tuple[str, ...] = (),
    presets: tuple[str, ...] = PRESETS,
    batches: tuple[int, ...] = BATCHES,
    backend: BackendName = "auto",
    quick: bool = False,
    seconds: float = 240,
    out: Path | None = None,
    plot: Path | None = None,
    lines: Path | None = None,
    device: str = "auto",
    commit: str = "",
) -> None:
    """Time whole generations with guidance, class to tokens and class to pixels, against this device's ceilings.

    What was drawn is judged by fp32 before it is timed; a wrong result gets no time and no ratio, and the exit status
    is 1. Other samplers run in turns with ours, and tables say where the time of a step goes. The last line of the
    output is one JSON object. On a CPU the models are tiny and the figures are no measure of any target.

    Args:
        cases: parts of names or targets, such as P6 or vqgan, of the cases that presets and batches make; all of them
            unless given.
        presets: of the generator; pixels are measured for the first, and for the targets.
        batches: images at once, 1 to 1024.
        backend: of our sampler: auto, reference, graph or fused.
        quick: only the cases of the targets, without the peer that needs torch.compile.
        seconds: how long the whole may take, compiling included; the cases of the targets come first, one peer of each
            at least, and what does not fit is left out and named.
        out: file to append the results to; on a GPU bench/results/sampler.jsonl of the checkout unless given.
        plot: also measure the first preset's tokens at 1 to 256 images, shortly and without peers, and draw latency
            against batch into this file.
        lines: with plot: measure nothing and draw what a file of results says.
        device: auto, cpu or cuda.
        commit: recorded with the results where git can't be asked.
    """
    if lines is not None:
        _draw_lines(lines, plot)
        return
    wanted = select(sampling_cases(presets, batches, backend), cases, targets_only=quick)
    if plot is not None:
        wanted = with_curve(wanted, presets[0], backend)
    run = Run("sampler", device, seconds, out, commit)
    suited = run.suited(wanted)
    chosen = [case for case in suited if case.runs_on(run.device)]
    for case in suited:
        if case not in chosen:
            run.console.print(f"left out, as this GPU has no fp8: {case.name}", highlight=False, soft_wrap=True)
    slow = _compiled_ahead(run, chosen) if run.on_gpu and len(chosen) > 1 and backend in ("auto", "fused") else set()

    def measured(case: SamplingCase, share: float) -> SamplingMeasurement:
        return measure_sampling(
            case, run.device, run.ceilings, share, compiled=not quick and run.early, operations=case.name not in slow
        )

    done = run.measure(chosen, measured, lambda m: print_sampling(m, run.ceilings, run.console))
    if plot is not None and not draw_latency(run.lines, plot, run.ceilings):
        run.console.print("no picture: nothing was measured that it shows")
        plot = None
    run.close(len(done), summary_of_sampler(done), plot=plot)


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
    most = torch.cuda.device_count() if auto_device(device).type == "cuda" else 8
    if not 1 <= ranks <= most:
        raise ValueError(f"ranks must be 1..{most}, not {ranks}")
    everything: Sequence[TrainingCase] = TRAINING_CASES if ranks == 1 else scaling_cases(ranks)
    wanted = select(everything, cases, targets_only=quick)
    run = Run("training", device, seconds, out, commit)
    chosen = run.suited(wanted)
    # Most of the time goes into models, judging and compiling.
    share = min(4.0, seconds / 20 / max(1, len(chosen)))

    def measured(case: TrainingCase, _: float) -> Measurement:
        if isinstance(case, ScalingCase):
            return measure_scaling(case, run.device, share)
        return measure_training(case, run.device, run.ceilings, share, compiled=not quick and run.early)

    def show(m: Measurement) -> None:
        if isinstance(m, TrainingMeasurement):
            print_training(m, run.ceilings, run.console)
        else:
            run.console.print(f"  {told(m)}", highlight=False)

    done = run.measure(chosen, measured, show)
    trained = [m for m in done if isinstance(m, TrainingMeasurement)]
    run.close(len(done), summary_of_training(trained) if ranks == 1 else summary_of_scaling(done))


def bench_loader_command(
    shards: Positional[str],
    batch: int = 256,
    size: int = 256,
    workers: int = 8,
    step_ms: float | None = None,
    cases: tuple[str, ...] = (),
    seconds: float = 60,
    out: Path | None = None,
    device: str = "auto",
    commit: str = "",
) -> None:
    """Time how fast pictures reach the device, against bare DALI and against webdataset with Pillow.

    Pictures and labels are compared with those of Pillow before anything is timed; a wrong result gets no time and no
    ratio, and the exit status is 1. Then a training step is fed, to see whether it waits. The last line of the output
    is one JSON object. On a CPU batches are small and the figures are no measure of any target.

    Args:
        shards: a folder of shards, one tar or a pattern of tars; best with indexes, as `spectralar shards` writes.
        batch: pictures at once.
        size: side of the random-resized crops, in pixels.
        workers: processes of our loader and of the peer.
        step_ms: length of the training step; 1.1 times what our loader takes for a batch unless given.
        cases: parts of names or targets, such as P12 or step; all cases unless given.
        seconds: about how long the whole may take; what does not fit is left out and named.
        out: file to append the results to; on a GPU bench/results/loader.jsonl of the checkout unless given.
        device: auto, cpu or cuda.
        commit: recorded with the results where git can't be asked.
    """
    wanted = select(loader_cases(shards, batch, size, workers, step_ms), cases)
    run = Run("loader", device, seconds, out, commit)
    chosen = run.suited(wanted)
    ImageLoader(chosen[0].config)  # refuses what cannot be loaded
    # Most of the time goes into starting processes, judging and filling queues.
    bench = Bench(run.device, min(5.0, seconds / 20))
    bare = bench.bare(chosen[0])
    print_bare(bare, chosen[0], run.console)

    def measured(case: LoaderCase, _: float) -> LoaderMeasurement:
        return bench.measure(case)

    done = run.measure(chosen, measured, lambda m: print_loader(m, run.console))
    run.close(len(done), summary_of_loader(done, bare))


def _compiled_ahead(run: Run, cases: Sequence[SamplingCase]) -> set[str]:
    """Compiles and says so; gives the names of cases whose operations would be compiled one after the other."""
    began = time.monotonic()
    missed = compile_ahead(cases, run.device, _AHEAD * run.left)
    told = f"compiled ahead in {time.monotonic() - began:.0f} s"
    reasons = "; ".join(f"{job.what} of {job.case.name}: {reason}" for job, reason in missed.items())
    run.console.print(f"{told}, but not {reasons}" if reasons else told, highlight=False, soft_wrap=True, markup=False)
    return {job.case.name for job in missed if job.of_operation}


def _draw_lines(lines: Path, plot: Path | None) -> None:
    if plot is None:
        raise ValueError("lines must come with plot, the file to draw them into")
    recorded = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    if not draw_latency(recorded, plot):
        raise ValueError(f"lines must hold a time of class -> tokens, and {lines} has none")
    print(json.dumps({"bench": "sampler", "lines": str(lines), "plot": str(plot)}))
