"""Several GPUs against one: the same step, each with its own batch, in processes that torchrun starts.

`python -m spectralar.bench.training_ranks JSON` is one of these processes. All ranks are given the same batch and the
same random choices, so that their mean gradient is a single GPU's, and so are the losses; the time does not know.

A step that takes all the power a GPU may draw is as fast as that GPU is cool, and GPUs of one kind differ by some
percent. So the two things to compare take turns, each after seconds of work: every GPU for itself, all of them at once,
and all of them together, at the pace of the slowest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from spectralar.bench.cases import Condition, Measurement, Rival
from spectralar.bench.processes import child_environment, last_report
from spectralar.bench.timing import Timing, release
from spectralar.bench.training import CASES, Settings, TrainingCase
from spectralar.bench.training_measure import time_steps
from spectralar.bench.training_truth import first_losses
from spectralar.devices import auto_device
from spectralar.training.capture import forget_recordings
from spectralar.training.distributed import ALONE, Ranks, join_ranks
from spectralar.training.loop import Trainer

# Relative; bf16 sums of gradients in another order, over the first steps.
_LOSS = 0.0025
_LONGEST = 600.0
# Turns of each of the two, and seconds of steps on a GPU before its clock is what it will stay.
_TURNS, _SETTLING = 2, 6.0
# Steps between two looks at the clock.
_UNSEEN = 8


@dataclass(frozen=True, kw_only=True)
class ScalingCase(TrainingCase):
    """A step of `ranks` GPUs with `batch` samples each, against steps of each GPU for itself with `batch` samples.

    The peer is their mean rate. `ceiling` of its measurement is the step of the slowest, which the others wait for.

    Attributes:
        ranks: number of GPUs.
        ranks_per_copy: see `LoopConfig`; 1 is DDP, 0 is FSDP2.
    """

    ranks: int = 2
    ranks_per_copy: int = 1

    @property
    def name(self) -> str:
        return f"{super().name} a GPU, {self.ranks} GPUs ({'DDP' if self.ranks_per_copy == 1 else 'FSDP2'})"

    def small(self) -> Self:
        return replace(super().small(), ranks=self.ranks, ranks_per_copy=self.ranks_per_copy)


def scaling_cases(ranks: int) -> list[ScalingCase]:
    """The targets' steps on so many GPUs, with a copy of the model each (P13), and with one copy for all."""
    least = 0.95 * ranks
    condition = Condition(f">= {least:g} x the images/s of one GPU", lambda m: _gain(m) >= least)
    steps = [
        ScalingCase(kind=case.kind, size=case.size, batch=case.batch, ranks=ranks)
        for case in CASES
        if case.target is not None
    ]
    return [
        *(replace(step, target="P13", condition=condition) for step in steps),
        *(replace(step, ranks_per_copy=0) for step in steps),
    ]


def measure_scaling(case: ScalingCase, device: torch.device, seconds: float) -> Measurement:
    """Times all ranks, each for itself and together; compares their losses first.

    Args:
        case: what to measure.
        device: of every rank: the CPU, or GPUs 0 to ranks - 1.
        seconds: for the timed steps of either, in each turn.

    Raises:
        RuntimeError: a rank failed.
    """
    on_gpu = device.type == "cuda"
    settings = Settings(compile=on_gpu, capture=on_gpu, ranks_per_copy=case.ranks_per_copy)
    found = _launch(case, settings, device, seconds)
    pairs = zip(found["losses"]["alone"], found["losses"]["together"], strict=True)
    error = max(abs(a - b) / abs(a) for a, b in pairs) / _LOSS
    each = [_mean([Timing(**turn) for turn in turns]) for turns in found["alone"]]
    all_ = _mean([Timing(**turn) for turn in found["together"]])
    # What one GPU of the mean rate needs for as many images.
    median, p20, p80 = (case.ranks / fmean(1 / getattr(one, name) for one in each) for name in ("median", "p20", "p80"))
    mean = replace(each[0], median=median, p20=p20, p80=p80)
    rivals = [Rival("one GPU, one after the other", "peer", 0.0, mean)]
    rivals += [Rival(f"GPU {gpu} for itself", "bound", 0.0, one) for gpu, one in enumerate(each)]
    slowest = max(one.median for one in each)
    measured = Measurement(case, error, all_, tuple(rivals), slowest, "the slowest GPU for itself")
    return measured if measured.right else replace(measured, ours=None, rivals=())


def _mean(turns: Sequence[Timing]) -> Timing:
    median, p20, p80 = (fmean(getattr(turn, name) for turn in turns) for name in ("median", "p20", "p80"))
    return replace(turns[0], median=median, p20=p20, p80=p80, samples=sum(turn.samples for turn in turns))


def told(m: Measurement) -> str:
    """One line on a measurement."""
    if m.ours is None:
        return f"[red]wrong[/]: losses {m.error:.3g} times as far off one GPU's as allowed; its time does not count"
    assert isinstance(m.case, ScalingCase)
    rate = m.case.ranks * m.case.batch / m.ours.median
    alone = ", ".join(f"{1e3 * one.median:.4g}" for one in _alone(m))
    return (
        f"{1e3 * m.ours.median:.4g} ms a step, {rate:,.1f} images/s, {_gain(m):.3f} x one GPU (each for itself {alone} "
        f"ms); losses off by {m.error * _LOSS:.2g}"
    )


def summary_of_scaling(measured: Sequence[Measurement]) -> dict[str, Any]:
    """Of a run: which targets were met, times of all GPUs and of each for itself, and the gain over one GPU."""
    met = [m.met for m in measured if m.met is not None]
    timed = [(m.case.name, m, m.ours) for m in measured if m.ours is not None]
    return {
        "met": {"P13": all(met)} if met else {},
        "median_ms": {name: round(1e3 * ours.median, 3) for name, _, ours in timed},
        "alone_ms": {name: [round(1e3 * one.median, 3) for one in _alone(m)] for name, m, _ in timed},
        "gain": {name: round(_gain(m), 4) for name, m, _ in timed},
    }


def _gain(m: Measurement) -> float:
    return m.ratio(m.rivals[0]) or 0.0 if m.rivals else 0.0


def _alone(m: Measurement) -> list[Timing]:
    """Every GPU for itself."""
    return [rival.timing for rival in m.rivals if rival.role == "bound" and rival.timing is not None]


def _launch(case: ScalingCase, settings: Settings, device: torch.device, seconds: float) -> dict[str, Any]:
    """What rank 0 reports: first losses and timings by turn, of all ranks together and of each alone."""
    fields = {"kind": case.kind, "size": case.size, "batch": case.batch, "tiny": case.tiny}
    order = {"case": fields, "settings": asdict(settings), "device": device.type, "seconds": seconds}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    call += ["-m", "spectralar.bench.training_ranks", json.dumps(order)]
    with subprocess.Popen(
        call, env=child_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            printed, complaints = process.communicate(timeout=_LONGEST)
        except subprocess.TimeoutExpired as late:
            process.terminate()  # torchrun ends its ranks, if it is let
            raise RuntimeError(f"{case.ranks} ranks were not done after {_LONGEST:g} s") from late
    report = last_report(printed)
    if process.returncode or report is None:
        reason = re.search(r"\w+Error: .*", complaints)
        raise RuntimeError(f"{case.ranks} ranks failed: {reason[0] if reason else complaints[-400:]}")
    return report


def _rank(order: dict[str, Any]) -> None:
    case, settings, seconds = TrainingCase(**order["case"]), Settings(**order["settings"]), order["seconds"]
    with join_ranks(order["device"]) as ranks:
        device = auto_device(order["device"])
        inputs = case.inputs(device)
        losses: dict[str, list[float]] = {}
        timings: dict[str, list[dict[str, Any]]] = {"alone": [], "together": []}
        for _ in range(_TURNS):
            for name, job in (("alone", ALONE), ("together", ranks)):
                first, timing = _turn(case.trainer(settings, device, job), inputs, seconds, device, ranks)
                forget_recordings()
                release(device)
                losses.setdefault(name, first)
                timings[name].append(asdict(timing))
        alone = ranks.gather(timings["alone"])
        if ranks.first:
            print(json.dumps({"losses": losses, "alone": alone, "together": timings["together"]}), flush=True)


def _turn(
    trainer: Trainer, inputs: list[Tensor], seconds: float, device: torch.device, ranks: Ranks
) -> tuple[list[float], Timing]:
    losses = first_losses(trainer.advance, inputs)

    def step() -> None:
        trainer.advance(inputs)

    until = time.perf_counter() + (_SETTLING if device.type == "cuda" else 0)
    while ranks.largest(int(time.perf_counter() < until)):
        for _ in range(_UNSEEN):
            step()
        torch.cuda.synchronize()
    return losses, time_steps(step, seconds, device, 0.0, ranks)


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
    # At the end of the interpreter a thread of gloo's, of which every turn leaves some, may still run and abort it.
    os._exit(0)
