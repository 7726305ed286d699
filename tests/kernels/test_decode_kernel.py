"""The persistent decoding step against its plain twins, operation by operation."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from spectralar.kernels.decode import DecodeState, DecodeWeights, reference
from spectralar.kernels.decode.config import StepConfig
from spectralar.kernels.decode.launch import launch
from tests.kernels.launches_decode import empty_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Without a GPU the interpreter runs the operations one at a time, as two programs.
PROGRAMS = None if DEVICE == "cuda" else 2
# Everything in a second block, and what the first leaves.
OPS = [(0, "fc2"), *((1, op) for op in reference.OPS)]


def random_weights(width: int, dtype: torch.dtype = torch.float32, **sizes: Any) -> DecodeWeights:
    weights = empty_weights(width, dtype=dtype, device=DEVICE, **sizes)
    for field in fields(weights):
        tensor = getattr(weights, field.name)
        if tensor is None:  # scales of fp8
            continue
        fan_in = tensor.shape[-1] if field.name in ("qkv", "proj", "fc1", "fc2", "head") else 4
        tensor.copy_(torch.randn(tensor.shape) / fan_in**0.5)
    weights.query_scale.copy_(torch.rand(weights.query_scale.shape) * 4 + 1)
    return weights


def random_state(weights: DecodeWeights, images: int, rows: int, first: int) -> DecodeState:
    """A state at position `first`; cells of the cache that nobody has written, and tokens not drawn, hold nonsense."""
    state = DecodeState.allocate(weights, images, rows)
    for field in fields(state):
        tensor = getattr(state, field.name)
        if field.name in ("start", "modulations", "head_modulation"):
            tensor.copy_(torch.randn(tensor.shape) / 2)
        elif tensor.is_floating_point():
            tensor.fill_(float("nan"))
    state.first.fill_(first)
    state.tokens.fill_(2**62)
    state.tokens[:, :first] = torch.randint(0, weights.codes, (images, first))
    for cache in (state.keys, state.values):
        cache[:, :, :, :first] = torch.randn(cache[:, :, :, :first].shape)
    return state


def copy(state: DecodeState) -> DecodeState:
    return DecodeState(**{field.name: getattr(state, field.name).clone() for field in fields(state)})


def widened(instance: Any) -> Any:
    """The same in fp64."""
    tensors = {field.name: getattr(instance, field.name) for field in fields(instance)}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return replace(instance, **{k: v.double() if v.is_floating_point() else v.clone() for k, v in tensors.items()})


def assert_within_budget(found: DecodeState, plain: DecodeState, exact: DecodeState, place: object) -> None:
    """Every buffer is off by at most twice what plain PyTorch is, and some rounding; the same cells are written."""
    for field in fields(found):
        if field.name in ("mailboxes", "turn"):
            continue
        ours, theirs, right = (getattr(s, field.name) for s in (found, plain, exact))
        if not ours.is_floating_point():
            assert torch.equal(ours, theirs), f"{place}: {field.name} changed"
            continue
        written = right.isfinite()
        assert torch.equal(ours.isfinite(), written), f"{place}: other cells of {field.name} are written"
        if not written.any():
            continue
        ours, theirs, right = (t[written].double() for t in (ours, theirs, right))
        rounding = torch.finfo(getattr(found, field.name).dtype).eps * right.abs().max().item()
        error, budget = (ours - right).abs().max().item(), 2 * (theirs - right).abs().max().item() + 2 * rounding
        assert error <= budget, f"{place}: {field.name} is off by {error:.3g}, allowed are {budget:.3g}"


def check(weights: DecodeWeights, state: DecodeState, until: tuple[int, str] | None, **options: Any) -> None:
    found, plain, exact = copy(state), copy(state), widened(state)
    launch(weights, found, until, programs=PROGRAMS, **options)
    reference.decode_step(weights, plain, until)
    reference.decode_step(widened(weights), exact, until)
    assert_within_budget(found, plain, exact, until)


# Triton's interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("until", [*OPS, None])
def test_every_operation(until: tuple[int, str] | None, dtype: torch.dtype) -> None:
    weights = random_weights(64, dtype, heads=2, length=6, codes=50)
    check(weights, random_state(weights, 1, 2, first=3), until)


@pytest.mark.parametrize(("rows", "first"), [(2, 0), (2, 12), (1, 4)])
def test_groups(rows: int, first: int) -> None:
    weights = random_weights(64, depth=1, heads=4, group=4, length=16, codes=33)
    check(weights, random_state(weights, 1, rows, first), None)


@pytest.mark.parametrize(("images", "rows", "first"), [(2, 4, 4), (3, 3, 0)])
def test_several_images(images: int, rows: int, first: int) -> None:
    weights = random_weights(64, depth=1, heads=1, length=5, codes=20)
    check(weights, random_state(weights, images, rows, first), None)


@pytest.mark.parametrize(
    "config",
    [
        StepConfig(warps=2, ahead=1),  # weights asked for one tile before
        StepConfig(warps=4, ahead=100),  # the weights of more than a block at once
    ],
)
def test_every_launch(config: StepConfig) -> None:
    weights = random_weights(64, depth=1, length=3, codes=70)
    check(weights, random_state(weights, 1, 2, 1), None, config=config)


def test_slices_that_are_not_full() -> None:
    # 320 inputs are a slice of 256 and a quarter of one.
    weights = random_weights(320, depth=1, length=3, codes=9)
    check(weights, random_state(weights, 1, 2, 1), (0, "proj"))


def test_a_row_depends_on_nothing_else() -> None:
    weights = random_weights(64, depth=1, heads=2, length=4, codes=30)
    state = random_state(weights, 2, 4, 2)
    other = copy(state)
    other.tokens[1] = 0
    other.modulations[:, 3] += 1
    other.keys[:, 3] += 1
    for each in (state, other):
        launch(weights, each, programs=PROGRAMS)
    # Rows 0 and 2 draw image 0.
    assert torch.equal(state.logits[::2], other.logits[::2])
    assert not torch.equal(state.logits[3], other.logits[3])
    # Alone, without the rows of image 1, as well.
    alone = DecodeState.allocate(weights, 1, 2)
    state = random_state(weights, 2, 4, 2)
    for field in fields(alone):
        part, whole = getattr(alone, field.name), getattr(state, field.name)
        if field.name in ("mailboxes", "turn"):
            continue
        if field.name in ("modulations", "keys", "values"):
            part.copy_(whole[:, ::2])
        elif whole.shape != part.shape:
            part.copy_(whole[: 2 * len(part) : 2])
        else:
            part.copy_(whole)
    for each in (state, alone):
        launch(weights, each, programs=PROGRAMS)
    assert torch.equal(state.logits[::2], alone.logits)
