"""Models of a few thousand weights, and a handful of smooth pictures as shards and as tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import TokenStore, TokenWriter, write_shards
from tests.training.harness import Bench


def smooth_image(seed: int, size: int = 20) -> Image.Image:
    """A picture with most of its energy at low frequencies, as photographs have."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def write_pictures(folder: Path, classes: tuple[str, ...], each: int, seed: int) -> Path:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            smooth_image(seed + 100 * label + i).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train`: 2 classes of 8 pictures, `val`: 2 of 5, 20 pixels wide."""
    base = tmp_path_factory.mktemp("photos")
    for name, each, seed in (("train", 8, 0), ("val", 5, 1000)):
        pictures = write_pictures(base / f"{name}-pictures", ("dusk", "noon"), each, seed)
        write_shards(pictures, base / name, samples_per_shard=6)
    return base


@pytest.fixture(scope="session")
def tokenizer_config() -> TokenizerConfig:
    side = ViTConfig(32, 1, 2)
    return TokenizerConfig(
        image_size=16, patch_size=4, tokens=4, encoder=side, decoder=side, codebook_size=16, code_dim=4
    )


@pytest.fixture(scope="session")
def generator_config() -> GeneratorConfig:
    """Class drop and stochastic depth are strong, so that a step that lost its random state would show."""
    return GeneratorConfig(
        depth=2, tokens=4, codebook_size=16, classes=2, class_drop=0.3, drop_path=0.4, class_names=("dusk", "noon")
    )


@pytest.fixture
def tokenizer(tokenizer_config: TokenizerConfig) -> SpectralTokenizer:
    torch.manual_seed(7)
    return SpectralTokenizer(tokenizer_config).eval()


@pytest.fixture(scope="session")
def token_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    """Twelve random rows of two classes, of no known tokenizer."""
    path = tmp_path_factory.mktemp("tokens") / "store"
    random = torch.Generator().manual_seed(3)
    writer = TokenWriter(path, tokens=4, codebook_size=16, class_names=("dusk", "noon"))
    with writer:
        writer.append(torch.randint(16, (12, 4), generator=random), torch.arange(12) % 2)
    return TokenStore.open(path)


@pytest.fixture
def bench(
    photo_shards: Path, token_store: TokenStore, tokenizer_config: TokenizerConfig, generator_config: GeneratorConfig
) -> Bench:
    return Bench(photo_shards, token_store, tokenizer_config, generator_config)


@pytest.fixture
def tokenizer_yaml(tmp_path: Path) -> str:
    """A tokenizer of a few thousand weights, trained for six steps, as a file for `--config`."""
    path = tmp_path / "tokenizer.yaml"
    path.write_text("""
model:
  image_size: 16
  patch_size: 4
  tokens: 4
  codebook_size: 16
  code_dim: 4
  encoder: {width: 32, depth: 1, heads: 2}
  decoder: {width: 32, depth: 1, heads: 2}
data: {batch: 4, workers: 0, cache: false, crop: {size: 16, kind: random, resize: 18, scale: [0.25, 1.0]}}
optimizer: {warmup: 2, lr: 0.001}
loop: {steps: 6, device: cpu, log_every: 1, validate_every: 0, picture_every: 0, checkpoint_every: 2}
""")
    return str(path)
