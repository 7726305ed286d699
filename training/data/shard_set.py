"""Random access to the samples of a set of shards, our own or any WebDataset tars with images and classes."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from spectralar.training.data.tar_index import Component, Samples, ShardError, read_index, scan_tar

FORMAT = "spectralar-shards 1"
MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
LABEL_EXTENSION = "cls"

_OPEN_FILES = 256


class ShardSet:
    """The samples of some shards, in the order of the shards: where each image lies, and its class.

    Made by `ShardSet.open`. Reading is safe from many threads and forked processes at once; a copy sent to another
    process opens its own files.

    Attributes:
        paths: the tars.
        labels: int64 `[samples]`, each below `classes`.
        class_names: one per class.
        digest: of the samples; for tars of other origin, of their names, sizes, keys, places and labels.
        manifest: what the writer noted; empty for tars of other origin.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        shards: Sequence[tuple[Sequence[str], Sequence[Component], Sequence[int]]],
        class_names: Sequence[str],
        digest: str,
        manifest: dict[str, Any],
    ) -> None:
        """Takes for each path the keys, image components and labels of its samples."""
        self.paths, self.class_names, self.digest, self.manifest = tuple(paths), tuple(class_names), digest, manifest
        # Fixed-width arrays: a list of a million strings would be copied page by page into every forked worker.
        self._keys = np.array([key.encode() for keys, _, _ in shards for key in keys], dtype=np.bytes_)
        self._shards = np.repeat(np.arange(len(shards)), [len(keys) for keys, _, _ in shards])
        images = [c for _, components, _ in shards for c in components]
        self._offsets = np.array([c.offset for c in images], dtype=np.int64)
        self._sizes = np.array([c.size for c in images], dtype=np.int64)
        self.labels = np.array([label for _, _, labels in shards for label in labels], dtype=np.int64)
        self._files: dict[int, IO[bytes]] = {}
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= self.classes))
        if len(bad):
            i = int(bad[0])
            raise ShardError(f"{self.where(i)}: label {self.labels[i]} is not in 0..{self.classes - 1}")

    @classmethod
    def open(cls, path: str | Path, *, classes: int | None = None) -> ShardSet:
        """Opens a folder of shards, one tar, or the tars that a pattern such as `data/train-*.tar` matches.

        A folder with a manifest is opened by its index files; other tars are scanned. There, each sample needs one
        image (jpg, jpeg, png, webp) and its class as an ASCII integer (cls).

        Args:
            path: folder, tar or pattern.
            classes: number of classes, where the tars do not hold all of them; default: the manifest's, or one more
                than the greatest label.

        Raises:
            ValueError: nothing there.
            ShardError: a shard missing, cut short, without index or not as its manifest says; a sample without image
                or class; a label of `classes` or more.
        """
        place = Path(path)
        if (place / MANIFEST).is_file():
            return cls._open_manifest(place, classes)
        if place.is_dir():
            paths = sorted(place.glob("*.tar"))
        elif place.is_file():
            paths = [place]
        else:
            paths = sorted(Path(p) for p in glob.glob(str(path)))
        if not paths:
            raise ValueError(f"path {path} is no folder with tars, no tar and no pattern that matches any")
        shards = [_foreign_samples(p) for p in paths]
        if not any(keys for keys, _, _ in shards):
            raise ShardError(f"path {path}: no samples in {len(paths)} shards, the first is {paths[0]}")
        names = _class_names(None, classes, max(max(labels, default=-1) for _, _, labels in shards) + 1)
        digest = hashlib.sha256()
        for p, (keys, images, labels) in zip(paths, shards, strict=True):
            places = [(c.offset, c.size) for c in images]
            digest.update(json.dumps([p.name, p.stat().st_size, keys, places, labels]).encode())
        return cls(paths, shards, names, digest.hexdigest(), {})

    @classmethod
    def _open_manifest(cls, folder: Path, classes: int | None) -> ShardSet:
        manifest = read_manifest(folder / MANIFEST)
        paths, shards = [], []
        for entry in manifest["shards"]:
            path = folder / entry["name"]
            if not path.is_file():
                raise ShardError(f"shard {path} is missing")
            if path.stat().st_size != entry["bytes"]:
                raise ShardError(
                    f"shard {path} has {path.stat().st_size} bytes, but its manifest says {entry['bytes']}"
                )
            samples = read_index(path.with_suffix(".idx"), path)
            if not len(samples) == len(entry["labels"]) == entry["samples"]:
                raise ShardError(f"shard {path}: its index has {len(samples)} samples, its manifest {entry['samples']}")
            paths.append(path)
            shards.append((list(samples), _images(path, samples), entry["labels"]))
        names = _class_names(manifest["class_names"], classes, 0)
        return cls(paths, shards, names, manifest["digest"], manifest)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[bytes, int, str]:
        """Encoded image, label and key of sample `index`.

        Raises:
            IndexError: no such sample.
            ShardError: the shard cannot be read, or ends before the sample does.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0..{len(self) - 1}, not {index}")
        size = int(self._sizes[index])
        try:
            data = self._pread(int(self._shards[index]), size, int(self._offsets[index]))
        except OSError as error:
            raise ShardError(f"{self.where(index)}: {error}") from error
        if len(data) != size:
            raise ShardError(f"{self.where(index)}: the shard is cut short, {len(data)} of {size} bytes are left")
        return data, int(self.labels[index]), self.key(index)

    def key(self, index: int) -> str:
        """Key of sample `index`."""
        return self._keys[index].decode()

    def where(self, index: int) -> str:
        """Shard and key of sample `index`, for messages."""
        return f"shard {self.paths[self._shards[index]]}, key {self.key(index)}"

    def verify(self) -> None:
        """Compares the content of every shard with the SHA-256 digests of the manifest.

        Raises:
            ValueError: tars of other origin, which have no digests.
            ShardError: a shard has changed.
        """
        if not self.manifest:
            raise ValueError(f"{self.paths[0].parent} has no {MANIFEST}, so there are no digests to compare with")
        for path, entry in zip(self.paths, self.manifest["shards"], strict=True):
            if file_digest(path) != entry["sha256"]:
                raise ShardError(f"shard {path} has changed since it was written: its SHA-256 digest is another")

    def close(self) -> None:
        """Closes the files; a later read opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        """Reads from a shard; `pread` has no file position, so threads and forks may share the open file."""
        file = self._files.get(shard)
        if file is None:
            opened = open(self.paths[shard], "rb", buffering=0)  # noqa: SIM115
            if len(self._files) >= _OPEN_FILES:
                with opened:
                    return os.pread(opened.fileno(), size, offset)
            file = self._files.setdefault(shard, opened)
            if file is not opened:
                opened.close()
        return os.pread(file.fileno(), size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of a set of shards.

    Raises:
        ShardError: no JSON, or of another format.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError(f"manifest {path} is not JSON: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ShardError(f"manifest {path} is of format {found!r}; this version reads {FORMAT!r}")
    return manifest


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _class_names(names: Sequence[str] | None, classes: int | None, found: int) -> tuple[str, ...]:
    if classes is not None and classes < 1:
        raise ValueError(f"classes must be positive, not {classes}")
    if names is None:
        return tuple(str(i) for i in range(found if classes is None else classes))
    if classes is not None and classes != len(names):
        raise ValueError(f"classes is {classes}, but the manifest names {len(names)}")
    return tuple(names)


def _images(path: Path, samples: Samples) -> list[Component]:
    images = []
    for key, components in samples.items():
        found = [c for c in components if c.extension in IMAGE_EXTENSIONS]
        if len(found) != 1:
            extensions = ", ".join(c.extension for c in components)
            allowed = ", ".join(IMAGE_EXTENSIONS)
            raise ShardError(f"shard {path}, key {key}: needs exactly one image ({allowed}), but has {extensions}")
        images.append(found[0])
    return images


def _foreign_samples(path: Path) -> tuple[list[str], list[Component], list[int]]:
    samples = scan_tar(path)
    images, labels = _images(path, samples), []
    with path.open("rb") as file:
        for key, components in samples.items():
            found = [c for c in components if c.extension == LABEL_EXTENSION]
            if not found:
                raise ShardError(f"shard {path}, key {key}: has no class ({LABEL_EXTENSION})")
            text = os.pread(file.fileno(), found[0].size, found[0].offset)
            try:
                labels.append(int(text))
            except ValueError as error:
                raise ShardError(f"shard {path}, key {key}: class {text[:40]!r} is not an integer") from error
    return list(samples), images, labels
