"""Which sample comes when: the order of an endless run of epochs, shared by all training loaders.

The order is a function of (seed, epoch) and the position of a loader is one integer, the number of batches handed out.
Workers, prefetching and ranks only divide the work, so none of them can change what a model sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np

_STREAMS = {"order": 1, "augmentation": 2, "crops": 3}


def random_stream(seed: int, use: Literal["order", "augmentation", "crops"], *place: int) -> np.random.Generator:
    """A generator that depends on `seed`, what it is used for and `place` only; different uses never share numbers."""
    return np.random.default_rng((seed, _STREAMS[use], *place))


def check_share(rank: int, world: int) -> None:
    """Raises ValueError unless `rank` is one of `world` ranks."""
    if world < 1:
        raise ValueError(f"world must be positive, not {world}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0..{world - 1}, not {rank}")


class EpochOrder:
    """Indices of the samples of every batch, for one rank.

    Epoch e is a permutation drawn from (seed, e). It is cut into global batches of `batch * world` samples, of which
    each rank takes its consecutive part, so the global batches depend on `batch * world` only. The rest of an epoch
    that fills no global batch is left out; it differs from epoch to epoch.

    Args:
        samples: size of the set.
        batch: samples per rank and step.
        seed: seed of the permutations, not negative.
        shuffle: False keeps every epoch in the order of the set.
        rank: this rank.
        world: number of ranks.

    Raises:
        ValueError: a value outside its limits, or a set smaller than one global batch.
    """

    def __init__(self, samples: int, batch: int, *, seed: int, shuffle: bool, rank: int, world: int) -> None:
        check_share(rank, world)
        if batch < 1:
            raise ValueError(f"batch must be positive, not {batch}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, not {seed}")
        if samples < batch * world:
            raise ValueError(
                f"the set has {samples} samples, less than one global batch of {batch} x {world} ranks; "
                f"batch may be at most {samples // world * world}, of all ranks together"
            )
        self.samples, self.batch, self.seed, self.shuffle = samples, batch, seed, shuffle
        self.rank, self.world = rank, world
        self.steps_per_epoch = samples // (batch * world)
        self._permutation = lru_cache(maxsize=2)(self._draw_permutation)

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and int64 sample indices `[batch]` of this rank's batch number `step` since the start of training."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = (within * self.world + self.rank) * self.batch
        return epoch, self._permutation(epoch)[start : start + self.batch]

    def _draw_permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.samples)
        return random_stream(self.seed, "order", epoch).permutation(self.samples)


class Position:
    """Place of a loader in its endless stream, and the saved form of that place.

    `step` counts the batches handed out, never those only prefetched. A saved place is the same for all ranks.
    """

    def __init__(self, order: EpochOrder, digest: str) -> None:
        self.order, self.digest = order, digest
        self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Batches per epoch and rank."""
        return self.order.steps_per_epoch

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, from 0."""
        return self.step // self.order.steps_per_epoch

    def state_dict(self) -> dict[str, Any]:
        """The place as plain values; `load_state_dict` continues with exactly the next batch."""
        return {"step": self.step, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch at which `state` was taken, also in the middle of an epoch.

        Raises:
            ValueError: the state is of another set, batch, world, seed or order, which would silently mix epochs.
        """
        expected = self._identity()
        missing = [name for name in ("step", *expected) if name not in state]
        if missing:
            raise ValueError(f"loader state lacks {', '.join(missing)}")
        different = [f"{n} {state[n]!r} (here {value!r})" for n, value in expected.items() if state[n] != value]
        if different:
            raise ValueError(f"loader state is of another run: {', '.join(different)}")
        if not isinstance(state["step"], int) or state["step"] < 0:
            raise ValueError(f"loader state: step must be a count, not {state['step']!r}")
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        order = self.order
        names = ("batch", "world", "seed", "shuffle")
        return {"digest": self.digest, **{name: getattr(order, name) for name in names}}
