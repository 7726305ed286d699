"""Token stores: written completely or not at all, checked when opened, and served like images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spectralar.training.data import TokenLoader, TokenStore, TokenWriter
from spectralar.training.data import tokens as tokens_module
from spectralar.training.data.tokens import TokenStoreError

NAMES = ("ant", "bee", "cat")
SETTINGS = {"tokens": 4, "codebook_size": 65536, "class_names": NAMES, "source_digest": "s", "tokenizer_digest": "t"}


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 65536, (count, 4), generator=generator)
    return tokens, torch.randint(0, 3, (count,), generator=generator)


def write(path: Path, count: int = 23, crops: int = 1, **changes: object) -> TokenStore:
    tokens, labels = rows(count * crops)
    writer = TokenWriter(path, crops=crops, **{**SETTINGS, **changes})
    writer.append(tokens, labels[:count].repeat(crops))
    return writer.finish()


def test_round_trip_in_pieces_of_any_size_and_dtype(tmp_path):
    tokens, labels = rows(10)
    tokens[0, 0], tokens[0, 1] = 65535, 32768
    with TokenWriter(tmp_path / "store", **SETTINGS) as writer:
        writer.append(tokens[:3].to(torch.int32), labels[:3].to(torch.uint8))
        writer.append(tokens[3:3], labels[3:3])
        assert not (tmp_path / "store").exists()
        writer.append(tokens[3:], labels[3:])
    store = TokenStore.open(tmp_path / "store")
    assert store.tokens.dtype == np.uint16 and store.labels.dtype == np.int32 and len(store) == 10
    np.testing.assert_array_equal(store.tokens, tokens.numpy())
    np.testing.assert_array_equal(store.labels, labels.numpy())
    info = store.info
    assert (info.tokens, info.codebook_size, info.class_names, info.classes) == (4, 65536, NAMES, 3)
    assert (info.crops, info.rows, info.images, info.source_digest, info.tokenizer_digest) == (1, 10, 10, "s", "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]
    assert np.load(tmp_path / "store" / "tokens.npy").shape == (10, 4)


def test_the_digest_does_not_depend_on_the_pieces(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole", 20)
    monkeypatch.setattr(tokens_module, "_CHUNK", 3)
    tokens, labels = rows(20)
    with TokenWriter(tmp_path / "pieces", **SETTINGS) as writer:
        for start in range(0, 20, 7):
            writer.append(tokens[start : start + 7], labels[start : start + 7])
    assert TokenStore.open(tmp_path / "pieces").info == whole.info
    for name in ("tokens.npy", "labels.npy", "store.json"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_unfinished_store_is_never_taken_for_one(tmp_path):
    writer = TokenWriter(tmp_path / "store", **SETTINGS)
    writer.append(*rows(5))
    for path in (tmp_path / "store", tmp_path / "store.partial"):
        with pytest.raises(TokenStoreError, match="no token store, or an unfinished one"):
            TokenStore.open(path)
    writer._close()  # as if its process had died
    again = write(tmp_path / "store", 6)  # starts over; the old partial folder is gone
    assert len(again) == 6 and not (tmp_path / "store.partial").exists()
    with pytest.raises(RuntimeError, match="stop"), TokenWriter(tmp_path / "other", **SETTINGS) as writer:
        writer.append(*rows(5))
        raise RuntimeError("stop")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": 0}, "tokens and crops must be positive, not 0 and 1"),
        ({"crops": 0}, "tokens and crops must be positive, not 4 and 0"),
        ({"codebook_size": 1}, r"codebook_size must be 2\.\.65536, not 1"),
        ({"codebook_size": 65537}, r"codebook_size must be 2\.\.65536, not 65537"),
        ({"class_names": ()}, "class_names must name at least one class"),
    ],
)
def test_writer_arguments(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TokenWriter(tmp_path / "store", **{**SETTINGS, **changes})
    assert not list(tmp_path.iterdir())


def test_an_existing_path_is_refused(tmp_path):
    write(tmp_path / "store")
    with pytest.raises(ValueError, match="store exists already"):
        TokenWriter(tmp_path / "store", **SETTINGS)


def test_rows_that_do_not_belong(tmp_path):
    writer = TokenWriter(tmp_path / "store", **{**SETTINGS, "codebook_size": 16})
    good, labels = torch.full((3, 4), 15), torch.tensor([0, 1, 2])
    writer.append(good, labels)
    for tokens, classes, kind, message in [
        (good.float(), labels, TypeError, "tokens must be integers, not torch.float32"),
        (good, labels.bool(), TypeError, "labels must be integers, not torch.bool"),
        (good[:, :3], labels, ValueError, r"tokens must be \[B, 4\], not \[3, 3\]"),
        (good[0], labels, ValueError, r"tokens must be \[B, 4\], not \[4\]"),
        (good, labels[:2], ValueError, r"labels must be \[3\], not \[2\]"),
        (good + torch.tensor([[0], [1], [0]]), labels, ValueError, r"tokens.npy, row 4: value 16 is not in 0\.\.15"),
        (good - torch.tensor([[0], [0], [16]]), labels, ValueError, r"tokens.npy, row 5: value -1 is not in 0\.\.15"),
        (good, labels + 1, ValueError, r"labels.npy, row 5: value 3 is not in 0\.\.2"),
        (good, labels - 1, ValueError, r"labels.npy, row 3: value -1 is not in 0\.\.2"),
    ]:
        with pytest.raises(kind, match=message):
            writer.append(tokens, classes)
    assert writer.finish().tokens.tolist() == good.tolist(), "refused rows must leave no trace"


def test_finish_wants_whole_images(tmp_path):
    writer = TokenWriter(tmp_path / "store", crops=2, **SETTINGS)
    with pytest.raises(ValueError, match="rows must be a positive multiple of crops 2, not 0"):
        writer.finish()
    tokens, _ = rows(4)
    writer.append(tokens[:3], torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="rows must be a positive multiple of crops 2, not 3"):
        writer.finish()
    writer.append(tokens[3:], torch.tensor([2]))
    with pytest.raises(TokenStoreError, match=r"labels.npy, row 3: label 2 is not that of row 1, 0, though both are"):
        writer.finish()
    assert not (tmp_path / "store").exists()


def change_json(path: Path, **changes: object) -> None:
    values = json.loads((path / "store.json").read_text())
    (path / "store.json").write_text(json.dumps({**values, **changes}))


def test_damaged_stores(tmp_path):
    def damaged(name: str) -> Path:
        write(tmp_path / name)
        return tmp_path / name

    path = damaged("codebook")
    change_json(path, codebook_size=1000)
    first = int(np.argmax((np.load(path / "tokens.npy") >= 1000).any(axis=1)))
    with pytest.raises(TokenStoreError, match=rf"tokens.npy, row {first}: value \d+ is not in 0\.\.999"):
        TokenStore.open(path)

    path = damaged("classes")
    change_json(path, class_names=["ant", "bee"])
    first = int(np.argmax(np.load(path / "labels.npy") == 2))
    with pytest.raises(TokenStoreError, match=rf"labels.npy, row {first}: value 2 is not in 0\.\.1"):
        TokenStore.open(path)

    path = damaged("bit")
    data = bytearray((path / "tokens.npy").read_bytes())
    data[-1] ^= 1
    (path / "tokens.npy").write_bytes(data)
    with pytest.raises(TokenStoreError, match=r"has changed since it was written \(digest\)"):
        TokenStore.open(path)

    path = damaged("cut")
    (path / "tokens.npy").write_bytes(data[:-1])
    with pytest.raises(TokenStoreError, match=r"tokens.npy is cut short or no array file"):
        TokenStore.open(path)
    (path / "tokens.npy").write_bytes(b"")
    with pytest.raises(TokenStoreError, match=r"tokens.npy is cut short or no array file"):
        TokenStore.open(path)
    (path / "tokens.npy").unlink()
    with pytest.raises(TokenStoreError, match=r"tokens.npy is missing"):
        TokenStore.open(path)

    path = damaged("shape")
    change_json(path, rows=22)
    with pytest.raises(TokenStoreError, match=r"tokens.npy holds uint16 \[23, 4\], not uint16 \[22, 4\]"):
        TokenStore.open(path)
    np.save(path / "tokens.npy", np.zeros((22, 4), np.int64))
    with pytest.raises(TokenStoreError, match=r"tokens.npy holds int64 \[22, 4\], not uint16"):
        TokenStore.open(path)

    path = damaged("json")
    change_json(path, crops=2)
    with pytest.raises(TokenStoreError, match="rows a multiple of crops"):
        TokenStore.open(path)
    change_json(path, format="x")
    with pytest.raises(TokenStoreError, match="is not of format 'spectralar-tokens 1'"):
        TokenStore.open(path)
    for text in (
        "{",
        "[]",
        '{"format": "spectralar-tokens 1"}',
        '{"format": "spectralar-tokens 1", "class_names": []}',
    ):
        (path / "store.json").write_text(text)
        with pytest.raises(TokenStoreError, match=r"store.json cannot be understood"):
            TokenStore.open(path)


def ids(store: TokenStore, tokens: torch.Tensor) -> list[int]:
    """Rows of the store that hold these tokens; all rows of the test stores differ."""
    table = {tuple(row): i for i, row in enumerate(store.tokens.tolist())}
    return [table[tuple(row)] for row in tokens.tolist()]


def test_loader_serves_rows_with_their_labels(tmp_path):
    store = write(tmp_path / "store")
    source = TokenLoader(store, 5, seed=2)
    assert source.steps_per_epoch == 4 and source.classes == 3 and source.class_names == NAMES
    for _ in range(9):
        batch = next(source)
        assert batch.tokens.dtype == batch.labels.dtype == torch.int64
        assert batch.tokens.shape == (5, 4) and batch.labels.shape == (5,)
        assert batch.labels.tolist() == store.labels[ids(store, batch.tokens)].tolist()
    assert source.step == 9 and source.epoch == 2


def test_two_ranks_share_the_global_batches(tmp_path):
    store = write(tmp_path / "store")
    whole = TokenLoader(store, 6)
    ranks = [TokenLoader(store, 3, rank=r, world=2) for r in range(2)]
    for _ in range(2):
        epoch: list[int] = []
        for _ in range(whole.steps_per_epoch):
            together = torch.cat([next(r).tokens for r in ranks])
            assert torch.equal(together, next(whole).tokens)
            epoch += ids(store, together)
        assert len(set(epoch)) == len(epoch) == 18


def test_every_row_of_an_image_comes_once_in_as_many_epochs_as_it_has_crops(tmp_path):
    store = write(tmp_path / "store", count=6, crops=3)
    source = TokenLoader(store, 6, seed=1)
    assert source.steps_per_epoch == 1
    epochs = [ids(store, next(source).tokens) for _ in range(6)]
    for epoch in epochs:
        assert sorted(row % 6 for row in epoch) == list(range(6))
    for three in (epochs[:3], epochs[3:]):
        assert sorted(row for epoch in three for row in epoch) == list(range(18))
    assert len({row // 6 for row in epochs[0]}) > 1, "images begin with different crops"


@pytest.mark.parametrize("at", [0, 3, 4, 6])
def test_resume(tmp_path, at):
    store = write(tmp_path / "store", crops=2)
    source = TokenLoader(store, 5, seed=2)
    for _ in range(at):
        next(source)
    state = source.state_dict()
    fresh = TokenLoader(TokenStore.open(store.path), 5, seed=2)
    fresh.load_state_dict(state)
    for _ in range(6):
        a, b = next(source), next(fresh)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels)
    with pytest.raises(ValueError, match=r"another run: seed 2 .here 3."):
        TokenLoader(store, 5, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"another run: digest"):
        TokenLoader(write(tmp_path / "other", 22), 5, seed=2).load_state_dict(state)


def test_loader_arguments(tmp_path):
    store = write(tmp_path / "store", crops=2)
    with pytest.raises(ValueError, match="the set has 23 samples, less than one global batch of 12 x 2 ranks"):
        TokenLoader(store, 12, world=2)
    with pytest.raises(ValueError, match="batch must be positive"):
        TokenLoader(store, 0)
    unshuffled = next(TokenLoader(store, 4, shuffle=False))
    assert [row % 23 for row in ids(store, unshuffled.tokens)] == [0, 1, 2, 3]
