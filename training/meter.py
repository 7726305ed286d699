"""What a step logs, read from the device without stopping it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from spectralar.training.distributed import Ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """Of the steps since the reading before.

    Attributes:
        step: the last of them.
        lr: its learning rate.
        means: means of the scalars over the steps and ranks.
        images_per_second: of all ranks.
        loader_wait: share of the time in which this rank's device stood still for the loader; its start counts.
        first_bad: number of the run's first step whose loss or gradient was not finite, on this rank.
    """

    step: int
    lr: float
    means: dict[str, float]
    images_per_second: float
    loader_wait: float
    first_bad: int


class Wait:
    """How long a device stands still: `with Wait(device) as wait: batch = next(batches)`.

    The host is ahead of a GPU. So the GPU comes to the beginning of the block when it is done with everything before,
    and to its end right after, unless the host is still waiting there or the batch is still being decoded. Without a
    GPU it is what passes on the host.

    Args:
        device: who waits, on its current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._began = self._ended = 0.0

    def __enter__(self) -> Wait:
        self._began = time.perf_counter()
        self._record(*self._events[:1])
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = time.perf_counter()
        self._record(*self._events[1:])

    def _record(self, *events: torch.cuda.Event) -> None:
        for event in events:
            event.record(torch.cuda.current_stream(self._device))

    @property
    def seconds(self) -> float:
        """A GPU must have come to the end of the block."""
        if self._events:
            before, after = self._events
            return before.elapsed_time(after) / 1e3
        return self._ended - self._began


class _Sent(NamedTuple):
    """What `Meter.close` has sent."""

    step: int
    lr: float
    images: int
    waits: list[Wait]
    names: list[str]
    values: Tensor
    arrived: torch.cuda.Event | None


class Meter:
    """Adds up scalars on the device. `close` sends their means to the host, and `take` waits for them to arrive.

    With a step of the device's work between the two the device never runs out of work because of a reading.

    Args:
        ranks: the processes that train together; all must close and take at the same steps.
        device: where the steps run.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._waits: list[Wait] = []
        self._sums: dict[str, Tensor] = {}
        self._steps, self._images = 0, 0
        self._began = time.perf_counter()
        self._sent: _Sent | None = None

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch; what the device stands still for it is waiting."""
        with Wait(self._device) as wait:
            batch = next(batches)
        self._waits.append(wait)
        return batch

    def add(self, scalars: dict[str, Tensor], images: int) -> None:
        """Counts a step of `images` samples of this rank."""
        for name, value in scalars.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += 1
        self._images += images

    def close(self, step: int, lr: float, first_bad: Tensor) -> None:
        """Sends the means of the steps since the last call; the reading before must have been taken."""
        assert self._sent is None
        total = self._ranks.sum(torch.stack([value.double() for value in self._sums.values()]))
        values = torch.cat([total / (self._steps * self._ranks.world), first_bad.double()[None]])
        arrived = None
        if values.is_cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent = _Sent(step, lr, self._images, self._waits, list(self._sums), values, arrived)
        self._sums, self._steps, self._images, self._waits = {}, 0, 0, []

    def take(self) -> Reading | None:
        """What was sent, once it is there; None where nothing is on its way."""
        if self._sent is None:
            return None
        step, lr, images, waits, names, values, arrived = self._sent
        self._sent = None
        if arrived is not None:
            arrived.synchronize()
        waited = sum(wait.seconds for wait in waits)
        now = time.perf_counter()
        elapsed = now - self._began
        self._began = now
        *means, first_bad = values.tolist()
        rate = images * self._ranks.world / elapsed
        return Reading(step, lr, dict(zip(names, means, strict=True)), rate, min(1.0, waited / elapsed), int(first_bad))

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leaves time that is not spent on steps out of the rate."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began
