"""Which device a name means on this machine, how much it may have in hand, and what recording a CUDA graph asks."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]
"""`bf16` is autocast, `fp32` is plain; `auto` is bf16 on a GPU."""

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


def many_queues() -> None:
    """Gives this process 32 queues to each of its GPUs, and not 8, unless the environment says otherwise.

    Streams share these queues, and what stands in one behind a recorded training step waits until all of it is done:
    with 8, a decoder that works on a dozen streams does. CUDA looks at `CUDA_DEVICE_MAX_CONNECTIONS` when it starts,
    so this must come before.
    """
    os.environ.setdefault(QUEUES, "32")


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
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, not {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU; use auto or cpu")
    if device.index is not None and device.index >= max(1, torch.cuda.device_count()):
        raise ValueError(f"device is {name}, but PyTorch sees {torch.cuda.device_count()} GPUs")
    return device


def in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether `precision` means autocast to bf16 on `device`."""
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


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
