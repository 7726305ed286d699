"""Which frequencies belong to which token: the cutoff schedules omega_1 < ... < omega_N (SpectralAR eq. 7 and 9)."""

from __future__ import annotations

import heapq
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Literal

FrequencyMapping = Literal["nonuniform", "uniform"]

# Equation 9 as a profile: of N tokens, the share that each segment takes, and the share of the H frequencies that the
# segment covers: 32 tokens of width 1, 16 of width 2, 16 of width 12.
_PROFILES = {
    "nonuniform": tuple((Fraction(n, 64), Fraction(h, 256)) for n, h in ((32, 32), (16, 32), (16, 192))),
    "uniform": ((Fraction(1), Fraction(1)),),
}


@lru_cache(maxsize=64)
def spectral_cutoffs(tokens: int, size: int, mapping: FrequencyMapping = "nonuniform") -> tuple[int, ...]:
    """Cutoffs (omega_1, ..., omega_N): sub-image n keeps the lowest omega_n x omega_n frequencies.

    `nonuniform` is equation 9 for 64 tokens at 256 pixels. For any other pair its profile (half of the tokens cover
    1/8 of the frequencies, the next quarter another 1/8, the last quarter the rest) is stretched and the `size`
    frequencies are handed out by D'Hondt's divisor rule: every token gets one, then each further one goes to the token
    with the largest share per frequency held, the latest on ties. Band widths are whole, never shrink along the
    sequence (eq. 7) and sum to `size`. `uniform` is the same rule with equal shares (the ablation of Table 4).

    Args:
        tokens: N, at least 1.
        size: side H of the image in pixels.
        mapping: `nonuniform` or `uniform`.

    Returns:
        N strictly increasing integers that end at `size`, so that I'_N = I.

    Raises:
        ValueError: N < 1, N > H (a token would get no frequency), or an unknown mapping.
    """
    if mapping not in _PROFILES:
        raise ValueError(f"mapping must be nonuniform or uniform, not {mapping!r}")
    if not 1 <= tokens <= size:
        raise ValueError(f"tokens must be 1..size ({size}), one new frequency each at least, not {tokens}")
    shares = _band_shares(tokens, size, _PROFILES[mapping])
    bands = [1] * tokens
    queue = [(-share / 2, -i) for i, share in enumerate(shares)]
    heapq.heapify(queue)
    for _ in range(size - tokens):
        _, negative = queue[0]
        i = -negative
        bands[i] += 1
        heapq.heapreplace(queue, (-shares[i] / (bands[i] + 1), -i))
    cutoffs, total = [], 0
    for band in bands:
        total += band
        cutoffs.append(total)
    return tuple(cutoffs)


def _band_shares(tokens: int, size: int, profile: tuple[tuple[Fraction, Fraction], ...]) -> list[Fraction]:
    """Real-valued band width of each token: differences of the convex, piecewise linear cumulative profile."""

    def covered(position: Fraction) -> Fraction:
        total = Fraction(0)
        for token_share, frequency_share in profile:
            inside = min(position, token_share)
            total += inside / token_share * frequency_share
            position -= inside
        return total

    edges = [size * covered(Fraction(i, tokens)) for i in range(tokens + 1)]
    return [high - low for low, high in pairwise(edges)]


def check_cutoffs(cutoffs: tuple[int, ...], size: int) -> None:
    """Checks a hand-made schedule: positive, strictly increasing, ending at `size`.

    Raises:
        ValueError: naming the first offending pair.
    """
    if not cutoffs or cutoffs[0] < 1:
        raise ValueError(f"cutoffs must start at 1 or more, not {cutoffs[:1]}")
    for i, (low, high) in enumerate(pairwise(cutoffs)):
        if high <= low:
            raise ValueError(f"cutoffs must increase: cutoff {i + 2} is {high} after {low}")
    if cutoffs[-1] != size:
        raise ValueError(f"cutoffs must end at the image size {size}, so that I'_N = I, not at {cutoffs[-1]}")
