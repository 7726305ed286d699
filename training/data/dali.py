"""The loader's batches by NVIDIA DALI, which decodes and cuts JPEGs on a GPU (or, without one, on its own threads).

DALI neither reads nor shuffles nor draws here. It is fed with files, boxes and flips that come from the same order and
the same `choose_cut` as those of Pillow's path, so a sample, its place in a run and what is cut out of it do not depend
on who decodes it. Pixels do, a little: Pillow rounds and clips to 8 bits between the passes of a resize and DALI does
not, and a GPU's inverse DCT rounds differently. Seen on CPUs, for photographs of 500 x 375 cut to 256: at most 9 of 255
in a pixel (at hard edges), 0.15 on average, and at most 8 in an orthonormal DCT coefficient, of 255 x 256.

What is no plain JPEG (see `plain_jpeg_size`) is decoded by Pillow in the worker processes and passed on as pixels.

An error ends a DALI pipeline, and does not say which image it is about. Pillow then decodes the whole batch: what it
cannot read is treated as on its own path (see `unreadable`), and a new pipeline goes on with that batch.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from spectralar.devices import QUEUES
from spectralar.training.data.ahead import Ahead
from spectralar.training.data.epochs import random_stream
from spectralar.training.data.images import Crop, choose_cut, decode_image, plain_jpeg_size, resized_size
from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.unreadable import Reasons, first_readable
from spectralar.training.data.workers import Answer, Batch, Request, processors

INSTALL = "pip install 'spectralar[cuda]'"

# Batches in DALI's queue, of which one is with the model.
_QUEUE = 3
# Batches that were taken from DALI before they are asked for: what that costs the host does not stop a training step.
_AHEAD = 2
# More threads gain nothing, even where nothing is decoded on the GPU.
_MOST_THREADS = 16

_log = logging.getLogger("spectralar")

# Those that were not closed. Worker processes forked meanwhile must never collect one: it would wait for its threads,
# which are not there.
_pipelines: set[Any] = set()


class EncodedBatch(NamedTuple):
    """Files of one batch and what to cut out of them.

    Attributes:
        files: uint8, the encoded images end to end.
        ends: int64 `[B]`, where each ends.
        first: float32 `[B, 2]`, row and column of the upper left corner of each box, in pixels of the encoded image.
        last: float32 `[B, 2]`, of the lower right corner.
        mirrored: int32 `[B]`, 1 or 0.
        samples: int64 `[B]`, the samples.
        request: what this is the answer to.
        unreadable: samples asked for whose place was taken by others.
        by_pillow: those that were decoded already because they are no plain JPEGs.
        pixels: all were decoded already.
    """

    files: torch.Tensor
    ends: np.ndarray
    first: np.ndarray
    last: np.ndarray
    mirrored: np.ndarray
    samples: np.ndarray
    request: Request
    unreadable: Reasons
    by_pillow: list[int]
    pixels: bool


class _File(NamedTuple):
    """What DALI is given of one sample: a JPEG or a portable pixmap, its width and height, and whether it is a JPEG."""

    data: bytes
    size: tuple[int, int]
    plain: bool


class EncodedImages(Dataset[EncodedBatch]):
    """Answers a request with the files of a batch and their crops; `most` samples may be unreadable."""

    def __init__(self, shards: ShardSet, crop: Crop, seed: int, most: int) -> None:
        self.shards, self.crop, self.seed, self.most = shards, crop, seed, most

    def __getitem__(self, request: Request) -> EncodedBatch:
        return self.encode(request, {})

    def encode(self, request: Request, damaged: Mapping[int, str], *, pixels: bool = False) -> EncodedBatch:
        """The answer to a request.

        Args:
            request: epoch and samples.
            damaged: samples that are known to be unreadable, although they look like plain JPEGs; and why.
            pixels: Pillow decodes all of them, plain JPEGs too.

        Raises:
            ShardError: a sample cannot be read, nor can `most` more.
        """
        epoch, indices = request
        files: list[bytes] = []
        first, last = np.empty((2, len(indices), 2), np.float32)
        mirrored = np.empty(len(indices), np.int32)
        samples, unreadable, by_pillow = indices.copy(), Reasons(), list[int]()
        for i, index in enumerate(indices.tolist()):
            sample, file = first_readable(
                self.shards, index, lambda sample: self._file(sample, pixels), self.most, unreadable, damaged
            )
            samples[i] = sample
            if not file.plain:
                by_pillow.append(sample)
            width, height = resized_size(*file.size, self.crop)
            cut = choose_cut(width, height, self.crop, random_stream(self.seed, "augmentation", epoch, index), epoch)
            across, down = file.size[0] / width, file.size[1] / height
            first[i] = cut.top * down, cut.left * across
            last[i] = cut.bottom * down, cut.right * across
            mirrored[i] = cut.mirrored
            files.append(file.data)
        ends = np.cumsum([len(data) for data in files])
        joined = torch.empty(int(ends[-1]), dtype=torch.uint8)
        memory = memoryview(joined.numpy().data)
        for data, end in zip(files, ends.tolist(), strict=True):
            memory[end - len(data) : end] = data
        return EncodedBatch(joined, ends, first, last, mirrored, samples, request, unreadable, by_pillow, pixels)

    def _file(self, sample: int, pixels: bool) -> _File:
        data, _, _ = self.shards.read(sample)
        size = plain_jpeg_size(data)
        plain = size is not None
        if size is None or pixels:
            image = decode_image(data)
            size = image.size
            data = b"P6 %d %d 255\n" % size + image.tobytes()  # a portable pixmap
        resized_size(*size, self.crop)  # ImageError where a crop is impossible
        return _File(data, size, plain)


class DaliBatches:
    """Decoded batches, in the order of the encoded ones; every iteration begins with a pipeline of its own.

    Args:
        encoded: the encoded batches of an iteration, as from worker processes.
        images: what encoded them.
        batch: largest number of images in a batch.
        device: where images and labels appear; on a GPU, decoding happens there.
        hw_decoder_load: see `LoaderConfig`.
    """

    def __init__(
        self,
        encoded: Iterable[EncodedBatch],
        images: EncodedImages,
        *,
        batch: int,
        device: torch.device,
        hw_decoder_load: float,
    ) -> None:
        self.encoded, self.images, self.batch = encoded, images, batch
        self.device, self.hw_decoder_load = device, hw_decoder_load
        self._damaged = Reasons()
        self._told = False
        if device.type == "cuda" and QUEUES not in os.environ:
            _log.warning(
                "%s is not set: beside training, decoding may wait for whole steps. Set it to 32 before CUDA starts, "
                "as the command line does (spectralar.devices.many_queues)",
                QUEUES,
            )

    def __iter__(self) -> Iterator[Answer]:
        import nvidia.dali  # noqa: F401  # before `Ahead`, which has to end before it does

        # The processes that encode are forked here and not in the thread: a fork copies locks that are held meanwhile.
        return Ahead(self._decoded(_Feed(map(self._without_damaged, self.encoded))), self.device, depth=_AHEAD)

    def _decoded(self, feed: _Feed) -> Generator[Answer, None, None]:
        try:
            while (error := (yield from self._until_error(feed))) is not None:
                feed.begin_again(self._by_pillow(feed.queued[0], error))
            if feed.failure is not None:
                raise feed.failure
        finally:
            # The workers must not hang on a pipeline's cycle: when it is collected, their queues are closed before they
            # are asked to end, and torch waits seconds for each.
            feed.close()

    def _until_error(self, feed: _Feed) -> Generator[Answer, None, RuntimeError | None]:
        """Hands out batches to the end of the feed, or to an error of DALI, which belongs to the next batch."""
        pipeline, process = self._pipeline(feed), os.getpid()
        _pipelines.add(pipeline)
        try:
            while True:
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
                try:
                    (images,) = pipeline.run(stream)
                except StopIteration:
                    return None
                except RuntimeError as error:
                    return error.with_traceback(None)  # which would keep the pipeline
                batch = feed.queued.popleft()
                self._tell(batch)
                yield Answer(self._batch(images, batch, stream), batch.unreadable)
        finally:
            if os.getpid() == process:
                _pipelines.discard(pipeline)
                pipeline.__del__()  # it is part of a cycle of references, and would keep its threads and memory

    def _by_pillow(self, batch: EncodedBatch, error: RuntimeError) -> EncodedBatch:
        """The batch without what Pillow cannot read, or, where that is nothing, in pixels."""
        first = self.images.shards.where(int(batch.samples[0]))
        if batch.pixels:
            raise RuntimeError(
                f"DALI fails on a batch that begins with {first}, even on its pixels: {error}"
            ) from error
        decoded = self.images.encode(batch.request, self._damaged, pixels=True)
        found = {sample: why for sample, why in decoded.unreadable.items() if sample not in batch.unreadable}
        if not found:
            _log.warning("Pillow decodes a batch that begins with %s, on which DALI fails: %s", first, error)
            return decoded
        self._damaged.update(found)
        return self._without_damaged(batch)

    def _without_damaged(self, batch: EncodedBatch) -> EncodedBatch:
        """The batch itself, unless samples of it have been found damaged meanwhile."""
        if self._damaged.keys().isdisjoint(batch.samples.tolist()):
            return batch
        return self.images.encode(batch.request, self._damaged)

    def _pipeline(self, feed: _Feed) -> Any:
        from nvidia.dali import Pipeline, fn, types

        gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self.batch,
            num_threads=decoder_threads(),
            device_id=self.device.index if gpu else None,
            prefetch_queue_depth=_QUEUE,
        )
        with pipeline:
            files, first, last, mirrored = fn.external_source(
                source=feed,
                num_outputs=4,
                no_copy=True,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            # The whole image, although only a box of it is needed: GPU decoding of a part has crashed in releases of
            # nvImageCodec (issue 55 there).
            images = fn.decoders.image(
                files,
                device="mixed" if gpu else "cpu",
                output_type=types.RGB,
                jpeg_fancy_upsampling=True,  # as every CPU decoder shows chroma
                adjust_orientation=False,  # only upright images come here
                hw_decoder_load=self.hw_decoder_load,
            )
            images = fn.resize(
                images,
                roi_start=first,
                roi_end=last,
                size=[self.images.crop.size] * 2,
                interp_type=types.INTERP_CUBIC,
                antialias=True,
            )
            images = fn.crop_mirror_normalize(
                images, mirror=mirrored, dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0]
            )
            pipeline.set_outputs(images)
        pipeline.build()
        return pipeline

    def _batch(self, images: Any, batch: EncodedBatch, stream: torch.cuda.Stream | None) -> Batch:
        """Copies out of DALI's memory, which another batch may soon fill; the copy of a batch takes microseconds."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        side = self.images.crop.size
        pixels = torch.empty((len(batch.samples), 3, side, side), dtype=torch.uint8, device=self.device)
        feed_ndarray(images.as_tensor(), pixels, cuda_stream=stream)
        labels = torch.from_numpy(self.images.shards.labels[batch.samples])
        if stream is not None:
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        return Batch(pixels, labels)

    def _tell(self, batch: EncodedBatch) -> None:
        if batch.by_pillow and not self._told:
            self._told = True
            _log.warning(
                "%d of the %d images of a batch, %s first, are no plain JPEGs: Pillow decodes such images in the "
                "data workers",
                len(batch.by_pillow),
                len(batch.samples),
                self.images.shards.where(batch.by_pillow[0]),
            )


class _Feed:
    """What DALI calls for the next batch; `queued` holds those that it has and that were not handed out."""

    def __init__(self, source: Iterator[EncodedBatch]) -> None:
        self.queued: deque[EncodedBatch] = deque()
        self.failure: Exception | None = None
        self._source = source
        self._waiting: deque[EncodedBatch] = deque()

    def __call__(self) -> tuple[list[Any], np.ndarray, np.ndarray, np.ndarray]:
        from nvidia.dali.tensors import TensorCPU

        if not self._waiting and self.failure is not None:
            raise StopIteration
        try:
            batch = self._waiting.popleft() if self._waiting else next(self._source)
        except StopIteration:
            raise
        except Exception as error:  # it belongs to a batch that comes after those in the queue
            self.failure = error
            raise StopIteration from None
        self.queued.append(batch)
        # Views: DALI reads what the worker wrote, and holds on to it until it has. As tensors of its own, of which it
        # takes hundreds a batch in half of the time.
        joined, ends = batch.files.numpy(), batch.ends.tolist()
        files = [TensorCPU(joined[start:end]) for start, end in itertools.pairwise([0, *ends])]
        return files, batch.first, batch.last, batch.mirrored

    def begin_again(self, first: EncodedBatch) -> None:
        """Gives a new pipeline `first` in place of the first batch of the queue, then the others."""
        self.queued.popleft()
        self._waiting.extendleft([*reversed(self.queued), first])
        self.queued.clear()

    def close(self) -> None:
        self._source = iter(())
        self.queued.clear()
        self._waiting.clear()
        self.failure = None


def dali_installed() -> bool:
    """Whether DALI can be imported, without importing it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # there is no package nvidia either
        return False


def decoder_threads() -> int:
    """Threads of a pipeline: this rank's processors, up to `_MOST_THREADS`."""
    return min(_MOST_THREADS, processors())
