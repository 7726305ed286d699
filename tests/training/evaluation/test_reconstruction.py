"""The tokenizer's report against slow counts, on a tokenizer whose tokens and pictures are known."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spectralar.config import TokenizerConfig
from spectralar.kernels.dct import dct2, idct2, spectral_targets
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.evaluation.reconstruction import band_energy, default_lengths, evaluate_tokenizer


def decibels(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    errors = (a.double().numpy() - b.double().numpy()) ** 2
    return [min(99.0, -10 * math.log10(e)) if e > 0 else 99.0 for e in errors.mean((1, 2, 3))]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (9, 3, 16, 16), dtype=torch.uint8)


@pytest.fixture
def tokens() -> torch.Tensor:
    """Position 2 is constant, position 0 has three codes, two of them equally often at the top."""
    columns = [[5, 5, 5, 5, 2, 2, 2, 2, 9], list(range(9)), [7] * 9, [0, 1] * 4 + [0]]
    return torch.tensor(columns).T.contiguous()


@pytest.fixture
def known(
    tokenizer: SpectralTokenizer, images: torch.Tensor, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> SpectralTokenizer:
    """A tokenizer that gives each of `images` its row of `tokens`, and whose pictures differ with every token."""
    with torch.no_grad():
        # Fresh weights are so small that no token would matter; and fp64 tells small costs from rounding.
        for name, weight in tokenizer.double().decoder.named_parameters():
            if weight.dim() == 2 and name.startswith(("vit.blocks", "from_code", "head.to_patch")):
                weight.mul_(16)
    rows = {image.numpy().tobytes(): row for image, row in zip(images.float() / 255, tokens, strict=True)}

    def encode(batch: torch.Tensor) -> torch.Tensor:
        return torch.stack([rows[image.numpy().tobytes()] for image in batch])

    monkeypatch.setattr(tokenizer, "encode", encode)
    return tokenizer


def test_psnr_by_hand(known: SpectralTokenizer, images: torch.Tensor, tokens: torch.Tensor) -> None:
    report = evaluate_tokenizer(known, [(images,)], lengths=(1, 3, 4))
    floats = images.float() / 255
    assert report.images == 9 and report.lengths == (1, 3, 4)
    for i, n in enumerate(report.lengths):
        rebuilt = known.decode(tokens[:, :n]).detach()
        target = spectral_targets(floats, known.config.cutoffs[n - 1])
        assert report.psnr[i] == pytest.approx(np.mean(decibels(rebuilt.clamp(0, 1), floats)), rel=1e-5)
        assert report.psnr_target[i] == pytest.approx(np.mean(decibels(rebuilt, target)), rel=1e-5)
        if n < 4:
            assert report.psnr_ideal[i] == pytest.approx(np.mean(decibels(target.clamp(0, 1), floats)), rel=1e-5)
    assert report.psnr_ideal[-1] == 99.0
    flat = floats.mean((2, 3), keepdim=True).expand_as(floats)
    assert report.psnr_mean_colour == pytest.approx(np.mean(decibels(flat, floats)), rel=1e-5)


def test_codes_against_a_slow_count(known: SpectralTokenizer, images: torch.Tensor, tokens: torch.Tensor) -> None:
    report = evaluate_tokenizer(known, [(images,)])

    def bits(values: list[int]) -> float:
        return -sum(c / len(values) * math.log2(c / len(values)) for c in Counter(values).values())

    columns = tokens.T.tolist()
    assert report.distinct == tuple(len(set(column)) for column in columns) == (3, 9, 1, 2)
    assert report.entropy == pytest.approx([bits(column) for column in columns], abs=1e-6)
    assert report.entropy[2] == 0
    everything = [value for column in columns for value in column]
    assert report.codes_used == len(set(everything))
    assert report.perplexity == pytest.approx(2 ** bits(everything), rel=1e-6)
    assert report.drop_cost == ()


def test_drop_cost_is_the_psnr_lost_and_zero_where_constant(
    known: SpectralTokenizer, images: torch.Tensor, tokens: torch.Tensor
) -> None:
    floats = images.float() / 255
    report = evaluate_tokenizer(known, [(images,)], costs=True)
    assert len(report.drop_cost) == 4 and report.drop_cost[2] == 0.0
    assert min(abs(report.drop_cost[i]) for i in (0, 1, 3)) > 4e-5

    def mean(rows: torch.Tensor) -> float:
        return float(np.mean(decibels(known.decode(rows).detach().clamp(0, 1), floats)))

    for position, column in enumerate(tokens.T.tolist()):
        most = max(Counter(column).values())
        changed = []
        for code in (c for c, count in Counter(column).items() if count == most):
            silent = tokens.clone()
            silent[:, position] = code
            changed.append(mean(tokens) - mean(silent))
        # Among equally frequent codes any may be taken.
        assert any(report.drop_cost[position] == pytest.approx(c, abs=4e-6) for c in changed)
    short = evaluate_tokenizer(known, [(images,)], lengths=(1,), costs=True)
    assert short.drop_cost == pytest.approx(report.drop_cost, abs=1e-6)


def test_bands_divide_the_mean_square() -> None:
    images = torch.randn(2, 3, 16, 16)
    energy = band_energy(images, (1, 2, 4, 16))
    torch.testing.assert_close(energy.sum(1), images.double().square().mean((1, 2, 3)), rtol=1e-5, atol=0)
    for u, v, band in ((0, 0, 0), (1, 0, 1), (1, 1, 1), (2, 3, 2), (0, 4, 3), (15, 15, 3)):
        coefficients = torch.zeros(1, 3, 16, 16)
        coefficients[0, 1, u, v] = 3.0
        energy = band_energy(idct2(coefficients), (1, 2, 4, 16))[0]
        assert energy[band] == pytest.approx(9 / (3 * 16 * 16), rel=1e-5)
        assert energy.sum() == pytest.approx(energy[band].item(), rel=1e-5)


def test_energies_of_images_reconstructions_and_errors(
    known: SpectralTokenizer, images: torch.Tensor, tokens: torch.Tensor
) -> None:
    report = evaluate_tokenizer(known, [(images,)])
    floats, rebuilt = images.float() / 255, known.decode(tokens).detach()
    for found, pictures in (
        (report.energy, floats), (report.energy_rebuilt, rebuilt), (report.energy_error, rebuilt - floats)
    ):  # fmt: skip
        assert found == pytest.approx(band_energy(pictures, known.config.cutoffs).mean(0).tolist(), rel=1e-5)


@pytest.mark.parametrize("normalize", [True, False])
def test_spread_and_distance_to_the_code(
    tokenizer_config: TokenizerConfig, images: torch.Tensor, normalize: bool
) -> None:
    tokenizer = SpectralTokenizer(replace(tokenizer_config, normalize_codes=normalize)).eval()
    report = evaluate_tokenizer(tokenizer, [(b,) for b in images.split(4)])
    latents = tokenizer.encoder(images.float() / 255).detach().double()
    codes = tokenizer.codebook.detach().double()
    if normalize:
        latents, codes = F.normalize(latents, dim=-1), F.normalize(codes, dim=-1)
    assert report.spread == pytest.approx(latents.var(0, correction=0).sum(-1).tolist(), rel=1e-4, abs=1e-9)
    nearest = (latents[:, :, None] - codes).square().sum(-1).min(-1).values
    assert report.code_distance == pytest.approx(nearest.mean(0).tolist(), rel=1e-4)


def test_shuffle_and_band_costs_against_slow_ones(
    known: SpectralTokenizer, images: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Another image's code is drawn as often as the position has it; the band of a token is the one it adds."""
    floats = images.float() / 255
    report = evaluate_tokenizer(known, [(images,)], costs=True)
    rank = (torch.arange(9, dtype=torch.float64) * 0.6180339887498949 % 1 * 9).long()
    full = known.decode(tokens).detach()
    edges = (0, *known.config.cutoffs)
    frequency = torch.arange(16)
    radius = torch.maximum(frequency[:, None], frequency)
    for position in range(4):
        others = tokens.clone()
        others[:, position] = tokens[:, position].sort().values[rank]
        lost = np.mean(decibels(full.clamp(0, 1), floats)) - np.mean(
            decibels(known.decode(others).detach().clamp(0, 1), floats)
        )
        assert report.shuffle_cost[position] == pytest.approx(lost, abs=4e-6)
        inside = (radius >= edges[position]) & (radius < edges[position + 1])
        shuffled = known.decode(others).detach()

        def error(rebuilt: torch.Tensor, inside: torch.Tensor = inside) -> float:
            return float(dct2(rebuilt - floats)[..., inside].double().square().sum())

        assert report.band_shuffle_cost[position] == pytest.approx(
            10 * math.log10(error(shuffled) / error(full)), abs=4e-6
        )
        costs = []
        for code in tokens[:, position].unique().tolist():
            silent = tokens.clone()
            silent[:, position] = code
            costs.append(10 * math.log10(error(known.decode(silent).detach()) / error(full)))
        assert any(report.band_drop_cost[position] == pytest.approx(c, abs=4e-6) for c in costs)
    assert report.shuffle_cost[2] == pytest.approx(0, abs=1e-12) and report.band_drop_cost[2] == pytest.approx(
        0, abs=1e-12
    )
    assert min(abs(report.shuffle_cost[i]) for i in (0, 1, 3)) > 4e-5
    assert min(abs(report.band_drop_cost[i]) for i in (0, 1, 3)) > 4e-5
    assert min(abs(report.band_shuffle_cost[i]) for i in (0, 1, 3)) > 4e-5


def test_costs_on_the_first_images_only(known: SpectralTokenizer, images: torch.Tensor) -> None:
    report = evaluate_tokenizer(known, [(b,) for b in images.split(2)], costs=True, cost_images=5)
    whole = evaluate_tokenizer(known, [(images,)], costs=True)
    assert report.images == 9 and report.psnr == pytest.approx(whole.psnr, abs=1e-4)
    # The codes that take a token's place are still those of all images.
    five = known.decode(known.encode(images.float() / 255)[:5]).detach().clamp(0, 1)
    assert report.drop_cost != pytest.approx(whole.drop_cost, abs=1e-4)
    silent = known.encode(images.float() / 255)[:5]
    silent[:, 3] = 0  # the most frequent of the last column
    lost = np.mean(decibels(five, images[:5].float() / 255)) - np.mean(
        decibels(known.decode(silent).detach().clamp(0, 1), images[:5].float() / 255)
    )
    assert report.drop_cost[3] == pytest.approx(lost, abs=4e-6)


def test_the_size_of_batches_changes_nothing(known: SpectralTokenizer, images: torch.Tensor) -> None:
    whole = asdict(evaluate_tokenizer(known, [(images,)], costs=True))
    for size in (1, 4):
        parts = asdict(evaluate_tokenizer(known, [(b, None) for b in images.split(size)], costs=True))
        for name, value in whole.items():
            # Matrix products of another batch size round differently: 1e-4 dB is 23 millionths of an error.
            assert parts[name] == pytest.approx(value, abs=1e-4), name


def test_floating_and_8_bit_images_are_one(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    assert evaluate_tokenizer(tokenizer, [(images,)]) == evaluate_tokenizer(tokenizer, [(images.float() / 255,)])


def test_plain_images_give_finite_figures(tokenizer: SpectralTokenizer) -> None:
    """The mean colour of a plain image is the image: endless PSNR, counted as 99 dB."""
    report = evaluate_tokenizer(tokenizer, [(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8),)], costs=True)
    assert report.psnr_mean_colour == 99.0 and report.psnr_ideal == (99.0, 99.0)
    assert report.drop_cost == (0.0,) * 4
    json.dumps(asdict(report), allow_nan=False)


def test_no_images_is_an_error(tokenizer: SpectralTokenizer) -> None:
    with pytest.raises(ValueError, match="batches holds no images"):
        evaluate_tokenizer(tokenizer, [])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, (1,)), (4, (1, 4)), (5, (1, 4, 5)), (32, (1, 4, 8, 16, 32)), (64, (1, 4, 8, 16, 32, 48, 64))],
)
def test_default_lengths(tokens: int, expected: tuple[int, ...]) -> None:
    assert default_lengths(tokens) == expected
