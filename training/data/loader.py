"""From shards to batches: an endless, reproducible, resumable training stream, and one exact pass for evaluation."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from spectralar.training.data.epochs import EpochOrder, Position, check_share, random_stream
from spectralar.training.data.images import Crop, ImageError, decode_image, draw, prepare
from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.tar_index import ShardError

Request = tuple[int, np.ndarray]
"""Epoch and sample indices of one batch."""


class Batch(NamedTuple):
    """Images uint8 `[B, 3, S, S]` and class labels int64 `[B]`."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy overlaps other work where the memory is pinned."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


@dataclass(frozen=True)
class LoaderConfig:
    """Where training images come from and how they are cut.

    Attributes:
        path: folder of shards, one tar, or a pattern of tars (see `ShardSet.open`).
        batch: images per rank and step.
        crop: square and augmentation.
        seed: seed of order and augmentation, not negative.
        workers: processes that decode; 0 decodes in the training process.
        shuffle: False keeps every epoch in the order of the shards.
        cache: keep all decoded and resized images in memory, shared by the workers, so that an epoch costs only crops.
        classes: number of classes, where the shards do not say.
    """

    path: str
    batch: int
    crop: Crop
    seed: int = 0
    workers: int = 0
    shuffle: bool = True
    cache: bool = False
    classes: int | None = None

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be positive, not {self.batch}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
        _check_workers(self.workers)


class ImageLoader(Position, Iterator[Batch]):
    """Endless stream of training batches.

    Epoch e visits the samples in an order drawn from (seed, e), each at most once over all ranks; what fills no global
    batch is left out of that epoch. The crop of a sample is drawn from (seed, epoch, sample) alone. So the images do
    not depend on workers, cache, prefetching, the division into ranks, or on where a run was interrupted.

    Batches are in pinned memory where CUDA is available. Worker processes live as long as the loader.

    Args:
        config: what to load.
        rank: this rank.
        world: number of ranks.

    Raises:
        ValueError: see `ShardSet.open` and `EpochOrder`; a set smaller than one global batch.
        ShardError: while iterating (while constructing, with a cache): an image that cannot be decoded or cut.
    """

    def __init__(self, config: LoaderConfig, *, rank: int = 0, world: int = 1) -> None:
        check_share(rank, world)
        self.config = config
        self.shards = ShardSet.open(config.path, classes=config.classes)
        order = EpochOrder(
            len(self.shards), config.batch, seed=config.seed, shuffle=config.shuffle, rank=rank, world=world
        )
        super().__init__(order, self.shards.digest)
        images = _Images(self.shards, config.crop, config.seed, config.cache)
        self._requests = _Requests(order)
        self._batches = _data_loader(images, self._requests, config.workers, persistent=True)
        self._stream: Iterator[Batch] | None = None
        self._stream_step = 0

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.shards.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every class."""
        return self.shards.class_names

    def __iter__(self) -> ImageLoader:
        return self

    def __next__(self) -> Batch:
        stream = self._stream
        if stream is None or self._stream_step != self.step:
            self._requests.start = self.step
            stream = iter(self._batches)
        self._stream = None  # after an error the stream would go on behind the batch that failed
        batch = next(stream)
        self.step += 1
        self._stream, self._stream_step = stream, self.step
        return batch


def evaluation_batches(
    path: str | Path,
    *,
    batch: int,
    size: int,
    resize: int | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    classes: int | None = None,
) -> Iterator[Batch]:
    """One pass over a set: centre crops, in order, each sample exactly once, the last batch as long as what is left.

    Rank r of w ranks gets the samples r, r + w, r + 2 w, ... so ranks differ by one sample at most.

    Args:
        path: see `ShardSet.open`.
        batch: images per batch.
        size: side of the squares, in pixels.
        resize: short side before the crop; None is `size`.
        workers: processes that decode.
        rank: this rank.
        world: number of ranks.
        classes: number of classes, where the shards do not say.

    Raises:
        ValueError: at once, for a bad argument.
        ShardError: for a shard or image that cannot be read.
    """
    check_share(rank, world)
    if batch < 1:
        raise ValueError(f"batch must be positive, not {batch}")
    _check_workers(workers)
    crop = Crop(size, "center", resize=resize, flip=False)
    shards = ShardSet.open(path, classes=classes)
    mine = np.arange(rank, len(shards), world)
    requests = [(0, mine[start : start + batch]) for start in range(0, len(mine), batch)]
    return iter(_data_loader(_Images(shards, crop, 0, cache=False), requests, workers, persistent=False))


def crop_batches(config: LoaderConfig, crops: int) -> Iterator[Batch]:
    """`crops` passes over a set in its order, every sample once a pass, the last batch of a pass as long as is left.

    Pass c gives each sample the crop that training with this configuration would give it in epoch c.

    Args:
        config: what to load; `batch` is the size of the batches, `shuffle` is not used.
        crops: number of passes, positive.

    Raises:
        ValueError: at once, for a bad argument.
        ShardError: for a shard or image that cannot be read.
    """
    if crops < 1:
        raise ValueError(f"crops must be positive, not {crops}")
    shards = ShardSet.open(config.path, classes=config.classes)
    every = np.arange(len(shards))
    requests = [
        (c, every[start : start + config.batch]) for c in range(crops) for start in range(0, len(every), config.batch)
    ]
    images = _Images(shards, config.crop, config.seed, config.cache)
    return iter(_data_loader(images, requests, config.workers, persistent=False))


class _Images(Dataset[Batch]):
    """Answers a request with a whole batch: one message per batch between processes, and no collation."""

    def __init__(self, shards: ShardSet, crop: Crop, seed: int, cache: bool) -> None:
        self.shards, self.crop, self.seed = shards, crop, seed
        self.cache = _Cache(self) if cache else None

    def __getitem__(self, request: Request) -> Batch:
        epoch, indices = request
        size = self.crop.size
        images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
        for out, index in zip(images.numpy(), indices.tolist(), strict=True):
            pixels = self.decode(index) if self.cache is None else self.cache[index]
            draw(pixels, self.crop, random_stream(self.seed, "augmentation", epoch, index), out)
        return Batch(images, torch.from_numpy(self.shards.labels[indices]))

    def decode(self, index: int) -> np.ndarray:
        """Pixels of one sample before the random part of its crop."""
        data, _, _ = self.shards.read(index)
        try:
            return prepare(decode_image(data), self.crop)
        except ImageError as error:
            raise ShardError(f"{self.shards.where(index)}: {error}") from error


class _Cache:
    """All prepared images end to end in one shared block of memory, so that workers get a view and not a copy."""

    def __init__(self, images: _Images) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pixels = list(pool.map(images.decode, range(len(images.shards))))
        self.shapes = np.array([p.shape for p in pixels])
        self.ends = np.cumsum([p.size for p in pixels])
        self.block = torch.empty(int(self.ends[-1]), dtype=torch.uint8).share_memory_()
        block = self.block.numpy()
        for end in self.ends[::-1]:
            last = pixels.pop()
            block[end - last.size : end] = last.reshape(-1)

    def __getitem__(self, index: int) -> np.ndarray:
        shape, end = self.shapes[index], int(self.ends[index])
        return self.block.numpy()[end - int(shape.prod()) : end].reshape(shape)


class _Requests(Sampler[Request]):
    """Endless requests, from batch number `start`."""

    def __init__(self, order: EpochOrder) -> None:
        self.order, self.start = order, 0

    def __iter__(self) -> Iterator[Request]:
        return map(self.order.indices, itertools.count(self.start))


def _data_loader(
    images: _Images, requests: Sampler[Request] | list[Request], workers: int, *, persistent: bool
) -> DataLoader[Batch]:
    return DataLoader(
        images,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=persistent and workers > 0,
        worker_init_fn=_leave_interrupts,
        prefetch_factor=2 if workers > 0 else None,
        # Without a generator of its own, every start of an iteration would draw from torch's global one.
        generator=torch.Generator(),
    )


def _leave_interrupts(_: int) -> None:
    """Ctrl-C and torchrun's SIGTERM go to a whole process group; the training process alone answers, after its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)


def _as_is(batch: Any) -> Any:
    return batch


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise ValueError(f"workers must not be negative, not {workers}")
