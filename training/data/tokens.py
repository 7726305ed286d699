"""Tokenized sets: written once by the tokenizer, held whole in device memory to train the generator.

A store is a folder: `tokens.npy` uint16 `[images * crops, N]`, `labels.npy` int32 `[images * crops]` and `store.json`.
With several crops, the store holds pass after pass over the images: crop c of image i is row `c * images + i`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from spectralar.training.data.epochs import EpochOrder, Position, random_stream

FORMAT = "spectralar-tokens 1"
_CHUNK = 1 << 16


class TokenStoreError(ValueError):
    """A token store cannot be used; the message names the file and the row."""


@dataclass(frozen=True)
class TokenInfo:
    """What `store.json` says.

    Attributes:
        tokens: length N of every row.
        codebook_size: number of codes, at most 65536.
        class_names: one per class.
        crops: rows per image.
        rows: number of rows.
        source_digest: digest of the shards that were tokenized (`ShardSet.digest`).
        tokenizer_digest: digest of the tokenizer's weights.
        digest: SHA-256 of the token and label values.
    """

    tokens: int
    codebook_size: int
    class_names: tuple[str, ...]
    crops: int
    rows: int
    source_digest: str
    tokenizer_digest: str
    digest: str

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def images(self) -> int:
        """Number of images."""
        return self.rows // self.crops


class TokenStore:
    """A complete, checked token store; `tokens` and `labels` are mapped from disk, not loaded.

    Attributes:
        path: the folder.
        info: what `store.json` says.
        tokens: uint16 `[rows, N]`, each below `info.codebook_size`.
        labels: int32 `[rows]`, each below `info.classes`.
    """

    def __init__(self, path: Path, info: TokenInfo, tokens: np.ndarray, labels: np.ndarray) -> None:
        self.path, self.info, self.tokens, self.labels = path, info, tokens, labels

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Opens a store and checks all of it: shapes, every token and label, and the digest.

        Raises:
            TokenStoreError: no store or an unfinished one, another format, or content that is not as it should be.
        """
        folder = Path(path)
        info = _read_info(folder)
        tokens = _map(folder / "tokens.npy", np.dtype("<u2"), (info.rows, info.tokens))
        labels = _map(folder / "labels.npy", np.dtype("<i4"), (info.rows,))
        digest = _Digest()
        for start in range(0, info.rows, _CHUNK):
            part = slice(start, start + _CHUNK)
            _check_rows(tokens[part], labels[part], info, folder, start)
            digest.update(tokens[part], labels[part])
        passes = labels.reshape(info.crops, info.images)
        other = np.argwhere(passes != passes[0])
        if len(other):
            crop, image = (int(i) for i in other[0])
            raise TokenStoreError(
                f"{folder / 'labels.npy'}, row {crop * info.images + image}: label {passes[crop, image]} is not "
                f"that of row {image}, {passes[0, image]}, though both are crops of one image"
            )
        if digest.hexdigest() != info.digest:
            raise TokenStoreError(f"store {folder}: tokens.npy or labels.npy has changed since it was written (digest)")
        return cls(folder, info, tokens, labels)

    def __len__(self) -> int:
        return self.info.rows


class TokenWriter:
    """Writes a token store batch by batch; the folder `path` appears, complete, when `finish` is called.

    Until then the rows go to `path` + `.partial`, which nothing takes for a store. As a context manager it finishes by
    itself, or removes the partial folder after an error.

    Args:
        path: the folder to make; it must not exist.
        tokens: length N of a row.
        codebook_size: number of codes, 2..65536.
        class_names: one per class.
        crops: rows per image.
        source_digest: `digest` of the shards.
        tokenizer_digest: digest of the tokenizer's weights.

    Raises:
        ValueError: a value outside its limits, or an existing `path`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokens: int,
        codebook_size: int,
        class_names: Sequence[str],
        crops: int = 1,
        source_digest: str = "",
        tokenizer_digest: str = "",
    ) -> None:
        if tokens < 1 or crops < 1:
            raise ValueError(f"tokens and crops must be positive, not {tokens} and {crops}")
        if not 2 <= codebook_size <= 65536:
            raise ValueError(f"codebook_size must be 2..65536, not {codebook_size}")
        if not class_names:
            raise ValueError("class_names must name at least one class")
        self.path = Path(path)
        if self.path.exists():
            raise ValueError(f"path {self.path} exists already")
        self.info = TokenInfo(
            tokens, codebook_size, tuple(class_names), crops, 0, source_digest, tokenizer_digest, digest=""
        )
        self._rows = 0
        self._digest = _Digest()
        self._partial = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._tokens = (self._partial / "tokens.npy").open("wb")
        self._labels = (self._partial / "labels.npy").open("wb")
        self._write_headers()

    def append(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds rows: integer tokens `[B, N]` and labels `[B]`, on any device.

        Raises:
            TypeError: tensors that are not integers.
            ValueError: another shape, or a value outside codebook or classes (named by its row in the store).
        """
        for name, tensor in (("tokens", tokens), ("labels", labels)):
            if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
                raise TypeError(f"{name} must be integers, not {tensor.dtype}")
        if tokens.ndim != 2 or tokens.shape[1] != self.info.tokens:
            raise ValueError(f"tokens must be [B, {self.info.tokens}], not {list(tokens.shape)}")
        if labels.shape != tokens.shape[:1]:
            raise ValueError(f"labels must be [{tokens.shape[0]}], not {list(labels.shape)}")
        wide_tokens = tokens.detach().to("cpu", torch.int64).numpy()
        wide_labels = labels.detach().to("cpu", torch.int64).numpy()
        _check_rows(wide_tokens, wide_labels, self.info, self._partial, self._rows)
        rows, row_labels = wide_tokens.astype("<u2"), wide_labels.astype("<i4")
        self._tokens.write(rows.tobytes())
        self._labels.write(row_labels.tobytes())
        self._digest.update(rows, row_labels)
        self._rows += len(rows)

    def finish(self) -> TokenStore:
        """Completes the store and opens it.

        Raises:
            ValueError: no rows, or not `crops` whole passes over the images.
            TokenStoreError: the passes differ in their labels.
        """
        if not self._rows or self._rows % self.info.crops:
            raise ValueError(f"rows must be a positive multiple of crops {self.info.crops}, not {self._rows}")
        self._write_headers()
        self._close()
        info = replace(self.info, rows=self._rows, digest=self._digest.hexdigest())
        text = json.dumps({"format": FORMAT, **asdict(info)}, indent=2)
        (self._partial / "store.json").write_text(text + "\n", encoding="utf-8")
        TokenStore.open(self._partial)
        self._partial.rename(self.path)
        return TokenStore.open(self.path)

    def abort(self) -> None:
        """Gives up and removes the partial folder."""
        self._close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._tokens.closed:
            self.finish()

    def _write_headers(self) -> None:
        """Writes both headers for the present number of rows; numpy leaves room for the first axis to grow."""
        shapes = ((self._tokens, "<u2", (self._rows, self.info.tokens)), (self._labels, "<i4", (self._rows,)))
        for file, dtype, shape in shapes:
            file.seek(0)
            header = {"descr": dtype, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)

    def _close(self) -> None:
        self._tokens.close()
        self._labels.close()


class TokenBatch(NamedTuple):
    """Tokens int64 `[B, N]` and class labels int64 `[B]`."""

    tokens: torch.Tensor
    labels: torch.Tensor


class TokenLoader(Position, Iterator[TokenBatch]):
    """Endless stream of token batches from a store that is resident on `device`.

    Epoch e visits the images in an order drawn from (seed, e), each at most once over all ranks, and takes one row of
    each: over `crops` consecutive epochs every row of an image comes once. Saving and resuming are as in `ImageLoader`.

    Args:
        store: what to load.
        batch: rows per rank and step.
        seed: seed of the order, not negative.
        device: where the store is kept, two bytes per token, and where batches appear.
        rank: this rank.
        world: number of ranks.
        shuffle: False keeps every epoch in the order of the store.

    Raises:
        ValueError: see `EpochOrder`; a set smaller than one global batch.
    """

    def __init__(
        self,
        store: TokenStore,
        batch: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ) -> None:
        order = EpochOrder(store.info.images, batch, seed=seed, shuffle=shuffle, rank=rank, world=world)
        super().__init__(order, store.info.digest)
        self.store = store
        self.device = torch.device(device)
        # torch indexes int16 on every device, uint16 on few; the sign is taken off again after the look-up.
        self._tokens = torch.from_numpy(store.tokens.astype("<u2").view(np.int16)).to(self.device)
        self._labels = torch.from_numpy(store.labels.astype(np.int64)).to(self.device)
        crops = store.info.crops
        self._first_crop = random_stream(seed, "crops").integers(crops, size=store.info.images)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.store.info.classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of every class."""
        return self.store.info.class_names

    def __iter__(self) -> TokenLoader:
        return self

    def __next__(self) -> TokenBatch:
        epoch, images = self.order.indices(self.step)
        crops = self.store.info.crops
        rows = (self._first_crop[images] + epoch) % crops * self.store.info.images + images
        place = torch.from_numpy(rows).to(self.device, non_blocking=True)
        self.step += 1
        return TokenBatch(self._tokens[place].long() & 0xFFFF, self._labels[place])


class _Digest:
    """SHA-256 of token and label values, whatever the size of the pieces they come in."""

    def __init__(self) -> None:
        self._tokens, self._labels = hashlib.sha256(), hashlib.sha256()

    def update(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        self._tokens.update(np.ascontiguousarray(tokens).data)
        self._labels.update(np.ascontiguousarray(labels).data)

    def hexdigest(self) -> str:
        return hashlib.sha256(self._tokens.digest() + self._labels.digest()).hexdigest()


def _check_rows(tokens: np.ndarray, labels: np.ndarray, info: TokenInfo, folder: Path, first: int) -> None:
    """Checks that tokens `[B, N]` and labels `[B]` are in range; `first` is the row of the first one in the store."""
    for name, values, bound in (("tokens", tokens, info.codebook_size), ("labels", labels, info.classes)):
        bad = (values < 0) | (values >= bound)
        if bad.any():
            place = tuple(np.argwhere(bad)[0])
            raise TokenStoreError(
                f"{folder / name}.npy, row {first + int(place[0])}: value {values[place]} is not in 0..{bound - 1}"
            )


def _read_info(folder: Path) -> TokenInfo:
    path = folder / "store.json"
    if not path.is_file():
        raise TokenStoreError(f"{folder} is no token store, or an unfinished one: it has no store.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format", None) != FORMAT:
            raise TokenStoreError(f"{path} is not of format {FORMAT!r}")
        info = TokenInfo(**{**values, "class_names": tuple(values["class_names"])})
        sound = (
            info.crops > 0 and info.tokens > 0 and info.rows > 0 and info.rows % info.crops == 0 and info.classes > 0
        )
    except TokenStoreError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise TokenStoreError(f"{path} cannot be understood: {error}") from error
    if not sound:
        raise TokenStoreError(f"{path}: tokens, classes and crops must be positive, rows a multiple of crops: {info}")
    return info


def _map(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if not path.is_file():
        raise TokenStoreError(f"{path} is missing")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise TokenStoreError(f"{path} is cut short or no array file: {error}") from error
    if array.shape != shape or array.dtype != dtype:
        raise TokenStoreError(f"{path} holds {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}")
    return array
