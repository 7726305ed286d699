"""One sampler interface for every backend: tokens, images, or a stream from coarse to fine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.images import to_uint8
from spectralar.sampling.reference import ReferenceBackend
from spectralar.sampling.settings import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer

Integers = Sequence[int] | Tensor


@dataclass(frozen=True)
class SamplerStep:
    """One step of a stream: all tokens so far `[B, n]`, and the pictures that they make."""

    tokens: Tensor
    tokenizer: SpectralTokenizer | None

    def images(self) -> Tensor:
        """Decodes the tokens so far: `[B, 3, S, S]` uint8."""
        if self.tokenizer is None:
            raise ValueError("this sampler has no tokenizer: build it with Sampler(generator, tokenizer)")
        with torch.inference_mode():
            return to_uint8(self.tokenizer.decode(self.tokens))


class Sampler:
    """Draws tokens and pictures from a trained generator.

    Every image has its own seed: the same (class, seed, settings) gives the same tokens in any batch and at any place
    in it, because the noise of a draw is a function of (seed, position, code) alone.

    Args:
        generator: the model, put into evaluation mode.
        tokenizer: needed for pictures; must agree with the generator on tokens and codebook size.
        backend: `reference`, eager PyTorch.

    Raises:
        ValueError: an unknown backend, or models that do not fit.
    """

    def __init__(
        self,
        generator: SpectralGenerator,
        tokenizer: SpectralTokenizer | None = None,
        *,
        backend: Literal["reference"] = "reference",
    ) -> None:
        if backend != "reference":
            raise ValueError(f"backend must be reference, not {backend!r}")
        if tokenizer is not None:
            for name in ("tokens", "codebook_size"):
                ours, theirs = getattr(generator.config, name), getattr(tokenizer.config, name)
                if ours != theirs:
                    raise ValueError(f"generator and tokenizer disagree on {name}: {ours} and {theirs}")
            tokenizer.eval()
        self.generator, self.tokenizer = generator.eval(), tokenizer
        self.backend = ReferenceBackend(generator)

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
        """
        config = self.generator.config
        settings = settings or SamplingSettings()
        device = self.generator.device
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
        prefix = self._checked_prefix(prefix, batch, length)
        steps = self.backend.steps(class_tensor.to(device), seed_tensor.to(device), settings, prefix.to(device))
        return self._emit(steps, length)

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
        *_, last = self.stream(classes, seeds, settings, prefix=prefix, length=length)
        return last.tokens

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
        *_, last = self.stream(classes, seeds, settings, prefix=prefix, length=length)
        return last.images()

    def _emit(self, steps: Iterator[Tensor], length: int) -> Iterator[SamplerStep]:
        groups: list[Tensor] = []
        for tokens in steps:
            groups.append(tokens)
            so_far = torch.cat(groups, dim=1)[:, :length]
            yield SamplerStep(so_far, self.tokenizer)
            if so_far.shape[1] == length:
                return

    def _checked_prefix(self, prefix: Tensor | None, batch: int, length: int) -> Tensor:
        if prefix is None:
            return torch.empty(batch, 0, dtype=torch.int64)
        if prefix.dim() != 2 or len(prefix) != batch or prefix.dtype.is_floating_point or prefix.shape[1] > length:
            raise ValueError(
                f"prefix must be integers of shape [{batch}, m] with m in 0..{length}, "
                f"not {prefix.dtype} {list(prefix.shape)}"
            )
        prefix = prefix.long()
        highest = self.generator.config.codebook_size - 1
        if prefix.numel() and not (0 <= int(prefix.min()) and int(prefix.max()) <= highest):
            raise ValueError(f"prefix tokens must be in 0..{highest}, not {int(prefix.min())}..{int(prefix.max())}")
        return prefix


def _integers(values: Integers, name: str) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a list of 64-bit integers, not {values!r}") from error
    if tensor.numel() == 0:
        tensor = tensor.long().reshape(-1) if tensor.dim() <= 1 else tensor
    if tensor.dim() != 1 or tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be a list of 64-bit integers, not {values!r}")
    return tensor.long()
