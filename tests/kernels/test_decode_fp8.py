"""fp8 weights: how they are rounded, and that the plain step with them is the definition."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from spectralar.kernels.decode import DecodeWeights, batch_kernel, dequantize, quantize, quantized, reference, widened
from spectralar.kernels.decode.state import MATRICES
from tests.kernels.launches_decode_batch import random_weights
from tests.kernels.test_decode_batch import assert_close, check, copy, double, random_state


def dequantized(weights: DecodeWeights) -> DecodeWeights:
    """What fp8 weights stand for, in fp64 and without scales."""
    wide, changes = double(weights), {}
    for name in MATRICES:
        changes[name] = getattr(weights, name).double() * getattr(weights, f"{name}_scale").double()[..., None]
        changes[f"{name}_scale"] = None
    return dataclasses.replace(wide, **changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_nearest_numbers_of_a_row_s_scale(dtype: torch.dtype) -> None:
    layers = [(torch.randn(20, 300, dtype=torch.float64) * 10.0 ** -(i + 1)).to(dtype) for i in range(2)]
    values, scales = quantize(layers)
    assert values.shape == (2, 20, 300) and values.dtype == torch.float8_e4m3fn
    assert scales.shape == (2, 20) and scales.dtype == torch.float32
    assert (values.float().abs().amax(-1) == 448).all(), "the whole range is used"
    everything = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = everything[everything.isfinite()].unique()
    for layer, value, scale in zip(layers, values, scales, strict=True):
        target = layer.double() / scale.double()[:, None]
        nearest = (target[..., None] - numbers).abs().amin(-1)
        # Quotients are rounded to fp32 before.
        assert ((value.double() - target).abs() <= nearest + 448 * 2**-23).all()
        large = layer.abs() >= layer.abs().amax(-1, keepdim=True) * 2.0**-14
        off = (dequantize(value, scale).double() - layer.double()).abs()
        assert (off <= layer.double().abs() / 16 * (1 + 1e-5))[large].all()


@pytest.mark.parametrize("row", [0.0, 1e-45, 1e-38, 1e-4, 3e38])
def test_rows_of_nothing_and_of_extremes(row: float) -> None:
    matrix = torch.full((2, 32), row)
    matrix[0] = torch.linspace(-1, 1, 32)
    values, scale = quantize([matrix])
    assert (scale > 0).all() and scale.isfinite().all() and values.float().isfinite().all()
    found = dequantize(values[0], scale[0])
    # A scale is a normal number, and in units of the smallest the spacing is a sixteenth or less.
    torch.testing.assert_close(found[1], matrix[1], rtol=1e-6, atol=2.0**-130)
    torch.testing.assert_close(found[0], matrix[0], rtol=1 / 16, atol=1e-5)


def test_a_row_s_numbers_depend_on_no_other() -> None:
    matrix = torch.randn(3, 64)
    other = matrix.clone()
    other[0] *= 1e4
    (values, scale), (others, scales) = quantize([matrix]), quantize([other])
    assert torch.equal(values[0, 1:].view(torch.uint8), others[0, 1:].view(torch.uint8))
    assert torch.equal(scale[0, 1:], scales[0, 1:]) and scale[0, 0] != scales[0, 0]


def test_only_matrices_change() -> None:
    weights = random_weights(2, 64, 4, 6, 2, 33, torch.bfloat16)
    found = quantized(weights)
    for field in dataclasses.fields(weights):
        own, new = getattr(weights, field.name), getattr(found, field.name)
        if field.name in MATRICES:
            assert new.dtype == torch.float8_e4m3fn and new.shape == own.shape and new.is_contiguous()
        elif field.name.removesuffix("_scale") in MATRICES:
            assert own is None and new.shape == getattr(weights, field.name.removesuffix("_scale")).shape[:-1]
        else:
            assert new is own
    assert found.dtype == torch.bfloat16
    assert found.scale("fc1", 1) is not None and weights.scale("fc1", 1) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_plain_step_is_the_definition(dtype: torch.dtype) -> None:
    weights = quantized(random_weights(3, 128, 2, 6, 2, 50, dtype))
    exact = copy(random_state(weights, 2, 2), torch.float64)
    same = copy(exact)
    reference.decode_step(dequantized(weights), exact)
    reference.decode_step(double(weights), same)
    torch.testing.assert_close(same.logits, exact.logits, rtol=0, atol=1e-11)
    found, plain = random_state(weights, 2, 2), random_state(weights, 2, 2)
    reference.decode_step(weights, found)
    # The measure: plain products with the same weights rounded to the dtype.
    rounded = {name: getattr(dequantized(weights), name).to(dtype) for name in MATRICES}
    scales = dict.fromkeys(f"{name}_scale" for name in MATRICES)
    reference.decode_step(dataclasses.replace(weights, **rounded, **scales), plain)
    for name in ("x", "logits"):
        assert_close(getattr(found, name), getattr(plain, name), getattr(exact, name), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_widened_weights_are_the_same_numbers(dtype: torch.dtype) -> None:
    weights = quantized(random_weights(2, 64, 4, 6, 2, 33, dtype))
    # Every number that there is.
    everything = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = everything[everything.float().isfinite()]
    weights.head.view(-1)[: len(finite)] = finite
    found = widened(weights)
    for field in dataclasses.fields(weights):
        own, new = getattr(weights, field.name), getattr(found, field.name)
        if field.name in MATRICES:
            assert new.dtype == dtype and torch.equal(new.double(), own.double()), field.name
        else:
            assert new is own, field.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_widened_weights_give_the_same_step(dtype: torch.dtype, poisoned_empty: None) -> None:
    weights = quantized(random_weights(2, 64, 4, 6, 2, 33, dtype))
    wide = widened(weights)
    for step in (reference.decode_step, batch_kernel.launch_step):
        found, expected = random_state(weights, 5, 2), random_state(weights, 5, 2)
        step(wide, found)
        step(weights, expected)
        for field in dataclasses.fields(found):
            ours, theirs = getattr(found, field.name), getattr(expected, field.name)
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), field.name
    check(wide, random_state(weights, 5, 2), None)
