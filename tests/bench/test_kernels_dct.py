"""Costs, judges, inputs and peers of the cosine transform's cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spectralar.bench.inputs import drawn_cutoffs, photographs
from spectralar.bench.kernels_dct import (
    LossCase,
    TargetsCase,
    TransformCase,
    loss_error,
    relative_error,
    targets_error,
    targets_flops,
)
from spectralar.bench.peers import dct as peers
from spectralar.kernels.dct import reference
from spectralar.spectrum import spectral_cutoffs

from .conftest import CPU


def test_bytes_are_every_input_and_output_once() -> None:
    values = 256 * 3 * 256 * 256
    assert TargetsCase().bytes() == values * 8 == 402_653_184
    assert TargetsCase(in_dtype=torch.uint8, out_dtype=torch.bfloat16).bytes() == values * 3 == 150_994_944
    assert TargetsCase(size=128).bytes() == 256 * 3 * 128 * 128 * 8
    assert LossCase().bytes() == values * 12
    assert TransformCase().bytes() == values * 8


def test_flops_are_those_of_the_cheapest_form() -> None:
    # Two products with a [w, H] matrix: 2 H H w and 2 H w w, and the same back.
    assert targets_flops(256, 8) == 2 * (2 * 256 * 256 * 8 + 2 * 256 * 8 * 8) == 2_162_688
    # From about 0.62 H on two full products are cheaper; the whole picture is a copy.
    assert targets_flops(256, 158) == 4 * (256 * 256 * 158 + 256 * 158 * 158)
    assert targets_flops(256, 159) == targets_flops(256, 255) == 4 * 256**3 == 67_108_864
    assert targets_flops(256, 256) == 0
    assert TargetsCase(cutoffs=8).flops() == 256 * 3 * 2_162_688
    drawn = drawn_cutoffs(256, 256, "random").tolist()
    assert TargetsCase().flops() == LossCase().flops() == sum(3 * targets_flops(256, w) for w in drawn)
    assert TransformCase().flops() == 256 * 3 * 2 * 2 * 256**3


def test_cutoffs_are_drawn_from_the_schedule() -> None:
    assert set(drawn_cutoffs(4096, 256, "random").tolist()) == set(spectral_cutoffs(64, 256))
    assert set(drawn_cutoffs(4096, 128, "uniform").tolist()) == set(spectral_cutoffs(64, 128, "uniform"))
    assert set(drawn_cutoffs(512, 8, "random").tolist()) == set(range(1, 9))
    assert drawn_cutoffs(3, 256, 17).tolist() == [17, 17, 17]
    assert torch.equal(drawn_cutoffs(64, 256, "random"), drawn_cutoffs(64, 256, "random"))


def test_pictures_have_the_spectrum_of_photographs() -> None:
    pictures = photographs(4, 3, 64, CPU)
    assert pictures.shape == (4, 3, 64, 64) and pictures.dtype == torch.uint8
    assert torch.equal(pictures, photographs(4, 3, 64, CPU))
    values = pictures.double() / 255
    assert 0.1 < values.std() < 0.4
    power = reference.dct2(values).square().mean(dim=(0, 1))
    # Octave by octave along the diagonal the power falls by about four; white noise would keep it.
    octaves = [power[n : 2 * n, n : 2 * n].mean().item() for n in (2, 4, 8, 16)]
    assert all(2 < low / high < 16 for low, high in pairwise(octaves))


@pytest.fixture
def images() -> Tensor:
    return photographs(3, 3, 24, CPU)


@pytest.fixture
def cutoffs() -> Tensor:
    return torch.tensor([5, 24, 17])


def test_judge_of_targets_sees_one_wrong_pixel(images: Tensor, cutoffs: Tensor) -> None:
    right = reference.spectral_targets(images.double() / 255, cutoffs)
    assert targets_error(right.float(), images, cutoffs, torch.float32) < 1e-7
    wrong = right.float()
    wrong[2, 1, 23, 0] += 0.01
    assert targets_error(wrong, images, cutoffs, torch.float32) == pytest.approx(0.01, rel=1e-4)
    relative = targets_error(wrong, images, cutoffs, torch.float32, relative=True)
    assert relative == pytest.approx(0.01 / right.abs().max().item(), rel=1e-4)
    wrong[0, 0, 0, 0] = math.nan
    assert math.isnan(targets_error(wrong, images, cutoffs, torch.float32))


def test_judge_of_targets_forgives_the_rounding_to_the_output_dtype_and_no_more(
    images: Tensor, cutoffs: Tensor
) -> None:
    right = reference.spectral_targets(images.double() / 255, cutoffs)
    rounded = right.to(torch.bfloat16)
    assert (rounded.double() - right).abs().max() > 1e-3
    assert targets_error(rounded, images, cutoffs, torch.bfloat16) == 0
    assert targets_error(rounded + 0.05, images, cutoffs, torch.bfloat16) > 0.03


def test_judge_of_targets_wants_shape_and_dtype(images: Tensor, cutoffs: Tensor) -> None:
    right = reference.spectral_targets(images.double() / 255, cutoffs)
    assert targets_error(right, images, cutoffs, torch.float32) == math.inf
    assert targets_error(right[:2].float(), images, cutoffs, torch.float32) == math.inf
    assert targets_error(None, images, cutoffs, torch.float32) == math.inf


def test_judge_of_the_loss_sees_loss_and_gradient(images: Tensor, cutoffs: Tensor) -> None:
    target = reference.spectral_targets(images.double() / 255, cutoffs)
    prediction = target + 0.1 * torch.randn(target.shape, dtype=torch.float64)
    loss = (prediction - target).square().mean()
    gradient = 2 * (prediction - target) / target.numel()
    assert loss_error(loss, gradient, prediction, images, cutoffs) < 1e-12
    off = gradient.clone()
    off[1, 1, 1, 1] += 2 * 0.02 / target.numel()
    assert loss_error(loss, off, prediction, images, cutoffs) == pytest.approx(0.02)
    assert loss_error((loss.sqrt() + 0.03) ** 2, gradient, prediction, images, cutoffs) == pytest.approx(0.03)
    assert loss_error(loss, gradient[:1], prediction, images, cutoffs) == math.inf
    assert math.isnan(loss_error(loss * math.nan, gradient, prediction, images, cutoffs))


def test_relative_judge(images: Tensor) -> None:
    x = images.float()
    assert relative_error(2 * x, x, torch.float32, lambda part: 2 * part.double()) == 0
    assert relative_error(2.5 * x, x, torch.float32, lambda part: 2 * part.double()) == pytest.approx(0.25)
    assert relative_error(x.double(), x, torch.float32, lambda part: part) == math.inf


@pytest.mark.parametrize("size", [1, 2, 7, 24])
def test_fft_transform_is_the_transform(size: int) -> None:
    x = torch.randn(2, 3, size, size)
    forward, inverse = peers.fft_dct2(size, CPU)
    torch.testing.assert_close(forward(x), reference.dct2(x.double()).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inverse(forward(x)), x, atol=1e-5, rtol=1e-5)


FORMS: dict[str, Callable[[int], Callable[[Tensor, Tensor], Tensor]]] = {
    "four matmuls": lambda size: peers.setup_four_matmuls(size, CPU, torch.float32, "fp32"),
    "projection": lambda size: peers.setup_projection(size, CPU, torch.float32, "fp32"),
    "projection fp16": lambda size: peers.setup_projection(size, CPU, torch.float32, "fp16"),
    "FFT": lambda size: peers.setup_fft(size, CPU, torch.float32),
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("form", FORMS)
def test_peers_compute_the_targets(form: str, dtype: torch.dtype, images: Tensor, cutoffs: Tensor) -> None:
    given = images if dtype == torch.uint8 else images.float() / 255
    result = FORMS[form](24)(given, cutoffs)
    assert targets_error(result, given, cutoffs, torch.float32) < (2e-3 if "16" in form else 2e-6)


def test_package_that_is_not_there_is_missing_and_says_so() -> None:
    assert peers.installed("no_such_package.part") == peers.Missing("no_such_package is not installed")
    assert peers.installed("math") is math
