"""Which device a name means on this machine, and what recording a CUDA graph asks of Python."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def auto_device(name: str) -> torch.device:
    """`auto` is the GPU when PyTorch sees one; any other name is PyTorch's own.

    Raises:
        ValueError: a GPU is named that is not there, or an unknown name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu or cuda, not {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU; use auto or cpu")
    return device


@contextmanager
def no_collection() -> Iterator[None]:
    """Collects garbage before and not during the block.

    Who records a CUDA graph needs it: trainers and samplers are in reference cycles with their graphs, so the collector
    may come upon an old one at any time, and its memory cannot be given back while another one is recorded.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
