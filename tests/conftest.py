"""Shared by all tests: skipping of `gpu` tests, fixed seeds, and empty tensors that betray unwritten elements."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton asks this when a kernel is defined: with it, kernels run on CPU tensors, in Python.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same global random states, whatever ran before it in this process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is the one that a test could use by accident
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `torch.empty` and its kin return NaN (integers: the greatest value, bool: True) for the test's length.

    An element that a kernel allocates but forgets to write then shows up in every comparison, instead of being the
    zero that fresh memory often holds.
    """

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
                    return tensor.fill_(float("nan"))
                return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

        return poisoned

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
    yield
