"""A whole training step as one CUDA graph: a small model is otherwise bound by the host that launches its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectralar.devices import no_collection

Step = Callable[[list[Tensor]], dict[str, Tensor]]

_WARMUP = 3


class CapturedStep:
    """Calls `step(inputs)`; after three ordinary calls records it and replays the recording.

    The step must read nothing but its inputs and tensors that live on, and must never wait for the GPU. Inputs keep
    their shapes and dtypes. The returned tensors are overwritten by the next call.

    Args:
        step: maps a list of CUDA tensors to scalars by name.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._calls = 0
        self._inputs: list[Tensor] = []
        self._outputs: dict[str, Tensor] = {}
        self._graph = torch.cuda.CUDAGraph()

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        if not self._inputs:
            self._inputs = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in inputs]
        for held, new in zip(self._inputs, inputs, strict=True):
            held.copy_(new, non_blocking=True)
        self._calls += 1
        if self._calls <= _WARMUP:
            return self._on_side_stream()
        if self._calls == _WARMUP + 1:
            # Other threads (the loader's) may use CUDA meanwhile, so only this one is watched.
            with no_collection(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._step(self._inputs)
        self._graph.replay()
        return self._outputs

    def _on_side_stream(self) -> dict[str, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self._step(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        return outputs
