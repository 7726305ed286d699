"""From shards to batches: an endless, reproducible, resumable training stream, and one exact pass for evaluation."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from spectralar.training.data.dali import INSTALL, DaliBatches, EncodedImages, dali_installed
from spectralar.training.data.epochs import EpochOrder, Position, check_share, random_stream
from spectralar.training.data.images import Crop, ImageError, decode_image, draw, prepare
from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.unreadable import Reasons, Unreadable, first_readable, most_unreadable, too_many
from spectralar.training.data.workers import Answer, Batch, Request, Requests, answers, processors

LoaderBackend = Literal["auto", "dali", "pillow"]

_log = logging.getLogger("spectralar")


@dataclass(frozen=True)
class LoaderConfig:
    """Where training images come from and how they are cut.

    Attributes:
        path: folder of shards, one tar, or a pattern of tars (see `ShardSet.open`).
        batch: images per rank and step; in a `TokenizerRun`, of all ranks together.
        crop: square and augmentation.
        seed: seed of order and augmentation, not negative.
        workers: processes that read and, unless DALI does, decode, but no more than this rank has processors; 0 does so
            in the training process.
        shuffle: False keeps every epoch in the order of the shards.
        cache: keep all decoded and resized images in memory, shared by the workers, so that an epoch costs only crops.
            Pillow decodes them.
        classes: number of classes, where the shards do not say.
        backend: `dali` decodes JPEGs on the GPU, `pillow` decodes in the workers; `auto` is `dali` on a GPU where it is
            installed, unless there is a cache. Both give the same samples, crops and order.
        hw_decoder_load: share of the JPEGs that `dali` gives to the decoder which some GPUs have beside their cores; 0
            leaves it out.
        max_unreadable: share of the samples that training may find impossible to decode or cut. The next sample of the
            set takes the place of such a one, with its own label; the sample is named in a warning, and one more than
            the share, rounded down, ends the run. Every rank counts those that it has met. 0 stops at the first, as
            evaluation and tokenising always do: for them, a sample is not to be replaced.

    Raises:
        ValueError: a value outside its limits, or a cache with `dali`.
    """

    path: str
    batch: int
    crop: Crop
    seed: int = 0
    workers: int = 0
    shuffle: bool = True
    cache: bool = False
    classes: int | None = None
    backend: LoaderBackend = "auto"
    hw_decoder_load: float = 1.0
    max_unreadable: float = 0.001

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be positive, not {self.batch}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
        _check_workers(self.workers)
        if self.backend not in get_args(LoaderBackend):
            raise ValueError(f"backend must be one of {', '.join(get_args(LoaderBackend))}, not {self.backend!r}")
        if self.backend == "dali" and self.cache:
            raise ValueError("cache must be off with backend dali: it holds what Pillow has decoded")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(f"hw_decoder_load must be 0..1, not {self.hw_decoder_load}")
        if not 0 <= self.max_unreadable < 1:
            raise ValueError(f"max_unreadable must be at least 0 and below 1, not {self.max_unreadable}")


class ImageLoader(Position, Iterator[Batch]):
    """Endless stream of training batches.

    Epoch e visits the samples in an order drawn from (seed, e), each at most once over all ranks; what fills no global
    batch is left out of that epoch. The crop of a sample is drawn from (seed, epoch, sample) alone. So the images do
    not depend on workers, cache, prefetching, the division into ranks, or on where a run was interrupted. Where an
    image cannot be read, the next sample of the set takes its place (see `LoaderConfig.max_unreadable`).

    Batches are on `device` with DALI, else on the CPU, in pinned memory where CUDA is available. Worker processes live
    as long as the loader.

    Args:
        config: what to load.
        rank: this rank.
        world: number of ranks.
        device: where the images are used.

    Attributes:
        backend: `dali` or `pillow`.

    Raises:
        ValueError: see `ShardSet.open` and `EpochOrder`; a set smaller than one global batch; DALI asked for and not
            installed.
        ShardError: while iterating (while constructing, with a cache): a shard that is cut short, or more images than
            `max_unreadable` that cannot be decoded or cut.
    """

    def __init__(
        self, config: LoaderConfig, *, rank: int = 0, world: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        check_share(rank, world)
        self.config = config
        self.shards = ShardSet.open(config.path, classes=config.classes)
        order = EpochOrder(
            len(self.shards), config.batch, seed=config.seed, shuffle=config.shuffle, rank=rank, world=world
        )
        super().__init__(order, self.shards.digest)
        self._requests = Requests(order)
        most = most_unreadable(config.max_unreadable, len(self.shards))
        self._unreadable = Unreadable(self.shards, most)
        self.backend, self._batches = _batches(
            config, self.shards, self._requests, torch.device(device), most=most, persistent=True, tells=rank == 0
        )
        self._stream: Iterator[Answer] | None = None
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
        if self._stream_step != self.step:
            self._stream = None  # it ends before another asks the same processes
        # After an error the stream would go on behind the batch that failed.
        stream, self._stream = self._stream, None
        if stream is None:
            self._requests.start = self.step
            stream = iter(self._batches)
        answer = next(stream)
        self._unreadable.add(answer.unreadable)
        self.step += 1
        self._stream, self._stream_step = stream, self.step
        return answer.batch

    def state_dict(self) -> dict[str, Any]:
        """See `Position`; `unreadable` are the samples that this rank has met and could not read, with the reasons."""
        return {**super().state_dict(), "unreadable": self._unreadable.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Position`."""
        super().load_state_dict(state)
        self._unreadable.load_state(state.get("unreadable", ()))


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
    images = _Images(shards, crop, 0, cache=False, most=0)
    return (answer.batch for answer in answers(images, requests, workers, persistent=False, pinned=True))


def crop_requests(samples: int, batch: int, crops: int) -> list[Request]:
    """`crops` passes over a set in its order, every sample once a pass, the last batch of a pass as long as is left.

    Args:
        samples: size of the set.
        batch: samples per batch.
        crops: number of passes, positive.

    Raises:
        ValueError: no passes.
    """
    if crops < 1:
        raise ValueError(f"crops must be positive, not {crops}")
    every = np.arange(samples)
    return [(c, every[start : start + batch]) for c in range(crops) for start in range(0, samples, batch)]


def crop_batches(
    config: LoaderConfig, requests: list[Request], *, device: torch.device | str = "cpu", tells: bool = True
) -> Iterator[Batch]:
    """The batches of some of `crop_requests`: pass c gives each sample its crop of epoch c in training.

    Args:
        config: what to load; `batch` is the largest number of samples in a request, `shuffle` and `max_unreadable` are
            not used.
        requests: the batches to load.
        device: where the images are used, see `ImageLoader`.
        tells: say which backend was chosen.

    Raises:
        ValueError: at once, for a bad argument.
        ShardError: for a shard or image that cannot be read.
    """
    shards = ShardSet.open(config.path, classes=config.classes)
    _, batches = _batches(config, shards, requests, torch.device(device), most=0, persistent=False, tells=tells)
    return (answer.batch for answer in batches)


def choose_backend(config: LoaderConfig, device: torch.device) -> tuple[Literal["dali", "pillow"], str]:
    """Who decodes for images that are used on `device`, and why.

    Raises:
        ValueError: DALI is asked for and not installed.
    """
    if config.backend == "dali" and not dali_installed():
        raise ValueError(f"backend dali needs NVIDIA DALI, which is not installed: {INSTALL}")
    if config.backend != "auto":
        return config.backend, "as asked for"
    if config.cache:
        return "pillow", "it fills the cache"
    if device.type != "cuda":
        return "pillow", f"the device is {device.type}"
    if not dali_installed():
        return "pillow", f"NVIDIA DALI, which decodes on the GPU, is not installed ({INSTALL})"
    return "dali", "it decodes on the GPU"


def _batches(
    config: LoaderConfig,
    shards: ShardSet,
    requests: Sampler[Request] | list[Request],
    device: torch.device,
    *,
    most: int,
    persistent: bool,
    tells: bool,
) -> tuple[Literal["dali", "pillow"], Iterable[Answer]]:
    backend, reason = choose_backend(config, device)
    workers = min(config.workers, processors())
    if tells:
        missing = device.type == "cuda" and config.backend == "auto" and backend == "pillow" and not config.cache
        _log.log(logging.WARNING if missing else logging.INFO, "images are decoded by %s: %s", backend, reason)
    if backend == "pillow":
        images = _Images(shards, config.crop, config.seed, config.cache, most)
        return backend, answers(images, requests, workers, persistent=persistent, pinned=True)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    encoded = EncodedImages(shards, config.crop, config.seed, most)
    return backend, DaliBatches(
        answers(encoded, requests, workers, persistent=persistent, pinned=False),
        encoded,
        batch=config.batch,
        device=device,
        hw_decoder_load=config.hw_decoder_load,
    )


class _Images(Dataset[Answer]):
    """Answers a request with a whole batch: one message per batch between processes, and no collation."""

    def __init__(self, shards: ShardSet, crop: Crop, seed: int, cache: bool, most: int) -> None:
        self.shards, self.crop, self.seed, self.most = shards, crop, seed, most
        self.cache = _Cache(self) if cache else None

    def __getitem__(self, request: Request) -> Answer:
        epoch, indices = request
        size = self.crop.size
        images = torch.empty((len(indices), 3, size, size), dtype=torch.uint8)
        read = self.decode if self.cache is None else self.cache.__getitem__
        samples, unreadable = indices.copy(), Reasons()
        for i, (out, index) in enumerate(zip(images.numpy(), indices.tolist(), strict=True)):
            samples[i], pixels = first_readable(self.shards, index, read, self.most, unreadable, {})
            draw(pixels, self.crop, random_stream(self.seed, "augmentation", epoch, index), epoch, out)
        return Answer(Batch(images, torch.from_numpy(self.shards.labels[samples])), unreadable)

    def decode(self, index: int) -> np.ndarray:
        """Pixels of one sample before the random part of its crop; ImageError where that is impossible."""
        data, _, _ = self.shards.read(index)
        return prepare(decode_image(data), self.crop)


class _Cache:
    """All prepared images end to end in one shared block of memory, so that workers get a view and not a copy."""

    def __init__(self, images: _Images) -> None:
        self.unreadable = Reasons()

        def decode(index: int) -> np.ndarray:
            try:
                return images.decode(index)
            except ImageError as error:
                self.unreadable[index] = str(error)
                return np.empty((0, 0, 3), np.uint8)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pixels = list(pool.map(decode, range(len(images.shards))))
        if len(self.unreadable) > images.most:
            raise too_many(images.shards, dict(sorted(self.unreadable.items())), images.most)
        self.shapes = np.array([p.shape for p in pixels])
        self.ends = np.cumsum([p.size for p in pixels])
        self.block = torch.empty(int(self.ends[-1]), dtype=torch.uint8).share_memory_()
        block = self.block.numpy()
        for end in self.ends[::-1]:
            last = pixels.pop()
            block[end - last.size : end] = last.reshape(-1)

    def __getitem__(self, index: int) -> np.ndarray:
        if index in self.unreadable:
            raise ImageError(self.unreadable[index])
        shape, end = self.shapes[index], int(self.ends[index])
        return self.block.numpy()[end - int(shape.prod()) : end].reshape(shape)


def _check_workers(workers: int) -> None:
    if workers < 0:
        raise ValueError(f"workers must not be negative, not {workers}")
