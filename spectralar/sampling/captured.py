"""Sampling from CUDA graphs: all steps of a generation in one, or one step that is replayed; the pixels in one more.

Nothing on the host depends on the position, and nothing waits for the GPU. On a CPU the same code runs unrecorded.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from spectralar.generator import SpectralGenerator
from spectralar.images import to_uint8
from spectralar.kernels import decode, vq
from spectralar.kernels.decode import DecodeState, DecodeWeights
from spectralar.kernels.decode import reference as twins
from spectralar.kernels.draw import draw_group
from spectralar.pixels import FusedVQGAN
from spectralar.sampling.graphs import Pool, Recording
from spectralar.sampling.packing import ClassTables, Memory, WeightFormat, begin, class_tables, memory_needed, pack
from spectralar.sampling.settings import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer
from spectralar.tokenizer.heads import ProxyCodeHead

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Sizes of the batches that are recorded; a batch is filled up to the next, and a longer list is cut."""

PIXEL_BATCH = 256
"""The most images whose pixels are made at once: 256 fill a GPU, and the maps of a convolutional head are large."""

Step = Literal["graph", "fused"]
STEPS: dict[Step, Callable[[DecodeWeights, DecodeState], None]] = {
    "graph": twins.decode_step,
    "fused": decode.decode_step,
}
"""How a step is computed: plain PyTorch operations, or fused kernels."""

_KINDS = 8
"""Recorded steps of a batch for different filters and temperatures; a service has few."""


def bucket(images: int) -> int:
    """The size that a batch is filled up to."""
    return BUCKETS[bisect.bisect_left(BUCKETS, images)]


class CapturedBackend:
    """Draws batches of up to 1,024 images from recorded steps; equals `ReferenceBackend` but for rounding.

    It works on a copy of the weights in the order in which steps read them, which is brought up to date before a
    generation when a parameter was replaced, moved or changed in place. Changes that leave no trace, by a CUDA graph or
    through `.data`, need a new sampler.

    Above `decode.config.MAX_ROWS` rows times tokens of a group, fused steps read fp8 weights from a copy in the
    generator's dtype (`decode.widened`), made for the first such batch.

    Args:
        generator: stays on its device and keeps its dtype.
        step: see `STEPS`.
        pool: for the buffers.
        weights: see `Sampler`.
    """

    def __init__(self, generator: SpectralGenerator, step: Step, pool: Pool, weights: WeightFormat = "same") -> None:
        self.generator, self._format = generator, weights
        self._step, self._pool = STEPS[step], pool
        self._lock = threading.Lock()
        self._packed: tuple[DecodeWeights, ClassTables] | None = None
        self._widened: DecodeWeights | None = None
        self._seen: list[tuple[int, int]] = []

    @torch.inference_mode()
    def steps(
        self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor
    ) -> Generator[Tensor, None, None]:
        """See `ReferenceBackend.steps`; the tensors are views of a buffer that the next step changes.

        Raises:
            torch.OutOfMemoryError: the buffers do not fit; raised before they are allocated, with the numbers.
        """
        config = self.generator.config
        self._refresh()
        with self._filled(classes, seeds, settings, prefix) as batch:
            step = batch.step(settings)
            for drawn in range(config.group, config.tokens + 1, config.group):
                step()
                yield batch.state.tokens[: len(classes), :drawn]

    @torch.inference_mode()
    def draw(self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor) -> Tensor:
        """See `ReferenceBackend.draw`; the same tokens as those of `steps`.

        Raises:
            torch.OutOfMemoryError: as `steps`.
        """
        tokens = self._draw(classes, seeds, settings, prefix)
        # To look at all weights takes the host longer than a step: the GPU has begun meanwhile.
        return self._draw(classes, seeds, settings, prefix) if self._refresh() else tokens

    def _draw(self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor) -> Tensor:
        with self._filled(classes, seeds, settings, prefix) as batch:
            batch.generate(settings)
            return batch.state.tokens[: len(classes)].clone()

    @contextmanager
    def _filled(self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor) -> Iterator[_Batch]:
        """Buffers that hold what a generation brings from the host."""
        key = bucket(len(classes)), settings.guidance != 1.0
        with self._pool.take(("tokens", *key), partial(self._allocate, *key)) as batch:
            batch.fill(classes, seeds, settings, prefix)
            yield batch

    def _pack(self, images: int, needed: Memory) -> tuple[DecodeWeights, ClassTables]:
        """The weights as steps of such a batch read them, as they were when they were last looked at."""
        device = self.generator.device
        with self._lock:
            if self._packed is None:
                _check_memory(sum(needed), "weights and buffers", images, device)
                self._seen = _traces(self.generator)
                self._packed = pack(self.generator, self._format), class_tables(self.generator)
            weights, tables = self._packed
            if not needed.widened:
                return weights, tables
            if self._widened is None:
                _check_memory(needed.widened + needed.batch, "weights for many rows and buffers", images, device)
                self._widened = decode.widened(weights)
            return self._widened, tables

    def _refresh(self) -> bool:
        """Packs weights again that have changed; whether any had."""
        seen = _traces(self.generator)
        with self._lock:
            if self._packed is None or seen == self._seen:
                return False
            weights, tables = self._packed
            _overwrite(weights, pack(self.generator, self._format))
            _overwrite(tables, class_tables(self.generator))
            if self._widened is not None:
                _overwrite(self._widened, weights)
            self._seen = seen
            return True

    def _allocate(self, images: int, guided: bool) -> _Batch:
        needed = self._needed(images, guided)
        packed = self._pack(images, needed)
        _check_memory(needed.batch, "buffers", images, self.generator.device)
        return _Batch(*packed, images, guided, self._step)

    def _needed(self, images: int, guided: bool) -> Memory:
        generator = self.generator
        needed = memory_needed(generator.config, images, guided, generator.positions.dtype, self._format)
        # Plain PyTorch converts weights of any dtype.
        return needed if self._step is decode.decode_step else needed._replace(widened=0)


class _Batch:
    """Buffers of a batch with its recorded steps. Row `classes` of a class table, "no class", fills it up."""

    def __init__(
        self,
        weights: DecodeWeights,
        tables: ClassTables,
        images: int,
        guided: bool,
        step: Callable[[DecodeWeights, DecodeState], None],
    ) -> None:
        rows, device = images * (2 if guided else 1), weights.qkv.device
        self._weights, self._tables, self._step = weights, tables, step
        self._no_class = len(tables.start) - 1
        self.state = DecodeState.allocate(weights, images, rows)
        # Images that fill the batch up get no prefix, and a step reads what stands in its place: it must be codes.
        self.state.tokens.zero_()
        # What a generation brings from the host comes in one copy: a copy takes as long as reading a block's weights.
        self._steps, scales = weights.length // weights.group, self.state.logits.dtype
        places = (rows, images, 1, -(-self._steps * scales.itemsize // 8))
        self._numbers = torch.zeros(sum(places), dtype=torch.int64, device=device)
        self._rows, self._seeds, given, bits = self._numbers.split(places)
        self._given, self._scales = given[0], bits.view(scales)[: self._steps]
        # Not pinned: of such memory a copy is done with when it returns, and the next generation may write to it.
        self._host = torch.zeros(sum(places), dtype=torch.int64)
        self._host_rows, self._host_seeds, self._host_given, bits = self._host.split(places)
        self._host_scales = bits.view(scales)[: self._steps]
        self.fill(torch.empty(0), torch.empty(0), SamplingSettings(), torch.empty(0, 0))
        self._many_launches = step is not decode.decode_step or decode.implementation(weights, rows) == "batch"
        # Of a whole generation every step knows its position; 16 bytes apart, as kernels are compiled for such places.
        self._firsts = torch.zeros(self._steps, 2, dtype=torch.int64, device=device)
        self._firsts[:, 0] = torch.arange(0, weights.length, weights.group)
        self._recorded: dict[tuple[SamplingSettings, str], Recording] = {}

    def fill(self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor) -> None:
        """Takes over the images of one generation; those that fill the batch up have no class."""
        self._host_rows.fill_(self._no_class)
        self._host_rows[: len(classes)] = classes
        self._host_seeds[: len(seeds)] = seeds
        self._host_given[0] = prefix.shape[1]
        self._host_scales.copy_(_guidance_scales(settings, self._steps))
        self._numbers.copy_(self._host)
        if prefix.numel():
            self.state.tokens[: len(prefix), : prefix.shape[1]] = prefix.to(self._rows.device)

    def generate(self, settings: SamplingSettings) -> None:
        """All steps with these filters and this temperature, recorded at their first use.

        A graph begins when all of its launches are queued, 5 ms for the 7,364 of d16 with many rows on an H200. There
        one step is replayed, whose launches take the host less time than the GPU.
        """
        if self._many_launches:
            step = self.step(settings)
            for _ in range(self._steps):
                step()
        else:
            self._recording(settings, "generation", self._generate)()

    def step(self, settings: SamplingSettings) -> Recording:
        """One step likewise, which moves on; the first is the next one."""
        recording = self._recording(settings, "step", self._move_on)
        self._begin()
        return recording

    def _recording(self, settings: SamplingSettings, what: str, work: Callable[[SamplingSettings], None]) -> Recording:
        # Guidance is read from a tensor.
        kind = dataclasses.replace(settings, guidance=1.0, guidance_schedule="constant"), what
        if kind not in self._recorded:
            if len(self._recorded) == _KINDS:
                del self._recorded[next(iter(self._recorded))]
            self._begin()
            self._recorded[kind] = Recording(partial(work, kind[0]), self._rows.device)
        return self._recorded[kind]

    def _begin(self) -> None:
        begin(self._tables, self.state, self._rows)

    def _generate(self, settings: SamplingSettings) -> None:
        self._begin()
        for first in self._firsts[:, 0]:
            self._draw(settings, dataclasses.replace(self.state, first=first))

    def _move_on(self, settings: SamplingSettings) -> None:
        self._draw(settings, self.state)
        self.state.first.add_(self._weights.group)

    def _draw(self, settings: SamplingSettings, state: DecodeState) -> None:
        self._step(self._weights, state)
        draw_group(
            state.tokens, state.logits, self._seeds, state.first, self._scales, self._given,
            temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, greedy=settings.greedy,
        )  # fmt: skip


@functools.lru_cache(_KINDS)
def _guidance_scales(settings: SamplingSettings, steps: int) -> Tensor:
    return torch.tensor(settings.guidance_scales(steps), dtype=torch.float64)


class CapturedPixels:
    """Pictures from tokens by the tokenizer's decoder, a graph for each number of images and tokens.

    Graphs read the tokenizer's own weights, so changes in place need nothing; weights that were replaced or moved are
    noticed. The convolutional decoder behind proxy codes is a copy (`FusedVQGAN`), made anew when its weights change in
    any way. A picture may differ in single levels from that of another batch, as products round differently.

    Args:
        tokenizer: decodes the tokens.
        pool: for the buffers.
    """

    def __init__(self, tokenizer: SpectralTokenizer, pool: Pool) -> None:
        self.tokenizer, self._pool = tokenizer, pool
        self._lock = threading.Lock()
        self._seen: list[tuple[int, int]] = []
        self._head: Head | None = None

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """`[B, n]` int64 in 0..codebook_size - 1, not checked, to `[B, 3, S, S]` uint8."""
        head = self._up_to_date()
        places = tuple(place for place, _ in _traces(self.tokenizer))
        parts = []
        for part in tokens.split(PIXEL_BATCH):
            shape = bucket(len(part)), part.shape[1]
            make = partial(_Pixels, self.tokenizer, head, *shape)
            with self._pool.take(("pixels", shape, places, head), make) as batch:
                batch.tokens[: len(part)] = part
                batch.run()
                parts.append(batch.images[: len(part)].clone())
        return torch.cat(parts)

    def _up_to_date(self) -> Head:
        head = self.tokenizer.decoder.head
        seen = _traces(head) if isinstance(head, ProxyCodeHead) else []
        with self._lock:
            if self._head is None or seen != self._seen:
                self._head = _quick(head) if isinstance(head, ProxyCodeHead) else partial(_plain, head)
                self._seen = seen
            return self._head


Head = Callable[[Tensor], Tensor]
"""Features of the decoder `[B, G, G, W]` to pictures `[B, 3, S, S]` uint8."""


def _plain(head: nn.Module, features: Tensor) -> Tensor:
    return to_uint8(head(features))


def _quick(head: ProxyCodeHead) -> Head:
    fused = FusedVQGAN(head.vqgan, head.vqgan.codebook.dtype)
    return lambda features: fused.to_uint8(head.vectors(features))


class _Pixels:
    """Tokens of a batch, and its pictures once `run` is done."""

    images: Tensor

    def __init__(self, tokenizer: SpectralTokenizer, head: Head, images: int, length: int) -> None:
        self._tokenizer, self._head = tokenizer, head
        self.tokens = torch.zeros(images, length, dtype=torch.int64, device=tokenizer.device)
        self.run = Recording(self._decode, tokenizer.device)

    def _decode(self) -> None:
        tokenizer = self._tokenizer
        codes = vq.lookup(self.tokens, tokenizer.codebook, normalize=tokenizer.config.normalize_codes)
        self.images = self._head(tokenizer.decoder.features(codes))


def free_memory(device: torch.device) -> float:
    """Bytes that PyTorch can still allocate; without bound off the GPU, where nobody knows."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _check_memory(needed: int, what: str, images: int, device: torch.device) -> None:
    free = free_memory(device)
    if needed > free:
        raise torch.OutOfMemoryError(
            f"{what} for {images} images at once need {needed / 2**20:,.0f} MiB, "
            f"but {free / 2**20:,.0f} MiB are free on {device}"
        )


def _overwrite(held: DecodeWeights | ClassTables, new: DecodeWeights | ClassTables) -> None:
    """In place, so that graphs that read the old tensors stay valid."""
    for field in dataclasses.fields(held):
        if (tensor := getattr(held, field.name)) is not None:
            tensor.copy_(getattr(new, field.name))


def _traces(module: nn.Module) -> list[tuple[int, int]]:
    """Address and version of every weight: what changes when it is replaced, moved or changed in place."""
    # By hand: `parameters()` takes as long as two steps of a small batch.
    found: list[tuple[int, int]] = []
    stack = [module]
    while stack:
        module = stack.pop()
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                # Tensors made in inference mode have no versions.
                found.append((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version))
        stack += [child for child in module._modules.values() if child is not None]
    return found
