"""Cutoff schedules: equation 9 to the letter, and equation 7 for every other pair of sizes."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralar.spectrum import check_cutoffs, spectral_cutoffs

MAPPINGS = ["nonuniform", "uniform"]


def bands(cutoffs: tuple[int, ...]) -> list[int]:
    return [high - low for low, high in pairwise((0, *cutoffs))]


def test_equation_9() -> None:
    """omega_i = i up to 32, then steps of 2 up to 64, then steps of 12 up to 256."""
    expected = [*range(1, 33), *range(34, 65, 2), *range(76, 257, 12)]
    assert len(expected) == 64
    assert spectral_cutoffs(64, 256) == tuple(expected)


def test_the_default_mapping_is_the_paper_s() -> None:
    assert spectral_cutoffs(64, 256) == spectral_cutoffs(64, 256, "nonuniform") != spectral_cutoffs(64, 256, "uniform")


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    size = draw(st.integers(1, 600))
    return draw(st.integers(1, size)), size


@settings(deadline=None, max_examples=150)
@given(pair=sizes(), mapping=st.sampled_from(MAPPINGS))
def test_every_schedule_is_one(pair: tuple[int, int], mapping: Any) -> None:
    tokens, size = pair
    cutoffs = spectral_cutoffs(tokens, size, mapping)
    assert len(cutoffs) == tokens
    assert cutoffs[-1] == size
    assert all(band >= 1 for band in bands(cutoffs))
    assert bands(cutoffs) == sorted(bands(cutoffs)), "eq. 7: bands never shrink"
    assert all(type(cutoff) is int for cutoff in cutoffs)
    check_cutoffs(cutoffs, size)


@settings(deadline=None, max_examples=80)
@given(pair=sizes())
def test_uniform_bands_differ_by_one_at_most(pair: tuple[int, int]) -> None:
    widths = bands(spectral_cutoffs(*pair, "uniform"))
    assert max(widths) - min(widths) <= 1


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_the_profile_scales_with_the_image(factor: int) -> None:
    """Equation 9 stretched: where its bands stay whole they are the paper's, times the factor."""
    stretched = spectral_cutoffs(64, 256 * factor)
    assert stretched == tuple(factor * cutoff for cutoff in spectral_cutoffs(64, 256))


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_the_smallest_schedules(mapping: Any) -> None:
    assert spectral_cutoffs(1, 1, mapping) == (1,)
    assert spectral_cutoffs(1, 9, mapping) == (9,)
    assert spectral_cutoffs(5, 5, mapping) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("tokens, size", [(0, 8), (-1, 8), (9, 8), (1, 0)])
def test_tokens_must_fit_the_size(tokens: int, size: int, mapping: Any) -> None:
    with pytest.raises(ValueError, match=rf"tokens must be 1..size \({size}\), .* not {tokens}"):
        spectral_cutoffs(tokens, size, mapping)


def test_an_unknown_mapping_is_refused() -> None:
    with pytest.raises(ValueError, match="mapping must be nonuniform or uniform, not 'log'"):
        spectral_cutoffs(4, 8, "log")


@pytest.mark.parametrize(
    "cutoffs, message",
    [
        ((), "cutoffs must start at 1 or more, not ()"),
        ((0, 8), "cutoffs must start at 1 or more, not (0,)"),
        ((1, 3, 3, 8), "cutoffs must increase: cutoff 3 is 3 after 3"),
        ((1, 4, 2, 8), "cutoffs must increase: cutoff 3 is 2 after 4"),
        ((1, 7), "cutoffs must end at the image size 8, so that I'_N = I, not at 7"),
        ((1, 9), "cutoffs must end at the image size 8, so that I'_N = I, not at 9"),
    ],
)
def test_errors_of_hand_made_schedules(cutoffs: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_cutoffs(cutoffs, 8)


def test_a_hand_made_schedule_may_shrink_its_bands() -> None:
    check_cutoffs((5, 7, 8), 8)
