"""One image: encoded bytes to RGB pixels, and RGB pixels to the square crop that a model sees.

Decoding refuses what a model should not silently learn from: empty, cut or unreadable files. A crop has two steps, so
that the first can be kept in memory: `prepare` (resize, the same in every epoch) and `draw` (place and flip, random).
What they do is said in numbers by `resized_size` and `choose_cut`, from which other decoders cut the same picture.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

CropKind = Literal["center", "random", "random-resized", "ten-crop", "none"]
CROP_KINDS: tuple[CropKind, ...] = ("center", "random", "random-resized", "ten-crop", "none")
TEN = 10
"""Crops of an image that `ten-crop` tells apart."""

MAX_PIXELS = 100_000_000
"""Largest accepted width x height, before and after a resize."""

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Containers that shards hold, by Pillow's name."""

_RESIZED_KINDS = ("center", "random", "ten-crop")
_ORIENTATION = 0x0112
_START_OF_JPEG, _END_OF_JPEG, _START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", 0xDA
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive
_EXIF, _ADOBE = 0xE1, 0xEE
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


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that every decoder shows as `decode_image` does; only its header is read.

    None for all other files: damaged and cut ones, other containers, CMYK and untransformed RGB, and whatever is not
    stored upright.
    """
    # Decoders on a GPU may fill what is missing at the end of a cut file with grey, and say nothing.
    if not (data.startswith(_START_OF_JPEG) and data.endswith(_END_OF_JPEG)):
        return None
    # Pillow reads all tables too, which at tens of thousands of images a second would keep several processors busy.
    size, components, transform = (0, 0), b"", 1
    at, marker = 2, 0
    while marker != _START_OF_SCAN:
        if at + 4 > len(data) or data[at] != 0xFF:
            return None
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        part = data[at + 4 : at + 2 + length]
        if marker in _FRAMES and len(part) >= 6:
            size = (int.from_bytes(part[3:5]), int.from_bytes(part[1:3]))
            if part[0] != 8:
                return None
            components = part[6::3]
        elif marker == _ADOBE and part.startswith(b"Adobe") and len(part) >= 12:
            transform = part[11]
        elif marker == _EXIF and (part.startswith(b"Exif") or b"tiff:Orientation" in part):  # the latter is XMP
            try:
                if not _is_upright(Image.open(io.BytesIO(data))):
                    return None
            except MemoryError:
                raise
            except Exception:  # decode_image says what it is
                return None
        at += 2 + max(2, length)
    if not 0 < size[0] * size[1] <= MAX_PIXELS or len(components) not in (1, 3):
        return None
    return size if len(components) == 1 or (transform == 1 and components != b"RGB") else None


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
        pixels, reason = pixels.resize(_short_side_size(*pixels.size, resize), Image.Resampling.BICUBIC), "resize"
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
            rectangle of random area and aspect and resizes it; `ten-crop` resizes the short side and cuts, in turn from
            epoch to epoch, the corners (top left, top right, bottom left, bottom right) and the centre, then the same
            five mirrored; `none` takes images that already are `size` x `size`.
        resize: short side before a cut of kind `random`, `center` or `ten-crop`; None is `size`, as TiTok does. At
            least `size`.
        scale: least and greatest share of the image's area for `random-resized`; the aspect is 3/4 to 4/3.
        flip: mirror left and right with probability 1/2; `ten-crop` mirrors five of its ten either way.

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
        if self.resize is not None and self.kind not in _RESIZED_KINDS:
            raise ValueError(f"resize is for kind {', '.join(_RESIZED_KINDS)}, not {self.kind}")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize must be at least size {self.size}, not {self.resize}")
        if not (len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1] <= 1):
            raise ValueError(f"scale must be two numbers with 0 < low <= high <= 1, not {self.scale}")


class Cut(NamedTuple):
    """A rectangle of an image, in its pixels from the top left, that becomes the square; and whether it is mirrored."""

    left: int
    top: int
    right: int
    bottom: int
    mirrored: bool


def apply_crop(image: Image.Image, crop: Crop, random: np.random.Generator, epoch: int = 0) -> torch.Tensor:
    """Cuts the square out of an RGB image: uint8 `[3, size, size]`, contiguous.

    Args:
        image: RGB image.
        crop: what to cut.
        random: source of place and flip; not used by a centre crop without flip.
        epoch: which of the crops of `ten-crop`; not used by the others.

    Raises:
        ImageError: `kind="none"` and another size, or a resize beyond `MAX_PIXELS`.
    """
    out = np.empty((3, crop.size, crop.size), np.uint8)
    draw(prepare(image, crop), crop, random, epoch, out)
    return torch.from_numpy(out)


def prepare(image: Image.Image, crop: Crop) -> np.ndarray:
    """The part of a crop that is the same in every epoch: uint8 `[height, width, 3]`.

    Raises:
        ImageError: see `apply_crop`.
    """
    size = resized_size(*image.size, crop)
    pixels = np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
    if crop.kind == "center":
        top, left = (pixels.shape[0] - crop.size) // 2, (pixels.shape[1] - crop.size) // 2
        pixels = np.ascontiguousarray(pixels[top : top + crop.size, left : left + crop.size])
    return pixels


def draw(pixels: np.ndarray, crop: Crop, random: np.random.Generator, epoch: int, out: np.ndarray) -> None:
    """The other part of a crop: writes uint8 `[3, size, size]` into `out` from what `prepare` returned."""
    # pixels [H, W, 3]
    height, width, _ = pixels.shape
    left, top, right, bottom, mirrored = choose_cut(width, height, crop, random, epoch)
    if (right - left, bottom - top) == (crop.size, crop.size):
        pixels = pixels[top:bottom, left:right]
    else:
        box, size = (left, top, right, bottom), (crop.size, crop.size)
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=box))
    if mirrored:
        pixels = pixels[:, ::-1]
    out[...] = pixels.transpose(2, 0, 1)


def resized_size(width: int, height: int, crop: Crop) -> tuple[int, int]:
    """Width and height of an image after the resize that the same crop begins with in every epoch.

    Raises:
        ImageError: see `apply_crop`.
    """
    size = crop.size
    if crop.kind == "none" and (width, height) != (size, size):
        raise ImageError(f"is {width} x {height} pixels, and crop kind none wants exactly {size} x {size}")
    if crop.kind in _RESIZED_KINDS:
        return _short_side_size(width, height, crop.resize or size)
    return width, height


def choose_cut(width: int, height: int, crop: Crop, random: np.random.Generator, epoch: int) -> Cut:
    """What to cut in one epoch out of an image that has been resized to `width` x `height`."""
    size = crop.size
    right, bottom = width - size, height - size  # of the last places, for the kinds that cut squares
    left, top = right // 2, bottom // 2
    mirrored = False
    if crop.kind == "random":
        top = int(random.integers(bottom + 1))
        left = int(random.integers(right + 1))
    elif crop.kind == "ten-crop":
        place = epoch % TEN
        left, top = ((0, 0), (right, 0), (0, bottom), (right, bottom), (left, top))[place % 5]
        mirrored = place >= 5
    box = (left, top, left + size, top + size)
    if crop.kind == "random-resized":
        box = _random_box(width, height, crop.scale, random)
    if crop.flip and crop.kind != "ten-crop":
        mirrored = random.random() < 0.5
    return Cut(*box, mirrored)


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


def _short_side_size(width: int, height: int, side: int) -> tuple[int, int]:
    short = min(width, height)
    width, height = max(side, round(width * side / short)), max(side, round(height * side / short))
    if width * height > MAX_PIXELS:
        raise ImageError(f"would be {width} x {height} pixels after the resize; {MAX_PIXELS} pixels are allowed")
    return width, height


def _open(data: bytes) -> Image.Image:
    """Opens and fully decodes; the pixels are still as stored."""
    if not data:
        raise ImageError("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from error
    except MemoryError:  # it says nothing about the image
        raise
    except Exception as error:  # Pillow's readers raise anything from struct.error to SyntaxError
        raise ImageError(f"not an image that Pillow can read ({len(data)} bytes)") from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"is {image.width} x {image.height} pixels; {MAX_PIXELS} pixels are allowed")
    try:
        image.load()
    except MemoryError:
        raise
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
    except (ImageError, MemoryError):
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
