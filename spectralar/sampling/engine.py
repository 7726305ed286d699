"""A queue before a sampler: requests that wait at the same time, with equal settings, are drawn as one batch."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from spectralar.sampling.captured import BUCKETS
from spectralar.sampling.sampler import Integers, Request, Sampler
from spectralar.sampling.settings import SamplingSettings

_REMEMBERED = 4096


class EngineClosed(RuntimeError):
    """The engine was closed before the request was done, or before it came."""


class EngineFull(RuntimeError):
    """The queue had no room for the request in time."""


class Drawn(NamedTuple):
    """Result of a request of B images, in CPU memory: tokens `[B, length]` int64, and pictures `[B, 3, S, S]` uint8.

    There are no pictures when the sampler has no tokenizer.
    """

    tokens: Tensor
    images: Tensor | None


@dataclass(frozen=True)
class EngineStats:
    """Counts since the start; times and rate over the last 4,096 requests that were drawn.

    Attributes:
        requests: drawn so far.
        images: images of these.
        failed: requests whose batch failed.
        waiting: images in the queue.
        p50: median of the seconds from `submit` to the result; NaN before the first.
        p95: likewise, the time that 95 % did not exceed.
        p99: likewise.
        images_per_second: from the first of these requests' arrival to the last one's result.
    """

    requests: int
    images: int
    failed: int
    waiting: int
    p50: float
    p95: float
    p99: float
    images_per_second: float


@dataclass(eq=False)
class _Entry:
    request: Request
    future: Future[Drawn]
    arrived: float

    @property
    def images(self) -> int:
        """Places in the queue and in a batch; one also for an empty request, or there could be any number of them."""
        return max(1, len(self.request.classes))


class Engine:
    """Draws the requests of many threads with one sampler, in a thread of its own.

    A generation starts as soon as the one before ends, with the oldest request and all that wait, have its settings and
    length and fit into the batch. What a request gets does not depend on whom it is drawn with, as far as a `Sampler`'s
    images do not. Used as a context manager, it closes at the end.

    Args:
        sampler: with a tokenizer for pictures. It may be used elsewhere at the same time.
        max_batch: the most images of a batch; a request of more is drawn alone.
        max_waiting: the most images in the queue.

    Raises:
        ValueError: a limit below 1.
    """

    def __init__(self, sampler: Sampler, *, max_batch: int = 64, max_waiting: int = 4096) -> None:
        for name, limit in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, not {limit}")
        self.sampler, self.max_batch, self.max_waiting = sampler, max_batch, max_waiting
        self._changed = threading.Condition()
        self._queue: deque[_Entry] = deque()
        self._running: list[_Entry] = []
        self._closed = False
        self._requests = self._images = self._failed = 0
        self._done: deque[tuple[float, float, int]] = deque(maxlen=_REMEMBERED)
        self._worker = threading.Thread(target=self._work, name="spectralar-engine", daemon=True)
        self._worker.start()

    def submit(
        self,
        classes: Integers,
        seeds: Integers,
        settings: SamplingSettings | None = None,
        *,
        length: int | None = None,
        timeout: float | None = 0.0,
    ) -> Future[Drawn]:
        """Puts a request into the queue.

        Args:
            classes: see `Sampler.stream`.
            seeds: see `Sampler.stream`.
            settings: see `Sampler.stream`.
            length: see `Sampler.stream`.
            timeout: how many seconds to wait for room in the queue; None waits as long as it takes.

        Returns:
            A future of `Drawn`; it raises what the sampler raised, or `EngineClosed`. It can be cancelled while the
            request waits.

        Raises:
            TypeError, ValueError: as `Sampler.stream`, or more images than the queue can hold.
            EngineFull: no room in time.
            EngineClosed: the engine is closed.
        """
        arrived = time.perf_counter()
        entry = _Entry(self.sampler.check(classes, seeds, settings, length=length), Future(), arrived)
        if entry.images > self.max_waiting:
            raise ValueError(f"classes must be at most {self.max_waiting} in one request, not {entry.images}")

        def room() -> bool:
            return self._closed or self._waiting() + entry.images <= self.max_waiting

        with self._changed:
            in_time = self._changed.wait_for(room, timeout)
            if self._closed:
                raise EngineClosed("the engine is closed")
            if not in_time:
                raise EngineFull(f"{self._waiting()} images are waiting, and the queue holds {self.max_waiting}")
            self._queue.append(entry)
            self._changed.notify_all()
        return entry.future

    def warm(self, batches: Sequence[int] | None = None, settings: SamplingSettings | None = None) -> float:
        """Has every size of batch that can occur compiled and recorded; see `Sampler.warm`."""
        if batches is None:
            batches = [size for size in BUCKETS if size < self.max_batch] + [self.max_batch]
        return self.sampler.warm(batches, settings)

    def stats(self) -> EngineStats:
        """What has been done so far, and how fast."""
        with self._changed:
            done, waiting = list(self._done), self._waiting()
            counts = self._requests, self._images, self._failed
        times = sorted(end - start for start, end, _ in done)
        p50, p95, p99 = (_percentile(times, share) for share in (0.5, 0.95, 0.99))
        rate = 0.0
        if done:
            rate = sum(n for _, _, n in done) / (max(end for _, end, _ in done) - min(start for start, _, _ in done))
        return EngineStats(*counts, waiting, p50, p95, p99, rate)

    def close(self, timeout: float | None = 10.0) -> None:
        """Fails all requests that wait or are being drawn with `EngineClosed`, and ends the thread.

        Args:
            timeout: how many seconds to wait for the running generation, whose result is thrown away; None waits as
                long as it takes.
        """
        with self._changed:
            self._closed = True
            queued = [entry for entry in self._queue if entry.future.set_running_or_notify_cancel()]
            left = self._running + queued
            self._running = []
            self._queue.clear()
            self._changed.notify_all()
        for entry in left:
            entry.future.set_exception(EngineClosed("the engine was closed before the request was done"))
        if threading.current_thread() is not self._worker:
            self._worker.join(timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _waiting(self) -> int:
        return sum(entry.images for entry in self._queue)

    def _work(self) -> None:
        while batch := self._next():
            try:
                results = self._draw(batch)
            except BaseException as error:  # whatever it is belongs to those who asked, and others wait
                self._finish(batch, error)
            else:
                self._finish(batch, results)

    def _next(self) -> list[_Entry]:
        """Waits for the entries of the coming batch; none when the engine is closed."""
        with self._changed:
            while not self._running:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return []
                self._running = self._taken()
            self._changed.notify_all()
            return self._running

    def _taken(self) -> list[_Entry]:
        """Takes the oldest entry from the queue, and those that can be drawn with it."""
        taken: list[_Entry] = []
        left: deque[_Entry] = deque()
        images = 0
        for entry in self._queue:
            kind = entry.request.settings, entry.request.length
            fits = not taken or images + entry.images <= self.max_batch
            if taken and (kind != (taken[0].request.settings, taken[0].request.length) or not fits):
                left.append(entry)
            elif entry.future.set_running_or_notify_cancel():
                taken.append(entry)
                images += entry.images
        self._queue = left
        return taken

    def _draw(self, batch: list[_Entry]) -> list[Drawn]:
        requests = [entry.request for entry in batch]
        tokens = self.sampler.draw(
            Request(
                torch.cat([request.classes for request in requests]),
                torch.cat([request.seeds for request in requests]),
                requests[0].settings,
                torch.cat([request.prefix for request in requests]),
                requests[0].length,
            )
        )
        images = None if self.sampler.tokenizer is None else self.sampler.pictures(tokens).cpu()
        sizes = [len(request.classes) for request in requests]
        # Copies, so that nobody's result keeps the whole batch in memory.
        parts = [part.clone() for part in tokens.cpu().split(sizes)]
        if images is None:
            return [Drawn(part, None) for part in parts]
        return [Drawn(*both) for both in zip(parts, (part.clone() for part in images.split(sizes)), strict=True)]

    def _finish(self, batch: list[_Entry], outcome: list[Drawn] | BaseException) -> None:
        end = time.perf_counter()
        with self._changed:
            if self._running is not batch:
                return  # closed meanwhile: all have their exception
            self._running = []
            if isinstance(outcome, BaseException):
                self._failed += len(batch)
            else:
                self._requests += len(batch)
                self._images += sum(entry.images for entry in batch)
                self._done.extend((entry.arrived, end, entry.images) for entry in batch)
        # Outside the lock: a future calls those who wait for it back.
        if isinstance(outcome, BaseException):
            for entry in batch:
                entry.future.set_exception(outcome)
        else:
            for entry, result in zip(batch, outcome, strict=True):
                entry.future.set_result(result)


def _percentile(ordered: list[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed."""
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan
