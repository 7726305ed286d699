"""The tokenizer's report against slow counts, on a tokenizer whose tokens and pictures are known."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch

from spectralar.kernels.dct import spectral_targets
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.evaluation.reconstruction import default_lengths, evaluate_tokenizer


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
    """A tokenizer that gives each of `images` its row of `tokens`."""
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
    report = evaluate_tokenizer(known, [(images,)], drop_cost=True)
    assert len(report.drop_cost) == 4 and report.drop_cost[2] == 0.0

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
        assert any(report.drop_cost[position] == pytest.approx(c, abs=1e-4) for c in changed)
    short = evaluate_tokenizer(known, [(images,)], lengths=(1,), drop_cost=True)
    assert short.drop_cost == pytest.approx(report.drop_cost, abs=1e-6)


def test_the_size_of_batches_changes_nothing(known: SpectralTokenizer, images: torch.Tensor) -> None:
    whole = asdict(evaluate_tokenizer(known, [(images,)], drop_cost=True))
    for size in (1, 4):
        parts = asdict(evaluate_tokenizer(known, [(b, None) for b in images.split(size)], drop_cost=True))
        for name, value in whole.items():
            # Matrix products of another batch size round differently: 1e-4 dB is 23 millionths of an error.
            assert parts[name] == pytest.approx(value, abs=1e-4), name


def test_floating_and_8_bit_images_are_one(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    assert evaluate_tokenizer(tokenizer, [(images,)]) == evaluate_tokenizer(tokenizer, [(images.float() / 255,)])


def test_plain_images_give_finite_figures(tokenizer: SpectralTokenizer) -> None:
    """The mean colour of a plain image is the image: endless PSNR, counted as 99 dB."""
    report = evaluate_tokenizer(tokenizer, [(torch.full((2, 3, 16, 16), 255, dtype=torch.uint8),)], drop_cost=True)
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
