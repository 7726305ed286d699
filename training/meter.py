"""What a step logs, read from the device without stopping it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralar.training.distributed import Ranks


@dataclass(frozen=True)
class Reading:
    """Of the steps since the reading before.

    Attributes:
        step: the last of them.
        lr: its learning rate.
        means: means of the scalars over the steps and ranks.
        images_per_second: of all ranks.
        first_bad: number of the run's first step whose loss or gradient was not finite, on this rank.
    """

    step: int
    lr: float
    means: dict[str, float]
    images_per_second: float
    first_bad: int


class Meter:
    """Adds up scalars on the device. `close` sends their means to the host, and `take` waits for them to arrive.

    With a step of the device's work between the two the device never runs out of work because of a reading.

    Args:
        ranks: the processes that train together; all must close and take at the same steps.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums: dict[str, Tensor] = {}
        self._steps, self._images = 0, 0
        self._began = time.perf_counter()
        self._sent: tuple[int, float, int, list[str], Tensor, torch.cuda.Event | None] | None = None

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
        self._sent = step, lr, self._images, list(self._sums), values, arrived
        self._sums, self._steps, self._images = {}, 0, 0

    def take(self) -> Reading | None:
        """What was sent, once it is there; None where nothing is on its way."""
        if self._sent is None:
            return None
        step, lr, images, names, values, arrived = self._sent
        self._sent = None
        if arrived is not None:
            arrived.synchronize()
        now = time.perf_counter()
        rate = images * self._ranks.world / (now - self._began)
        self._began = now
        *means, first_bad = values.tolist()
        return Reading(step, lr, dict(zip(names, means, strict=True)), rate, int(first_bad))

    def exclude(self, seconds: float) -> None:
        """Leaves time that was not spent on steps out of the rate."""
        self._began += seconds
