"""Sets to token stores: by one rank or several, at once or in pieces, always the same store."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from spectralar.tokenizer import SpectralTokenizer
from spectralar.training import tokenizing
from spectralar.training.data import Crop, LoaderConfig, ShardSet, TokenStore, evaluation_batches
from spectralar.training.data.token_parts import TokenParts
from spectralar.training.distributed import join_ranks
from spectralar.training.lock import RunLock, RunLockedError
from spectralar.training.runs import weights_digest
from spectralar.training.tokenizing import tokenize
from tests.training.jobs import Job


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def data(photo_shards: Path) -> LoaderConfig:
    return LoaderConfig(str(photo_shards / "val"), batch=4, crop=Crop(16, "random", resize=18))


def pixels_as_tokens(images: torch.Tensor) -> torch.Tensor:
    """In place of an encoder, which with random weights gives nearly every image the same tokens."""
    return images[:, 0, ::9, ::9].flatten(1).long() % 16


@pytest.fixture
def telling(tokenizer: SpectralTokenizer, monkeypatch: pytest.MonkeyPatch) -> SpectralTokenizer:
    monkeypatch.setattr(tokenizer, "encode", pixels_as_tokens)
    return tokenizer


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches in a part."""
    monkeypatch.setattr(tokenizing, "_PART", 2)


def test_order_labels_and_origins(tokenizer: SpectralTokenizer, photo_shards: Path, tmp_path: Path) -> None:
    data = LoaderConfig(str(photo_shards / "val"), batch=4, crop=Crop(16, "center", flip=False))
    store = tokenize(tokenizer, data, tmp_path / "deep" / "store", crops=2, console=quiet())
    (everything,) = evaluation_batches(photo_shards / "val", batch=10, size=16)
    expected = tokenizer.encode(everything.images)
    tokens = torch.from_numpy(store.tokens.astype("int64"))
    assert torch.equal(tokens[:10], tokens[10:])
    # A code may flip where two are all but equally near, since another batch size rounds differently.
    assert (tokens[:10] == expected).double().mean() > 0.95
    assert store.labels.tolist() == everything.labels.tolist() * 2
    info = store.info
    assert (info.tokens, info.codebook_size, info.crops, info.images) == (4, 16, 2, 10)
    assert info.class_names == ("dusk", "noon")
    assert info.source_digest == ShardSet.open(photo_shards / "val").digest
    assert info.tokenizer_digest == weights_digest(tokenizer)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["store"]


def test_ten_crops(telling: SpectralTokenizer, data: LoaderConfig, tmp_path: Path) -> None:
    """Row c of an image is its crop c: five places, then the same mirrored; the fifth is the centre."""
    crop = Crop(16, "ten-crop", resize=20)
    store = tokenize(telling, replace(data, crop=crop), tmp_path / "ten", console=quiet())
    assert (store.info.crops, store.info.images) == (10, 10)
    centre = Crop(16, "center", resize=20, flip=False)
    alone = tokenize(telling, replace(data, crop=centre), tmp_path / "centre", console=quiet())
    passes = store.tokens.reshape(10, 10, 4)
    np.testing.assert_array_equal(passes[4], alone.tokens)
    assert len({rows.tobytes() for rows in passes}) == 10
    with pytest.raises(ValueError, match="crops must be 10 with kind ten-crop, not 3"):
        tokenize(telling, replace(data, crop=crop), tmp_path / "other", crops=3, console=quiet())


def test_what_is_refused_leaves_nothing(tokenizer: SpectralTokenizer, data: LoaderConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"crop\.size must be the tokenizer's 16, not 12"):
        tokenize(tokenizer, replace(data, crop=Crop(12)), tmp_path / "store", console=quiet())
    with pytest.raises(ValueError, match="crops must be positive, not 0"):
        tokenize(tokenizer, data, tmp_path / "store", crops=0, console=quiet())
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=r"there exists already"):
        tokenize(tokenizer, data, tmp_path / "there", console=quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.usefixtures("small_parts")
def test_a_job_that_failed_goes_on_where_it_was(
    telling: SpectralTokenizer, data: LoaderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes of batches 4, 4, 2: three parts; the failure comes in the second one."""
    whole = tokenize(telling, data, tmp_path / "whole", crops=2, console=quiet())
    calls: list[int] = []

    def failing(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return pixels_as_tokens(images)

    monkeypatch.setattr(telling, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        tokenize(telling, data, tmp_path / "store", crops=2, console=quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store.parts", "whole"]
    for changes in ({"seed": 1}, {"batch": 5}, {"crop": Crop(16)}):
        with pytest.raises(ValueError, match=r"store\.parts was begun with other images or settings"):
            tokenize(telling, replace(data, **changes), tmp_path / "store", crops=2, console=quiet())
    (tmp_path / "store.parts" / "part-000002.u16").write_bytes(b"cut short")
    console = quiet()
    again = tokenize(telling, data, tmp_path / "store", crops=2, console=console)
    assert f"going on: 1 of 3 parts are in {tmp_path / 'store.parts'}" in printed(console)
    assert calls[4:] == [2, 4, 4, 2], "the first part is not made again"
    assert again.info == whole.info
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "whole"]


def test_the_speed_is_told(tokenizer: SpectralTokenizer, data: LoaderConfig, tmp_path: Path) -> None:
    console = quiet()
    tokenize(tokenizer, data, tmp_path / "store", crops=2, console=console)
    assert "images/s on 1 rank; " in printed(console) and "encoding alone does" in printed(console)
    ranks = [tokenizing._Times(100, 1.0, 5.0), tokenizing._Times(60, 0.0, 4.0)]
    assert tokenizing._speed(ranks) == (
        "32 images/s on 2 ranks; 11% of the time went into waiting for images, and encoding alone does 40 images/s"
    )


def test_precision(
    tokenizer: SpectralTokenizer, data: LoaderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    encode = tokenizer.encode

    def watched(images: torch.Tensor) -> torch.Tensor:
        seen.append(tokenizer.encoder.to_latent(torch.zeros(1, tokenizer.config.encoder.width)).dtype)
        return encode(images)

    monkeypatch.setattr(tokenizer, "encode", watched)
    for precision in ("auto", "fp32", "bf16"):
        tokenize(tokenizer, data, tmp_path / precision, precision=precision, console=quiet())
    assert seen == [torch.float32] * 6 + [torch.bfloat16] * 3
    # A job goes on in the precision in which it was begun.
    (tmp_path / "store.parts").mkdir()
    monkeypatch.setattr(tokenizing, "_encode", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tokenize(tokenizer, data, tmp_path / "store", precision="bf16", console=quiet())
    with pytest.raises(ValueError, match="was begun with other images or settings"):
        tokenize(tokenizer, data, tmp_path / "store", console=quiet())


def test_another_job_that_writes_the_store_is_respected(
    tokenizer: SpectralTokenizer, data: LoaderConfig, tmp_path: Path
) -> None:
    (tmp_path / "store.parts").mkdir()
    job = Job(tmp_path / "printed", 1, hold, tmp_path / "store.parts")
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "held").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        with pytest.raises(RunLockedError, match="writes to"):
            tokenize(tokenizer, data, tmp_path / "store", console=quiet())
    finally:
        job.kill()
    tokenize(tokenizer, data, tmp_path / "store", console=quiet())


def hold(folder: Path) -> None:
    with RunLock(folder):
        (folder.parent / "held").touch()
        time.sleep(60)


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 3)])
def test_a_job_that_is_killed_goes_on_with_any_number_of_ranks(
    telling: SpectralTokenizer, data: LoaderConfig, tmp_path: Path, first: int, second: int
) -> None:
    """Ten passes in 15 parts; killed when it has a few of them."""
    saved = telling.save_pretrained(tmp_path / "saved")
    whole = tokenize(telling, data, tmp_path / "whole", crops=10, console=quiet())
    assert len({row.tobytes() for row in whole.tokens}) > 50
    killed = Job(tmp_path / "killed", first, encode_set, saved, data, tmp_path / "store", 0.05)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("store.parts/part-*.u16"))) < 3:
        assert time.monotonic() < until, killed.texts()
        time.sleep(0.01)
    killed.kill()
    left = len(list(tmp_path.glob("store.parts/part-*.u16")))
    assert 3 <= left < 15 and not (tmp_path / "store").exists()
    job = Job(tmp_path / "second", second, encode_set, saved, data, tmp_path / "store", 0.0)
    job.succeed()
    assert f"going on: {left} of 15 parts" in job.texts()[0] and f"on {second} rank" in job.texts()[0]
    assert all(text == "" for text in job.texts()[1:])
    assert TokenStore.open(tmp_path / "store").info == whole.info


def encode_set(saved: Path, data: LoaderConfig, out: Path, delay: float) -> None:
    tokenizing._PART = 2
    tokenizer = SpectralTokenizer.from_pretrained(saved)

    def slow(images: torch.Tensor) -> torch.Tensor:
        time.sleep(delay)
        return pixels_as_tokens(images)

    tokenizer.encode = slow  # type: ignore[method-assign]
    with join_ranks("cpu") as ranks:
        tokenize(tokenizer, data, out, crops=10, ranks=ranks)


def test_parts_take_only_what_belongs(tmp_path: Path) -> None:
    parts = TokenParts(tmp_path / "store", [3, 2], tokens=4)
    assert parts.begin({"seed": 1}) == [0, 1]
    with pytest.raises(ValueError, match=r"tokens must be \[2, 4\], not \[3, 4\]"):
        parts.write(1, np.zeros((3, 4), np.int64))
    with pytest.raises(ValueError, match=r"tokens must be in 0\.\.65535, not -1\.\.0"):
        parts.write(1, -np.eye(2, 4, dtype=np.int64))
    values = np.array([[0, 1, 65535, 32768], [4, 5, 6, 7]])
    parts.write(1, values)
    np.testing.assert_array_equal(parts.read(1), values)
    assert TokenParts(tmp_path / "store", [3, 2], tokens=4).begin({"seed": 1}) == [0]
    with pytest.raises(ValueError, match="was begun with other images or settings"):
        parts.begin({"seed": 2})
    parts.remove()
    assert not list(tmp_path.iterdir())
