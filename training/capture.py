"""A whole training step as one CUDA graph: a small model is otherwise bound by the host that launches its kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from spectralar.devices import no_collection

Step = Callable[[list[Tensor]], dict[str, Tensor]]

WARMUP = 3
"""Ordinary calls before a recording: kernels are compiled and measured, memory is found."""
WARMUP_OF_RANKS = 11
"""With DDP, which sorts its buckets after the first backward pass and times the first ten, waiting for the GPU."""

_steps: weakref.WeakSet[CapturedStep] = weakref.WeakSet()


class CapturedStep:
    """Calls `step(inputs)`; after `warmup` ordinary calls records it and replays the recording.

    The step must read nothing but its inputs and tensors that live on, and must never wait for the GPU. Inputs keep
    their shapes and dtypes. The returned tensors are overwritten by the next call.

    Args:
        step: maps a list of CUDA tensors to scalars by name; where it talks to other ranks, all record together.
        warmup: see above.
    """

    def __init__(self, step: Step, *, warmup: int = WARMUP) -> None:
        self._step, self._warmup = step, warmup
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._graph = torch.cuda.CUDAGraph()
        _steps.add(self)

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        if not self._inputs:
            self._inputs = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in inputs]
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new, non_blocking=True)
        self._calls += 1
        if self._calls <= self._warmup:
            with side_stream():
                return self._step(self._inputs)
        if self._calls == self._warmup + 1:
            # Other threads (the loader's) may use CUDA meanwhile, so only this one is watched.
            with no_collection(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._step(self._inputs)
        self._graph.replay()
        return self._outputs

    def forget(self) -> None:
        """Gives up the recording; the next calls are ordinary ones again, and record anew."""
        if self._calls > self._warmup:
            self._graph.reset()
            self._graph = torch.cuda.CUDAGraph()
        self._calls = 0


def forget_recordings() -> None:
    """Gives up all recordings: NCCL ends a communicator only after every graph that talks through it."""
    for step in list(_steps):
        step.forget()


@contextmanager
def side_stream() -> Iterator[None]:
    """Work on another stream than the default one, which cannot be recorded; in order with what surrounds it."""
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
