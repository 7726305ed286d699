"""What training must at least have room for on the device, known before it begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def state_bytes(model: nn.Module, *, averaged: bool, ranks_per_copy: int = 1) -> int:
    """Bytes that the training of a model keeps on each device, whatever the batch; activations come on top.

    Every parameter takes its own bytes, as many for its average, and where it is trained as many for its gradient and
    for each of AdamW's two moments: 20 bytes for an averaged fp32 parameter. Buffers are not divided among ranks.
    Where weights are, every device holds them and their average whole before, and one of the two in every validation.

    Args:
        model: not yet sharded.
        averaged: whether an average of the weights is kept.
        ranks_per_copy: devices that share one copy.
    """
    kept = 1 + averaged
    weights = sum(p.numel() * p.element_size() * (kept + 3 * p.requires_grad) for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    divided = -(-weights // ranks_per_copy) + kept * buffers
    if ranks_per_copy == 1:
        return divided
    one = sum(p.numel() * p.element_size() for p in model.parameters()) + buffers
    return max(kept * one, divided + one)


def check_memory(needed: int, device: torch.device) -> None:
    """Refuses a model for which a GPU is too small whatever the batch.

    Raises:
        ValueError: with what is needed, what is free and what the device has.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # this process may use it again
    if needed > free:
        raise ValueError(
            f"training needs at least {_gb(needed)} for weights, gradients, moments and average, before any "
            f"activation; {_gb(free)} of {_gb(total)} are free on {torch.cuda.get_device_name(device)}. Train a "
            "smaller model, free the device, or let several GPUs hold each copy of the model (loop.ranks_per_copy)"
        )


@contextmanager
def explained_memory(needed: int, device: torch.device) -> Iterator[None]:
    """Says of an out-of-memory error in the block what the model's state takes and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{device} is out of memory: beside {_gb(needed)} of weights, gradients, moments and average there is no "
            f"room for the activations of this batch. Set loop.checkpointing, or lower the batch and raise "
            f"optimizer.accumulation. ({error})"
        ) from error


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
