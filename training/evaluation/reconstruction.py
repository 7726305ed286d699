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
from spectralar.training.distributed import ALONE, Ranks

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
    ranks: Ranks = ALONE,
) -> TokenizerReport:
    """Measures a tokenizer on every image of `batches`, those of all ranks together.

    Args:
        tokenizer: in evaluation mode.
        batches: tuples whose first entry is images `[B, 3, S, S]`, uint8 or floating in [0, 1].
        lengths: prefix lengths; None is `default_lengths`.
        drop_cost: also measure what every single token is worth, at the price of N more decodings.
        ranks: the processes that measure together; all get the same report.

    Raises:
        ValueError: no images on any rank.
    """
    config = tokenizer.config
    chosen = tuple(lengths or default_lengths(config.tokens))
    tokens_seen: list[Tensor] = []
    images_seen: list[Tensor] = []
    # Sums over images of every figure, and their number; the codes' counts [N, K].
    sums = torch.zeros(2 + 3 * len(chosen), dtype=torch.float64)
    usage = torch.zeros(config.tokens, config.codebook_size, dtype=torch.int64)
    for batch in batches:
        images = to_float(batch[0].to(tokenizer.device), size=config.image_size)
        tokens = tokenizer.encode(images)
        tokens_seen.append(tokens)
        images_seen.append(batch[0])
        figures = [torch.ones(len(images)), _psnr(images.mean((2, 3), keepdim=True).expand_as(images), images)]
        for n in chosen:
            rebuilt = tokenizer.decode(tokens[:, :n])
            target = spectral_targets(images, config.cutoffs[n - 1])
            figures += [_psnr(rebuilt, images), _psnr_unclamped(rebuilt, target), _psnr(target, images)]
        sums += torch.stack([values.double().sum().cpu() for values in figures])
        usage += torch.stack([code_usage(column, config.codebook_size) for column in tokens.unbind(1)]).cpu()
    total, *rest = ranks.sum(sums).tolist()
    if not total:
        raise ValueError("batches holds no images")
    usage = ranks.sum(usage)
    mean_colour, *by_length = (value / total for value in rest)
    costs: tuple[float, ...] = ()
    if drop_cost:
        costs = _drop_costs(tokenizer, tokens_seen, images_seen, usage.argmax(1).tolist(), ranks)
    overall = usage.sum(0)
    return TokenizerReport(
        images=int(total),
        lengths=chosen,
        psnr=tuple(by_length[0::3]),
        psnr_target=tuple(by_length[1::3]),
        psnr_ideal=tuple(by_length[2::3]),
        psnr_mean_colour=mean_colour,
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
    tokenizer: SpectralTokenizer, tokens: list[Tensor], images: list[Tensor], silent: list[int], ranks: Ranks
) -> tuple[float, ...]:
    """`silent` is every position's most frequent code."""
    # Sums of all tokens' PSNR, then without each position; then the number of images.
    sums = torch.zeros(len(silent) + 2, dtype=torch.float64)
    for chunk, batch in zip(tokens, images, strict=True):
        truth = to_float(batch.to(chunk.device))
        variants = [chunk]
        for position, code in enumerate(silent):
            variants.append(chunk.clone())
            variants[-1][:, position] = code
        values = [_psnr(tokenizer.decode(variant), truth).double().sum().cpu() for variant in variants]
        sums += torch.stack([*values, torch.tensor(float(len(chunk)), dtype=torch.float64)])
    full, *without, total = ranks.sum(sums).tolist()
    return tuple((full - value) / total for value in without)
