"""The webdataset library with Pillow, as one writes it: decoded and cut in PyTorch's workers, batched there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from spectralar.bench.cases import Missing
from spectralar.bench.timing import Call
from spectralar.training.data.epochs import random_stream
from spectralar.training.data.images import Crop, apply_crop
from spectralar.training.data.shard_set import IMAGE_EXTENSIONS, ShardSet

_SHUFFLED = 1000


def setup_webdataset(
    shards: ShardSet, crop: Crop, batch: int, workers: int, device: torch.device, seed: int
) -> Call | Missing:
    """Gives a callable for the next images uint8 `[B, 3, S, S]` and labels `[B]` on the device, and the samples.

    Shards are drawn with replacement, since with fewer shards than workers some would have nothing to do otherwise. A
    sample is always cut as `ImageLoader` cuts it in its first epoch, so that the pictures can be compared.
    """
    try:
        import webdataset
    except ImportError:
        return Missing("webdataset is not installed")
    numbers = {shards.where(i): i for i in range(len(shards))}

    def cut(sample: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
        image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        number = numbers[f"shard {sample['__url__']}, key {sample['__key__']}"]
        return apply_crop(image, crop, random_stream(seed, "augmentation", 0, number)), sample["cls"], number

    dataset = (
        webdataset.WebDataset([str(path) for path in shards.paths], resampled=True, shardshuffle=False)
        .shuffle(_SHUFFLED)
        .decode("pilrgb")
        .map(cut)
        .batched(batch)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, pin_memory=device.type == "cuda")
    batches: Iterator[Any] = iter(loader)

    def take() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        images, labels, samples = next(batches)
        return images.to(device, non_blocking=True), torch.as_tensor(labels).to(device), np.asarray(samples)

    return take
