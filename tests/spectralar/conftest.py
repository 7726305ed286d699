"""Tiny models, built in milliseconds: 32 pixels, 8 tokens, 32 codes, 3 classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig
from spectralar.generator import SpectralGenerator
from spectralar.pipeline import SpectralAR
from spectralar.tokenizer import SpectralTokenizer

CLASS_NAMES = ("red panda", "Giant panda", "crane")


def tiny_tokenizer(**changes: Any) -> SpectralTokenizer:
    """A tokenizer in evaluation mode, always with the same weights for the same configuration."""
    vit = ViTConfig(width=32, depth=2, heads=2)
    fields = {"image_size": 32, "patch_size": 8, "tokens": 8, "codebook_size": 32, "code_dim": 6}
    torch.manual_seed(1)
    return SpectralTokenizer(TokenizerConfig(**{"encoder": vit, "decoder": vit, **fields, **changes})).eval()


def tiny_generator(**changes: Any) -> SpectralGenerator:
    """A generator in evaluation mode whose gates are open and whose logits differ, unlike VAR's shy start."""
    fields = {"depth": 2, "tokens": 8, "codebook_size": 32, "classes": 3, "code_dim": 6, "gate_init": 1.0}
    torch.manual_seed(2)
    config = GeneratorConfig(**{**fields, **changes})
    model = SpectralGenerator(config, torch.randn(config.codebook_size, config.code_dim)).eval()
    with torch.no_grad():
        model.head.weight.mul_(200)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def make_tokenizer() -> Callable[..., SpectralTokenizer]:
    return tiny_tokenizer


@pytest.fixture
def make_generator() -> Callable[..., SpectralGenerator]:
    return tiny_generator


@pytest.fixture
def tokenizer() -> SpectralTokenizer:
    return tiny_tokenizer()


@pytest.fixture
def generator() -> SpectralGenerator:
    return tiny_generator(class_names=CLASS_NAMES)


@pytest.fixture
def model(tokenizer: SpectralTokenizer, generator: SpectralGenerator) -> SpectralAR:
    return SpectralAR(tokenizer, generator)


@pytest.fixture
def photos() -> Tensor:
    """`[3, 3, 32, 32]` uint8: noise with a different brightness and slope per image."""
    draw = torch.Generator().manual_seed(4)
    slope = torch.linspace(0, 1, 32)[:, None] * torch.tensor([0.2, 0.6, 0.9]).view(3, 1, 1, 1)
    return ((slope + 0.1 * torch.rand(3, 3, 32, 32, generator=draw)) * 255).to(torch.uint8)
