"""Images that cannot be decoded: who takes their place, on both paths of the loader, and when that is too many."""

from __future__ import annotations

import io
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from skimage import data as photographs

from spectralar.training.data import (
    Batch,
    Crop,
    ImageError,
    ImageLoader,
    LoaderConfig,
    ShardError,
    ShardSet,
    apply_crop,
    crop_batches,
    crop_requests,
    dali,
    decode_image,
    evaluation_batches,
)
from spectralar.training.data.dali import DaliBatches, dali_installed
from spectralar.training.data.epochs import random_stream
from spectralar.training.data.images import plain_jpeg_size
from spectralar.training.data.unreadable import Unreadable, first_readable, most_unreadable
from tests.training.data.batches import assert_same, take

COUNT = 30
CUT, EMPTY, HUFFMAN, LAST = (4, 12), 5, 20, 29
"""Cut short, one after the other with an empty file; with tables that no decoder takes; cut short, at the end."""
BAD = (4, 5, 12, 20, 29)
LARGEST_PIXEL = 12
"""Between the paths, of 255; see test_dali.py."""
SUBSTITUTES = {4: 6, 5: 6, 12: 13, 20: 21, 29: 0}

BACKENDS = [
    "pillow",
    pytest.param("dali", marks=pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")),
]


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def no_tables(data: bytes) -> bytes:
    """A JPEG whose first Huffman table cannot be one; head and tail are sound."""
    at = data.index(b"\xff\xc4") + 5
    return data[:at] + b"\xff" * 16 + data[at + 16 :]


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty photographs of a class each in three tars of other origin, which nobody has decoded before."""
    folder = tmp_path_factory.mktemp("torn")
    photo = Image.fromarray(photographs.astronaut())
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(10 * shard, 10 * shard + 10):
                data = jpeg(photo.crop((5 * i, 3 * i, 5 * i + 200, 3 * i + 160)))
                if i in (*CUT, LAST):
                    data = data[: len(data) // 2]
                elif i == EMPTY:
                    data = b""
                elif i == HUFFMAN:
                    data = no_tables(data)
                for extension, content in (("jpg", data), ("cls", str(i).encode())):
                    member = tarfile.TarInfo(f"{i:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def loader(path: Path, backend: str, *, rank: int = 0, world: int = 1, **changes: Any) -> ImageLoader:
    crop = Crop(64, "random", resize=80)
    settings = {"path": str(path), "batch": 6, "crop": crop, "seed": 3, "max_unreadable": 0.2, **changes}
    return ImageLoader(LoaderConfig(backend=backend, **settings), rank=rank, world=world)


def test_the_set_is_as_bad_as_it_should_be(torn):
    shards = ShardSet.open(torn)
    bad = []
    for i in range(COUNT):
        try:
            decode_image(shards.read(i)[0])
        except ImageError:
            bad.append(i)
    assert tuple(bad) == BAD
    assert plain_jpeg_size(shards.read(HUFFMAN)[0]) == (200, 160), "only a decoder can notice it"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_sample_takes_the_place_with_its_own_label(torn, backend, workers):
    source = loader(torn, backend, workers=workers)
    shards = ShardSet.open(torn)
    for step, batch in enumerate(take(source, 11)):
        epoch, indices = source.order.indices(step)
        samples = [SUBSTITUTES.get(i, i) for i in indices.tolist()]
        assert batch.labels.tolist() == samples, "labels are numbers of samples here"
        for image, index, sample in zip(batch.images, indices.tolist(), samples, strict=True):
            stream = random_stream(3, "augmentation", epoch, index)
            expected = apply_crop(decode_image(shards.read(sample)[0]), source.config.crop, stream, epoch)
            assert (image.int() - expected.int()).abs().max() <= (0 if backend == "pillow" else LARGEST_PIXEL)
    assert {sample for sample, _ in source.state_dict()["unreadable"]} == set(BAD)


@pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
@pytest.mark.parametrize("crop", [Crop(64, "random", resize=80), Crop(96, "random-resized"), Crop(64, "ten-crop")])
def test_both_paths_put_the_same_in_the_same_place(torn, crop):
    ours, theirs = (loader(torn, backend, crop=crop) for backend in ("dali", "pillow"))
    for _ in range(11):
        a, b = next(ours), next(theirs)
        assert torch.equal(a.labels, b.labels)
        assert (a.images.int() - b.images.int()).abs().max() <= LARGEST_PIXEL
        assert [s for s, _ in ours.state_dict()["unreadable"]] == [s for s, _ in theirs.state_dict()["unreadable"]]


@pytest.mark.parametrize("workers, cache", [(2, False), (0, True), (2, True)])
def test_workers_and_cache_change_nothing(torn, workers, cache):
    plain, other = loader(torn, "pillow"), loader(torn, "pillow", workers=workers, cache=cache)
    assert_same(take(other, 7), take(plain, 7))
    assert other.state_dict() == plain.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_share_the_global_batches(torn, backend):
    whole = take(loader(torn, backend), 6)
    ranks = [loader(torn, backend, batch=3, rank=r, world=2) for r in range(2)]
    parts = [take(rank, 6) for rank in ranks]
    joined = [Batch(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels])) for a, b in zip(*parts)]  # noqa: B905
    assert_same(joined, whole)
    met = [{sample for sample, _ in rank.state_dict()["unreadable"]} for rank in ranks]
    assert met[0] | met[1] == set(BAD)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [0, 2, 5, 8])
def test_resume_continues_with_the_next_batch_and_the_count(torn, backend, at, caplog):
    source = loader(torn, backend, workers=2)
    take(source, at)
    state = source.state_dict()
    expected = take(source, 6)
    fresh = loader(torn, backend)
    fresh.load_state_dict(state)
    caplog.clear()
    assert_same(take(fresh, 6), expected)
    assert fresh.state_dict() == source.state_dict()
    warned = [r for r in caplog.records if "takes its place" in r.getMessage()]
    assert len(warned) == len(BAD) - len(state["unreadable"])
    del state["unreadable"]  # of a run that knew no such thing
    fresh.load_state_dict(state)
    assert_same(take(fresh, 6), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_is_named_once(torn, backend, caplog):
    with caplog.at_level(logging.WARNING, "spectralar"):
        take(loader(torn, backend, shuffle=False), 15)
    said = [r.getMessage() for r in caplog.records if "takes its place" in r.getMessage()]
    assert len(said) == len(BAD)
    for line, sample in zip(said, BAD, strict=True):
        shard = torn / f"{sample // 10}.tar"
        assert line.startswith(f"shard {shard}, key {sample:03d}: ") and line.endswith(
            "; the next image takes its place"
        )
    assert "empty file" in said[1] and "damaged JPEG" in said[3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_the_limit_end_the_run(torn, backend, workers):
    source = loader(torn, backend, shuffle=False, workers=workers, max_unreadable=0.134)  # 4 of 30
    take(source, 4)
    for _ in range(2):
        message = (
            r"more than 4 of the 30 images, which max_unreadable allows, cannot be read\. The first: .*0.tar, key 004"
        )
        with pytest.raises(ShardError, match=message + r": truncated.*0.tar, key 005: empty file; .*1.tar, key 012: "):
            next(source)
        assert source.step == 4
    if workers:
        batches: Any = source._batches
        (batches.encoded if isinstance(batches, DaliBatches) else batches)._iterator._shutdown_workers()


def test_more_than_the_limit_are_no_cache(torn):
    with pytest.raises(ShardError, match="more than 4 of the 30 images"):
        loader(torn, "pillow", cache=True, max_unreadable=0.134)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [4, 20])
def test_none_is_allowed_by_default_in_a_small_set_and_for_tokens(torn, backend, bad):
    assert most_unreadable(LoaderConfig("", 1, Crop(8)).max_unreadable, 1_281_167) == 1281
    if bad == 4:
        with pytest.raises(ShardError, match=r"^shard .*0\.tar, key 004: truncated or damaged JPEG"):
            take(loader(torn, backend, shuffle=False, max_unreadable=0.001), 1)
    config = LoaderConfig(str(torn), 6, Crop(64, "center"), backend=backend, max_unreadable=0.5)
    requests = [r for r in crop_requests(COUNT, 6, 1) if bad in r[1]]
    with pytest.raises(ShardError, match=rf"^shard .*\.tar, key 0{bad:02d}: truncated or damaged JPEG"):
        list(crop_batches(config, requests))


def test_evaluation_replaces_nothing(torn):
    batches = evaluation_batches(torn, batch=4, size=32)
    next(batches)
    with pytest.raises(ShardError, match=r"^shard .*0\.tar, key 004: truncated or damaged JPEG"):
        next(batches)


@pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
def test_pillow_decodes_what_only_dali_refuses(torn, monkeypatch, caplog):
    """As if Pillow could read the image with the bad tables: its batch is all Pillow's, others are DALI's as before."""
    before = take(loader(torn, "dali", shuffle=False), 10)
    bad = ShardSet.open(torn).read(HUFFMAN)[0]
    grey = Image.new("RGB", (200, 160), (90, 120, 150))
    monkeypatch.setattr(dali, "decode_image", lambda data: grey if data == bad else decode_image(data))
    source = loader(torn, "dali", shuffle=False)
    after = take(source, 10)
    place = HUFFMAN // 6
    for i, (x, y) in enumerate(zip(before, after, strict=True)):
        if i % 5 != place:
            assert_same([x], [y])
            continue
        assert y.labels.tolist() == list(range(18, 24))
        assert (y.images[HUFFMAN % 6] - torch.tensor([90, 120, 150])[:, None, None]).abs().max() == 0
        assert (x.images[3:].int() - y.images[3:].int()).abs().max() <= LARGEST_PIXEL
    assert {sample for sample, _ in source.state_dict()["unreadable"]} == set(BAD) - {HUFFMAN}
    said = [r.getMessage() for r in caplog.records if "on which DALI fails" in r.getMessage()]
    assert len(said) == 2 and said[0].startswith(
        f"Pillow decodes a batch that begins with shard {torn / '1.tar'}, key 018"
    )


@pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
@pytest.mark.gpu
@pytest.mark.parametrize("hw_decoder_load", [0.0, 1.0])
def test_on_a_gpu(torn, hw_decoder_load):
    """What is cut short never reaches the GPU; of the bad tables a GPU's decoder may think otherwise than Pillow."""
    config = LoaderConfig(
        str(torn),
        6,
        Crop(64, "random", resize=80),
        seed=3,
        workers=2,
        max_unreadable=0.2,
        hw_decoder_load=hw_decoder_load,
    )
    source, theirs = ImageLoader(config, device="cuda"), loader(torn, "pillow")
    assert source.backend == "dali"
    for _ in range(11):
        _, indices = source.order.indices(source.step)
        a, b = next(source), next(theirs)
        same = torch.from_numpy(indices != HUFFMAN)
        assert torch.equal(a.labels.cpu()[same], b.labels[same]) and a.labels[~same].tolist() in ([], [20], [21])
        assert (a.images.cpu()[same].int() - b.images[same].int()).abs().max() <= LARGEST_PIXEL + 6
    assert {sample for sample, _ in source.state_dict()["unreadable"]} | {HUFFMAN} == set(BAD)


def test_whole_numbers_of_samples():
    assert [most_unreadable(share, 100) for share in (0, 0.009, 0.01, 0.29, 0.3)] == [0, 0, 1, 29, 30]
    for share in (-0.1, 1):
        with pytest.raises(ValueError, match="max_unreadable must be at least 0 and below 1, not "):
            LoaderConfig("x", 2, Crop(8), max_unreadable=share)


def test_the_search_ends(torn):
    shards = ShardSet.open(torn)

    def refuse(sample: int) -> int:
        raise ImageError(f"no {sample}")

    met: dict[int, str] = {}
    with pytest.raises(ShardError, match="more than 3 of the 30"):
        first_readable(shards, 28, refuse, 3, met, {0: "known"})
    assert met == {28: "no 28", 29: "no 29", 0: "known", 1: "no 1"}
    count = Unreadable(shards, 1)
    count.add({4: "bad"})
    count.add({4: "bad"})
    with pytest.raises(ShardError, match=r"key 004: bad; .*key 005: worse"):
        count.add({5: "worse"})
