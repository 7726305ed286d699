"""One sampler interface for every backend: tokens, images, or a stream from coarse to fine."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.images import to_uint8
from spectralar.kernels import decode
from spectralar.sampling.captured import BUCKETS, CapturedBackend, CapturedPixels
from spectralar.sampling.graphs import Pool
from spectralar.sampling.packing import WeightFormat
from spectralar.sampling.reference import ReferenceBackend
from spectralar.sampling.settings import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer

Integers = Sequence[int] | Tensor
Chosen = Literal["reference", "graph", "fused"]
BackendName = Literal["auto"] | Chosen

_log = logging.getLogger("spectralar")


class Backend(Protocol):
    """Draws a batch of at most `BUCKETS[-1]` images; see `ReferenceBackend`."""

    def steps(
        self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor
    ) -> Generator[Tensor, None, None]: ...

    def draw(self, classes: Tensor, seeds: Tensor, settings: SamplingSettings, prefix: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Request:
    """Checked arguments of a generation of B images, in CPU memory: classes, seeds `[B]` and prefix `[B, m]` int64."""

    classes: Tensor
    seeds: Tensor
    settings: SamplingSettings
    prefix: Tensor
    length: int

    def split(self, size: int) -> list[Request]:
        """Requests of at most `size` images; one at least, which may be empty."""
        parts = zip(self.classes.split(size), self.seeds.split(size), self.prefix.split(size), strict=True)
        return [Request(c, s, self.settings, p, self.length) for c, s, p in parts]


@dataclass(frozen=True)
class SamplerStep:
    """One step of a stream: all tokens so far `[B, n]`, and the pictures that they make."""

    tokens: Tensor
    tokenizer: SpectralTokenizer | None

    def images(self) -> Tensor:
        """Decodes the tokens so far: `[B, 3, S, S]` uint8."""
        with torch.inference_mode():
            return to_uint8(_required(self.tokenizer).decode(self.tokens))


class Sampler:
    """Draws tokens and pictures from a trained generator.

    Every image has its own seed: the same (class, seed, settings) gives the same tokens in any batch and at any place
    in it, because the noise of a draw is a function of (seed, position, code) alone. Where logits of different batches
    differ by rounding, as in bf16, two nearly equal scores may change places.

    Lists may have any length; more than 1,024 images are drawn one batch after the other.

    Args:
        generator: the model, put into evaluation mode.
        tokenizer: needed for pictures; must agree with the generator on tokens and codebook size.
        backend: `reference`, eager PyTorch; `graph`, plain PyTorch recorded in CUDA graphs; `fused`, kernels of our own
            recorded likewise; `auto`, by device. On a CPU nothing is recorded.
        weights: `same`, in the generator's dtype; `fp8`, eight bits a weight in the matrix products of steps, with a
            scale for each output channel, and arithmetic in the generator's dtype. What is drawn changes then, and
            `weight_error` says by how much. For `graph`, and `fused` on GPUs of compute capability 8.9 or above. It is
            for few rows: above 8 rows (one an image, two with guidance) times tokens of a group `fused` reads a copy of
            the same numbers in the generator's dtype, made when first needed, which is no faster than `same`. In 16
            bits both together take one and a half times the memory of `same`, 411 MB more than fp8 alone for d16.

    Attributes:
        backend: the backend in use, never `auto`; chosen again when the generator moves or changes its dtype.
        backend_reason: why it is.
        weights: as given.

    Raises:
        ValueError: an unknown backend or format of weights, or one that cannot run this generator or on this GPU, or
            models that do not fit.
    """

    backend: Chosen
    backend_reason: str

    def __init__(
        self,
        generator: SpectralGenerator,
        tokenizer: SpectralTokenizer | None = None,
        *,
        backend: BackendName = "auto",
        weights: WeightFormat = "same",
    ) -> None:
        if backend not in ("auto", *get_args(Chosen)):
            raise ValueError(f"backend must be one of auto, {', '.join(get_args(Chosen))}, not {backend!r}")
        if weights not in get_args(WeightFormat):
            raise ValueError(f"weights must be one of {', '.join(get_args(WeightFormat))}, not {weights!r}")
        if tokenizer is not None:
            for name in ("tokens", "codebook_size"):
                ours, theirs = getattr(generator.config, name), getattr(tokenizer.config, name)
                if ours != theirs:
                    raise ValueError(f"generator and tokenizer disagree on {name}: {ours} and {theirs}")
            tokenizer.eval()
        self.generator, self.tokenizer = generator.eval(), tokenizer
        self.weights, self._asked = weights, backend
        self._place: tuple[torch.device, torch.dtype] | None = None
        self._prepare()

    def stream(
        self,
        classes: Integers,
        seeds: Integers,
        settings: SamplingSettings | None = None,
        *,
        prefix: Tensor | None = None,
        length: int | None = None,
    ) -> Iterator[SamplerStep]:
        """Yields a `SamplerStep` after every group of tokens, coarse to fine.

        Args:
            classes: B class numbers in 0..classes; the number `classes` itself means "no class".
            seeds: B integers, one per image.
            settings: guidance and filters; None is plain sampling.
            prefix: `[B, m]` tokens to start from, 0 <= m <= N.
            length: stop after this many tokens, 1..N (the paper's truncation); None draws all.

        Raises:
            TypeError, ValueError: counts that differ, or values out of range; raised before any work.
            torch.OutOfMemoryError: a recorded backend needs more memory than is free; raised at the first step, before
                anything is allocated, with the numbers.
        """
        return self._stream(self.check(classes, seeds, settings, prefix=prefix, length=length))

    def sample_tokens(
        self,
        classes: Integers,
        seeds: Integers,
        settings: SamplingSettings | None = None,
        *,
        prefix: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Tokens `[B, length]` int64; arguments and errors as `stream`."""
        return self.draw(self.check(classes, seeds, settings, prefix=prefix, length=length))

    def generate(
        self,
        classes: Integers,
        seeds: Integers,
        settings: SamplingSettings | None = None,
        *,
        prefix: Tensor | None = None,
        length: int | None = None,
    ) -> Tensor:
        """Pictures `[B, 3, S, S]` uint8; arguments and errors as `stream`."""
        _required(self.tokenizer)
        return self.pictures(self.sample_tokens(classes, seeds, settings, prefix=prefix, length=length))

    def check(
        self,
        classes: Integers,
        seeds: Integers,
        settings: SamplingSettings | None = None,
        *,
        prefix: Tensor | None = None,
        length: int | None = None,
    ) -> Request:
        """What `draw` takes; arguments and errors as `stream`."""
        config = self.generator.config
        settings = settings or SamplingSettings()
        class_tensor, seed_tensor = _integers(classes, "classes"), _integers(seeds, "seeds")
        batch = len(class_tensor)
        if len(seed_tensor) != batch:
            raise ValueError(f"seeds must be as many as classes ({batch}), not {len(seed_tensor)}")
        if batch and not (0 <= int(class_tensor.min()) and int(class_tensor.max()) <= config.classes):
            raise ValueError(
                f"classes must be in 0..{config.classes - 1}, or {config.classes} for no class, "
                f"not {int(class_tensor.min())}..{int(class_tensor.max())}"
            )
        if settings.top_k > config.codebook_size:
            raise ValueError(f"top_k must be at most the codebook size {config.codebook_size}, not {settings.top_k}")
        length = config.tokens if length is None else length
        if not 1 <= length <= config.tokens:
            raise ValueError(f"length must be 1..{config.tokens}, not {length}")
        return Request(class_tensor, seed_tensor, settings, self._checked_prefix(prefix, batch, length), length)

    def draw(self, request: Request) -> Tensor:
        """Tokens `[B, length]` int64 of a checked request."""
        return torch.cat([self._last(part) for part in request.split(BUCKETS[-1])])

    def pictures(self, tokens: Tensor) -> Tensor:
        """Pictures `[B, 3, S, S]` uint8 of tokens `[B, n]` that this sampler drew; values are not checked.

        Raises:
            ValueError: the sampler has no tokenizer.
        """
        tokenizer = _required(self.tokenizer)
        self._prepare()
        return SamplerStep(tokens, tokenizer).images() if self._pixels is None else self._pixels(tokens)

    def warm(self, batches: Sequence[int] = (1,), settings: SamplingSettings | None = None) -> float:
        """Draws once for each batch size, so that all is compiled and recorded; gives the seconds that it took.

        Args:
            batches: numbers of images.
            settings: as they will be used: whether with guidance, and its filters and temperature.
        """
        began = time.perf_counter()
        for batch in batches:
            tokens = self.sample_tokens([self.generator.config.classes] * batch, [0] * batch, settings)
            (tokens if self.tokenizer is None else self.pictures(tokens)).cpu()
        return time.perf_counter() - began

    def _stream(self, request: Request) -> Iterator[SamplerStep]:
        self._prepare()
        with ExitStack() as stack:
            # All parts go on together, each in buffers of its own.
            parts = [stack.enter_context(closing(self._steps(part))) for part in request.split(BUCKETS[-1])]
            for together in zip(*parts, strict=True):
                tokens = torch.cat([tokens[:, : request.length] for tokens in together])
                if tokens.shape[1] == request.length:
                    break
                yield SamplerStep(tokens, self.tokenizer)
        # The buffers are free by now: who waits for the last step may never ask for another.
        yield SamplerStep(tokens, self.tokenizer)

    def _last(self, part: Request) -> Tensor:
        self._prepare()
        if part.length == self.generator.config.tokens:
            return self._backend.draw(part.classes, part.seeds, part.settings, part.prefix)
        with closing(self._steps(part)) as steps:
            tokens = next(tokens for tokens in steps if tokens.shape[1] >= part.length)
            return tokens[:, : part.length].clone()

    def _steps(self, part: Request) -> Generator[Tensor, None, None]:
        return self._backend.steps(part.classes, part.seeds, part.settings, part.prefix)

    def _prepare(self) -> None:
        """Chooses the backend for the generator as it is now."""
        place = self.generator.device, self.generator.positions.dtype
        if place == self._place:
            return
        self.backend, self.backend_reason = choose_backend(self.generator, self._asked, self.weights)
        self._backend: Backend
        self._pixels: CapturedPixels | None = None
        if self.backend == "reference":
            self._backend = ReferenceBackend(self.generator)
        else:
            pool = Pool(self.generator.device)
            self._backend = CapturedBackend(self.generator, self.backend, pool, self.weights)
            if self.tokenizer is not None:
                self._pixels = CapturedPixels(self.tokenizer, pool)
        self._place = place
        _log.info("sampling backend %s: %s", self.backend, self.backend_reason)

    def _checked_prefix(self, prefix: Tensor | None, batch: int, length: int) -> Tensor:
        if prefix is None:
            return torch.empty(batch, 0, dtype=torch.int64)
        if prefix.dim() != 2 or len(prefix) != batch or prefix.dtype.is_floating_point or prefix.shape[1] > length:
            raise ValueError(
                f"prefix must be integers of shape [{batch}, m] with m in 0..{length}, "
                f"not {prefix.dtype} {list(prefix.shape)}"
            )
        prefix = prefix.long().cpu()
        highest = self.generator.config.codebook_size - 1
        if prefix.numel() and not (0 <= int(prefix.min()) and int(prefix.max()) <= highest):
            raise ValueError(f"prefix tokens must be in 0..{highest}, not {int(prefix.min())}..{int(prefix.max())}")
        return prefix


def choose_backend(
    generator: SpectralGenerator, asked: BackendName, weights: WeightFormat = "same"
) -> tuple[Chosen, str]:
    """The backend that samples from a generator where it is now, and the reason in words.

    Raises:
        ValueError: `fused` was asked for, and its kernels cannot run this generator on this GPU, or with these weights
            nothing that was asked for can.
    """
    config, device, fp8 = generator.config, generator.device, weights == "fp8"
    on_gpu, obstacle = device.type == "cuda", ""
    if on_gpu:
        obstacle = decode.obstacle(device, generator.positions.dtype, length=config.tokens, group=config.group, fp8=fp8)
    if fp8 and asked == "reference":
        raise ValueError("weights fp8 are for the backends graph, fused and auto, not reference")
    # Plain PyTorch is slower with fp8 than with other weights: nobody who does not ask for it wants that.
    if fp8 and obstacle and asked in ("auto", "fused"):
        raise ValueError(
            f"weights fp8 cannot be used by the fused kernels: {obstacle}; use weights same, or backend graph"
        )
    if asked == "fused" and obstacle:
        raise ValueError(f"backend fused cannot run this generator: {obstacle}; use graph or auto")
    if asked != "auto":
        return asked, "asked for" if on_gpu else f"asked for; nothing is recorded on {device}"
    if not on_gpu and fp8:
        return "graph", f"the one for fp8 weights here, though nothing is recorded on {device}"
    if not on_gpu:
        return "reference", f"graphs and kernels need a GPU, and the generator is on {device}"
    if obstacle:
        return "graph", f"the fused kernels cannot run this generator: {obstacle}"
    return "fused", "the fastest on a GPU"


def _required(tokenizer: SpectralTokenizer | None) -> SpectralTokenizer:
    if tokenizer is None:
        raise ValueError("this sampler has no tokenizer: build it with Sampler(generator, tokenizer)")
    return tokenizer


def _integers(values: Integers, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a list of 64-bit integers, not {values!r}") from error
    if tensor.numel() == 0:
        tensor = tensor.long().reshape(-1) if tensor.dim() <= 1 else tensor
    if tensor.dim() != 1 or tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be a list of 64-bit integers, not {values!r}")
    return tensor.long().cpu()
