"""The modulated layer norm, against its definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.kernels.norm import modulated_layer_norm

SHAPES = [(1, 1, 1), (2, 3, 5), (3, 1, 64), (1, 7, 127), (2, 64, 768)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    x, scale, shift = x.double(), scale.double(), shift.double()
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    scale, shift = (m[:, None] if m.ndim == 2 else m for m in (scale, shift))
    return normed * (1 + scale) + shift


def inputs(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    batch, _, channels = shape
    x = torch.randn(shape, generator=generator) * 3 + 1
    scale, shift = torch.randn(2, batch, channels, generator=generator)
    return x.to(dtype), scale.to(dtype), shift.to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_within_the_budget(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, scale, shift = inputs(shape, dtype)
    expected = exact(x, scale, shift, 1e-6)
    result = modulated_layer_norm(x, scale, shift)
    assert result.dtype == dtype
    plain = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    error, budget = (result.double() - expected).abs(), (plain.double() - expected).abs().max()
    rounding = torch.finfo(dtype).eps * (1 + expected.abs().max())
    assert error.max() <= 2 * budget + rounding
    # The output is rounded once from fp32, so each element is within half a unit of the exact value.
    inner = 32 * torch.finfo(torch.float32).eps * (1 + expected.abs().max())
    assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + inner).all()


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_fp64_stays_fp64(eps: float) -> None:
    x, scale, shift = inputs((2, 3, 33), torch.float64)
    result = modulated_layer_norm(x, scale, shift, eps=eps)
    assert (result - exact(x, scale, shift, eps)).abs().max() <= 1e-13


@pytest.mark.parametrize("form", ["B C", "B 1 C", "B T C", "1 1 C", "1 T C", "B T 1"])
def test_every_form_of_modulation(form: str) -> None:
    sizes = {"B": 2, "T": 3, "C": 5, "1": 1}
    shape = [sizes[letter] for letter in form.split()]
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    scale, shift = torch.randn(2, *shape, dtype=torch.float64)
    result = modulated_layer_norm(x, scale, shift)
    assert (result - exact(x, scale, shift, 1e-6)).abs().max() <= 1e-13


def test_two_dimensions_are_batch_and_channels_even_where_tokens_would_fit() -> None:
    x = torch.zeros(3, 3, 2)
    shift = torch.arange(6.0).view(3, 2)
    assert torch.equal(modulated_layer_norm(x, torch.zeros(3, 2), shift), shift[:, None].expand(3, 3, 2))


def test_constant_rows_give_the_shift() -> None:
    x = torch.full((1, 2, 8), 3.0)
    shift = torch.randn(1, 8)
    assert torch.equal(modulated_layer_norm(x, torch.randn(1, 8), shift), shift[:, None].expand(1, 2, 8))


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x = torch.randn(1, 4, 512) + 1000
    zero = torch.zeros(1, 512)
    expected = exact(x, zero, zero, 1e-6)
    plain = (F.layer_norm(x, (512,), eps=1e-6).double() - expected).abs().max()
    error = (modulated_layer_norm(x, zero, zero).double() - expected).abs().max()
    assert error <= 2 * plain + torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 1)])
def test_zero_sizes(shape: tuple[int, int, int]) -> None:
    x, scale, shift = (tensor.requires_grad_() for tensor in inputs(shape, torch.float32))
    result = modulated_layer_norm(x, scale, shift)
    assert result.shape == shape
    result.sum().backward()
    assert scale.grad is not None and torch.equal(scale.grad, torch.zeros_like(scale))


@pytest.mark.parametrize("form", [(2, 5), (2, 1, 5), (1, 3, 1)])
def test_gradcheck(form: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(form, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(form, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(modulated_layer_norm, (x, scale, shift))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_within_the_budget(dtype: torch.dtype) -> None:
    leaves = inputs((2, 16, 96), dtype)
    cotangent = torch.randn(2, 16, 96, generator=torch.Generator().manual_seed(3)).to(dtype)

    def gradients(call: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        output = call(*copies)
        return torch.autograd.grad(output, copies, cotangent.to(output.dtype))

    expected = gradients(lambda x, a, b: exact(x, a, b, 1e-6), *(leaf.double() for leaf in leaves))
    plain = gradients(lambda x, a, b: F.layer_norm(x, (96,), eps=1e-6) * (1 + a[:, None]) + b[:, None], *leaves)
    ours = gradients(modulated_layer_norm, *leaves)
    for name, want, reference, got in zip(("x", "scale", "shift"), expected, plain, ours, strict=True):
        budget = 2 * (reference.double() - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert got.dtype == dtype
        assert (got.double() - want).abs().max() <= budget, name


def test_mixed_dtypes_strides_and_autocast() -> None:
    x, scale, shift = inputs((2, 6, 10), torch.float32)
    strided = x.mT.contiguous().mT
    assert torch.equal(modulated_layer_norm(strided, scale, shift), modulated_layer_norm(x, scale, shift))
    low = x.bfloat16()
    mixed = modulated_layer_norm(low, scale, shift)
    assert torch.equal(mixed, modulated_layer_norm(low.float(), scale, shift).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modulated_layer_norm(x, scale, shift), modulated_layer_norm(strided, scale, shift))
        assert modulated_layer_norm(x, scale, shift).dtype == torch.float32


X, M = torch.rand(2, 3, 4), torch.rand(2, 4)
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: modulated_layer_norm(X.int(), M, M), TypeError, "x must be a floating tensor, got torch.int32"),
    (lambda: modulated_layer_norm(X, 1.0, M), TypeError, "scale must be a floating tensor"),  # type: ignore[arg-type]
    (lambda: modulated_layer_norm(X, M, M.long()), TypeError, "shift must be a floating tensor, got torch.int64"),
    (lambda: modulated_layer_norm(X[0], M, M), ValueError, r"x must have shape \[B, T, C\].*got \[3, 4\]"),
    (lambda: modulated_layer_norm(X[..., :0], M, M), ValueError, r"x must have shape.*got \[2, 3, 0\]"),
    (lambda: modulated_layer_norm(X, M[:1], M), ValueError, r"scale must have shape \[2, 4\].*got \[1, 4\]"),
    (lambda: modulated_layer_norm(X, M, M[0]), ValueError, r"shift must have shape .*\[2, 3, 4\], got \[4\]"),
    (lambda: modulated_layer_norm(X, M, X[:, :2]), ValueError, r"shift must have shape .*got \[2, 2, 4\]"),
    (lambda: modulated_layer_norm(X, M.to("meta"), M), ValueError, "scale must be on x's device cpu, got meta"),
    (lambda: modulated_layer_norm(X, M, M, eps=0), ValueError, "eps must be finite and positive, got 0"),
    (lambda: modulated_layer_norm(X, M, M, eps=float("nan")), ValueError, "eps must be finite .* got nan"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
