"""Several GPUs against one: the same step, each with its own batch, in processes that torchrun starts.

`python -m spectralar.bench.training_ranks JSON` is one of these processes. All ranks are given the same batch and the
same random choices, so that their mean gradient is a single GPU's, and so are the losses; the time does not know.

GPUs of one kind differ by some percent in a step that takes all the power they may draw, and together they go at the
pace of the slowest. So every one of them is measured by itself, while the others rest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Self

import torch

from spectralar.bench.cases import Condition, Measurement, Rival
from spectralar.bench.processes import child_environment, last_report
from spectralar.bench.timing import Timing
from spectralar.bench.training import CASES, Settings, TrainingCase
from spectralar.bench.training_measure import time_steps
from spectralar.bench.training_truth import first_losses
from spectralar.devices import auto_device
from spectralar.training.distributed import join_ranks

# Relative; bf16 sums of gradients in another order, over the first steps.
_LOSS = 0.0025
_LONGEST = 600.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class ScalingCase(TrainingCase):
    """A step of `ranks` GPUs with `batch` samples each, against the steps of each GPU by itself with `batch` samples.

    The peer is their mean rate. `ceiling` of its measurement is the step of the slowest, which the others wait for.
    """

    ranks: int = 2

    @property
    def name(self) -> str:
        return f"{super().name} a GPU, {self.ranks} GPUs (DDP)"

    def small(self) -> Self:
        return replace(super().small(), ranks=self.ranks)


def scaling_cases(ranks: int) -> list[ScalingCase]:
    """The targets' steps on so many GPUs."""
    least = 0.95 * ranks
    condition = Condition(f">= {least:g} x the images/s of one GPU", lambda m: _gain(m) >= least)
    return [
        ScalingCase(kind=case.kind, size=case.size, batch=case.batch, ranks=ranks, target="P13", condition=condition)
        for case in CASES
        if case.target is not None
    ]


def measure_scaling(case: ScalingCase, device: torch.device, seconds: float) -> Measurement:
    """Times one rank and then all of them; compares their losses first.

    Args:
        case: what to measure.
        device: of every rank: the CPU, or GPUs 0 to ranks - 1.
        seconds: for the timed steps of either.

    Raises:
        RuntimeError: a rank failed.
    """
    on_gpu = device.type == "cuda"
    settings = Settings(compile=on_gpu, capture=on_gpu)
    alone = [_launch(case, [gpu], settings, device, seconds) for gpu in range(case.ranks)]
    together = _launch(case, range(case.ranks), settings, device, seconds)
    pairs = zip(alone[0]["losses"], together["losses"], strict=True)
    error = max(abs(a - b) / abs(a) for a, b in pairs) / _LOSS
    each, all_ = [Timing(**found["timing"]) for found in alone], Timing(**together["timing"])
    # What one GPU of the mean rate needs for as many images.
    median, p20, p80 = (case.ranks / fmean(1 / getattr(one, name) for one in each) for name in ("median", "p20", "p80"))
    mean = replace(each[0], median=median, p20=p20, p80=p80)
    rivals = [Rival("one GPU, one after the other", "peer", 0.0, mean)]
    rivals += [Rival(f"GPU {gpu} by itself", "bound", 0.0, one) for gpu, one in enumerate(each)]
    slowest = max(one.median for one in each)
    found = Measurement(case, error, all_, tuple(rivals), slowest, "the slowest GPU by itself")
    return found if found.right else replace(found, ours=None, rivals=())


def told(m: Measurement) -> str:
    """One line on a measurement."""
    if m.ours is None:
        return f"[red]wrong[/]: losses {m.error:.3g} times as far off one GPU's as allowed; its time does not count"
    assert isinstance(m.case, ScalingCase)
    rate = m.case.ranks * m.case.batch / m.ours.median
    alone = ", ".join(f"{1e3 * one.median:.4g}" for one in _alone(m))
    return (
        f"{1e3 * m.ours.median:.4g} ms a step, {rate:,.1f} images/s, {_gain(m):.3f} x one GPU (by themselves {alone} "
        f"ms); losses off by {m.error * _LOSS:.2g}"
    )


def summary_of_scaling(measured: Sequence[Measurement]) -> dict[str, Any]:
    """Of a run: which targets were met, times of all GPUs and of each by itself, and the gain over one GPU."""
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
    """Every GPU by itself."""
    return [rival.timing for rival in m.rivals if rival.role == "bound" and rival.timing is not None]


def _launch(
    case: ScalingCase, gpus: Sequence[int], settings: Settings, device: torch.device, seconds: float
) -> dict[str, Any]:
    """What rank 0 of as many processes reports."""
    ranks = len(gpus)
    fields = {"kind": case.kind, "size": case.size, "batch": case.batch, "tiny": case.tiny}
    order = {"case": fields, "settings": asdict(settings), "device": device.type, "seconds": seconds}
    call = [sys.executable]
    if ranks > 1:
        call += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    call += ["-m", "spectralar.bench.training_ranks", json.dumps(order)]
    visible = os.environ.get(_VISIBLE)
    names = visible.split(",") if visible else [str(gpu) for gpu in range(case.ranks)]
    seen = {_VISIBLE: ",".join(names[gpu] for gpu in gpus)}
    with subprocess.Popen(
        call, env={**child_environment(), **seen}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            printed, complaints = process.communicate(timeout=_LONGEST)
        except subprocess.TimeoutExpired as late:
            process.terminate()  # torchrun ends its ranks, if it is let
            raise RuntimeError(f"{ranks} ranks were not done after {_LONGEST:g} s") from late
    report = last_report(printed)
    if process.returncode or report is None:
        reason = re.search(r"\w+Error: .*", complaints)
        raise RuntimeError(f"{ranks} ranks failed: {reason[0] if reason else complaints[-400:]}")
    return report


def _rank(order: dict[str, Any]) -> None:
    case, settings = TrainingCase(**order["case"]), Settings(**order["settings"])
    with join_ranks(order["device"]) as ranks:
        device = auto_device(order["device"])
        trainer = case.trainer(settings, device, ranks)
        inputs = case.inputs(device)
        losses = first_losses(trainer.advance, inputs)
        timing = time_steps(lambda: trainer.advance(inputs), order["seconds"], device, 0.0, ranks)
        if ranks.first:
            print(json.dumps({"losses": losses, "timing": asdict(timing)}), flush=True)


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
