"""Pictures for people: where every cell lies, what the labels say, what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from spectralar.images import to_uint8
from spectralar.pictures import coarse_to_fine, grid, prefix_strip, sample_grid, to_image
from spectralar.pipeline import SpectralAR
from spectralar.sampling import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer

GAP, TEXT = 4, 20  # between cells; height of the line of column labels


def colour(red: int, green: int, blue: int, side: int = 8) -> Tensor:
    return torch.tensor([red, green, blue], dtype=torch.uint8).view(3, 1, 1).expand(3, side, side)


@pytest.fixture
def labels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn, in order."""
    drawn: list[str] = []
    text = ImageDraw.ImageDraw.text

    def spy(self: ImageDraw.ImageDraw, xy: Any, string: str, *rest: Any, **options: Any) -> None:
        drawn.append(string)
        text(self, xy, string, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    return drawn


def test_to_image() -> None:
    picture = to_image(torch.stack([torch.full((2, 3), v) for v in (0.0, 0.5, 2.0)]))
    assert picture.size == (3, 2) and picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (0, 128, 255)
    assert to_image(colour(1, 2, 3)).getpixel((7, 7)) == (1, 2, 3)


def test_a_grid_without_labels() -> None:
    picture = grid([[colour(255, 0, 0), None], [colour(0, 255, 0), colour(0, 0, 255)]])
    assert picture.size == (2 * (8 + GAP), 2 * (8 + GAP))
    expected = np.full((24, 24, 3), 255, dtype=np.uint8)
    expected[0:8, 0:8] = (255, 0, 0)
    expected[12:20, 0:8] = (0, 255, 0)
    expected[12:20, 12:20] = (0, 0, 255)
    assert np.array_equal(np.asarray(picture), expected)


def test_a_grid_with_labels(labels: list[str]) -> None:
    plain = grid([[colour(9, 9, 9)] * 3] * 2)
    assert labels == []
    picture = grid([[colour(9, 9, 9)] * 3] * 2, row_labels=["cat", "a long name"], column_labels=["a", "b", "c"])
    assert labels == ["a", "b", "c", "cat", "a long name"]
    left = picture.width - plain.width
    assert picture.height == plain.height + TEXT and left > 8
    assert np.array_equal(np.asarray(picture)[TEXT:, left:], np.asarray(plain))
    margin = np.asarray(picture)[TEXT:, :left]
    assert (margin < 128).any(), "there is text beside the rows"
    shorter = grid([[colour(9, 9, 9)] * 3] * 2, row_labels=["cat", "x"])
    assert shorter.width < picture.width


def test_rows_of_different_length() -> None:
    assert grid([[colour(1, 1, 1)], [colour(1, 1, 1)] * 3]).width == 3 * (8 + GAP)


def test_small_images_are_enlarged_without_smoothing() -> None:
    image = torch.tensor([[[0, 255]] * 2] * 3, dtype=torch.uint8)
    picture = np.asarray(grid([[image]], cell=8))[:8, :8, 0]
    assert np.array_equal(picture, np.repeat([[0, 255]], 4, axis=1).repeat(8, axis=0))
    assert grid([[colour(0, 0, 0, 16)]], cell=8).size == (12, 12)


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([], {}, "rows holds no image"),
        ([[None]], {}, "rows holds no image"),
        ([[colour(0, 0, 0)]], {"row_labels": ["a", "b"]}, "row_labels must be none or 1, not 2"),
        ([[colour(0, 0, 0)] * 3], {"column_labels": ["a"]}, "column_labels must be none or 3, not 1"),
    ],
)
def test_errors_of_grids(rows: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid(rows, **options)


def cells(picture: Image.Image, rows: int, columns: int, side: int = 32) -> np.ndarray[Any, Any]:
    """`[rows, columns, side, side, 3]` from the lower right of a labelled grid."""
    pixels = np.asarray(picture)[picture.height - rows * (side + GAP) :, picture.width - columns * (side + GAP) :]
    return pixels.reshape(rows, side + GAP, columns, side + GAP, 3).swapaxes(1, 2)[:, :, :side, :side]


def pixels(image: Tensor) -> np.ndarray[Any, Any]:
    return image.permute(1, 2, 0).numpy()


def test_prefix_strip(tokenizer: SpectralTokenizer, photos: Tensor, labels: list[str]) -> None:
    strip = prefix_strip(tokenizer, photos[:2], [1, 3, 8])
    assert labels == ["original", "n = 1", "n = 3", "n = 8", *["sub-image", "rebuilt"] * 2]
    shown = cells(strip, 4, 4)
    for i in range(2):
        assert np.array_equal(shown[2 * i, 0], pixels(photos[i]))
        assert (shown[2 * i + 1, 0] == 255).all()
        for j, n in enumerate([1, 3, 8], start=1):
            target = tokenizer.targets(photos[i : i + 1], torch.tensor([n]))
            rebuilt = tokenizer.reconstruct(photos[i : i + 1], n)
            for row, image in ((2 * i, target), (2 * i + 1, rebuilt)):
                difference = shown[row, j].astype(int) - pixels(to_uint8(image)[0])
                assert abs(difference).max() <= 1, "one level where fp32 rounds differently in a batch"


def test_sample_grid(model: SpectralAR, labels: list[str]) -> None:
    picture = sample_grid(model, classes=[2, 0], columns=3, seed=10)
    assert labels == ["crane", "red panda"]
    shown = cells(picture, 2, 3)
    assert np.array_equal(shown[0, 1], pixels(model.generate([2], [11])[0]))
    assert np.array_equal(shown[1, 2], pixels(model.generate([0], [12])[0]))


def test_sample_grid_without_a_class(model: SpectralAR, labels: list[str]) -> None:
    sample_grid(model, classes=[model.generator.config.classes], columns=1)
    assert labels == ["no class"]


def test_sample_grid_draws_at_most_eight_classes(
    make_generator: Callable[..., Any], tokenizer: SpectralTokenizer, labels: list[str]
) -> None:
    sample_grid(SpectralAR(tokenizer, make_generator(classes=11, group=8)), columns=1)
    assert labels == [str(i) for i in range(8)]
    labels.clear()
    sample_grid(SpectralAR(tokenizer, make_generator(classes=2, group=8)), columns=1)
    assert labels == ["0", "1"]


def test_coarse_to_fine(model: SpectralAR, labels: list[str]) -> None:
    settings = SamplingSettings(guidance=2.0)
    strip = coarse_to_fine(model, 1, seed=3, settings=settings)
    assert labels == ["n = 1", "n = 2", "n = 4", "n = 8", "Giant panda"]
    shown = cells(strip, 1, 4)
    for j, n in enumerate((1, 2, 4, 8)):
        assert np.array_equal(shown[0, j], pixels(model.generate([1], [3], settings, length=n)[0]))


def test_coarse_to_fine_at_chosen_lengths_in_any_order(model: SpectralAR, labels: list[str]) -> None:
    """Labels and pictures go together, however the lengths are given."""
    shown = cells(coarse_to_fine(model, 0, lengths=(5, 2, 5)), 1, 2)
    assert labels == ["n = 2", "n = 5", "red panda"]
    for j, n in enumerate((2, 5)):
        assert np.array_equal(shown[0, j], pixels(model.generate([0], [0], length=n)[0]))


def test_coarse_to_fine_in_groups(
    make_generator: Callable[..., Any], tokenizer: SpectralTokenizer, labels: list[str]
) -> None:
    grouped = SpectralAR(tokenizer, make_generator(group=4))
    coarse_to_fine(grouped, 0)
    assert labels == ["n = 4", "n = 8", "0"]
    for lengths, wrong in (((4, 6), 6), ((12,), 12), ((0, 4), 0)):
        with pytest.raises(ValueError, match=re.escape(f"lengths must be multiples of 4 up to 8, not {wrong}")):
            coarse_to_fine(grouped, 0, lengths=lengths)
