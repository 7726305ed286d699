"""Where the time of a generation goes: by kernel as the device reports them, and by operation of the fused step."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile

from spectralar.bench.ceilings import Ceilings
from spectralar.bench.timing import prepare, take_turns
from spectralar.kernels.decode import DecodeState, decode_step
from spectralar.kernels.decode.reference import OPS
from spectralar.sampling.packing import begin, class_tables, pack

if TYPE_CHECKING:
    from spectralar.bench.sampler import SamplingCase

_SECONDS = 0.3
_LONGEST_NAME = 60


@dataclass(frozen=True)
class Part:
    """A share of the time.

    Attributes:
        name: of a kernel or an operation.
        count: how often it runs.
        seconds: of all runs together.
        floor: what its weights need at copy speed, where that is known.
    """

    name: str
    count: int
    seconds: float
    floor: float | None = None


def split_by_kernel(call: Callable[[], object], device: torch.device) -> tuple[Part, ...]:
    """The kernels of one call, the longest first; operators on a CPU. Empty where nothing was recorded."""
    on_gpu = device.type == "cuda"
    call()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    parts: dict[str, Part] = {}
    for event in recorded.key_averages():
        if on_gpu and event.device_type.name != "CUDA":
            continue
        spent = 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        name = short_name(event.key)
        before = parts.get(name, Part(name, 0, 0.0))
        parts[name] = Part(name, before.count + event.count, before.seconds + spent)
    return tuple(sorted(parts.values(), key=lambda part: -part.seconds))


def short_name(name: str) -> str:
    """A kernel's name without return type, arguments and the parameters of its templates."""
    plain = name.removeprefix("void ")
    while (inner := re.sub(r"<[^<>]*>", "", plain)) != plain:
        plain = inner
    return re.sub(r"\(.*$", "", plain).strip()[:_LONGEST_NAME] or name[:_LONGEST_NAME]


def split_by_operation(case: SamplingCase, ceilings: Ceilings, device: torch.device) -> tuple[Part, ...]:
    """The operations of one decoding step in the middle of a generation, by stopping after each of them.

    An operation's time is what it adds to a step that stops before it, measured in one block and taken for all.
    """
    config = case.generator_config
    generator = case.sampler(device, case.backend).generator
    with torch.inference_mode():
        weights = pack(generator)
        state = DecodeState.allocate(weights, case.batch, 2 * case.batch)
        state.tokens.zero_()
        for held in (state.keys, state.values):
            held.normal_()
        begin(class_tables(generator), state, torch.tensor(2 * case.inputs[0], device=device))
        state.first.fill_(config.tokens // 2)
        middle, last = config.depth // 2, config.depth - 1
        stops = [(middle - 1, OPS[-1]), *((middle, op) for op in OPS), (last, OPS[-1]), None]
        variants = {
            str(stop): prepare(lambda s=stop: decode_step(weights, state, until=s), [()], device) for stop in stops
        }
        times = take_turns(variants, _SECONDS * len(stops))
    at = [times[str(stop)].median for stop in stops]
    spent = [later - earlier for earlier, later in itertools.pairwise(at)]
    element = weights.qkv.element_size()

    def floor(*held: torch.Tensor) -> float:
        return sum(tensor.numel() for tensor in held) * element / ceilings.copy

    floors = {
        "qkv": floor(weights.qkv),
        "proj": floor(weights.proj),
        "fc1": floor(weights.fc1),
        "fc2": floor(weights.fc2),
    }
    blocks = [Part(op, config.depth, config.depth * t, floors.get(op)) for op, t in zip(OPS, spent, strict=False)]
    # What the step has before its blocks is what all of them do not explain.
    embed = Part("embed, start", 1, at[-2] - sum(part.seconds for part in blocks))
    return (embed, *blocks, Part("head", 1, spent[-1], floor(weights.head)))
