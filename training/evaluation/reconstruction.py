"""What a tokenizer's tokens are worth: PSNR of every prefix, and per position how much a token says and does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.images import psnr, to_float
from spectralar.kernels.dct import dct2, spectral_targets
from spectralar.kernels.vq import code_usage, lookup, perplexity
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.distributed import ALONE, Ranks

_MOST = 99.0
_LEAST_ERROR = 1e-12  # of a band, so that the loss in dB of a perfect one is finite
_VALUES = 2**25  # of pictures decoded at once


@dataclass(frozen=True)
class TokenizerReport:
    """Figures over one set of images; the PSNR of an image counts at most 99 dB, so that means are finite.

    Band n is the frequencies that I'_n has and I'_(n-1) has not: those for which token n is there. Energies are mean
    squares of pixels in [0, 1], as the squared error behind a PSNR, so that those of all bands sum to the whole.

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
        spread: per position, variance over images of the latent as it is compared with codes (of unit length where
            codes are), summed over its coordinates: 0 where all images have one latent.
        code_distance: per position, mean squared distance of that latent to its code.
        energy: per band, of the images, which are also the targets of all N tokens.
        energy_rebuilt: per band, of the reconstructions from all N tokens.
        energy_error: per band, of their difference.
        drop_cost: per position, PSNR in dB lost from all N tokens when the token is replaced by the position's most
            frequent code, so that it says nothing; this and the next three are empty when not measured.
        shuffle_cost: the same when the token is replaced by another image's, drawn from the position's own codes.
        band_drop_cost: per position, what dropping costs in the token's own band: the ratio of that band's error
            without and with the token, in dB.
        band_shuffle_cost: the same for another image's token.
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
    spread: tuple[float, ...]
    code_distance: tuple[float, ...]
    energy: tuple[float, ...]
    energy_rebuilt: tuple[float, ...]
    energy_error: tuple[float, ...]
    drop_cost: tuple[float, ...] = ()
    shuffle_cost: tuple[float, ...] = ()
    band_drop_cost: tuple[float, ...] = ()
    band_shuffle_cost: tuple[float, ...] = ()


def default_lengths(tokens: int) -> tuple[int, ...]:
    """Prefix lengths worth showing: 1, 4, 8, 16, then every 16, and all tokens."""
    return tuple(sorted({n for n in (1, 4, 8, *range(16, tokens, 16)) if n < tokens} | {tokens}))


@torch.inference_mode()
def evaluate_tokenizer(
    tokenizer: SpectralTokenizer,
    batches: Iterable[Any],
    *,
    lengths: Sequence[int] | None = None,
    costs: bool = False,
    cost_images: int = 512,
    ranks: Ranks = ALONE,
) -> TokenizerReport:
    """Measures a tokenizer on every image of `batches`, those of all ranks together.

    Args:
        tokenizer: in evaluation mode.
        batches: tuples whose first entry is images `[B, 3, S, S]`, uint8 or floating in [0, 1].
        lengths: prefix lengths; None is `default_lengths`.
        costs: also measure what every single token is worth, at the price of 2 N more decodings of an image.
        cost_images: the costs are measured on at most so many images, the first of every rank.
        ranks: the processes that measure together; all get the same report. Image i of rank r counts as image
            i * world + r of the set.

    Raises:
        ValueError: no images on any rank.
    """
    config = tokenizer.config
    chosen = tuple(lengths or default_lengths(config.tokens))
    tokens_seen: list[Tensor] = []
    images_seen: list[Tensor] = []
    # Sums over images of every figure, and their number; of every position or band; the codes' counts [N, K].
    sums = torch.zeros(2 + 3 * len(chosen), dtype=torch.float64)
    energies = torch.zeros(3, config.tokens, dtype=torch.float64)
    latents = torch.zeros(config.tokens, config.code_dim + 2, dtype=torch.float64)
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
        rebuilt = tokenizer.decode(tokens)
        energies += torch.stack(
            [band_energy(x, config.cutoffs).sum(0).cpu() for x in (images, rebuilt, rebuilt - images)]
        )
        latents += _latent_sums(tokenizer, images, tokens).cpu()
        usage += torch.stack([code_usage(column, config.codebook_size) for column in tokens.unbind(1)]).cpu()
    total, *rest = ranks.sum(sums).tolist()
    if not total:
        raise ValueError("batches holds no images")
    usage, energies, latents = ranks.sum(usage), ranks.sum(energies) / total, ranks.sum(latents) / total
    mean_colour, *by_length = (value / total for value in rest)
    measured: tuple[tuple[float, ...], ...] = ((), (), (), ())
    if costs:
        measured = _costs(tokenizer, tokens_seen, images_seen, usage, cost_images, ranks)
    overall = usage.sum(0)
    variance = latents[:, -2] - latents[:, :-2].square().sum(1)
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
        spread=tuple(variance.clamp_min(0).tolist()),
        code_distance=tuple(latents[:, -1].tolist()),
        energy=tuple(energies[0].tolist()),
        energy_rebuilt=tuple(energies[1].tolist()),
        energy_error=tuple(energies[2].tolist()),
        drop_cost=measured[0],
        shuffle_cost=measured[1],
        band_drop_cost=measured[2],
        band_shuffle_cost=measured[3],
    )


def band_energy(images: Tensor, cutoffs: Sequence[int]) -> Tensor:
    """Mean square of the part of every image that lies in each band; the bands of an image sum to its mean square.

    Args:
        images: `[B, C, S, S]` floating.
        cutoffs: the N cutoffs, rising to S; band n has the frequencies with cutoff n-1 <= max(u, v) < cutoff n.

    Returns:
        `[B, N]` float64.
    """
    squares = dct2(images).double().square().sum(1)  # [B, S, S]
    last = torch.tensor(cutoffs, device=images.device) - 1
    boxes = squares.cumsum(1).cumsum(2)[:, last, last]  # energy below every cutoff
    return torch.diff(boxes, dim=1, prepend=torch.zeros_like(boxes[:, :1])) / images[0].numel()


def _psnr(images: Tensor, targets: Tensor) -> Tensor:
    return psnr(images, targets).clamp(max=_MOST)


def _psnr_unclamped(images: Tensor, targets: Tensor) -> Tensor:
    """PSNR against sub-images, whose values may leave [0, 1]."""
    return (-10 * (images - targets).square().flatten(1).mean(1).log10()).clamp(max=_MOST)


def _latent_sums(tokenizer: SpectralTokenizer, images: Tensor, tokens: Tensor) -> Tensor:
    """Sums over images `[N, D + 2]`: the latents, their squared lengths, their squared distances to the codes."""
    normalize = tokenizer.config.normalize_codes
    latents = tokenizer.encoder(images).double()
    if normalize:
        latents = F.normalize(latents, dim=-1)
    distances = (lookup(tokens, tokenizer.codebook, normalize=normalize) - latents).square().sum(-1)
    return torch.cat([latents, latents.square().sum(-1, keepdim=True), distances[..., None]], dim=-1).sum(0)


def _costs(
    tokenizer: SpectralTokenizer,
    tokens: list[Tensor],
    images: list[Tensor],
    usage: Tensor,
    limit: int,
    ranks: Ranks,
) -> tuple[tuple[float, ...], ...]:
    """Drop and shuffle cost, and both in the token's own band, from the codes' counts `usage` [N, K]."""
    positions, device = len(usage), tokenizer.device
    silent = usage.argmax(1).to(device)
    below = usage.cumsum(1).to(device)  # [N, K]
    # Rows of sums over images: PSNR without the token, error of its band without it, both with another's, error of the
    # band with all tokens; then the PSNR with all tokens and the number of images.
    sums = torch.zeros(6, positions, dtype=torch.float64)
    seen = ranks.rank
    for chunk, batch in zip(tokens, images, strict=True):
        kept = len(range(seen, limit, ranks.world)[: len(chunk)])
        if not kept:
            break
        chunk, truth = chunk[:kept], to_float(batch[:kept].to(device))
        rebuilt = tokenizer.decode(chunk)
        places = seen + ranks.world * torch.arange(kept, device=device)
        sums[0:2] += torch.stack(_without(tokenizer, chunk, truth, silent.expand(kept, -1)))
        sums[2:4] += torch.stack(_without(tokenizer, chunk, truth, _another(below, places)))
        sums[4] += band_energy(rebuilt - truth, tokenizer.config.cutoffs).sum(0).cpu()
        sums[5, :2] += torch.tensor([float(_psnr(rebuilt, truth).double().sum()), kept], dtype=torch.float64)
        seen += ranks.world * kept
    dropped, band_dropped, shuffled, band_shuffled, band, (full, total, *_) = ranks.sum(sums)
    overall = [(full - without) / total for without in (dropped, shuffled)]
    own = band / total + _LEAST_ERROR
    in_band = [10 * ((without / total + _LEAST_ERROR) / own).log10() for without in (band_dropped, band_shuffled)]
    return tuple(tuple(x.tolist()) for x in (*overall, *in_band))


def _another(below: Tensor, places: Tensor) -> Tensor:
    """For every image a code of another `[B, N]`, in the end as often each as `below` [N, K], the sums of counts, says.

    Images take the codes at quantiles that wander by the golden ratio, so that the choice depends on an image's place
    in the set alone.
    """
    quantiles = places.double() * 0.6180339887498949 % 1
    wanted = (quantiles * below[0, -1]).long().expand(len(below), -1).contiguous()  # [N, B]
    return torch.searchsorted(below, wanted, right=True).T


def _without(
    tokenizer: SpectralTokenizer, tokens: Tensor, images: Tensor, replacement: Tensor
) -> tuple[Tensor, Tensor]:
    """With one token at a time replaced: sums over images of the PSNR `[N]` and of the error in that token's band."""
    count, positions = tokens.shape
    found: list[tuple[Tensor, Tensor]] = []
    for part in torch.arange(positions, device=tokens.device).split(max(1, _VALUES // images.numel())):
        variants = tokens.repeat(len(part), 1, 1)  # [P, B, N]
        variants[part - part[0], :, part] = replacement[:, part].T
        rebuilt = tokenizer.decode(variants.flatten(0, 1))
        truth = images.repeat(len(part), 1, 1, 1)
        energy = band_energy(rebuilt - truth, tokenizer.config.cutoffs).unflatten(0, (-1, count)).sum(1)  # [P, N]
        found.append(
            (
                _psnr(rebuilt, truth).double().unflatten(0, (-1, count)).sum(1).cpu(),
                energy.gather(1, part[:, None]).cpu(),
            )
        )
    return torch.cat([a for a, _ in found]), torch.cat([b[:, 0] for _, b in found])
