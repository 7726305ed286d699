"""What tests of the loader do with batches."""

from __future__ import annotations

import torch

from spectralar.training.data import Batch, ImageLoader


def take(source: ImageLoader, count: int) -> list[Batch]:
    return [next(source) for _ in range(count)]


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)
