"""What becomes of an image that cannot be decoded or cut: the next sample of the set takes its place, up to a limit.

The place is taken by image and label together, so no image ever gets another's label, and who takes it depends on the
set alone: not on the order of an epoch, on ranks, on who decodes, or on where a run was interrupted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from spectralar.training.data.images import ImageError
from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.tar_index import ShardError

T = TypeVar("T")
Reasons = dict[int, str]
"""Samples that cannot be read, in the order in which they were met, and why."""

_NAMED = 3

_log = logging.getLogger("spectralar")


def most_unreadable(share: float, samples: int) -> int:
    """The whole number of samples that a share of a set allows."""
    return math.floor(share * samples + 1e-9)


def first_readable(
    shards: ShardSet, index: int, read: Callable[[int], T], most: int, met: Reasons, known: Mapping[int, str]
) -> tuple[int, T]:
    """The first of the samples `index`, `index` + 1, ... (around the end of the set) that can be read, and what it is.

    Args:
        shards: the set.
        index: the sample that was asked for.
        read: gives a sample, or raises ImageError.
        most: samples that may be unreadable; 0 is none.
        met: gets those that are passed over.
        known: samples that are unreadable, whatever `read` does with them.

    Raises:
        ShardError: more than `most` in a row cannot be read.
    """
    for sample in range(index, index + most + 1):
        sample %= len(shards)
        if sample in known:
            met[sample] = known[sample]
            continue
        try:
            return sample, read(sample)
        except ImageError as error:
            met[sample] = str(error)
    raise too_many(shards, met, most)


def too_many(shards: ShardSet, met: Reasons, most: int) -> ShardError:
    """The error that names the first of them."""
    named = "; ".join(f"{shards.where(sample)}: {reason}" for sample, reason in list(met.items())[:_NAMED])
    if not most:
        return ShardError(named)
    return ShardError(
        f"more than {most} of the {len(shards)} images, which max_unreadable allows, cannot be read. The first: {named}"
    )


class Unreadable:
    """Counts the samples of a training stream that could not be read, and warns of each once.

    Args:
        shards: the set.
        most: samples that may be unreadable.
    """

    def __init__(self, shards: ShardSet, most: int) -> None:
        self.shards, self.most = shards, most
        self.reasons: Reasons = {}

    def add(self, met: Reasons) -> None:
        """Counts those that one batch met.

        Raises:
            ShardError: they have become more than `most`; names the first ones.
        """
        for sample, reason in met.items():
            if sample not in self.reasons:
                self.reasons[sample] = reason
                _log.warning("%s: %s; the next image takes its place", self.shards.where(sample), reason)
        if len(self.reasons) > self.most:
            raise too_many(self.shards, self.reasons, self.most)

    def state(self) -> list[list[int | str]]:
        """Samples and reasons as plain values."""
        return [[sample, reason] for sample, reason in self.reasons.items()]

    def load_state(self, state: Iterable[tuple[int, str]]) -> None:
        """Goes on counting from what `state` gave."""
        self.reasons = dict(state)
