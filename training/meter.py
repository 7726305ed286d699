"""What a step logs, read from the device without stopping it."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


class _Sent(NamedTuple):
    """What `Meter.close` has sent; `fetches` are from before to after each."""

    step: int
    lr: float
    images: int
    waited: float
    fetches: list[tuple[torch.cuda.Event, torch.cuda.Event]]
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
        self._ranks = ranks
        self._cuda = device.type == "cuda"
        self._fetches: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._sums: dict[str, Tensor] = {}
        self._steps, self._images = 0, 0
        self._waited = 0.0
        self._began = time.perf_counter()
        self._sent: _Sent | None = None

    def fetch(self, batches: Iterator[T]) -> T:
        """The next batch; what passes meanwhile is waiting, on a GPU by its own clock.

        The host is ahead of a GPU. So the GPU comes to the first event when it is done with all steps before, and to
        the second right after it, unless the host is still waiting or the batch is still being decoded.
        """
        if not self._cuda:
            began = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - began
            return batch
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        batch = next(batches)
        after.record()
        self._fetches.append((before, after))
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
        self._sent = _Sent(step, lr, self._images, self._waited, self._fetches, list(self._sums), values, arrived)
        self._sums, self._steps, self._images, self._waited, self._fetches = {}, 0, 0, 0.0, []

    def take(self) -> Reading | None:
        """What was sent, once it is there; None where nothing is on its way."""
        if self._sent is None:
            return None
        step, lr, images, waited, fetches, names, values, arrived = self._sent
        self._sent = None
        if arrived is not None:
            arrived.synchronize()
        waited += sum(before.elapsed_time(after) for before, after in fetches) / 1e3
        now = time.perf_counter()
        elapsed = now - self._began
        self._began = now
        *means, first_bad = values.tolist()
        rate = images * self._ranks.world / elapsed
        return Reading(step, lr, dict(zip(names, means, strict=True)), rate, min(1.0, waited / elapsed), int(first_bad))

    def exclude(self, seconds: float) -> None:
        """Leaves time that was not spent on steps out of the rate."""
        self._began += seconds
