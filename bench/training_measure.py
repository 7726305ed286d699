"""Measures one case of training: every way to run the step judged first, then timed, alone on the device.

Two models with their activations fit into no memory together, so that variants and peers take turns as wholes: each is
built, judged, warmed up, timed over many steps, and given back.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectralar.bench.cases import Measurement, Missing, Peer, Rival, first_line
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.peers.training import PlainStep
from spectralar.bench.split import Part, split_by_kernel
from spectralar.bench.timing import Sampler, Timing, release, summarize
from spectralar.bench.training import Settings, TrainingCase
from spectralar.bench.training_truth import Judge, Verdict, gradients_of
from spectralar.training.distributed import ALONE, Ranks
from spectralar.training.loop import Trainer

_FEWEST, _MOST = 7, 60
_SPLIT_STEPS = 5


@dataclass(frozen=True)
class Variant:
    """The trainer's step under some settings.

    Attributes:
        settings: how it runs.
        verdict: None when it did not run, and `reason` says why.
        timing: None when it is wrong or did not run.
        memory: most bytes that were allocated at once; None where nobody counts.
        reason: why it did not run.
    """

    settings: Settings
    verdict: Verdict | None = None
    timing: Timing | None = None
    memory: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class TrainingMeasurement(Measurement):
    """A case of training as it came out; `ours` is the fastest variant without checkpointing.

    Attributes:
        variants: all settings of the trainer.
        peer_memory: most bytes of the peers, by name.
        stages: where the time of a step goes, by part of the step, under `stages_of`.
        kernels: the same by kernel, of the fastest variant.
    """

    variants: tuple[Variant, ...] = ()
    peer_memory: tuple[tuple[str, int], ...] = ()
    stages: tuple[Part, ...] = ()
    stages_of: str = ""
    kernels: tuple[Part, ...] = ()

    @property
    def best(self) -> Variant | None:
        """The variant whose time is `ours`."""
        return next((v for v in self.variants if v.timing is not None and v.timing is self.ours), None)


def measure_training(
    case: TrainingCase, device: torch.device, ceilings: Ceilings, seconds: float, *, compiled: bool = True
) -> TrainingMeasurement:
    """Judges and times the trainer's step under all of the case's settings, and the peers' steps.

    Args:
        case: what to measure.
        device: where.
        ceilings: rates of the device.
        seconds: for the timed steps of each, apart from building, judging and compiling.
        compiled: False leaves out the peers that need torch.compile.

    Raises:
        RuntimeError: no variant could run, or plain PyTorch could not be run to judge them.
    """
    inputs = case.inputs(device)
    judge = Judge(functools.partial(case.plain, device), inputs)
    floor, ceiling = ceilings.floor(case.bytes(), case.flops(), case.arithmetic)
    found = TrainingMeasurement(case, float("nan"), None, (), floor, ceiling)
    variants: list[Variant] = []
    for settings in case.variants(device):
        variant, stages, kernels = _variant(case, settings, judge, inputs, device, seconds)
        variants.append(variant)
        if stages and (not found.stages or settings.compile):
            found = replace(found, stages=stages, stages_of=settings.name)
        if kernels:
            found = replace(found, kernels=kernels)
    ran = [v.verdict.error for v in variants if v.verdict is not None]
    if not ran:
        raise RuntimeError(variants[0].reason)
    found = replace(found, error=max(ran), variants=tuple(variants))
    timings = [v.timing for v in variants if v.timing is not None and not v.settings.checkpointing]
    if not found.right or not timings:
        return found
    rivals, memory = [], []
    for peer in case.peers(device):
        if peer.compiled and not compiled:
            rivals.append(Rival(peer.name, peer.role, reason="left out, for compiling takes long"))
            continue
        rival, most = _rival(peer, judge, inputs, device, seconds)
        rivals.append(rival)
        if most is not None:
            memory.append((peer.name, most))
    best = min(timings, key=lambda timing: timing.median)
    return replace(found, ours=best, rivals=tuple(rivals), peer_memory=tuple(memory))


def time_steps(
    step: Callable[[], object], seconds: float, device: torch.device, first_call: float, ranks: Ranks = ALONE
) -> Timing:
    """Steps one right after the other; on a GPU between events, so that the host is waited for only if it is late.

    Several ranks make equally many steps.
    """
    for _ in range(2):
        step()
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    once = time.perf_counter() - began
    count = ranks.largest(min(max(_FEWEST, int(seconds / once)), _MOST))
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            step()
            marks.append(time.perf_counter())
        samples = [later - earlier for earlier, later in itertools.pairwise(marks)]
    else:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        _wait(device)
        samples = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]
    how = "events between steps" if device.type == "cuda" else "clock"
    return summarize(samples, Sampler(lambda: once, once, 1, how, first_call))


def split_by_stage(trainer: Trainer, inputs: list[Tensor], device: torch.device) -> tuple[Part, ...]:
    """Where the time of a step that is not captured goes, by what the trainer calls its stages.

    Of a tokenizer's forward pass, making targets and comparing them with the pictures is a part of its own.
    """
    clock = _Clock(device)
    usual = trainer.stage
    trainer.stage = clock
    pixel_loss = getattr(trainer.model, "pixel_loss", None)
    if pixel_loss is not None:

        def timed(*arguments: Tensor | None) -> Tensor:
            with clock("targets and error"):
                loss: Tensor = pixel_loss(*arguments)
                return loss

        trainer.model.pixel_loss = timed  # type: ignore[assignment]
    try:
        for _ in range(_SPLIT_STEPS):
            trainer.advance(inputs)
        spent = clock.seconds()
    finally:
        trainer.stage = usual
        if pixel_loss is not None:
            del trainer.model.pixel_loss
    if "targets and error" in spent:
        spent["forward"] -= spent["targets and error"]
    return tuple(Part(name, 1, total / _SPLIT_STEPS) for name, total in spent.items())


class _Clock:
    """Adds up the time in blocks by name, on the device where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._spent: dict[str, float] = {}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._on_gpu(name) if self._device.type == "cuda" else self._on_cpu(name)

    @contextmanager
    def _on_gpu(self, name: str) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        self._spans.append((name, start, end))

    @contextmanager
    def _on_cpu(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Of all blocks of a name together."""
        _wait(self._device)
        for name, start, end in self._spans:
            self._spent[name] = self._spent.get(name, 0.0) + start.elapsed_time(end) / 1e3
        self._spans.clear()
        return self._spent


def _variant(
    case: TrainingCase, settings: Settings, judge: Judge, inputs: list[Tensor], device: torch.device, seconds: float
) -> tuple[Variant, tuple[Part, ...], tuple[Part, ...]]:
    """The variant, and of a right one its stages or its kernels, whichever can be seen."""
    _release(device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        trainer = case.trainer(settings, device)
        verdict = judge(trainer.advance, gradients_of(trainer.model))
        if not verdict.error <= case.budget:
            return Variant(settings, verdict), (), ()

        def step() -> dict[str, Tensor]:
            return trainer.advance(inputs)

        timing = time_steps(step, seconds, device, verdict.first_call)
        memory = _most(device)
        stages = () if settings.capture or settings.checkpointing else split_by_stage(trainer, inputs, device)
        trainer.stage = lambda name: nullcontext()  # the profiler would take a stage for a kernel
        kernels = split_by_kernel(step, device) if settings == case.variants(device)[0] else ()
        return Variant(settings, verdict, timing, memory), stages, kernels
    except RuntimeError as failure:  # one that is out of memory says nothing of the others
        if stream is not None:
            torch.cuda.set_stream(stream)  # a recording that fails can leave its own as the current one
        return Variant(settings, reason=first_line(failure)), (), ()


def _rival(
    peer: Peer, judge: Judge, inputs: list[Tensor], device: torch.device, seconds: float
) -> tuple[Rival, int | None]:
    _release(device)
    try:
        step = peer.setup()
        if isinstance(step, Missing):
            return Rival(peer.name, peer.role, reason=step.reason), None
        assert isinstance(step, PlainStep)
        verdict = judge(step, step.gradients)
        timing = time_steps(lambda: step(inputs), seconds, device, verdict.first_call)
        return Rival(peer.name, peer.role, verdict.error, timing), _most(device)
    except RuntimeError as failure:
        return Rival(peer.name, peer.role, reason=first_line(failure)), None


def _release(device: torch.device) -> None:
    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _most(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
