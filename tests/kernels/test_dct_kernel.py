"""The DCT kernels against their reference in fp64: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectralar.kernels.dct import dct2, kernel, ops, reference, spectral_mse, spectral_targets
from spectralar.kernels.dct.config import LARGEST, ProjectionConfig
from spectralar.spectrum import spectral_cutoffs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUARTER = 0.25 / 255
EPS = 2.0**-11  # of fp16

# Sides of one pixel, odd and uneven ones, and cutoffs below, between and above both sides.
CASES = [
    ((1, 1), [1]),
    ((1, 3), [1, 2, 3]),
    ((16, 16), [1, 8, 15, 16]),
    ((18, 40), [1, 17, 33, 40]),
    ((70, 6), [1, 5, 64, 69, 70]),
    ((21, 33), [1, 20, 33]),
    ((80, 72), [65, 73, 80]),
]


def pictures(batch: int, height: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """8-bit pictures with the spectrum of photographs: amplitude falls as one over frequency, and there are edges."""
    g = torch.Generator().manual_seed(seed)
    f = torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width) ** 2
    noise = torch.randn(batch, 3, *f.shape, dtype=torch.complex64, generator=g) / (f.sqrt() + 0.3 / max(height, width))
    x = torch.fft.irfft2(noise, s=(height, width))
    x = x / x.std((-2, -1), keepdim=True, unbiased=False).clamp_min(1e-6) / 4
    x = x + torch.rand(batch, 3, 1, 1, generator=g)
    x[..., height // 3 : height // 2, width // 4 : width // 2] = torch.rand(batch, 3, 1, 1, generator=g)
    steps = (x.clamp(0, 1) * 255).round().to(DEVICE)
    return steps.byte() if dtype == torch.uint8 else (steps / 255).to(dtype)


def exact(images: Tensor, cutoffs: Tensor) -> Tensor:
    pixels = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    return reference.spectral_targets(pixels, cutoffs)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("size", "cutoffs"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_sub_images(size: tuple[int, int], cutoffs: list[int], dtype: torch.dtype) -> None:
    w = torch.tensor(cutoffs, device=DEVICE)
    images = pictures(len(w), *size, dtype)
    result = kernel.sub_images(images, w, torch.float32)
    error = (result - exact(images, w)).abs().amax((1, 2, 3))
    assert error.max() <= QUARTER, f"worst at cutoff {w[error.argmax()]}"
    whole = w >= max(size)
    if dtype == torch.uint8:
        assert torch.equal(result[whole].cpu(), images[whole].cpu().float() / 255)
    else:
        assert torch.equal(result[whole], images[whole])
    assert torch.equal(kernel.sub_images(images, w, torch.float32), result)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("size", "cutoffs"), CASES[2:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_loss_and_gradient(size: tuple[int, int], cutoffs: list[int], dtype: torch.dtype) -> None:
    w = torch.tensor(cutoffs, device=DEVICE)
    images = pictures(len(w), *size, dtype)
    prediction = pictures(len(w), *size, torch.float32, seed=1)
    loss, gradient = kernel.compare(prediction, images, w)
    difference = prediction.double() - exact(images, w)
    assert (gradient.double() * (images.numel() / 2) - difference).abs().max() <= QUARTER
    # The error of a pixel counts twice its distance, on average over signs far less than once.
    assert (loss - difference.square().mean()).abs() <= 2 * QUARTER * difference.abs().mean()


def rising(height: int, width: int) -> Tensor:
    """Weights that grow with the frequency, as an emphasis has them, and none at the highest."""
    rows, columns = (torch.arange(n, dtype=torch.float32, device=DEVICE) for n in (height, width))
    weights = 1 + torch.maximum(rows[:, None], columns) / 8
    weights[-1, -1] = 0
    return weights


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("size", "cutoffs"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("prediction_dtype", [torch.float32, torch.float16])
def test_weighted_loss_and_gradient(
    size: tuple[int, int], cutoffs: list[int], dtype: torch.dtype, prediction_dtype: torch.dtype
) -> None:
    w = torch.tensor(cutoffs, device=DEVICE)
    images = pictures(len(w), *size, dtype)
    prediction, weights = pictures(len(w), *size, prediction_dtype, seed=1), rising(*size)
    loss, gradient = kernel.compare(prediction, images, w, weights)
    difference = prediction.double() - exact(images, w)
    expected = reference.weigh_frequencies(difference, weights)
    assert loss.dtype == torch.float32 and gradient.dtype == prediction_dtype and gradient.shape == images.shape
    # Up to a quarter of a step in the targets, which the weights raise in the mean; and the roundings of five products.
    raised = weights.double().square().mean().sqrt() * QUARTER
    error = (gradient.double() * (images.numel() / 2) - expected).square().mean().sqrt()
    # Half a step of the smallest numbers that the gradient's dtype has.
    step = torch.finfo(prediction_dtype).smallest_normal * torch.finfo(prediction_dtype).eps * images.numel() / 4
    assert error <= raised + 5 * EPS * expected.square().mean().sqrt() + step
    assert (loss - (difference * expected).mean()).abs() <= 2 * raised * difference.abs().mean() + 5 * EPS * loss
    again, same = kernel.compare(prediction, images, w, weights)
    assert torch.equal(again, loss) and torch.equal(same, gradient)


def test_weights_of_any_scale_are_taken() -> None:
    w, images = torch.tensor([3, 16], device=DEVICE), pictures(2, 16, 16, torch.float32)
    prediction = pictures(2, 16, 16, torch.float32, seed=1)
    loss, gradient = kernel.compare(prediction, images, w, rising(16, 16))
    for scale in (2.0**-40, 2.0**40):
        scaled, steeper = kernel.compare(prediction, images, w, scale * rising(16, 16))
        assert torch.equal(scaled / scale, loss) and torch.equal(steeper / scale, gradient)
    nothing, flat = kernel.compare(prediction, images, w, torch.zeros(16, 16, device=DEVICE))
    assert nothing == 0 and not flat.any()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [128, 256])
def test_weighted_gradient_has_at_most_twice_the_error_of_fp16_matrix_products(size: int) -> None:
    w = torch.tensor(spectral_cutoffs(64, size), device=DEVICE)
    images, prediction = pictures(64, size, size, torch.float32), pictures(64, size, size, torch.float32, seed=1)
    weights = rising(size, size)
    true = reference.weigh_frequencies(prediction.double() - exact(images, w), weights)
    a, difference = reference.dct_matrix(size, device=DEVICE).half(), (prediction - exact(images, w)).half()
    plain = a.T @ (weights.half() * (a @ difference @ a.T)) @ a
    _, gradient = kernel.compare(prediction, images, w, weights)
    ours = (gradient.double() * (images.numel() / 2) - true).square().mean().sqrt()
    theirs = (plain - true).square().mean().sqrt()
    assert ours <= 2 * theirs, f"{ours:.2e} against {theirs:.2e}"
    prediction.requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        [same] = torch.autograd.grad(spectral_mse(prediction, images, w, weights=weights), prediction)
    assert torch.equal(same, gradient)


def test_a_picture_does_not_depend_on_the_others() -> None:
    w = torch.tensor([70, 3, 72, 66, 40], device=DEVICE)
    images = pictures(5, 72, 72, torch.float32)
    together = kernel.sub_images(images, w, torch.float32)
    order = torch.tensor([3, 0, 4, 2, 1], device=DEVICE)
    assert torch.equal(kernel.sub_images(images[order].contiguous(), w[order], torch.float32), together[order])
    for b in range(5):
        assert torch.equal(kernel.sub_images(images[b : b + 1], w[b : b + 1], torch.float32)[0], together[b])


def test_a_bad_picture_stays_alone() -> None:
    w = torch.tensor([70, 3, 70], device=DEVICE)
    images = pictures(3, 72, 72, torch.float32)
    good = kernel.sub_images(images, w, torch.float32)
    images[0, 1, 5, 5], images[1, 0, 70, 71] = torch.nan, torch.inf
    bad = kernel.sub_images(images, w, torch.float32)
    alike = torch.ones(3, 3, dtype=torch.bool, device=DEVICE)
    alike[0, 1] = alike[1, 0] = False
    assert torch.equal(bad[alike], good[alike])
    assert not bad[~alike].isfinite().any()


def test_cutoffs_out_of_range_act_as_the_nearest() -> None:
    images = pictures(4, 16, 16, torch.float32)
    result = kernel.sub_images(images, torch.tensor([-3, 0, 17, 1000], device=DEVICE), torch.float32)
    assert torch.equal(result, kernel.sub_images(images, torch.tensor([1, 1, 16, 16], device=DEVICE), torch.float32))


def test_projection_and_nestedness() -> None:
    images = pictures(2, 80, 80, torch.float32)
    first, second = torch.tensor([70, 30], device=DEVICE), torch.tensor([20, 66], device=DEVICE)
    once = kernel.sub_images(images, first, torch.float32)
    assert (kernel.sub_images(once, first, torch.float32) - once).abs().max() <= 2 * QUARTER
    nested = kernel.sub_images(once, second, torch.float32)
    lower = kernel.sub_images(images, torch.minimum(first, second), torch.float32)
    assert (nested - lower).abs().max() <= 2 * QUARTER


@pytest.mark.gpu
@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("mapping", ["nonuniform", "uniform"])
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (d, o)
        for d in (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
        for o in (torch.float32, torch.bfloat16)
    ],
)
def test_tuned_sizes(size: int, mapping: str, dtype: torch.dtype, out: torch.dtype) -> None:
    w = torch.tensor(spectral_cutoffs(64, size, mapping), device=DEVICE)  # type: ignore[arg-type]
    images = pictures(64, size, size, dtype)
    result, true = spectral_targets(images, w, out_dtype=out).double(), exact(images, w)
    # Rounding to `out` comes on top, half a unit in the last place of the value.
    rounding = torch.finfo(out).eps / 2 * true.abs() if out == torch.bfloat16 else 0.0
    assert ((result - true).abs() - rounding).max() <= QUARTER


@pytest.mark.gpu
def test_at_most_twice_the_error_of_fp16_matrix_products() -> None:
    w = torch.tensor(spectral_cutoffs(64, 256), device=DEVICE)
    images = pictures(64, 256, 256, torch.float32)
    true = exact(images, w)
    full = reference.dct_matrix(256, device=DEVICE)
    plain = []
    for x, n in zip(images, w.tolist(), strict=True):
        a = full[:n].half()
        middle = a @ (x - 0.5).half() @ a.T
        plain.append((a.T @ middle @ a).float() + 0.5)
    ours = (spectral_targets(images, w) - true).square().mean().sqrt()
    theirs = (torch.stack(plain) - true).square().mean().sqrt()
    assert ours <= 2 * theirs, f"{ours:.2e} against {theirs:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(256, 256), (100, 300)])
def test_exact_reaches_fp32_rounding_under_tf32(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    images = pictures(4, *size, torch.float32)
    w = torch.tensor([3, 64, 99, 100], device=DEVICE)
    true = exact(images, w)
    assert (spectral_targets(images, w, precision="exact") - true).abs().max() <= 1e-7 * true.abs().max()
    prediction, weights = images.flip(0).requires_grad_(), rising(*size)
    loss = spectral_mse(prediction, images, w, weights=weights, precision="exact")
    expected = reference.weigh_frequencies(prediction.detach().double() - true, weights)
    gradient = torch.autograd.grad(loss, prediction)[0] * (images.numel() / 2)
    assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max()
    coefficients = reference.dct2(images.double())
    assert (dct2(images) - coefficients).abs().max() <= 1e-7 * coefficients.abs().max()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_strides_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "runs_kernels", lambda images, exact: True)
    dense, w = pictures(4, 18, 40, torch.float32), torch.tensor([1, 17, 33, 40], device=DEVICE)
    images = dense.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    column = w[:, None].repeat(1, 5)[:, 0]
    assert not images.is_contiguous() and not column.is_contiguous()
    expected = spectral_targets(dense, w)
    assert torch.equal(spectral_targets(images, column), expected)
    assert torch.equal(spectral_mse(images, images, column), spectral_mse(dense, dense, w))
    once = torch.tensor([17], device=DEVICE)
    assert torch.equal(spectral_targets(images, once.expand(4)), spectral_targets(dense, 17))


@pytest.mark.gpu
def test_captured_in_a_graph() -> None:
    images = pictures(8, 256, 256, torch.uint8).to(memory_format=torch.channels_last)
    w = torch.tensor([1, 20, 64, 65, 130, 200, 255, 256], device=DEVICE)
    prediction = torch.rand(8, 3, 256, 256, device=DEVICE, requires_grad=True)

    def step() -> tuple[Tensor, Tensor, Tensor]:
        loss = spectral_mse(prediction, images, w)
        # A loss that is kept would keep the stream of this call in the leaf's node, where a capture may not follow.
        return spectral_targets(images, w), loss.detach(), torch.autograd.grad(loss, prediction)[0]

    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        plain = step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))
    assert torch.equal(spectral_targets(images.contiguous(), w), plain[0])


@pytest.mark.gpu
def test_compiled_as_one_graph() -> None:
    images, w = pictures(4, 256, 256, torch.uint8), torch.tensor([1, 64, 130, 256], device=DEVICE)
    prediction = torch.rand(4, 3, 256, 256, device=DEVICE, requires_grad=True)

    def step(p: Tensor) -> Tensor:
        return spectral_mse(p.sigmoid(), images, w)

    loss, again = step(prediction), torch.compile(step, fullgraph=True)(prediction)
    assert (loss - again).abs() <= 1e-5 * loss
    torch.library.opcheck(torch.ops.spectralar.sub_images.default, (images, w, torch.float32, False))
    for weights in (None, rising(256, 256)):
        torch.library.opcheck(torch.ops.spectralar.spectral_mse.default, (prediction, images, w, False, weights))


@pytest.mark.gpu
def test_more_than_two_to_the_31_pixels() -> None:
    batch = 2**31 // (3 * LARGEST**2) + 2
    images = torch.zeros(batch, 3, LARGEST, LARGEST, dtype=torch.uint8, device=DEVICE)
    images[-2:] = pictures(2, LARGEST, LARGEST, torch.uint8)
    w = torch.full((batch,), 40, device=DEVICE)
    w[-1] = 100
    result = spectral_targets(images, w, out_dtype=torch.bfloat16)
    assert torch.equal(result[-2:], spectral_targets(images[-2:], w[-2:], out_dtype=torch.bfloat16))
    assert not result[0].any()


@pytest.mark.gpu
def test_no_coefficients_in_memory() -> None:
    images = pictures(32, 256, 256, torch.float32)
    w = torch.tensor(spectral_cutoffs(64, 256)[::2], device=DEVICE)
    spectral_targets(images, w)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = spectral_targets(images, w)
    assert torch.cuda.max_memory_allocated() - before <= result.nbytes + 2**16


def test_other_rows_of_the_launch_table_give_the_same() -> None:
    images, w = pictures(2, 96, 96, torch.float32), torch.tensor([70, 90], device=DEVICE)
    default = kernel.sub_images(images, w, torch.float32)
    other = ProjectionConfig(rows=32, columns=16, warps=4, stages=1, spread=1)
    assert (kernel.sub_images(images, w, torch.float32, projection=other) - default).abs().max() <= 2 * EPS
