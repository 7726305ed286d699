"""The image loader: what a model sees is a function of seed and step alone."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spectralar.training.data import (
    Batch,
    Crop,
    ImageLoader,
    LoaderConfig,
    ShardError,
    ShardSet,
    TokenStore,
    TokenWriter,
    apply_crop,
    crop_batches,
    crop_requests,
    decode_image,
    evaluation_batches,
    write_shards,
)
from spectralar.training.data.epochs import random_stream
from tests.training.data.batches import assert_same, take


def loader(path: Path, *, rank: int = 0, world: int = 1, **changes: object) -> ImageLoader:
    settings = {"path": str(path), "batch": 4, "crop": Crop(10, resize=12), "seed": 3, **changes}
    return ImageLoader(LoaderConfig(**settings), rank=rank, world=world)


def test_batches_are_the_crops_that_the_documentation_promises(numbered_dir):
    source = loader(numbered_dir)
    shards = ShardSet.open(numbered_dir)
    assert source.steps_per_epoch == 5 and source.classes == 23 and source.class_names[1] == "01"
    for step, batch in enumerate(take(source, 12)):
        assert batch.images.shape == (4, 3, 10, 10) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous() and batch.labels.dtype == torch.int64 and batch.labels.shape == (4,)
        epoch, indices = source.order.indices(step)
        for image, label, index in zip(batch.images, batch.labels, indices.tolist(), strict=True):
            data, expected_label, _ = shards.read(index)
            stream = random_stream(3, "augmentation", epoch, index)
            expected = apply_crop(decode_image(data), Crop(10, resize=12), stream)
            assert torch.equal(image, expected) and label == expected_label


@pytest.mark.parametrize("crop", [Crop(10, resize=12), Crop(8, "random-resized"), Crop(9, "center"), Crop(12, "none")])
@pytest.mark.parametrize("workers, cache", [(0, True), (2, False), (2, True)])
def test_workers_and_cache_change_nothing(numbered_dir, crop, workers, cache):
    expected = take(loader(numbered_dir, crop=crop), 7)
    assert_same(take(loader(numbered_dir, crop=crop, workers=workers, cache=cache), 7), expected)


def test_cache_holds_pictures_of_different_sizes(shards_dir):
    crop = Crop(16, "random")
    assert_same(take(loader(shards_dir, crop=crop, cache=True), 5), take(loader(shards_dir, crop=crop), 5))


def test_ranks_share_the_global_batches(numbered_dir):
    whole = take(loader(numbered_dir, batch=6), 6)
    ranks = [take(loader(numbered_dir, batch=3, rank=r, world=2), 6) for r in range(2)]
    joined = [
        Batch(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels])) for a, b in zip(*ranks, strict=True)
    ]
    assert_same(joined, whole)
    for start in (0, 3):  # three steps an epoch: 18 of 23 samples, none twice
        labels = torch.cat([b.labels for b in joined[start : start + 3]]).tolist()
        assert len(set(labels)) == 18
    assert set(torch.cat([b.labels for b in whole]).tolist()) > set(torch.cat([b.labels for b in whole[:3]]).tolist())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [0, 1, 4, 5, 7])
def test_resume_continues_with_the_next_batch(numbered_dir, workers, at):
    source = loader(numbered_dir, workers=workers)
    take(source, at)
    state = source.state_dict()
    assert state["step"] == at and source.epoch == at // 5
    expected = take(source, 4)
    fresh = loader(numbered_dir, workers=2 - workers)
    take(fresh, 2)
    fresh.load_state_dict(state)
    assert_same(take(fresh, 4), expected)
    source.load_state_dict(state)
    assert_same(take(source, 4), expected)


def test_states_of_other_runs_are_refused(numbered_dir, shards_dir):
    state = loader(numbered_dir).state_dict()
    with pytest.raises(ValueError, match=r"another run: digest"):
        loader(shards_dir).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another run: batch 4 .here 5., seed 3 .here 4."):
        loader(numbered_dir, batch=5, seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another run: world 1 .here 2."):
        loader(numbered_dir, world=2).load_state_dict(state)


def test_epochs_are_augmented_differently(numbered_dir):
    first, second = take(loader(numbered_dir, batch=23, shuffle=False), 2)
    assert torch.equal(first.labels, second.labels)
    changed = (first.images != second.images).flatten(1).any(dim=1)
    assert changed.float().mean() > 0.7  # 3 x 3 places and 2 flips leave 1 of 18 alike


def test_the_global_random_state_is_left_alone(numbered_dir):
    before, before_python = torch.get_rng_state(), random.getstate()
    take(loader(numbered_dir, workers=1), 2)
    take(loader(numbered_dir), 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == before_python


def test_no_more_workers_than_processors(numbered_dir, monkeypatch):
    monkeypatch.setattr("spectralar.training.data.loader.processors", lambda: 2)
    source = loader(numbered_dir, workers=5)
    take(source, 1)
    assert len(source._batches._iterator._workers) == 2


def test_workers_persist_across_epochs_and_resume(numbered_dir):
    source = loader(numbered_dir, workers=2)
    take(source, 1)
    pids = [w.pid for w in source._batches._iterator._workers]
    take(source, 9)
    source.load_state_dict({**source.state_dict(), "step": 2})
    take(source, 1)
    assert [w.pid for w in source._batches._iterator._workers] == pids


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 0}, "batch must be positive, not 0"),
        ({"seed": -1}, "seed must not be negative"),
        ({"workers": -1}, "workers must not be negative, not -1"),
        ({"rank": 1}, r"rank must be 0\.\.0, not 1"),
        ({"batch": 24}, "the set has 23 samples, less than one global batch of 24 x 1 ranks"),
        ({"classes": 7}, "classes is 7, but the manifest names 23"),
        ({"path": "/nowhere/at/all"}, "is no folder with tars"),
    ],
)
def test_arguments(numbered_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        loader(**{"path": numbered_dir, **changes})


@pytest.fixture
def damaged(numbered_dir, tmp_path) -> Path:
    """The numbered set with the image of sample 8 overwritten after the shards were written."""
    folder = Path(shutil.copytree(numbered_dir, tmp_path / "damaged"))
    shards = ShardSet.open(folder)
    path = shards.paths[shards._shards[8]]
    data = bytearray(path.read_bytes())
    data[shards._offsets[8] : shards._offsets[8] + 30] = bytes(30)
    path.write_bytes(data)
    return folder


@pytest.mark.parametrize("workers, cache", [(0, False), (2, False), (0, True)])
def test_undecodable_image_names_shard_and_key(damaged, workers, cache):
    source = None if cache else loader(damaged, shuffle=False, workers=workers)
    with pytest.raises(ShardError, match=r"train-000001.tar, key 00000008: not an image"):
        take(source or loader(damaged, shuffle=False, cache=True), 3)
    if source is not None and workers:
        # The traceback keeps the workers alive until garbage is collected, and then torch waits seconds for them.
        source._batches._iterator._shutdown_workers()


def test_the_place_after_an_error_is_that_of_the_batch_that_failed(damaged):
    source = loader(damaged, shuffle=False)
    first = take(source, 2)
    for _ in range(2):
        with pytest.raises(ShardError):
            next(source)
        assert source.step == 2
    source.load_state_dict({**source.state_dict(), "step": 0})
    assert_same(take(source, 2), first)


def test_wrong_size_for_kind_none_names_shard_and_key(shards_dir):
    with pytest.raises(ShardError, match=r"train-000000.tar, key 0000000\d: is \d+ x \d+ pixels, and crop kind none"):
        next(loader(shards_dir, crop=Crop(64, "none"), shuffle=False))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once_and_in_order(numbered_dir, world, workers):
    shards = ShardSet.open(numbered_dir)
    for rank in range(world):
        batches = list(evaluation_batches(numbered_dir, batch=5, size=8, rank=rank, world=world, workers=workers))
        mine = range(rank, 23, world)
        assert [len(b.labels) for b in batches] == [min(5, len(mine) - i) for i in range(0, len(mine), 5)]
        images = torch.cat([b.images for b in batches])
        labels = torch.cat([b.labels for b in batches])
        assert labels.tolist() == [int(shards.labels[i]) for i in mine]
        for image, index in zip(images, mine, strict=True):
            picture = decode_image(shards.read(index)[0])
            expected = apply_crop(picture, Crop(8, "center", flip=False), np.random.default_rng(0))
            assert torch.equal(image, expected)


def test_evaluation_of_fewer_samples_than_ranks(tmp_path, encode, picture):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.png").write_bytes(encode(picture(4, 4)))
    write_shards(tmp_path / "in", tmp_path / "out")
    counts = [len(list(evaluation_batches(tmp_path / "out", batch=2, size=4, rank=r, world=2))) for r in range(2)]
    assert counts == [1, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 0}, "batch must be positive, not 0"),
        ({"size": 0}, "size must be positive, not 0"),
        ({"workers": -1}, "workers must not be negative, not -1"),
        ({"rank": 3, "world": 2}, r"rank must be 0\.\.1, not 3"),
        ({"path": "/nowhere/at/all"}, "is no folder with tars"),
    ],
)
def test_evaluation_arguments_are_checked_at_once(numbered_dir, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluation_batches(**{"path": numbered_dir, "batch": 2, "size": 4, **changes})


@pytest.mark.parametrize("workers, cache", [(0, False), (2, True)])
def test_crop_batches_are_the_crops_of_the_epochs_in_the_order_of_the_set(numbered_dir, workers, cache):
    config = LoaderConfig(str(numbered_dir), 10, Crop(10, resize=12), seed=3, workers=workers, cache=cache)
    requests = crop_requests(23, 10, 2)
    batches = list(crop_batches(config, requests))
    assert [len(b.labels) for b in batches] == [10, 10, 3] * 2
    trained = take(loader(numbered_dir, batch=23, shuffle=False), 2)
    for start, epoch in zip((0, 3), trained, strict=True):
        assert torch.equal(torch.cat([b.images for b in batches[start : start + 3]]), epoch.images)
        assert torch.equal(torch.cat([b.labels for b in batches[start : start + 3]]), epoch.labels)
    with pytest.raises(ValueError, match="crops must be positive, not 0"):
        crop_requests(23, 10, 0)
    (second,) = crop_batches(config, requests[3:4])
    assert torch.equal(second.images, batches[3].images)


def test_crop_batches_fill_a_token_store(numbered_dir, tmp_path):
    config = LoaderConfig(str(numbered_dir), 10, Crop(2, resize=12), seed=3)
    names = ShardSet.open(numbered_dir).class_names
    with TokenWriter(tmp_path / "store", tokens=4, codebook_size=256, class_names=names, crops=3) as writer:
        for images, labels in crop_batches(config, crop_requests(23, 10, 3)):
            writer.append(images[:, 0].flatten(1), labels)
    store = TokenStore.open(tmp_path / "store")
    assert store.info.images == 23 and store.info.rows == 69


def test_batch_to_device(numbered_dir):
    batch = next(loader(numbered_dir)).to("meta")
    assert isinstance(batch, Batch) and batch.images.device.type == batch.labels.device.type == "meta"
