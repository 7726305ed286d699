"""The order of an endless run of epochs, and the saved place in it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectralar.training.data.epochs import EpochOrder, Position, random_stream


def order(samples: int = 23, batch: int = 4, **changes: object) -> EpochOrder:
    return EpochOrder(samples, batch, **{"seed": 0, "shuffle": True, "rank": 0, "world": 1, **changes})


@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 8),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**70),
    shuffle=st.booleans(),
)
def test_an_epoch_visits_each_sample_at_most_once_over_all_ranks(samples, batch, world, seed, shuffle):
    if samples < batch * world:
        with pytest.raises(ValueError, match=f"the set has {samples} samples, less than one global batch"):
            order(samples, batch, world=world)
        return
    ranks = [order(samples, batch, world=world, rank=r, seed=seed, shuffle=shuffle) for r in range(world)]
    steps = samples // (batch * world)
    assert all(r.steps_per_epoch == steps for r in ranks)
    whole = order(samples, batch * world, seed=seed, shuffle=shuffle)
    for step in range(2 * steps):
        parts = [r.indices(step) for r in ranks]
        assert all(epoch == step // steps and len(part) == batch for epoch, part in parts)
        together = np.concatenate([part for _, part in parts])
        np.testing.assert_array_equal(together, whole.indices(step)[1])  # global batches do not depend on the ranks
    for epoch in range(2):
        seen = np.concatenate([whole.indices(epoch * steps + i)[1] for i in range(steps)])
        assert len(set(seen.tolist())) == len(seen) == steps * batch * world
        assert seen.min() >= 0 and seen.max() < samples


def test_epochs_and_seeds_differ_and_repeat():
    def epoch(e: int, **changes: object) -> list[int]:
        o = order(batch=23, **changes)
        return o.indices(e)[1].tolist()

    assert epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=1)
    assert epoch(7) == epoch(7) and sorted(epoch(7)) == list(range(23))
    assert epoch(3, shuffle=False) == list(range(23))


def test_what_is_left_out_differs_from_epoch_to_epoch():
    o = order(batch=22)
    assert len({(set(range(23)) - set(o.indices(e)[1].tolist())).pop() for e in range(40)}) > 10


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 0}, "batch must be positive, not 0"),
        ({"seed": -1}, "seed must not be negative, not -1"),
        ({"world": 0}, "world must be positive, not 0"),
        ({"rank": 2, "world": 2}, r"rank must be 0\.\.1, not 2"),
        ({"rank": -1}, r"rank must be 0\.\.0, not -1"),
        ({"batch": 12, "world": 2}, "the set has 23 samples, less than one global batch of 12 x 2 ranks"),
    ],
)
def test_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        order(**changes)


def test_streams_of_different_use_share_no_numbers():
    draws = [random_stream(5, "order", 1), random_stream(5, "augmentation", 1, 0), random_stream(5, "crops", 1)]
    draws += [random_stream(5, "augmentation", 1, 1), random_stream(6, "order", 1)]
    assert len({d.integers(2**63) for d in draws}) == 5


def test_saved_places():
    position = Position(order(), "digest")
    position.step = 7
    state = position.state_dict()
    assert state == {"step": 7, "digest": "digest", "batch": 4, "world": 1, "seed": 0, "shuffle": True}
    assert position.steps_per_epoch == 5 and position.epoch == 1
    other = Position(order(), "digest")
    other.load_state_dict(state)
    assert other.step == 7
    for name, value in {"digest": "x", "batch": 5, "world": 2, "seed": 1, "shuffle": False}.items():
        with pytest.raises(ValueError, match=rf"state is of another run: {name} {value!r} \(here {state[name]!r}\)"):
            other.load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match="loader state lacks seed"):
        other.load_state_dict({n: v for n, v in state.items() if n != "seed"})
    for step in (-1, "3", 1.5):
        with pytest.raises(ValueError, match="step must be a count"):
            other.load_state_dict({**state, "step": step})
    assert other.step == 7, "a refused state must change nothing"
