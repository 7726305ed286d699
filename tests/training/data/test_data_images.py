"""Decoding of every kind of good and bad file, and crops."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from spectralar.training.data import Crop, ImageError, apply_crop, decode_image, encode_for_shard
from spectralar.training.data import images as images_module
from spectralar.training.data.images import CROP_KINDS, choose_cut, resized_size


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_16bit(values: np.ndarray) -> bytes:
    """A 16-bit PNG, which Pillow cannot write in colour; values uint16 [H, W] or [H, W, 3]."""
    height, width = values.shape[:2]
    colour_type = 2 if values.ndim == 3 else 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def test_rgb_is_untouched(encode, picture):
    image = picture(5, 7)
    np.testing.assert_array_equal(pixels(encode(image)), np.asarray(image))


def test_greyscale_fills_three_channels(encode, picture):
    grey = picture(5, 7).convert("L")
    np.testing.assert_array_equal(pixels(encode(grey)), np.repeat(np.asarray(grey)[..., None], 3, axis=2))


def test_bilevel_and_palette(encode, picture):
    bits = picture(5, 7).convert("1")
    np.testing.assert_array_equal(pixels(encode(bits))[..., 0], np.asarray(bits) * 255)
    palette = picture(5, 7).quantize(8)
    np.testing.assert_array_equal(pixels(encode(palette)), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white(encode, picture, mode):
    image = picture(4, 6).convert(mode)
    alpha = np.tile(np.array([0, 51, 255], np.uint8), (4, 2))
    image.putalpha(Image.fromarray(alpha))
    colour = np.asarray(image.convert("RGBA"))[..., :3].astype(np.float64)
    share = alpha[..., None] / 255
    expected = colour * share + 255 * (1 - share)
    assert np.abs(pixels(encode(image)) - expected).max() <= 1  # Pillow composites in integers


def test_transparent_palette_and_colour_key(encode):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert pixels(encode(palette, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]
    key = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encode(key, transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 3)])
def test_sixteen_bits_are_scaled_and_not_clipped(shape):
    values = np.linspace(0, 65535, 12).astype(np.uint16)
    values = values.reshape(3, 4) if len(shape) == 2 else np.stack([values.reshape(3, 4)] * 3, axis=2)
    got = pixels(png_16bit(values))
    expected = (values if values.ndim == 3 else values[..., None]) >> 8
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (3, 4, 3)))
    assert got.min() == 0 and got.max() == 255


def test_wide_integers_and_floats_are_refused(encode):
    with pytest.raises(ImageError, match="beyond 16 bits"):
        decode_image(encode(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"))
    with pytest.raises(ImageError, match="floating point"):
        decode_image(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_cmyk(encode, picture):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels(encode(image, "JPEG", quality=100)).astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 4  # JPEG rounding


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(encode, picture, orientation):
    image = picture(3, 5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    a = np.asarray(image)
    transposed = a.transpose(1, 0, 2)
    expected = {
        1: a,
        2: a[:, ::-1],
        3: a[::-1, ::-1],
        4: a[::-1],
        5: transposed,
        6: transposed[:, ::-1],
        7: transposed[::-1, ::-1],
        8: transposed[::-1],
    }[orientation]
    np.testing.assert_array_equal(pixels(encode(image, exif=exif)), expected)


@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_files(encode, picture, container, share):
    data = encode(picture(64, 64), container)
    with pytest.raises(ImageError, match=r"truncated or damaged|not an image"):
        decode_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("method", ["load", "convert"])
def test_a_lack_of_memory_is_not_the_images_fault(encode, picture, monkeypatch, method):
    def fail(*_, **__):
        raise MemoryError

    data = encode(picture(9, 9).convert("L"))
    monkeypatch.setattr(Image.Image if method == "convert" else PngImagePlugin.PngImageFile, method, fail)
    with pytest.raises(MemoryError):
        decode_image(data)


@pytest.mark.parametrize(
    "data, reason", [(b"", "empty file"), (b"\0" * 500, "not an image"), (b"hello", r"not an image .*\(5 bytes\)")]
)
def test_no_image_at_all(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode_image(data)


def test_absurd_sizes(encode, picture, monkeypatch):
    header = png_16bit(np.zeros((1, 1), np.uint16))
    bomb = header[:16] + struct.pack(">II", 60000, 60000) + header[24:]
    bomb = bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:]
    with pytest.raises(ImageError, match="pixels"):
        decode_image(bomb)
    data = encode(picture(10, 11))
    monkeypatch.setattr(images_module, "MAX_PIXELS", 109)
    with pytest.raises(ImageError, match=r"is 11 x 10 pixels; 109 pixels are allowed"):
        decode_image(data)
    with pytest.raises(ImageError, match=r"would be 40 x 20 pixels after the resize"):
        apply_crop(picture(2, 4), Crop(20), np.random.default_rng(0))


@pytest.mark.parametrize(
    "container, extension, mode",
    [("JPEG", "jpg", "RGB"), ("JPEG", "jpg", "L"), ("PNG", "png", "RGB"), ("PNG", "png", "L"), ("WEBP", "webp", "RGB")],
)
def test_plain_files_are_stored_untouched(encode, picture, container, extension, mode):
    data = encode(picture(8, 9).convert(mode), container)
    stored = encode_for_shard(data, resize=8)
    assert (stored.data, stored.extension, stored.reason) == (data, extension, None)


def test_other_files_are_re_encoded_with_a_reason(encode, picture):
    image = picture(8, 9)
    exif = Image.Exif()
    exif[0x0112] = 6
    cases = [
        (encode(image, "BMP"), "png", "container BMP"),
        (encode(image, "JPEG", exif=exif), "jpg", "orientation"),
        (png_16bit(np.zeros((2, 2), np.uint16)), "png", "16-bit"),
        (png_16bit(np.zeros((2, 2, 3), np.uint16)), "png", "16-bit"),
        (encode(image.convert("RGBA")), "png", "transparency"),
        (encode(image.quantize(8)), "png", "mode P"),
        (encode(image.convert("CMYK"), "JPEG"), "jpg", "mode CMYK"),
        (encode(picture(30, 40), "JPEG"), "jpg", "resize"),
        (encode(picture(30, 40)), "png", "resize"),
    ]
    for data, extension, reason in cases:
        stored = encode_for_shard(data, resize=20)
        assert (stored.extension, stored.reason) == (extension, reason)
        again = Image.open(io.BytesIO(stored.data))
        assert again.mode == "RGB" and again.getexif().get(0x0112, 1) == 1 and min(again.size) <= 20
        if extension == "png" and reason != "resize":
            np.testing.assert_array_equal(pixels(stored.data), pixels(data))


def test_crop_settings_are_checked():
    for settings_, message in [
        ({"size": 0}, "size must be positive, not 0"),
        (
            {"size": 4, "kind": "other"},
            "kind must be one of center, random, .*ten-crop, none, not 'other'",
        ),
        ({"size": 4, "resize": 3}, "resize must be at least size 4, not 3"),
        ({"size": 4, "kind": "none", "resize": 8}, "resize is for kind center, random, ten-crop, not none"),
        ({"size": 4, "scale": (0.5, 0.4)}, "scale must be"),
        ({"size": 4, "scale": (0.0, 0.4)}, "scale must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            Crop(**settings_)


def test_none_wants_the_exact_size(picture):
    crop = Crop(6, "none", flip=False)
    image = picture(6, 6)
    got = apply_crop(image, crop, np.random.default_rng(0))
    np.testing.assert_array_equal(got.numpy(), np.asarray(image).transpose(2, 0, 1))
    with pytest.raises(ImageError, match=r"is 7 x 6 pixels, and crop kind none wants exactly 6 x 6"):
        apply_crop(picture(6, 7), crop, np.random.default_rng(0))


def test_center_crop_is_in_the_middle(picture):
    image = picture(8, 13)
    got = apply_crop(image, Crop(4, "center", resize=8, flip=False), np.random.default_rng(0))
    np.testing.assert_array_equal(got.numpy(), np.asarray(image)[2:6, 4:8].transpose(2, 0, 1))
    small = apply_crop(image, Crop(4, "center", flip=False), np.random.default_rng(0))
    whole = np.asarray(image.resize((6, 4), Image.Resampling.BICUBIC))  # 13 * 4 / 8 = 6.5, rounded to even
    np.testing.assert_array_equal(small.numpy(), whole[:, 1:5].transpose(2, 0, 1))


def test_ten_crops_are_corners_and_centre_and_their_mirror_images(picture):
    image = picture(7, 10)
    a = np.asarray(image).transpose(2, 0, 1)
    places = [(0, 0), (0, 6), (3, 0), (3, 6), (1, 3)]
    expected = [a[:, y : y + 4, x : x + 4] for y, x in places]
    expected += [square[:, :, ::-1] for square in expected]
    for flip in (False, True):
        crop = Crop(4, "ten-crop", resize=7, flip=flip)
        for epoch in range(20):
            got = apply_crop(image, crop, np.random.default_rng(epoch), epoch)
            np.testing.assert_array_equal(got.numpy(), expected[epoch % 10])


@pytest.mark.parametrize("kind", CROP_KINDS)
def test_cut_and_size_in_numbers_are_what_is_cut(picture, kind):
    """What `resized_size` and `choose_cut` say, done by hand, is the crop: other decoders cut by them."""
    for seed in range(20):
        sides = np.random.default_rng(seed).integers(12, 40, 2).tolist() if kind != "none" else (9, 9)
        image = picture(*sides, seed=seed)
        crop = Crop(9, kind, resize=11 if kind in ("center", "random", "ten-crop") else None)
        size = resized_size(*image.size, crop)
        cut = choose_cut(*size, crop, np.random.default_rng(seed), seed)
        assert 0 <= cut.left < cut.right <= size[0] and 0 <= cut.top < cut.bottom <= size[1]
        by_hand = image.resize(size, Image.Resampling.BICUBIC).resize((9, 9), Image.Resampling.BICUBIC, box=cut[:4])
        if cut.mirrored:
            by_hand = by_hand.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        got = apply_crop(image, crop, np.random.default_rng(seed), seed)
        np.testing.assert_array_equal(got.numpy(), np.asarray(by_hand).transpose(2, 0, 1))


def test_random_crops_reach_every_place_and_both_flips(picture):
    image = picture(5, 6)
    a = np.asarray(image).transpose(2, 0, 1)
    places = {a[:, y : y + 4, x : x + 4].tobytes(): (y, x, 0) for y in range(2) for x in range(3)}
    places |= {a[:, y : y + 4, x : x + 4][:, :, ::-1].tobytes(): (y, x, 1) for y in range(2) for x in range(3)}
    random = np.random.default_rng(0)
    seen = {places[apply_crop(image, Crop(4, resize=5), random).numpy().tobytes()] for _ in range(300)}
    assert len(seen) == 12


def test_random_resized_keeps_area_and_aspect_in_range():
    # Coordinates as colours: the spread of a smooth crop tells which box it was cut from.
    rows, columns = np.mgrid[0:200, 0:200]
    image = Image.fromarray(np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8))
    random = np.random.default_rng(0)
    areas = []
    for _ in range(200):
        got = apply_crop(image, Crop(32, "random-resized", scale=(0.1, 0.5), flip=False), random).numpy().astype(float)
        height, width = ((got[c].max() - got[c].min()) * 32 / 31 for c in (0, 1))
        assert 0.7 < width / height < 1.43  # 3/4..4/3 and one grey level of rounding at each end
        areas.append(width * height / 200**2)
    assert 0.09 < min(areas) < 0.16 and 0.44 < max(areas) < 0.54


def test_random_resized_of_a_thin_image_falls_back_to_the_largest_square(picture):
    image = picture(2, 60)
    got = apply_crop(image, Crop(2, "random-resized", scale=(1.0, 1.0), flip=False), np.random.default_rng(0))
    np.testing.assert_array_equal(got.numpy(), np.asarray(image)[:, 29:31].transpose(2, 0, 1))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 24),
    extra=st.integers(0, 9),
    kind=st.sampled_from([k for k in CROP_KINDS if k != "none"]),
    seed=st.integers(0, 2**32),
)
def test_every_size_gives_a_contiguous_square_that_depends_on_the_seed_only(height, width, size, extra, kind, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    crop = Crop(size, kind, resize=size + extra if kind != "random-resized" else None)
    got = apply_crop(image, crop, np.random.default_rng(seed))
    assert got.shape == (3, size, size) and got.dtype == torch.uint8 and got.is_contiguous()
    assert torch.equal(got, apply_crop(image, crop, np.random.default_rng(seed)))
