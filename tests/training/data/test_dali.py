"""DALI's path of the loader against Pillow's: same samples, crops, order and errors, and pixels that differ little."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from spectralar.devices import QUEUES
from spectralar.kernels.dct import dct2
from spectralar.training.data import (
    Batch,
    Crop,
    ImageLoader,
    LoaderConfig,
    ShardError,
    ShardSet,
    crop_batches,
    crop_requests,
    decode_image,
    write_shards,
)
from spectralar.training.data import loader as loader_module
from spectralar.training.data.dali import DaliBatches, EncodedImages, dali_installed
from spectralar.training.data.images import plain_jpeg_size
from spectralar.training.data.loader import choose_backend
from tests.training.data.batches import assert_same, take

needs_dali = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")

CROPS = [
    Crop(64, "random", resize=80),
    Crop(96, "random-resized", scale=(0.1, 1.0)),
    Crop(64, "center"),
    Crop(64, "ten-crop", resize=72),
]
LARGEST_PIXEL = 12
"""Largest difference that was seen between the paths on a CPU, of 255, for photographs at a quarter of their size: at
hard edges, where Pillow clips what a resize overshoots before its second pass, and DALI after it."""
LARGEST_COEFFICIENT = 6.0
"""Largest difference of an orthonormal DCT coefficient for 64 and 96 pixels, where constant 255 has 255 x size."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 samples: JPEGs with and without chroma subsampling, progressive, grey, odd sides; WebP and PNG."""
    base = tmp_path_factory.mktemp("mixed")
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        folder = base / "pictures" / name
        folder.mkdir(parents=True)
        photo = Image.fromarray(getattr(photographs, name)()).convert("RGB")
        for i in range(3):
            photo.resize((400 - 33 * i, 300 - 7 * i)).save(folder / f"{i}.jpg", quality=90)
        photo.resize((231, 257)).save(folder / "full.jpg", quality=95, subsampling=0)
        photo.resize((300, 200)).save(folder / "progressive.jpg", progressive=True)
        photo.convert("L").resize((160, 200)).save(folder / "grey.jpg")
        photo.resize((150, 120)).save(folder / "x.webp")
    photo.resize((120, 150)).save(folder / "x.png")
    write_shards(base / "pictures", base / "shards", samples_per_shard=8)
    return base / "shards"


def loader(path: Path, backend: str = "dali", *, rank: int = 0, world: int = 1, **changes: Any) -> ImageLoader:
    settings = {"path": str(path), "batch": 6, "crop": CROPS[0], "seed": 3, **changes}
    return ImageLoader(LoaderConfig(backend=backend, **settings), rank=rank, world=world)


@needs_dali
@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: crop.kind)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_samples_are_those_of_pillow(mixed, crop, workers):
    ours = take(loader(mixed, crop=crop, workers=workers), 9)
    theirs = take(loader(mixed, "pillow", crop=crop), 9)
    pixel = coefficient = mean = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.images.shape == b.images.shape and a.images.dtype == torch.uint8 and a.images.is_contiguous()
        assert torch.equal(a.labels, b.labels) and a.labels.dtype == torch.int64
        difference = a.images.double() - b.images.double()
        pixel = max(pixel, difference.abs().max().item())
        coefficient = max(coefficient, dct2(difference).abs().max().item())
        mean += difference.abs().mean().item() / 9
    print(f"{crop.kind}: pixel {pixel:.0f}, mean {mean:.3f}, coefficient {coefficient:.1f}")
    assert pixel <= LARGEST_PIXEL and coefficient <= LARGEST_COEFFICIENT
    assert 0 < mean < 0.25


@needs_dali
def test_pictures_that_need_no_resize_are_equal_to_the_bit(mixed, tmp_path):
    shards = ShardSet.open(mixed)
    (tmp_path / "in" / "a").mkdir(parents=True)
    for i in range(len(shards)):
        photo = decode_image(shards.read(i)[0]).crop((0, 0, 120, 120))
        photo.save(tmp_path / "in" / "a" / f"{i}.{('jpg', 'png')[i % 2]}")
    write_shards(tmp_path / "in", tmp_path / "out")
    for crop in (Crop(120, "none"), Crop(120, "ten-crop")):
        assert_same(*(take(loader(tmp_path / "out", backend, crop=crop), 6) for backend in ("dali", "pillow")))


@needs_dali
@pytest.mark.parametrize("at", [0, 1, 3, 4, 6])
def test_resume_continues_with_the_next_batch_on_either_path(mixed, at):
    source = loader(mixed, workers=2)
    assert source.backend == "dali" and source.steps_per_epoch == 4
    take(source, at)
    state = source.state_dict()
    assert state["step"] == at, "what DALI has in its queue is not handed out"
    expected = take(source, 4)
    fresh = loader(mixed)
    take(fresh, 2)
    fresh.load_state_dict(state)
    assert_same(take(fresh, 4), expected)
    source.load_state_dict(state)
    assert_same(take(source, 4), expected)
    other = loader(mixed, "pillow")
    other.load_state_dict(state)
    for a, b in zip(take(other, 4), expected, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert (a.images.int() - b.images.int()).abs().max() <= LARGEST_PIXEL
    for changes, message in (({"batch": 5}, "batch 6 .here 5."), ({"world": 2}, "world 1 .here 2.")):
        with pytest.raises(ValueError, match=message):
            loader(mixed, **changes).load_state_dict(state)


@needs_dali
def test_ranks_share_the_global_batches(mixed):
    whole = take(loader(mixed), 5)
    ranks = [take(loader(mixed, batch=3, rank=r, world=2), 5) for r in range(2)]
    joined = [Batch(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels])) for a, b in zip(*ranks)]  # noqa: B905
    assert_same(joined, whole)


@needs_dali
def test_crop_batches_with_a_shorter_last_batch(mixed):
    config = {"path": str(mixed), "batch": 12, "crop": CROPS[3]}
    requests = crop_requests(29, 12, 2)
    ours, theirs = (list(crop_batches(LoaderConfig(**config, backend=b), requests)) for b in ("dali", "pillow"))
    assert [len(b.labels) for b in ours] == [12, 12, 5] * 2
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.labels, b.labels)
        assert (a.images.int() - b.images.int()).abs().max() <= LARGEST_PIXEL


def damage(shards_path: Path, out: Path, index: int, part: slice, by: int) -> tuple[Path, str]:
    """A copy of a set in which some bytes of one image are overwritten, and the key of that image."""
    folder = Path(shutil.copytree(shards_path, out))
    shards = ShardSet.open(folder)
    path = shards.paths[shards._shards[index]]
    data = bytearray(path.read_bytes())
    start, size = int(shards._offsets[index]), int(shards._sizes[index])
    image = data[start : start + size]
    image[part] = bytes([by]) * len(image[part])
    data[start : start + size] = image
    path.write_bytes(data)
    return folder, shards.key(index)


def first_jpeg(path: Path, after: int) -> int:
    shards = ShardSet.open(path)
    return next(i for i in range(after, len(shards)) if plain_jpeg_size(shards.read(i)[0]))


@needs_dali
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("part", "reason"),
    [(slice(0, 30), "not an image"), (slice(-400, None), "damaged JPEG"), (slice(20, -2), "not an image|damaged JPEG")],
    ids=["head", "tail", "between its marks"],
)
def test_a_damaged_image_names_shard_and_key_and_the_place_stays(mixed, tmp_path, part, reason, workers):
    index = first_jpeg(mixed, 13)
    folder, key = damage(mixed, tmp_path / "damaged", index, part, 0)
    source = loader(folder, shuffle=False, workers=workers)
    first = take(source, index // 6)
    for _ in range(2):
        with pytest.raises(ShardError, match=rf"train-\d+\.tar, key {key}: .*({reason})"):
            next(source)
        assert source.step == index // 6
    source.load_state_dict({**source.state_dict(), "step": 0})
    assert_same(take(source, index // 6), first)
    if workers:
        source._batches.encoded._iterator._shutdown_workers()  # type: ignore[union-attr]


@needs_dali
def test_what_pillow_decodes_is_said_once(mixed, caplog):
    with caplog.at_level(logging.INFO, "spectralar"):
        take(loader(mixed), 9)
    said = [r.getMessage() for r in caplog.records]
    assert said[0] == "images are decoded by dali: as asked for"
    assert len(said) == 2 and "are no plain JPEGs: Pillow decodes such images" in said[1]


@needs_dali
def test_wrong_size_for_kind_none_names_shard_and_key(mixed):
    with pytest.raises(ShardError, match=r"train-00000\d.tar, key \d+: is \d+ x \d+ pixels, and crop kind none"):
        next(loader(mixed, crop=Crop(64, "none")))


@needs_dali
def test_the_global_random_state_is_left_alone(mixed):
    before = torch.get_rng_state()
    take(loader(mixed, workers=1), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_encoded_batches_hold_untouched_jpegs_and_decoded_others(mixed):
    shards = ShardSet.open(mixed)
    indices = np.arange(len(shards))[::-1].copy()
    batch = EncodedImages(shards, Crop(64, "random", resize=80), 3, 0)[(1, indices)]
    assert batch.files.dtype == torch.uint8 and len(batch.files) == batch.ends[-1]
    others = []
    for i, (end, index) in enumerate(zip(batch.ends, indices.tolist(), strict=True)):
        data = shards.read(index)[0]
        stored = batch.files.numpy()[batch.ends[i - 1] if i else 0 : end].tobytes()
        image = decode_image(data)
        if not data.startswith(b"\xff\xd8"):
            others.append(index)
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored))), np.asarray(image))
        else:
            assert stored == data
        # A square of 64 out of an image whose short side has become 80.
        sides = (batch.last - batch.first)[i]
        np.testing.assert_allclose(sides, 64 / 80 * min(image.size), rtol=0.01)
        assert (batch.first[i] >= 0).all() and (batch.last[i] <= np.float32([image.height, image.width]) + 1e-3).all()
    assert len(others) == 5 and batch.by_pillow == others
    assert set(batch.mirrored.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("changes", "device", "installed", "expected"),
    [
        ({}, "cpu", True, ("pillow", "the device is cpu")),
        ({}, "cuda", True, ("dali", "it decodes on the GPU")),
        ({}, "cuda", False, ("pillow", "NVIDIA DALI, which decodes on the GPU, is not installed (pip install")),
        ({"cache": True}, "cuda", True, ("pillow", "it fills the cache")),
        ({"backend": "dali"}, "cpu", True, ("dali", "as asked for")),
        ({"backend": "pillow"}, "cuda", True, ("pillow", "as asked for")),
    ],
)
def test_the_choice_of_the_backend(monkeypatch, changes, device, installed, expected):
    monkeypatch.setattr(loader_module, "dali_installed", lambda: installed)
    backend, reason = choose_backend(LoaderConfig("x", 2, CROPS[0], **changes), torch.device(device))
    assert backend == expected[0] and reason.startswith(expected[1])


def test_a_gpu_without_dali_is_warned_of_once(mixed, monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "dali_installed", lambda: False)
    config = LoaderConfig(str(mixed), 6, CROPS[0])
    for rank in (0, 1):
        source = ImageLoader(config, rank=rank, world=2, device="cuda")
        assert source.backend == "pillow"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("images are decoded by pillow: NVIDIA DALI, which decodes on the GPU, is not")


@pytest.mark.parametrize("device, queues, warned", [("cuda", None, True), ("cuda", "8", False), ("cpu", None, False)])
def test_few_queues_of_a_gpu_are_warned_of(mixed, monkeypatch, caplog, device, queues, warned):
    monkeypatch.delenv(QUEUES, raising=False)
    if queues:
        monkeypatch.setenv(QUEUES, queues)
    with caplog.at_level(logging.WARNING, "spectralar"):
        images = EncodedImages(ShardSet.open(mixed), CROPS[0], 0, 0)
        DaliBatches([], images, batch=4, device=torch.device(device, 0), hw_decoder_load=1.0)
    assert (f"{QUEUES} is not set" in caplog.text) == warned


def test_arguments(mixed, monkeypatch):
    for changes, message in (
        ({"backend": "webdataset"}, "backend must be one of auto, dali, pillow, not 'webdataset'"),
        ({"backend": "dali", "cache": True}, "cache must be off with backend dali"),
        ({"hw_decoder_load": 1.5}, r"hw_decoder_load must be 0\.\.1, not 1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            LoaderConfig("x", 2, CROPS[0], **changes)
    monkeypatch.setattr(loader_module, "dali_installed", lambda: False)
    with pytest.raises(ValueError, match=r"backend dali needs NVIDIA DALI, which is not installed: pip install"):
        loader(mixed)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def test_plain_jpegs(picture):
    image = picture(9, 7)
    rotated, upright = Image.Exif(), Image.Exif()
    rotated[0x0112], upright[0x0112] = 6, 1
    whole = jpeg(image)

    def with_segment(marker: int, content: bytes) -> bytes:
        return whole[:2] + bytes([0xFF, marker]) + (2 + len(content)).to_bytes(2) + content + whole[2:]

    turned_by_xmp = (
        b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"/>'
    )
    upright_by_xmp = turned_by_xmp.replace(b'"6"', b'"1"')
    assert plain_jpeg_size(with_segment(0xE1, upright_by_xmp)) == (7, 9)
    assert plain_jpeg_size(with_segment(0xE1, turned_by_xmp)) is None
    assert decode_image(with_segment(0xE1, turned_by_xmp)).size == (9, 7)
    assert plain_jpeg_size(with_segment(0xEE, b"Adobe\0\x64\0\0\0\0\0 and more")) is None
    for data in (
        whole,
        jpeg(image, subsampling=0),
        jpeg(image, progressive=True),
        jpeg(image.convert("L")),
        jpeg(image, exif=upright),
    ):
        assert plain_jpeg_size(data) == (7, 9)
    png = io.BytesIO()
    image.save(png, "PNG")
    for data in (
        b"",
        b"\xff\xd9",
        b"\xff\xd8\xff\xd9",
        whole[:30] + b"\xff\xd9",
        whole.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"),  # 12 bits
        whole.replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"),  # arithmetic coding
        whole[:-1],
        whole[:-2] + b"\x00" * 10,
        png.getvalue(),
        png.getvalue() + b"\xff\xd9",
        jpeg(image.convert("CMYK")),
        jpeg(image, keep_rgb=True),
        jpeg(image, exif=rotated),
    ):
        assert plain_jpeg_size(data) is None


@needs_dali
def test_the_interpreter_ends_with_a_loader_at_work(mixed):
    program = (
        "from spectralar.training.data import Crop, ImageLoader, LoaderConfig\n"
        f"loader = ImageLoader(LoaderConfig({str(mixed)!r}, 6, Crop(64, 'random'), backend='dali'))\n"
        "print(len(next(loader).images))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "6\n")
    assert "fails" not in done.stderr and "Exception" not in done.stderr


@needs_dali
@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_on_a_gpu(mixed, hw_decoder_load):
    """A GPU's inverse DCT rounds differently: one level more, which a resize that enlarges may turn into a few."""
    for crop in CROPS:
        config = LoaderConfig(str(mixed), 6, crop, seed=3, workers=2, hw_decoder_load=hw_decoder_load)
        ours = take(ImageLoader(config, device="cuda"), 9)
        theirs = take(loader(mixed, "pillow", crop=crop), 9)
        for a, b in zip(ours, theirs, strict=True):
            assert a.images.is_cuda and a.labels.is_cuda and torch.equal(a.labels.cpu(), b.labels)
            assert (a.images.cpu().int() - b.images.int()).abs().max() <= LARGEST_PIXEL + 6
        assert_same(take(ImageLoader(config, device="cuda"), 9), ours)
