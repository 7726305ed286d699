"""One image: encoded bytes to RGB pixels, and RGB pixels to the square crop that a model sees.

Decoding refuses what a model should not silently learn from: empty, cut or unreadable files. A crop has two steps, so
that the first can be kept in memory: `prepare` (resize, the same in every epoch) and `draw` (place and flip, random).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps

CropKind = Literal["center", "random", "random-resized", "none"]
CROP_KINDS: tuple[CropKind, ...] = ("center", "random", "random-resized", "none")

MAX_PIXELS = 100_000_000
"""Largest accepted width x height, before and after a resize."""

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Containers that shards hold, by Pillow's name."""

_ORIENTATION = 0x0112
_DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")


class ImageError(ValueError):
    """An image cannot be used; the message is the reason, and names no file because only the caller knows it."""


def decode_image(data: bytes) -> Image.Image:
    """Decodes an encoded image completely and returns it upright, as 8-bit RGB.

    EXIF orientation is applied. Greyscale, palette and CMYK are converted, transparency is composited on white, 16-bit
    greyscale keeps its high byte (as Pillow does for 16-bit colour). Colour profiles are ignored: pixels count as sRGB.
    Damage that leaves a file decodable, such as a flipped bit inside JPEG data, cannot be noticed.

    Args:
        data: the bytes of the file, in any container that Pillow reads.

    Raises:
        ImageError: empty, truncated, not an image, more than `MAX_PIXELS` pixels, or pixels without a defined range.
    """
    return _upright_rgb(_open(data))


@dataclass(frozen=True)
class Encoded:
    """Image bytes fit for a shard: `extension` jpg, png or webp; `reason` of re-encoding, None for untouched bytes."""

    data: bytes
    extension: str
    reason: str | None


def encode_for_shard(data: bytes, *, resize: int | None = None, quality: int = 95) -> Encoded:
    """Verifies an image and returns bytes which every decoder turns into the same upright RGB picture.

    The bytes stay untouched if they are an upright 8-bit RGB or greyscale JPEG, PNG or WebP, no larger than asked for.
    Otherwise they are re-encoded: lossy sources (JPEG, WebP) as JPEG without chroma subsampling, others as PNG.

    Args:
        data: the bytes of the file.
        resize: longest allowed short side in pixels; larger images are reduced (bicubic, antialiased).
        quality: JPEG quality, 1..100, of re-encoded images.

    Raises:
        ImageError: see `decode_image`.
    """
    image = _open(data)
    container = image.format or "unknown"
    reason = _conversion_reason(image, data)
    pixels = _upright_rgb(image)
    if resize is not None and min(pixels.size) > resize:
        pixels, reason = _resize_short_side(pixels, resize), "resize"
    if reason is None:
        return Encoded(data, EXTENSIONS[container], None)
    file = io.BytesIO()
    if container in ("JPEG", "WEBP"):
        pixels.save(file, "JPEG", quality=quality, subsampling=0)
        return Encoded(file.getvalue(), "jpg", reason)
    pixels.save(file, "PNG")
    return Encoded(file.getvalue(), "png", reason)


@dataclass(frozen=True)
class Crop:
    """How an image becomes a square of `size` pixels.

    Attributes:
        size: side of the result, in pixels.
        kind: `random` and `center` resize the short side to `resize` and cut a square; `random-resized` cuts a
            rectangle of random area and aspect and resizes it; `none` takes images that already are `size` x `size`.
        resize: short side before a `random` or `center` cut; None is `size`, as TiTok does. At least `size`.
        scale: least and greatest share of the image's area for `random-resized`; the aspect is 3/4 to 4/3.
        flip: mirror left and right with probability 1/2.

    Raises:
        ValueError: a value outside these limits.
    """

    size: int
    kind: CropKind = "random"
    resize: int | None = None
    scale: tuple[float, float] = (0.25, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be positive, not {self.size}")
        if self.kind not in CROP_KINDS:
            raise ValueError(f"kind must be one of {', '.join(CROP_KINDS)}, not {self.kind!r}")
        if self.resize is not None and self.kind not in ("center", "random"):
            raise ValueError(f"resize is for kind center or random, not {self.kind}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize must be at least size {self.size}, not {self.resize}")
        if not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1):
            raise ValueError(f"scale must be two numbers with 0 < low <= high <= 1, not {self.scale}")


def apply_crop(image: Image.Image, crop: Crop, random: np.random.Generator) -> torch.Tensor:
    """Cuts the square out of an RGB image: uint8 `[3, size, size]`, contiguous.

    Args:
        image: RGB image.
        crop: what to cut.
        random: source of place and flip; not used by a centre crop without flip.

    Raises:
        ImageError: `kind="none"` and another size, or a resize beyond `MAX_PIXELS`.
    """
    out = np.empty((3, crop.size, crop.size), np.uint8)
    draw(prepare(image, crop), crop, random, out)
    return torch.from_numpy(out)


def prepare(image: Image.Image, crop: Crop) -> np.ndarray:
    """The part of a crop that is the same in every epoch: uint8 `[height, width, 3]`.

    Raises:
        ImageError: see `apply_crop`.
    """
    size = crop.size
    if crop.kind == "none" and image.size != (size, size):
        raise ImageError(f"is {image.width} x {image.height} pixels, and crop kind none wants exactly {size} x {size}")
    if crop.kind in ("center", "random"):
        image = _resize_short_side(image, crop.resize or size)
    pixels = np.asarray(image)
    if crop.kind == "center":
        top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
        pixels = np.ascontiguousarray(pixels[top : top + size, left : left + size])
    return pixels


def draw(pixels: np.ndarray, crop: Crop, random: np.random.Generator, out: np.ndarray) -> None:
    """The random part of a crop: writes uint8 `[3, size, size]` into `out` from what `prepare` returned."""
    # pixels [H, W, 3]
    height, width, _ = pixels.shape
    size = crop.size
    if crop.kind == "random":
        top = int(random.integers(height - size + 1))
        left = int(random.integers(width - size + 1))
        pixels = pixels[top : top + size, left : left + size]
    elif crop.kind == "random-resized":
        box = _random_box(width, height, crop.scale, random)
        pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=box))
    if crop.flip and random.random() < 0.5:
        pixels = pixels[:, ::-1]
    out[...] = pixels.transpose(2, 0, 1)


def _random_box(
    width: int, height: int, scale: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a box of random area and aspect; the largest centred square if ten draws miss."""
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _resize_short_side(image: Image.Image, side: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    if short == side:
        return image
    width, height = max(side, round(width * side / short)), max(side, round(height * side / short))
    if width * height > MAX_PIXELS:
        raise ImageError(f"would be {width} x {height} pixels after the resize; {MAX_PIXELS} pixels are allowed")
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _open(data: bytes) -> Image.Image:
    """Opens and fully decodes; the pixels are still as stored."""
    if not data:
        raise ImageError("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # Pillow's readers raise anything from struct.error to SyntaxError
        raise ImageError(f"not an image that Pillow can read ({len(data)} bytes)") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"is {image.width} x {image.height} pixels; {MAX_PIXELS} pixels are allowed")
    try:
        image.load()
    except Exception as error:
        raise ImageError(f"truncated or damaged {image.format}: {error}") from error
    return image


def _upright_rgb(image: Image.Image) -> Image.Image:
    try:
        if not _is_upright(image):
            image = ImageOps.exif_transpose(image)
        if image.mode in _DEEP_MODES:
            return _high_byte(image).convert("RGB")
        if image.mode == "F":
            raise ImageError("has floating point pixels, whose range is not defined")
        if image.mode in _ALPHA_MODES or "transparency" in image.info:
            picture = image.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"cannot be converted from {image.mode} to RGB: {error}") from error


def _is_upright(image: Image.Image) -> bool:
    try:
        return image.getexif().get(_ORIENTATION, 1) == 1
    except Exception as error:
        raise ImageError(f"has EXIF data that cannot be read: {error}") from error


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit greyscale to 8 bits. Pillow's own conversion would clip at 255 instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"has values {values.min()}..{values.max()}, beyond 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _conversion_reason(image: Image.Image, data: bytes) -> str | None:
    """Why other decoders could show this file differently from `decode_image`, or None."""
    if image.format not in EXTENSIONS:
        return f"container {image.format}"
    if not _is_upright(image):
        return "orientation"
    # The bit depth stands at byte 24 of every PNG; Pillow already reports 16-bit colour as plain RGB.
    if image.mode in _DEEP_MODES or (image.format == "PNG" and data[24] == 16):
        return "16-bit"
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return "transparency"
    if image.mode not in ("RGB", "L"):
        return f"mode {image.mode}"
    return None
