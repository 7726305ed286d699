"""What a tokenizer's tokens are worth: PSNR of every prefix, and per position how much a token says and does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralar.images import psnr, to_float
from spectralar.kernels.dct import spectral_targets
from spectralar.kernels.vq import code_usage, perplexity
from spectralar.tokenizer import SpectralTokenizer

_MOST = 99.0


@dataclass(frozen=True)
class TokenizerReport:
    """Figures over one set of images; the PSNR of an image counts at most 99 dB, so that means are finite.

    Attributes:
        images: number of images.
        lengths: the prefix lengths n of the PSNR lists.
        psnr: mean PSNR in dB of the reconstruction from n tokens, against the image.
        psnr_target: the same against the sub-image I'_n.
        psnr_ideal: of the sub-image I'_n itself against the image, the best that n tokens are asked to reach.
        psnr_mean_colour: of predicting every image's mean colour.
        distinct: per position, number of different codes.
        entropy: per position, entropy of the codes in bits.
        codes_used: number of codes used at any position.
        perplexity: exponential of the entropy over all positions.
        drop_cost: per position, PSNR in dB lost from all N tokens when the token is replaced by the position's most
            frequent code, so that it says nothing; empty when not measured.
    """

    images: int
    lengths: tuple[int, ...]
    psnr: tuple[float, ...]
    psnr_target: tuple[float, ...]
    psnr_ideal: tuple[float, ...]
    psnr_mean_colour: float
    distinct: tuple[int, ...]
    entropy: tuple[float, ...]
    codes_used: int
    perplexity: float
    drop_cost: tuple[float, ...] = ()


def default_lengths(tokens: int) -> tuple[int, ...]:
    """Prefix lengths worth showing: 1, 4, 8, 16, then every 16, and all tokens."""
    return tuple(sorted({n for n in (1, 4, 8, *range(16, tokens, 16)) if n < tokens} | {tokens}))


@torch.inference_mode()
def evaluate_tokenizer(
    tokenizer: SpectralTokenizer,
    batches: Iterable[Any],
    *,
    lengths: Sequence[int] | None = None,
    drop_cost: bool = False,
) -> TokenizerReport:
    """Measures a tokenizer on every image of `batches`.

    Args:
        tokenizer: in evaluation mode.
        batches: tuples whose first entry is images `[B, 3, S, S]`, uint8 or floating in [0, 1].
        lengths: prefix lengths; None is `default_lengths`.
        drop_cost: also measure what every single token is worth, at the price of N more decodings.

    Raises:
        ValueError: no images.
    """
    config = tokenizer.config
    chosen = tuple(lengths or default_lengths(config.tokens))
    tokens_seen: list[Tensor] = []
    images_seen: list[Tensor] = []
    sums: dict[str, Tensor] = {}

    def add(name: str, values: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + values.double().sum().cpu()

    for batch in batches:
        images = to_float(batch[0].to(tokenizer.device), size=config.image_size)
        tokens = tokenizer.encode(images)
        tokens_seen.append(tokens)
        images_seen.append(batch[0])
        add("mean", _psnr(images.mean((2, 3), keepdim=True).expand_as(images), images))
        for n in chosen:
            rebuilt = tokenizer.decode(tokens[:, :n])
            target = spectral_targets(images, config.cutoffs[n - 1])
            add(f"image{n}", _psnr(rebuilt, images))
            add(f"target{n}", _psnr_unclamped(rebuilt, target))
            add(f"ideal{n}", _psnr(target, images))
    if not tokens_seen:
        raise ValueError("batches holds no images")
    tokens = torch.cat(tokens_seen)
    total = len(tokens)

    costs: tuple[float, ...] = ()
    if drop_cost:
        full = float(sums[f"image{config.tokens}"]) / total if config.tokens in chosen else None
        costs = _drop_costs(tokenizer, tokens, images_seen, full)
    usage = [code_usage(column, config.codebook_size) for column in tokens.unbind(1)]
    overall = torch.stack(usage).sum(0)
    return TokenizerReport(
        images=total,
        lengths=chosen,
        psnr=tuple(float(sums[f"image{n}"]) / total for n in chosen),
        psnr_target=tuple(float(sums[f"target{n}"]) / total for n in chosen),
        psnr_ideal=tuple(float(sums[f"ideal{n}"]) / total for n in chosen),
        psnr_mean_colour=float(sums["mean"]) / total,
        distinct=tuple(int((counts > 0).sum()) for counts in usage),
        entropy=tuple(float(perplexity(counts).log2()) for counts in usage),
        codes_used=int((overall > 0).sum()),
        perplexity=float(perplexity(overall)),
        drop_cost=costs,
    )


def _psnr(images: Tensor, targets: Tensor) -> Tensor:
    return psnr(images, targets).clamp(max=_MOST)


def _psnr_unclamped(images: Tensor, targets: Tensor) -> Tensor:
    """PSNR against sub-images, whose values may leave [0, 1]."""
    return (-10 * (images - targets).square().flatten(1).mean(1).log10()).clamp(max=_MOST)


def _drop_costs(
    tokenizer: SpectralTokenizer, tokens: Tensor, images: Sequence[Tensor], full: float | None
) -> tuple[float, ...]:
    silent = tokens.mode(dim=0).values
    chunks = tokens.split([len(batch) for batch in images])

    def mean_psnr(position: int | None) -> float:
        total = 0.0
        for chunk, batch in zip(chunks, images, strict=True):
            if position is not None:
                chunk = chunk.clone()
                chunk[:, position] = silent[position]
            total += float(_psnr(tokenizer.decode(chunk), to_float(batch.to(tokens.device))).double().sum())
        return total / len(tokens)

    reference = mean_psnr(None) if full is None else full
    return tuple(reference - mean_psnr(position) for position in range(tokens.shape[1]))
