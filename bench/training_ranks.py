"""Several GPUs against one: the same step, each with its own batch, in processes that torchrun starts.

`python -m spectralar.bench.training_ranks JSON` is one of these processes. All ranks are given the same batch and the
same random choices, so that their mean gradient is a single GPU's, and so are the losses; the time does not know.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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


@dataclass(frozen=True, kw_only=True)
class ScalingCase(TrainingCase):
    """A step of `ranks` GPUs with `batch` samples each, against the fastest step of one GPU with `batch` samples.

    `ceiling` of its measurement is the step of one GPU, so that `fraction` is the share of perfect scaling.
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
    alone = _launch(case, 1, Settings(compile=on_gpu, capture=on_gpu), device, seconds)
    together = _launch(case, case.ranks, Settings(compile=on_gpu), device, seconds)
    pairs = zip(alone["losses"], together["losses"], strict=True)
    error = max(abs(a - b) / abs(a) for a, b in pairs) / _LOSS
    one, all_ = Timing(**alone["timing"]), Timing(**together["timing"])
    # What one GPU needs for as many images.
    times = {name: case.ranks * getattr(one, name) for name in ("median", "p20", "p80")}
    rival = Rival("one GPU, one after the other", "peer", 0.0, replace(one, **times))
    found = Measurement(case, error, all_, (rival,), one.median, "one GPU")
    return found if found.right else replace(found, ours=None, rivals=())


def told(m: Measurement) -> str:
    """One line on a measurement."""
    if m.ours is None:
        return f"[red]wrong[/]: losses {m.error:.3g} times as far off one GPU's as allowed; its time does not count"
    assert isinstance(m.case, ScalingCase)
    rate = m.case.ranks * m.case.batch / m.ours.median
    return (
        f"{1e3 * m.ours.median:.4g} ms a step, {rate:,.1f} images/s, {_gain(m):.3f} x one GPU with "
        f"{1e3 * m.floor:.4g} ms; losses off by {m.error * _LOSS:.2g}"
    )


def summary_of_scaling(measured: Sequence[Measurement]) -> dict[str, Any]:
    """Of a run: which targets were met, times, and the gain over one GPU."""
    met = [m.met for m in measured if m.met is not None]
    timed = [(m.case.name, m, m.ours) for m in measured if m.ours is not None]
    return {
        "met": {"P13": all(met)} if met else {},
        "median_ms": {name: round(1e3 * ours.median, 3) for name, _, ours in timed},
        "gain": {name: round(_gain(m), 4) for name, m, _ in timed},
    }


def _gain(m: Measurement) -> float:
    return m.ratio(m.rivals[0]) or 0.0 if m.rivals else 0.0


def _launch(case: ScalingCase, ranks: int, settings: Settings, device: torch.device, seconds: float) -> dict[str, Any]:
    """What rank 0 of so many processes reports."""
    fields = {"kind": case.kind, "size": case.size, "batch": case.batch, "tiny": case.tiny}
    order = {"case": fields, "settings": asdict(settings), "device": device.type, "seconds": seconds}
    call = [sys.executable]
    if ranks > 1:
        call += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    call += ["-m", "spectralar.bench.training_ranks", json.dumps(order)]
    with subprocess.Popen(
        call, env=child_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
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
