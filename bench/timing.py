"""Time of a call on the device: CUDA graphs over rotating inputs, variants interleaved, medians with their spread.

A kernel of microseconds can't be timed by a clock around it: the launch costs as much, and the second call finds its
input in the L2 cache. So several calls are captured in one CUDA graph, each on the next of a ring of input sets that
together exceed the L2 cache, and events around a replay measure the device alone. A variant that can't be captured is
timed by events behind a backlog of work, and says so. Variants take turns, so that clocks and heat treat them alike.

On a CPU the same functions use the wall clock.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = Callable[..., object]
Inputs = tuple[Any, ...]

# One sample lasts at least this long, or the ends of the measured interval weigh in; at most so long that many rounds
# fit into a second.
_SHORTEST = 2e-3
_LONGEST = 30e-3
# A ring of sets three times the cache leaves nothing of a set when its turn comes again.
_L2_MULTIPLE = 3
# More sets than this are not needed by any case, and each is a call in the graph.
_MOST_SETS = 1024
# About half a millisecond on a Hopper GPU: the host has queued everything before the first event is reached.
_BACKLOG_CYCLES = 1_000_000


@dataclass(frozen=True)
class Timing:
    """Seconds for one call.

    Attributes:
        median, p20, p80: over the samples.
        samples: rounds of measurement.
        calls: calls in one sample, over which its time was divided.
        how: "graph", "events (why no graph)" or "clock".
        first_call: wall time of the very first call, with all compilation.
    """

    median: float
    p20: float
    p80: float
    samples: int
    calls: int
    how: str
    first_call: float


@dataclass(frozen=True)
class Sampler:
    """One variant made ready: `sample()` runs `calls` calls and returns the seconds that one took.

    `held` keeps the call and its inputs alive: a graph knows the addresses of their tensors, but does not own them.
    """

    sample: Callable[[], float]
    seconds: float
    calls: int
    how: str
    first_call: float
    held: object = None


def rotating_sets(inputs: Inputs, device: torch.device) -> list[Inputs]:
    """The inputs and as many copies as it takes for the ring to exceed three times the L2 cache of a GPU.

    On a CPU two sets are made, whose caches are nothing that a figure from there should depend on.
    """
    if device.type != "cuda":
        return [inputs, _copy(inputs)]
    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    wanted = _L2_MULTIPLE * torch.cuda.get_device_properties(device).L2_cache_size
    return [inputs, *(_copy(inputs) for _ in range(min(math.ceil(wanted / max(1, size)), _MOST_SETS) - 1))]


def run_once(call: Call, inputs: Inputs, device: torch.device) -> tuple[object, float]:
    """The result of a call and the wall time until the device was done with it."""
    _synchronize(device)
    started = time.perf_counter()
    result = call(*inputs)
    _synchronize(device)
    return result, time.perf_counter() - started


def prepare(
    call: Call,
    sets: Sequence[Inputs],
    device: torch.device,
    *,
    capture: bool = True,
    first_call: float | None = None,
) -> Sampler:
    """Compiles, warms up and captures a variant.

    Args:
        call: called as `call(*inputs)`; what it returns is dropped.
        sets: the ring of inputs.
        device: where `call` computes.
        capture: False for a call that is known not to work in a CUDA graph.
        first_call: wall time of the very first call; None if this is to make it.
    """
    if first_call is None:
        first_call = run_once(call, sets[0], device)[1]
    if device.type != "cuda":
        return _on_the_clock(call, sets, first_call)
    if not capture:
        return _with_events(call, sets, first_call, "does not work in a CUDA graph")
    seconds = _estimate(call, sets)
    # Once around the ring, or the inputs stay in the cache; fewer only where that takes long, and then the call itself
    # moves far more than the cache holds.
    calls = min(max(len(sets), math.ceil(_SHORTEST / seconds)), max(1, math.floor(_LONGEST / seconds)))
    stream = torch.cuda.current_stream()
    try:
        return _in_a_graph(call, sets, calls, first_call)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # A capture that fails can leave its own stream behind as the current one, and the end of the capture can raise
        # in its turn: the reason is what was raised first.
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return _with_events(call, sets, first_call, str(error.__context__ or error).splitlines()[0])


def take_turns(
    samplers: Mapping[str, Sampler], seconds: float, *, fewest: int = 7, most: int = 60
) -> dict[str, Timing]:
    """Times all variants round by round for about `seconds`, but at least `fewest` and at most `most` rounds."""
    names = list(samplers)
    once = sum(sampler.seconds for sampler in samplers.values())
    rounds = min(max(fewest, int(seconds / max(once, 1e-9))), most)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        # Nobody always runs after the same neighbour.
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(samplers[name].sample())
    return {name: summarize(samples[name], samplers[name]) for name in names}


def summarize(samples: Sequence[float], sampler: Sampler) -> Timing:
    """Median and 20th and 80th percentile (linear between neighbours) of the samples."""
    p20, median, p80 = (float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8)))
    return Timing(median, p20, p80, len(samples), sampler.calls, sampler.how, sampler.first_call)


def _on_the_clock(call: Call, sets: Sequence[Inputs], first_call: float) -> Sampler:
    def run(calls: int) -> float:
        started = time.perf_counter()
        for i in range(calls):
            call(*sets[i % len(sets)])
        return (time.perf_counter() - started) / calls

    seconds = run(len(sets))
    calls = max(1, math.ceil(_SHORTEST / max(seconds, 1e-9)))
    return Sampler(lambda: run(calls), seconds * calls, calls, "clock", first_call)


def _in_a_graph(call: Call, sets: Sequence[Inputs], calls: int, first_call: float) -> Sampler:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(2):
            call(*sets[i % len(sets)])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: threads of a compiler may use the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(calls):
            call(*sets[i % len(sets)])
    graph.replay()
    seconds = _between_events(graph.replay, _BACKLOG_CYCLES)

    def sample() -> float:
        return _between_events(graph.replay, _BACKLOG_CYCLES) / calls

    return Sampler(sample, seconds, calls, "graph", first_call, held=(call, sets))


def _with_events(call: Call, sets: Sequence[Inputs], first_call: float, reason: str) -> Sampler:
    calls = min(max(1, math.ceil(_SHORTEST / _estimate(call, sets))), 50)

    def run() -> None:
        for i in range(calls):
            call(*sets[i % len(sets)])

    started = time.perf_counter()
    run()
    host = time.perf_counter() - started
    torch.cuda.synchronize()
    # Two cycles a nanosecond at most; half as long again as the host needs, and at most 20 ms, since a call that waits
    # for the device is not sped up by any backlog.
    cycles = int(min(1.5 * host, 20e-3) * 2e9)
    seconds = _between_events(run, cycles)
    return Sampler(lambda: _between_events(run, cycles) / calls, seconds, calls, f"events ({reason})", first_call)


def _estimate(call: Call, sets: Sequence[Inputs]) -> float:
    def run() -> None:
        for i in range(4):
            call(*sets[i % len(sets)])

    run()
    return max(_between_events(run, 4 * _BACKLOG_CYCLES) / 4, 1e-6)


def _between_events(run: Callable[[], object], backlog_cycles: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(backlog_cycles)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _copy(inputs: Inputs) -> Inputs:
    def copy(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tuple(copy(x) for x in inputs)


def release(device: torch.device) -> None:
    """Gives memory back that nothing holds any more; cycles of references too, as a recorded step is part of one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
