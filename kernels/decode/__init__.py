"""One cached step of VAR's transformer: from the tokens of the last group to the logits of the next.

`decode_step` runs the plain PyTorch reference today, on any device.
"""

from __future__ import annotations

from . import reference
from .state import DecodeState, DecodeWeights

__all__ = ["DecodeState", "DecodeWeights", "decode_step"]


def decode_step(weights: DecodeWeights, state: DecodeState, *, until: tuple[int, str] | None = None) -> None:
    """Writes the logits of the group at `state.first` (SpectralAR eq. 8 with a key/value cache).

    Args:
        weights: see `DecodeWeights`.
        state: see `DecodeState`; every buffer of activations, and the group's keys and values, are written.
        until: (block, operation of `reference.OPS`) to stop after, for looking at its result.
    """
    reference.decode_step(weights, state, until)
