"""Where the time of a call goes, by kernel as the device reports them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_LONGEST_NAME = 60


@dataclass(frozen=True)
class Part:
    """A share of the time.

    Attributes:
        name: of a kernel, an operation or a stage.
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
    """A kernel's name without return type, arguments, the parameters of its templates and nameless namespaces."""
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    while (inner := re.sub(r"<[^<>]*>", "", plain)) != plain:
        plain = inner
    return re.sub(r"\(.*$", "", plain).strip()[:_LONGEST_NAME] or name[:_LONGEST_NAME]
