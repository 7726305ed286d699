"""Pictures for people: labelled grids of images, prefix strips and coarse-to-fine sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from spectralar.images import to_uint8
from spectralar.pipeline import SpectralAR
from spectralar.sampling import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer

_GAP, _TEXT = 4, 12


def to_image(image: Tensor) -> Image.Image:
    """A picture from one image tensor `[3, H, W]`, uint8 or floating in [0, 1]."""
    pixels = image if image.dtype == torch.uint8 else to_uint8(image)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def grid(
    rows: Sequence[Sequence[Tensor | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    cell: int | None = None,
) -> Image.Image:
    """Images in rows and columns on white, with labels beside the rows and above the columns.

    Args:
        rows: images `[3, H, W]`, uint8 or floating in [0, 1]; None leaves a cell empty.
        row_labels: one per row, or none.
        column_labels: one per column, or none.
        cell: side of a cell in pixels; smaller images are enlarged without smoothing. None is the image's own size.

    Raises:
        ValueError: no image at all, or labels that do not match the rows or columns.
    """
    images = [image for row in rows for image in row if image is not None]
    columns = max((len(row) for row in rows), default=0)
    if not images:
        raise ValueError("rows holds no image")
    for name, labels, count in (("row_labels", row_labels, len(rows)), ("column_labels", column_labels, columns)):
        if len(labels) not in (0, count):
            raise ValueError(f"{name} must be none or {count}, not {len(labels)}")
    side = cell or max(images[0].shape[1:])
    font = ImageFont.load_default(_TEXT)
    left = max((int(font.getlength(label)) for label in row_labels), default=-2 * _GAP) + 2 * _GAP
    top = _TEXT + 2 * _GAP if column_labels else 0
    picture = Image.new("RGB", (left + columns * (side + _GAP), top + len(rows) * (side + _GAP)), "white")
    draw = ImageDraw.Draw(picture)
    for j, label in enumerate(column_labels):
        draw.text((left + j * (side + _GAP) + side / 2, _GAP), label, fill="black", font=font, anchor="mt")
    for i, row in enumerate(rows):
        y = top + i * (side + _GAP)
        if row_labels:
            draw.text((_GAP, y + side / 2), row_labels[i], fill="black", font=font, anchor="lm")
        for j, image in enumerate(row):
            if image is not None:
                drawn = to_image(image)
                drawn = drawn.resize(
                    (side, side), Image.Resampling.NEAREST if side > drawn.width else Image.Resampling.BICUBIC
                )
                picture.paste(drawn, (left + j * (side + _GAP), y))
    return picture


@torch.inference_mode()
def prefix_strip(tokenizer: SpectralTokenizer, images: Tensor, lengths: Sequence[int]) -> Image.Image:
    """Two rows per image: the original and its sub-images I'_n; below them the reconstructions from n tokens.

    Args:
        tokenizer: in evaluation mode.
        images: `[B, 3, S, S]` uint8 or floating in [0, 1].
        lengths: prefix lengths n, 1..N.
    """
    images = images.to(tokenizer.device)
    tokens = tokenizer.encode(images)
    targets = [tokenizer.targets(images, torch.full((len(images),), n)) for n in lengths]
    rebuilt = [tokenizer.decode(tokens[:, :n]) for n in lengths]
    rows: list[list[Tensor | None]] = []
    for i in range(len(images)):
        rows.append([images[i], *(target[i] for target in targets)])
        rows.append([None, *(picture[i] for picture in rebuilt)])
    labels = ["sub-image", "rebuilt"] * len(images)
    return grid(rows, row_labels=labels, column_labels=["original", *(f"n = {n}" for n in lengths)])


def sample_rows(
    model: SpectralAR,
    classes: Sequence[int],
    *,
    columns: int,
    seed: int = 0,
    settings: SamplingSettings | None = None,
    length: int | None = None,
) -> list[list[Tensor]]:
    """New pictures `[3, S, S]` uint8 in CPU memory, one row per class; the picture in column j has seed `seed` + j.

    Args:
        model: what to sample from.
        classes: class numbers.
        columns: pictures per class.
        seed: seed of the first column.
        settings: see `SamplingSettings`.
        length: draw only the first so many tokens; None draws all.
    """
    seeds = range(seed, seed + columns)
    pairs = [(c, s) for c in classes for s in seeds]
    images = model.generate([c for c, _ in pairs], [s for _, s in pairs], settings, length=length).cpu()
    return [list(row) for row in images.split(columns)]


def sample_grid(
    model: SpectralAR,
    *,
    classes: Sequence[int] | None = None,
    columns: int = 4,
    seed: int = 0,
    settings: SamplingSettings | None = None,
) -> Image.Image:
    """New pictures, one row per class, labelled; column j has seed `seed` + j.

    Args:
        model: what to sample from.
        classes: class numbers; None is the first eight.
        columns: pictures per class.
        seed: seed of the first column.
        settings: see `SamplingSettings`.
    """
    chosen = list(classes) if classes is not None else list(range(min(8, model.generator.config.classes)))
    rows = sample_rows(model, chosen, columns=columns, seed=seed, settings=settings)
    return grid(rows, row_labels=[model.class_label(c) for c in chosen])


def coarse_to_fine(
    model: SpectralAR,
    class_number: int,
    *,
    seed: int = 0,
    settings: SamplingSettings | None = None,
    lengths: Sequence[int] = (),
) -> Image.Image:
    """One picture while it is drawn: what its first n tokens show, for each n of `lengths`, in rising order.

    Args:
        model: what to sample from.
        class_number: number of the class.
        seed: seed of the picture.
        settings: see `SamplingSettings`.
        lengths: numbers of tokens, each a whole number of the generator's groups; none is a choice of up to ten.

    Raises:
        ValueError: a length that no step reaches.
    """
    total, group = model.generator.config.tokens, model.generator.config.group
    reachable = range(group, total + 1, group)
    chosen = sorted(set(lengths) or {n for n in (1, 2, 4, 8, 12, 16, 24, 32, 48, total) if n in reachable})
    wrong = [n for n in chosen if n not in reachable]
    if wrong:
        raise ValueError(f"lengths must be multiples of {group} up to {total}, not {wrong[0]}")
    row = [
        step.images()[0] for step in model.stream([class_number], [seed], settings) if step.tokens.shape[1] in chosen
    ]
    return grid([row], row_labels=[model.class_label(class_number)], column_labels=[f"n = {n}" for n in chosen])
