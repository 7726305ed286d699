"""CUDA graphs of work that is repeated, and a pool of the things that hold them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from spectralar.devices import no_collection

Held = TypeVar("Held")


class Recording:
    """`work()` as a CUDA graph, replayed by every call; on another device every call runs the work itself.

    Args:
        work: reads and writes nothing but tensors that live as long as it does, and never waits for the GPU. It runs
            once before it is recorded, so that what compiles or allocates at first use has done so.
        device: where its tensors are.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        side, here = _side_stream(device), torch.cuda.current_stream(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            side.wait_stream(here)
            with torch.cuda.stream(side):
                work()
            # Other threads may use CUDA meanwhile, so only this one is watched.
            with no_collection(), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                work()
            here.wait_stream(side)
        self._graph = graph

    def __call__(self) -> None:
        if self._graph is None:
            self._work()
            return
        with torch.cuda.device(self._device):
            self._graph.replay()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class Pool:
    """Buffers with their graphs, by key, each used by one run at a time.

    A run that finds all of its key in use makes another. Idle ones are kept until memory is short or there are too
    many; those used last stay. Runs may come from any thread; a run on another CUDA stream waits for those that ended
    before. Runs whose calls are mixed should be on one stream, as recorded products share cuBLAS's workspace.

    Args:
        device: where the buffers are.
        keep: the largest number of idle ones.
    """

    def __init__(self, device: torch.device, keep: int = 32) -> None:
        self._device, self._keep = device, keep
        self._lock = threading.Lock()
        self._idle: list[tuple[Hashable, Any]] = []
        self._ended: torch.cuda.Event | None = None

    @contextmanager
    def take(self, key: Hashable, make: Callable[[], Held]) -> Iterator[Held]:
        """Gives an idle thing of that key or a new one, and takes it back afterwards."""
        with self._lock:
            if self._ended is not None:
                torch.cuda.current_stream(self._device).wait_event(self._ended)
            place = next((i for i, (known, _) in enumerate(self._idle) if known == key), None)
            held = self._made(make) if place is None else self._idle.pop(place)[1]
        try:
            yield held
        finally:
            with self._lock:
                if self._device.type == "cuda":
                    self._ended = torch.cuda.current_stream(self._device).record_event()
                self._idle.append((key, held))
                del self._idle[: -self._keep]

    def _made(self, make: Callable[[], Held]) -> Held:
        try:
            return make()
        except torch.OutOfMemoryError:
            if not self._idle:
                raise
        self._idle.clear()
        torch.cuda.empty_cache()
        return make()
