"""Checks and conversions of images."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from spectralar.images import psnr, to_float, to_uint8


def test_uint8_and_back_for_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    as_float = to_float(levels)
    assert as_float.dtype == torch.float32 and as_float.min() == 0 and as_float.max() == 1
    assert torch.equal(to_uint8(as_float), levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_images_pass_as_they_are(dtype: torch.dtype) -> None:
    images = torch.rand(2, 3, 4, 6).to(dtype)
    assert to_float(images) is images


def test_to_uint8_clamps_and_rounds() -> None:
    values = torch.tensor([-1.0, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 2.0, 254.6 / 255])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize(
    "images, error, message",
    [
        ([1.0], TypeError, "photos must be a tensor, not list"),
        (torch.rand(3, 4, 4), ValueError, "photos must have shape [B, 3, H, W], not [3, 4, 4]"),
        (torch.rand(1, 1, 4, 4), ValueError, "photos must have shape [B, 3, H, W], not [1, 1, 4, 4]"),
        (torch.rand(1, 3, 4, 5), ValueError, "photos must be 4 x 4 pixels, not 4 x 5"),
        (torch.zeros(1, 3, 4, 4).long(), TypeError, "photos must be uint8 or floating in [0, 1], not torch.int64"),
        (torch.full((1, 3, 4, 4), 1.5), ValueError, "photos must be in [0, 1] when floating, not 1.5..1.5"),
        (torch.full((1, 3, 4, 4), -0.25), ValueError, "photos must be in [0, 1] when floating, not -0.25..-0.25"),
        (torch.full((1, 3, 4, 4), math.nan), ValueError, "photos must be in [0, 1] when floating, not nan..nan"),
    ],
)
def test_errors(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        to_float(images, name="photos", size=4)


def test_the_range_check_can_be_switched_off() -> None:
    images = torch.full((1, 3, 4, 4), 7.0)
    assert to_float(images, check_range=False) is images


def test_an_empty_batch_is_fine() -> None:
    assert to_float(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_psnr() -> None:
    target = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    images = torch.tensor([0.1, 0.0, -5.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    values = psnr(images, target)
    assert values[0].item() == pytest.approx(20, abs=1e-4)
    assert values[1] == math.inf
    assert values[2] == math.inf, "values beyond the screen's range are clamped"
    with pytest.raises(ValueError, match=re.escape("images [3, 3, 4, 4] and targets [2, 3, 4, 4] must have one shape")):
        psnr(images, target[:2])
