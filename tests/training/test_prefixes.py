"""Prefix lengths: their distribution, one of each part, and without chance where asked."""

from __future__ import annotations

import pytest
import torch

from spectralar.training.prefixes import PrefixConfig

CPU = torch.device("cpu")


def counts(config: PrefixConfig, tokens: int, samples: int = 120_000) -> torch.Tensor:
    """Shares of the lengths 0..N over evenly spread quantiles."""
    quantiles = (torch.arange(samples, dtype=torch.float64) + 0.5) / samples
    lengths = config.lengths_at(quantiles, tokens)
    assert lengths.dtype == torch.int64
    return lengths.bincount(minlength=tokens + 1) / samples


@pytest.mark.parametrize("tokens", [1, 4, 7, 64])
@pytest.mark.parametrize("full", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("tilt", [0.0, 1.0, 2.5])
def test_the_distribution(tokens: int, full: float, tilt: float) -> None:
    got = counts(PrefixConfig(tilt=tilt, full=full), tokens)
    edges = (torch.arange(tokens + 1, dtype=torch.float64) / tokens) ** (1 + tilt)
    expected = torch.cat([torch.zeros(1), (1 - full) * edges.diff()])
    expected[-1] += full
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=2e-5)


def test_the_defaults_are_uniform() -> None:
    torch.testing.assert_close(counts(PrefixConfig(), 64)[1:], torch.full((64,), 1 / 64), rtol=0, atol=2e-5)


def test_the_ends_of_the_quantiles() -> None:
    ends = torch.tensor([0.0, 1.0 - 2**-24, 1.0])
    for config in (PrefixConfig(), PrefixConfig(tilt=1.0), PrefixConfig(full=0.3)):
        assert config.lengths_at(ends, 64).tolist() == [1, 64, 64]
    assert PrefixConfig(full=1.0).lengths_at(ends, 64).tolist() == [64, 64, 64]


def test_the_share_of_full_prefixes_may_be_a_tensor() -> None:
    quantiles = torch.rand(1000)
    for full in (0.0, 0.3, 1.0):
        expected = PrefixConfig(tilt=1.0, full=full).lengths_at(quantiles, 64)
        assert torch.equal(PrefixConfig(tilt=1.0).lengths_at(quantiles, 64, full=torch.tensor(full)), expected)


def test_every_image_draws_from_every_part() -> None:
    quantiles = PrefixConfig(per_image=4).draw_quantiles(500, CPU)
    assert quantiles.shape == (4, 500)
    assert ((4 * quantiles).floor() == torch.arange(4)[:, None]).all()
    inside = 4 * quantiles - torch.arange(4)[:, None]
    assert inside.mean(1) == pytest.approx([0.5] * 4, abs=0.06) and inside.std() == pytest.approx(12**-0.5, abs=0.02)
    assert not torch.equal(inside[0], inside[1])


def test_even_quantiles_are_even_and_without_chance() -> None:
    state = torch.get_rng_state()
    config = PrefixConfig(per_image=2)
    quantiles = config.even_quantiles(64, CPU)
    assert torch.equal(quantiles, config.even_quantiles(64, CPU)) and torch.equal(torch.get_rng_state(), state)
    assert quantiles.shape == (2, 64)
    gaps = torch.cat([quantiles.flatten().sort().values, torch.ones(1)]).diff()
    assert gaps.max() < 3 / 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_image": 0}, "per_image must be at least 1, not 0"),
        ({"tilt": -0.5}, "tilt must not be negative, not -0.5"),
        ({"full": 1.5}, r"full must be in \[0, 1\], not 1.5"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixConfig(**changes)  # type: ignore[arg-type]
