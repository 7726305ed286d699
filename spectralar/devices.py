"""Which device a name means on this machine."""

from __future__ import annotations

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
