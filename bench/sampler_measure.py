"""Measures one case of the sampler: judged first, then in turns with each rival, then where the time goes.

A generation is timed from the call with lists of classes and seeds until the device is done, by the clock: what a user
waits for, host and all. The weights of one step are many times as large as any cache, so nothing is gained by a rest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from spectralar.bench.cases import Measurement, Missing, Peer, Rival, first_line
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.sampler import SamplingCase, draws
from spectralar.bench.sampler_split import split_by_operation
from spectralar.bench.sampler_truth import Drawn, Judge, Verdict
from spectralar.bench.split import Part, split_by_kernel
from spectralar.bench.timing import Call, Inputs, Sampler, release, run_once, summarize
from spectralar.sampling import WeightError, memory_needed, weight_error
from spectralar.sampling.captured import bucket

_FEWEST, _MOST = 7, 40
# Of what is left for a case, so that several peers and the tables have a share.
_ROUNDS_SHARE = 0.25
_LATE = "left out for lack of time"


@dataclass(frozen=True)
class SamplingMeasurement(Measurement):
    """A case of the sampler as it came out.

    Attributes:
        backend: of our sampler.
        sampled, greedy: the verdicts on what ours drew with the case's settings, and without chance.
        memory: most bytes that were allocated at once beside the models; None where nobody counts.
        estimate: what the sampler says that it needs, where it says so.
        kernels: where the time of one generation goes, by kernel.
        operations: the same for one step, by operation of the fused backend.
        dropped: tables that there was no time for.
        weight_error: what weights in fp8 change, along the sequences that were drawn.
    """

    backend: str
    sampled: Verdict
    greedy: Verdict
    memory: int | None = None
    estimate: int | None = None
    kernels: tuple[Part, ...] = ()
    operations: tuple[Part, ...] = ()
    dropped: tuple[str, ...] = ()
    weight_error: WeightError | None = None


def measure_sampling(
    case: SamplingCase,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    *,
    compiled: bool = True,
    operations: bool = True,
) -> SamplingMeasurement:
    """Judges our sampler, and if it is right times it and then its peers, and finds where the time goes.

    Args:
        case: what to measure; a brief one is timed alone.
        device: where.
        ceilings: rates of the device.
        seconds: for all of this. Ours and one peer (and what the target is a ratio to) are measured however long they
            take; once time is up no other peer and no table is begun, and the rounds of a peer take a part of the rest.
        compiled: False leaves out the peers that need torch.compile.
        operations: False leaves out the split by operation.

    Raises:
        RuntimeError, ValueError: our sampler cannot run the case.
    """
    end = time.monotonic() + seconds
    sampler = case.sampler(device, case.backend)
    classes, seeds, settings = inputs = case.inputs
    judge = case.judge(sampler)
    ours = draws(sampler)
    drawn, first_call, memory = _first_call(ours, inputs, device)
    sampled = judge(drawn)
    greedy = judge(ours(classes, seeds, replace(settings, greedy=True)))
    floor, ceiling = ceilings.floor(case.bytes(), case.flops(), case.arithmetic)
    found = SamplingMeasurement(
        case=case,
        error=max(sampled.error, greedy.error),
        ours=None,
        rivals=(),
        floor=floor,
        ceiling=ceiling,
        backend=sampler.backend,
        sampled=sampled,
        greedy=greedy,
        memory=memory,
        estimate=None if sampler.backend == "reference" or case.pixels != "none" else _estimate(case),
        weight_error=None if case.weights == "same" else weight_error(sampler.generator, classes, drawn.tokens),
    )
    if not found.right:
        return found
    own = latency(ours, inputs, device, first_call)
    samples: list[float] = []
    rivals: list[Rival] = []
    for peer in () if case.brief else case.peers(device):
        compared = any(r.role == "peer" and r.timing is not None for r in rivals)
        if peer.compiled and not compiled:
            rivals.append(Rival(peer.name, peer.role, reason="left out, for compiling takes long"))
        elif compared and time.monotonic() > end:
            rivals.append(Rival(peer.name, peer.role, reason=_LATE))
        else:
            rivals.append(_rival(peer, judge, inputs, device, own, samples, end))
            release(device)
    for _ in range(len(samples), _FEWEST):
        samples.append(own.sample())
    found = replace(found, ours=summarize(samples, own), rivals=tuple(rivals))
    return found if case.target is None else _split(found, ours, inputs, device, ceilings, end, operations)


def _split(
    found: SamplingMeasurement,
    ours: Call,
    inputs: Inputs,
    device: torch.device,
    ceilings: Ceilings,
    end: float,
    operations: bool,
) -> SamplingMeasurement:
    """With the tables that say where the time goes, as far as there is time."""
    case, dropped = found.case, []
    assert isinstance(case, SamplingCase)
    if time.monotonic() > end:
        dropped.append("time by kernel")
    else:
        found = replace(found, kernels=split_by_kernel(lambda: ours(*inputs), device))
    if found.backend == "fused" and case.pixels == "none":
        if not operations or time.monotonic() > end:
            dropped.append("time by operation")
        else:
            found = replace(found, operations=split_by_operation(case, ceilings, device))
    return replace(found, dropped=tuple(dropped))


def latency(call: Call, inputs: Inputs, device: torch.device, first_call: float) -> Sampler:
    """A variant timed call by call, from the host's lists until the device is done."""

    def sample() -> float:
        return run_once(call, inputs, device)[1]

    sample()
    return Sampler(sample, sample(), 1, "clock", first_call, held=(call, inputs))


def _rival(
    peer: Peer,
    judge: Judge,
    inputs: Inputs,
    device: torch.device,
    own: Sampler,
    samples: list[float],
    end: float,
) -> Rival:
    """Judges and times a peer, in turns with our sampler, whose times join `samples`."""
    classes, seeds, settings = inputs
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        call = peer.setup()
        if isinstance(call, Missing):
            return Rival(peer.name, peer.role, reason=call.reason)
        drawn, first_call = run_once(call, inputs, device)
        error = None
        if peer.role != "bound":
            error = max(judge(_drawn(x)).error for x in (drawn, call(classes, seeds, replace(settings, greedy=True))))
        theirs = latency(call, inputs, device, first_call)
        times = []
        share = _ROUNDS_SHARE * (end - time.monotonic())
        for _ in range(min(max(1, math.floor(share / (theirs.seconds + own.seconds))), _MOST)):
            times.append(theirs.sample())
            samples.append(own.sample())
        return Rival(peer.name, peer.role, error, summarize(times, theirs))
    except Exception as failure:  # a stranger's code may raise anything
        if stream is not None:
            # A recording that fails can leave its own stream behind as the current one.
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize(device)
        return Rival(peer.name, peer.role, reason=first_line(failure))


def _first_call(call: Callable[..., Drawn], inputs: Inputs, device: torch.device) -> tuple[Drawn, float, int | None]:
    """The result, the seconds with all that is compiled and recorded, and the most bytes that it took."""
    if device.type != "cuda":
        drawn, seconds = run_once(call, inputs, device)
        return _drawn(drawn), seconds, None
    release(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    drawn, seconds = run_once(call, inputs, device)
    return _drawn(drawn), seconds, torch.cuda.max_memory_allocated(device) - before


def _estimate(case: SamplingCase) -> int:
    return sum(memory_needed(case.generator_config, bucket(case.batch), guided=True, weights=case.weights))


def _drawn(result: object) -> Drawn:
    assert isinstance(result, Drawn)
    return result
