"""The cosine transform and the sub-images, against SciPy and against their own algebra."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch import Tensor

from spectralar.kernels.dct import dct2, dct_matrix, idct2, spectral_mse, spectral_pyramid, spectral_targets

SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (8, 8), (13, 13), (5, 12), (12, 5), (31, 17), (64, 48), (256, 256)]
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
sizes = st.tuples(st.integers(1, 17), st.integers(1, 17))


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scipy_dct(x: Tensor) -> Tensor:
    return torch.from_numpy(dctn(x.double().numpy(), axes=(-2, -1), norm="ortho"))


def scipy_targets(images: Tensor, cutoff: int) -> Tensor:
    """SpectralAR eq. 5 with SciPy's forward transform and the cosine sum of eq. 2 written out."""
    coefficients = scipy_dct(images)
    coefficients[..., cutoff:, :] = 0
    coefficients[..., :, cutoff:] = 0
    return torch.einsum("...uv,uy,vx->...yx", coefficients, *(cosines(n) for n in images.shape[-2:]))


def cosines(n: int) -> Tensor:
    rows = [
        [math.sqrt((1 if k == 0 else 2) / n) * math.cos(math.pi * (2 * i + 1) * k / (2 * n)) for i in range(n)]
        for k in range(n)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 101, 256])
def test_matrix_is_the_orthonormal_dct(n: int) -> None:
    matrix = dct_matrix(n, dtype=torch.float64)
    assert (matrix - cosines(n)).abs().max() <= 4 * n * EPS64
    assert (matrix @ matrix.T - torch.eye(n, dtype=torch.float64)).abs().max() <= 8 * EPS64
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dct_matrix(n, dtype=dtype), matrix.to(dtype))


def test_matrix_is_a_copy() -> None:
    dct_matrix(6).zero_()
    assert dct_matrix(6)[0, 0] > 0


def test_matrix_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        dct2(torch.rand(9, 11))
    images = torch.rand(9, 11, requires_grad=True)
    dct2(images).sum().backward()
    assert images.grad is not None


@pytest.mark.parametrize("size", SIZES)
def test_dct2_is_scipys(size: tuple[int, int]) -> None:
    x = noise(2, 3, *size)
    expected = scipy_dct(x)
    budget = 2 * sum(size) * EPS64 * x.abs().max()
    assert (dct2(x) - expected).abs().max() <= budget
    assert (idct2(expected) - x).abs().max() <= budget


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    x = noise(2, 3, 33, 20, dtype=dtype)
    exact = scipy_dct(x)
    # fp32 accumulates over H + W products; the output dtype then rounds by half a unit in the last place.
    budget = 53 * EPS32 * exact.abs().max() + torch.finfo(dtype).eps / 2 * exact.abs()
    result = dct2(x)
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= budget).all()
    back = idct2(result)
    assert back.dtype == dtype
    exact_back = torch.einsum("...uv,uy,vx->...yx", result.double(), cosines(33), cosines(20))
    assert ((back.double() - exact_back).abs() <= 53 * EPS32 * 4 + torch.finfo(dtype).eps / 2 * exact_back.abs()).all()


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 10_000))
def test_parseval_inverse_and_linearity(size: tuple[int, int], seed: int) -> None:
    x, y = noise(*size, seed=seed), noise(*size, seed=seed + 1)
    assert abs(dct2(x).square().sum() / x.square().sum() - 1) <= 100 * EPS64
    assert (idct2(dct2(x)) - x).abs().max() <= 100 * EPS64 * x.abs().max()
    assert (dct2(2 * x - 3 * y) - (2 * dct2(x) - 3 * dct2(y))).abs().max() <= 1000 * EPS64


def test_leading_dimensions() -> None:
    x = noise(2, 3, 4, 5, 6)
    whole = dct2(x)
    assert (whole[1, 2, 3] - dct2(x[1, 2, 3])).abs().max() <= 50 * EPS64
    assert dct2(x[0, 0, 0]).shape == (5, 6)
    assert dct2(x[:0]).shape == idct2(x[:0]).shape == (0, 3, 4, 5, 6)


@settings(max_examples=30, deadline=None)
@given(sizes, st.data())
def test_projection_algebra(size: tuple[int, int], data: st.DataObject) -> None:
    largest = max(size)
    first, second = data.draw(st.integers(1, largest)), data.draw(st.integers(1, largest))
    images, others = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    once = spectral_targets(images, first)
    assert (once - scipy_targets(images, first)).abs().max() <= 200 * EPS64
    assert (spectral_targets(once, first) - once).abs().max() <= 200 * EPS64
    nested = spectral_targets(once, second)
    assert (nested - spectral_targets(images, min(first, second))).abs().max() <= 200 * EPS64
    symmetric = (once * others).sum() - (images * spectral_targets(others, first)).sum()
    assert symmetric.abs() <= 1e4 * EPS64


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_last_cutoff_gives_the_image_itself(size: tuple[int, int], dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, *size, dtype=torch.float64).to(dtype)
    assert torch.equal(spectral_targets(images, max(size)), images)
    assert torch.equal(spectral_pyramid(images, [1, max(size)])[:, 1], images)


def test_the_first_cutoff_gives_the_mean() -> None:
    images = torch.rand(2, 3, 6, 9)
    mean = images.double().mean((-2, -1), keepdim=True).expand_as(images)
    assert (spectral_targets(images, 1).double() - mean).abs().max() <= 16 * EPS32


@pytest.mark.parametrize("size", [(9, 9), (6, 9), (9, 6)])
def test_cutoffs_per_sample(size: tuple[int, int]) -> None:
    cutoffs = list(range(1, 10))
    images = torch.rand(9, 3, *size)
    together = spectral_targets(images, cutoffs)
    for integers in (torch.int64, torch.int32, torch.uint8):
        assert torch.equal(spectral_targets(images, torch.tensor(cutoffs, dtype=integers)), together)
    for b, cutoff in enumerate(cutoffs):
        alone = spectral_targets(images[b : b + 1], cutoff)[0]
        assert (alone - together[b]).abs().max() <= 8 * EPS32
        assert (together[b] - scipy_targets(images[b], cutoff)).abs().max() <= 32 * EPS32
    assert torch.equal(together[8], images[8])


def test_a_bad_image_stays_alone() -> None:
    images = torch.rand(3, 3, 8, 8)
    images[1, 0, 0, 0] = math.nan
    targets = spectral_targets(images, [4, 4, 4])
    assert targets[[0, 2]].isfinite().all() and targets[1, 0].isnan().all()


@pytest.mark.parametrize("size", [(9, 9), (6, 9), (9, 6), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_pyramid_holds_all_targets(size: tuple[int, int], dtype: torch.dtype) -> None:
    images = (torch.rand(2, 3, *size) * 255).byte() if dtype == torch.uint8 else noise(2, 3, *size, dtype=dtype)
    cutoffs = list(range(1, max(size) + 1))
    pyramid = spectral_pyramid(images, cutoffs)
    out = torch.float32 if dtype == torch.uint8 else dtype
    assert pyramid.shape == (2, len(cutoffs), 3, *size) and pyramid.dtype == out
    for n, cutoff in enumerate(cutoffs):
        difference = pyramid[:, n].double() - spectral_targets(images, cutoff).double()
        assert difference.abs().max() <= 16 * torch.finfo(out).eps
    assert spectral_pyramid(images[:0], cutoffs).shape == (0, len(cutoffs), 3, *size)


def test_uint8_is_mapped_to_the_unit_interval() -> None:
    images = torch.randint(0, 256, (2, 3, 10, 7), dtype=torch.uint8)
    scaled = images.float() / 255
    assert torch.equal(spectral_targets(images, 4), spectral_targets(scaled, 4))
    assert torch.equal(spectral_targets(images, 10), scaled)
    assert torch.equal(spectral_targets(images, 4, out_dtype=torch.bfloat16), spectral_targets(scaled, 4).bfloat16())


def test_out_dtype_is_the_last_step() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(spectral_targets(images, 3, out_dtype=torch.float16), spectral_targets(images, 3).half())
    assert spectral_targets(images.bfloat16(), 3, out_dtype=torch.float32).dtype == torch.float32


def test_strided_input() -> None:
    images = torch.rand(4, 9, 6, 3).permute(0, 3, 2, 1)[::2]
    dense = images.contiguous()
    budget = 8 * EPS32
    assert (spectral_targets(images, [2, 9]) - spectral_targets(dense, [2, 9])).abs().max() <= budget
    assert (spectral_pyramid(images, [2, 9]) - spectral_pyramid(dense, [2, 9])).abs().max() <= budget
    assert (dct2(images) - dct2(dense)).abs().max() <= 8 * budget
    assert (idct2(images) - idct2(dense)).abs().max() <= 8 * budget


def test_empty_batch() -> None:
    images = torch.rand(0, 3, 8, 8)
    assert spectral_targets(images, 3).shape == (0, 3, 8, 8)
    assert spectral_targets(images, []).shape == (0, 3, 8, 8)
    assert spectral_targets(images, torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 8, 8)


def test_autocast_changes_nothing() -> None:
    images, plane = torch.rand(3, 3, 16, 12), torch.rand(16, 12)
    plain = spectral_targets(images, [1, 5, 16]), spectral_pyramid(images, [1, 5]), dct2(plane), idct2(plane)
    with torch.autocast("cpu", torch.bfloat16):
        under = spectral_targets(images, [1, 5, 16]), spectral_pyramid(images, [1, 5]), dct2(plane), idct2(plane)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))


def test_gradient_is_the_sub_image_of_the_cotangent() -> None:
    images = torch.rand(3, 3, 10, 7, dtype=torch.float64, requires_grad=True)
    cotangent = noise(3, 3, 10, 7)
    spectral_targets(images, [1, 4, 10]).backward(cotangent)
    assert images.grad is not None
    assert (images.grad - spectral_targets(cotangent, [1, 4, 10])).abs().max() <= 100 * EPS64
    assert torch.equal(images.grad[2], cotangent[2])


def test_gradcheck() -> None:
    plane = noise(2, 4, 3).requires_grad_()
    images = noise(2, 1, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(dct2, plane)
    assert torch.autograd.gradcheck(idct2, plane)
    assert torch.autograd.gradcheck(lambda x: spectral_targets(x, [2, 4]), images)
    assert torch.autograd.gradcheck(lambda x: spectral_pyramid(x, [1, 2, 4]), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_the_loss_is_that_of_the_targets(dtype: torch.dtype) -> None:
    images = torch.rand(3, 3, 10, 7, dtype=torch.float64)
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    prediction = torch.rand(3, 3, 10, 7, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    prediction.requires_grad_()
    loss = spectral_mse(prediction, images, [1, 4, 10])
    plain = (prediction - spectral_targets(images, [1, 4, 10])).square().mean()
    eps = torch.finfo(prediction.dtype).eps
    assert loss.dtype == prediction.dtype and (loss / plain - 1).abs() <= 8 * eps
    (gradient,) = torch.autograd.grad(3 * loss, prediction)
    (expected,) = torch.autograd.grad(3 * plain, prediction)
    assert (gradient - expected).abs().max() <= 4 * eps * expected.abs().max()


@pytest.mark.parametrize("size", [(8, 8), (10, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_the_weighted_loss_is_that_of_the_coefficients(size: tuple[int, int], dtype: torch.dtype) -> None:
    images = torch.rand(3, 3, *size, dtype=torch.float64)
    images = (images * 255).byte() if dtype == torch.uint8 else images.to(dtype)
    prediction = torch.rand(3, 3, *size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    prediction.requires_grad_()
    weights = 30 * torch.rand(size)
    loss = spectral_mse(prediction, images, [1, 4, max(size)], weights=weights)
    plain = (weights * dct2(prediction - spectral_targets(images, [1, 4, max(size)])).square()).mean()
    eps = torch.finfo(prediction.dtype).eps
    assert loss.dtype == prediction.dtype and (loss / plain - 1).abs() <= 32 * eps
    (gradient,) = torch.autograd.grad(3 * loss, prediction)
    (expected,) = torch.autograd.grad(3 * plain, prediction)
    assert (gradient - expected).abs().max() <= 32 * eps * expected.abs().max()


def test_weights_of_one_change_nothing_and_a_single_frequency_counts_alone() -> None:
    prediction, images = noise(2, 3, 6, 9, seed=0), noise(2, 3, 6, 9, seed=1)
    plain = spectral_mse(prediction, images, 4)
    torch.testing.assert_close(spectral_mse(prediction, images, 4, weights=torch.ones(6, 9)), plain)
    weights = torch.zeros(6, 9)
    weights[5, 2] = 2.0
    expected = 2 * dct2(prediction)[..., 5, 2].square().sum() / prediction.numel()  # no target has that frequency
    torch.testing.assert_close(spectral_mse(prediction, images, 4, weights=weights), expected)
    assert spectral_mse(prediction, images, 4, weights=torch.zeros(6, 9)) == 0


def test_the_loss_of_nothing_is_zero() -> None:
    assert spectral_mse(torch.rand(0, 3, 8, 8), torch.rand(0, 3, 8, 8), 3) == 0
    assert spectral_mse(torch.rand(0, 3, 8, 8), torch.rand(0, 3, 8, 8), 3, weights=torch.ones(8, 8)) == 0


@pytest.mark.parametrize("weights", [None, torch.arange(12.0).view(4, 3)])
def test_gradcheck_of_the_loss(weights: Tensor | None) -> None:
    prediction, images = (noise(2, 1, 4, 3, seed=s).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda p, x: spectral_mse(p, x, [2, 4], weights=weights), (prediction, images))


@pytest.mark.parametrize("grad", [False, True])
def test_operators_are_sound(grad: bool) -> None:
    images, cutoffs = torch.rand(2, 3, 6, 8, requires_grad=grad), torch.tensor([3, 8])
    prediction = torch.rand(2, 3, 6, 8, requires_grad=grad)
    operators = torch.ops.spectralar
    torch.library.opcheck(operators.sub_images.default, (images, cutoffs, torch.bfloat16, False))
    for weights in (None, torch.rand(6, 8)):
        torch.library.opcheck(operators.spectral_mse.default, (prediction, images, cutoffs, False, weights))
    torch.library.opcheck(operators.dct2.default, (images, True))


def test_compiles_as_one_graph() -> None:
    images, cutoffs = torch.rand(2, 3, 6, 8), torch.tensor([3, 8])

    def step(prediction: Tensor) -> Tensor:
        weighted = spectral_mse(prediction, images, cutoffs, weights=torch.arange(48.0).view(6, 8))
        return weighted + spectral_mse(prediction, images, cutoffs) + dct2(spectral_targets(images, cutoffs)).mean()

    prediction = torch.rand(2, 3, 6, 8, requires_grad=True)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function in (step, compiled):
        prediction.grad = None
        function(prediction).backward()
        if function is step:
            loss, gradient = step(prediction), prediction.grad
    assert gradient is not None and prediction.grad is not None
    assert torch.equal(compiled(prediction), loss) and torch.equal(prediction.grad, gradient)


IMAGES = torch.rand(2, 3, 4, 6)
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: dct_matrix(0), ValueError, "n must be at least 1, got 0"),
    (lambda: dct_matrix(2.5), TypeError, "n must be integral"),  # type: ignore[arg-type]
    (lambda: dct_matrix(2, dtype=torch.int32), TypeError, "dtype must be a floating dtype, got torch.int32"),
    (lambda: dct2([[1.0]]), TypeError, "images must be a tensor, got list"),  # type: ignore[arg-type]
    (lambda: dct2(IMAGES.byte()), TypeError, "images must be floating, got torch.uint8"),
    (lambda: dct2(torch.rand(3)), ValueError, r"images must have shape \[\.\.\., H, W\].*got \[3\]"),
    (lambda: idct2(torch.rand(3, 0)), ValueError, r"coefficients must have shape.*got \[3, 0\]"),
    (lambda: spectral_targets([1], 1), TypeError, "images must be a tensor, got list"),  # type: ignore[arg-type]
    (lambda: spectral_targets(IMAGES.int(), 1), TypeError, "images must be uint8 or floating, got torch.int32"),
    (lambda: spectral_targets(IMAGES[0], 1), ValueError, r"images must have shape \[B, C, H, W\].*got \[3, 4, 6\]"),
    (lambda: spectral_targets(IMAGES[..., :0], 1), ValueError, r"images must have shape.*got \[2, 3, 4, 0\]"),
    (lambda: spectral_targets(IMAGES, 7), ValueError, r"cutoffs must lie from 1 to max\(H, W\) = 6, got 7"),
    (lambda: spectral_targets(IMAGES, 0), ValueError, "cutoffs must lie.*got 0"),
    (lambda: spectral_targets(IMAGES, -1), ValueError, "cutoffs must lie.*got -1"),
    (lambda: spectral_targets(IMAGES, [1, 7]), ValueError, "cutoffs must lie.*got 7"),
    (lambda: spectral_targets(IMAGES, torch.tensor([-1, 7])), ValueError, "cutoffs must lie.*got -1"),
    (lambda: spectral_targets(IMAGES, [1]), ValueError, "cutoffs must hold 2 values, one per image, got 1"),
    (lambda: spectral_targets(IMAGES, torch.tensor(3)), ValueError, r"cutoffs must have shape \[2\].*got \[\]"),
    (lambda: spectral_targets(IMAGES, torch.tensor([1.0, 2.0])), TypeError, "cutoffs must be integers.*float32"),
    (lambda: spectral_targets(IMAGES, torch.tensor([True, False])), TypeError, "cutoffs must be integers.*bool"),
    (lambda: spectral_targets(IMAGES, 1.5), TypeError, "cutoffs must be integral"),  # type: ignore[arg-type]
    (lambda: spectral_targets(IMAGES, [1, 1.5]), TypeError, "cutoffs must be integral"),  # type: ignore[list-item]
    (lambda: spectral_targets(IMAGES, 1, out_dtype=torch.uint8), TypeError, "out_dtype must be a floating dtype"),
    (
        lambda: spectral_targets(IMAGES, 1, precision="half"),  # type: ignore[arg-type]
        ValueError,
        "precision must be one of pixel, exact, got 'half'",
    ),
    (
        lambda: spectral_targets(IMAGES, torch.ones(2, dtype=torch.int64, device="meta")),
        ValueError,
        "cutoffs must be on the images' device cpu, got meta",
    ),
    (
        lambda: spectral_mse(IMAGES.byte(), IMAGES, 1),
        TypeError,
        "prediction must be a floating tensor, got torch.uint8",
    ),
    (lambda: spectral_mse(IMAGES[:1], IMAGES, 1), ValueError, r"prediction must be \[2, 3, 4, 6\].*got \[1, 3, 4, 6\]"),
    (lambda: spectral_mse(IMAGES, IMAGES, 0), ValueError, "cutoffs must lie.*got 0"),
    (
        lambda: spectral_mse(IMAGES, IMAGES, 1, weights=torch.ones(4, 6).int()),
        TypeError,
        "weights must be a floating tensor, got torch.int32",
    ),
    (
        lambda: spectral_mse(IMAGES, IMAGES, 1, weights=torch.ones(6, 4)),
        ValueError,
        r"weights must be \[4, 6\] on cpu as images, got \[6, 4\] on cpu",
    ),
    (
        lambda: spectral_mse(IMAGES, IMAGES, 1, weights=torch.ones(4, 6, device="meta")),
        ValueError,
        "weights must be .* on cpu as images, got .* on meta",
    ),
    (lambda: spectral_pyramid(IMAGES, []), ValueError, "cutoffs must hold at least one value, got none"),
    (lambda: spectral_pyramid(IMAGES, [1, 7]), ValueError, "cutoffs must lie.*got 7"),
    (lambda: spectral_pyramid(IMAGES, 3), TypeError, "cutoffs must be integral, got 3"),  # type: ignore[arg-type]
    (lambda: spectral_pyramid(IMAGES[0], [3]), ValueError, "images must have shape"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
