"""Small pictures and sets of shards for the data tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spectralar.training.data import write_shards

Encode = Callable[..., bytes]


def encode_image(image: Image.Image, container: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, container, **options)
    return file.getvalue()


def random_image(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def encode() -> Encode:
    return encode_image


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    return random_image


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 5, 6 and 7 pictures, all different, of various sizes and containers."""
    root = tmp_path_factory.mktemp("tree")
    containers = (("PNG", "png"), ("JPEG", "JPEG"), ("WEBP", "webp"))
    for label, name in enumerate(("ant", "bee", "cat")):
        (root / name).mkdir()
        for i in range(5 + label):
            container, suffix = containers[i % 3]
            image = random_image(20 + i, 24 + 2 * label, seed=10 * label + i)
            (root / name / f"{i}.{suffix}").write_bytes(encode_image(image, container))
    return root


@pytest.fixture(scope="session")
def shards_dir(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as four shards of five samples, the last of three."""
    out = tmp_path_factory.mktemp("shards") / "train"
    write_shards(tree, out, samples_per_shard=5)
    return out


@pytest.fixture(scope="session")
def numbered_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures of 12 x 12 pixels of one class each, so that the label of a sample tells which one it is."""
    base = tmp_path_factory.mktemp("numbered")
    for i in range(23):
        folder = base / "source" / f"{i:02d}"
        folder.mkdir(parents=True)
        (folder / "x.png").write_bytes(encode_image(random_image(12, 12, seed=i)))
    write_shards(base / "source", base / "shards", samples_per_shard=6)
    return base / "shards"
