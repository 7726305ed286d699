"""What both tasks minimise, that it goes down, and what they report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spectralar.config import GeneratorConfig, TokenizerConfig
from spectralar.generator import SpectralGenerator
from spectralar.sampling import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Crop, ImageLoader, LoaderConfig, TokenBatch
from spectralar.training.generator import GeneratorTask
from spectralar.training.prefixes import PrefixConfig
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask


@pytest.fixture
def images(photo_shards: Path) -> torch.Tensor:
    config = LoaderConfig(str(photo_shards / "train"), batch=8, crop=Crop(16, "center", flip=False))
    return next(ImageLoader(config)).images


def test_tokenizer_loss_is_its_weighted_parts(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    out = TokenizerTask(tokenizer, TokenizerLossConfig(pixel=3.0, quantizer=0.5)).loss((images, labels))
    expected = 3 * out["pixel"] + 0.5 * (out["codebook"] + out["commitment"])
    torch.testing.assert_close(out["loss"], expected, rtol=1e-6, atol=0)
    assert all(value.dim() == 0 for value in out.values())
    assert 1 <= out["codes_used"] <= 16


def test_tokenizer_loss_compares_each_prefix_with_its_sub_image(
    tokenizer: SpectralTokenizer, images: torch.Tensor
) -> None:
    """The pixel term, recomputed sample by sample through the public functions, for the lengths that the seed draws."""
    task = TokenizerTask(tokenizer, TokenizerLossConfig())
    torch.manual_seed(11)
    lengths = task.draw_lengths(images)
    assert lengths.unique().numel() > 1
    torch.manual_seed(11)
    pixel = task.loss((images, torch.zeros(8)))["pixel"]
    tokens = tokenizer.encode(images)
    errors = []
    for i, n in enumerate(lengths.tolist()):
        rebuilt = tokenizer.decode(tokens[i : i + 1, :n]).double()
        errors.append((rebuilt - tokenizer.targets(images[i : i + 1], torch.tensor([n]))).square().mean().item())
    assert pixel.item() == pytest.approx(float(np.mean(errors)), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"emphasis": 1.5}])
def test_the_loss_of_several_prefixes_is_their_mean(
    tokenizer: SpectralTokenizer, images: torch.Tensor, changes: dict[str, float]
) -> None:
    task = TokenizerTask(tokenizer, TokenizerLossConfig(pixel=3.0, prefixes=PrefixConfig(per_image=2), **changes))  # type: ignore[arg-type]
    lengths = task.draw_lengths(images)
    assert lengths.shape == (16,) and (lengths[:8] <= 2).all() and (lengths[8:] > 2).all()
    together, pixel, out = task.objective(tokenizer, images, lengths)
    assert out.images.shape == (16, 3, 16, 16) and out.tokens.shape == (8, 4)
    parts = [task.objective(tokenizer, images, part) for part in lengths.split(8)]
    torch.testing.assert_close(together, torch.stack([p[0] for p in parts]).mean())
    torch.testing.assert_close(pixel, torch.stack([p[1] for p in parts]).mean())
    for i, part in enumerate(parts):
        torch.testing.assert_close(out.images[8 * i : 8 * i + 8], part[2].images)


def test_emphasis_weighs_by_frequency() -> None:
    assert TokenizerLossConfig().frequency_weights(16, torch.device("cpu")) is None
    weights = TokenizerLossConfig(emphasis=2.0, knee=4.0).frequency_weights(16, torch.device("cpu"))
    assert weights is not None and weights.shape == (16, 16)
    for u, v in ((0, 0), (3, 5), (15, 2)):
        assert weights[u, v] == (1 + max(u, v) / 4) ** 2


def test_emphasis_changes_the_pixel_loss_and_its_gradient(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    lengths = torch.tensor([1, 2, 3, 4] * 2)
    values, gradients = [], []
    for emphasis in (0.0, 1e-9, 2.0):
        task = TokenizerTask(tokenizer, TokenizerLossConfig(emphasis=emphasis))
        _, pixel, _ = task.objective(tokenizer, images, lengths)
        values.append(pixel)
        gradients.append(torch.autograd.grad(pixel, tokenizer.decoder.mask_token)[0])
    torch.testing.assert_close(values[1], values[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)
    assert values[2] > values[0] and not torch.allclose(gradients[2], gradients[0], rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emphasis": -1.0}, "emphasis must lie from 0 to 2, not -1.0"),
        ({"emphasis": 2.5}, "emphasis must lie from 0 to 2, not 2.5"),
        ({"knee": 0.0}, "knee must be positive, not 0.0"),
    ],
)
def test_impossible_weights_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenizerLossConfig(**changes)  # type: ignore[arg-type]


def test_every_prefix_length_is_drawn(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []
    pixel_loss = tokenizer.pixel_loss

    def remember(
        rebuilt: torch.Tensor, images: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        seen.append(lengths)
        return pixel_loss(rebuilt, images, lengths, weights)

    tokenizer.pixel_loss = remember  # type: ignore[method-assign]
    task = TokenizerTask(tokenizer, TokenizerLossConfig())
    for _ in range(25):
        task.loss((images, torch.zeros(8)))
    counts = torch.cat(seen).bincount(minlength=5)
    assert counts[0] == 0 and len(counts) == 5
    # 200 draws of 4 lengths: 50 each, standard deviation 6.
    assert counts[1:].min() > 25 and counts[1:].max() < 75


def test_the_tokenizer_learns_to_tell_colours_apart(tokenizer_config: TokenizerConfig) -> None:
    """Eight colours under one gradient. Well below the error of the mean image, only tokens that differ can lead."""
    torch.manual_seed(0)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5])] * 3)
    images = corners[:, :, None, None] + torch.linspace(0.1, 0.4, 16).expand(16, 16)
    model = SpectralTokenizer(tokenizer_config)
    task = TokenizerTask(model, TokenizerLossConfig(pixel=50.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(250):
        losses = task.loss((images, torch.zeros(8)))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    error = (model.eval().reconstruct(images) - images).square().mean().item()
    mean_image = (images.mean(0) - images).square().mean().item()
    assert error < 0.8 * mean_image, (error, mean_image)


def test_generator_loss_is_the_mean_cross_entropy(generator_config: GeneratorConfig) -> None:
    model = SpectralGenerator(generator_config).eval()
    tokens, labels = torch.randint(16, (3, 4)), torch.tensor([0, 1, 1])
    out = GeneratorTask(model).loss((tokens, labels))
    logits = model(labels, tokens).double().detach()
    picked = logits.log_softmax(-1).gather(-1, tokens[..., None])
    assert out["loss"].item() == pytest.approx(-picked.mean().item(), rel=1e-6)
    assert out["accuracy"].item() == pytest.approx((logits.argmax(-1) == tokens).double().mean().item())


def test_the_generator_learns_a_handful_of_rows_by_heart(generator_config: GeneratorConfig) -> None:
    """One row per class: with class drop the best loss is not 0, so it is measured without."""
    torch.manual_seed(0)
    model = SpectralGenerator(replace(generator_config, drop_path=0.0))
    tokens, labels = torch.randint(16, (2, 4)), torch.arange(2)
    task = GeneratorTask(model, validation=lambda: [TokenBatch(tokens, labels)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = task.validate(model.eval())["val_loss"]
    assert before == pytest.approx(math.log(16), rel=0.1)
    model.train()
    for _ in range(80):
        optimizer.zero_grad()
        task.loss((tokens, labels))["loss"].backward()
        optimizer.step()
    after = task.validate(model.eval())
    assert after["val_loss"] < 0.1 and after["val_accuracy"] == 1.0


def test_generator_validation_equals_a_slow_count(generator_config: GeneratorConfig) -> None:
    model = SpectralGenerator(generator_config).eval()
    tokens, labels = torch.randint(16, (7, 4)), torch.arange(7) % 2
    losses = torch.stack(
        [
            F.cross_entropy(model(labels[i : i + 1], tokens[i : i + 1])[0].double(), tokens[i], reduction="none")
            for i in range(7)
        ]
    )
    for size in (7, 3, 1):
        batches = [TokenBatch(t, c) for t, c in zip(tokens.split(size), labels.split(size), strict=True)]
        figures = GeneratorTask(model, validation=lambda batches=batches: batches).validate(model)  # type: ignore[misc]
        assert figures["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert figures["val_loss_by_position"] == pytest.approx(losses.mean(0).tolist(), rel=1e-5)
        assert f"{figures['val_loss']:.4f} nats per token" in figures["note"]
        json.dumps(figures, allow_nan=False)


def test_no_validation_and_no_pictures(generator_config: GeneratorConfig, tokenizer: SpectralTokenizer) -> None:
    model = SpectralGenerator(generator_config).eval()
    assert GeneratorTask(model).validate(model) == {}
    assert GeneratorTask(model, validation=list).validate(model) == {}
    assert GeneratorTask(model).picture(model) is None
    assert GeneratorTask(model, tokenizer=tokenizer).picture(model) is None
    task = TokenizerTask(tokenizer, TokenizerLossConfig())
    assert task.validate(tokenizer) == {} and task.picture(tokenizer) is None


def test_pictures_have_their_rows(
    generator_config: GeneratorConfig, tokenizer: SpectralTokenizer, images: torch.Tensor
) -> None:
    model = SpectralGenerator(generator_config).eval()
    drawn = GeneratorTask(model, tokenizer=tokenizer, pictured=(1, 0)).picture(model)
    assert drawn is not None and drawn.height == 2 * (16 + 4)
    strips = TokenizerTask(tokenizer, TokenizerLossConfig(), pictured=images[:3]).picture(tokenizer)
    assert strips is not None and strips.height >= 6 * (16 + 4)


def test_tokenizer_validation_gives_the_report_as_json(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    """The sub-image of all tokens is the image itself, so its PSNR is endless; the log must hold numbers."""
    task = TokenizerTask(tokenizer, TokenizerLossConfig(), validation=lambda: [(images,)])
    figures = json.loads(json.dumps(task.validate(tokenizer), allow_nan=False))
    assert figures["val_images"] == 8 and figures["val_lengths"] == [1, 4]
    assert figures["val_psnr_ideal"][-1] == 99.0
    assert figures["note"].startswith(f"PSNR (dB) n=1 {figures['val_psnr'][0]:.2f}")


@pytest.mark.parametrize(
    ("pictured", "settings", "message"),
    [
        ((0, 3), SamplingSettings(), r"classes must be in 0\.\.1, or 2 for no class, not 0\.\.3"),
        ((0,), SamplingSettings(top_k=17), "top_k must be at most the codebook size 16, not 17"),
    ],
)
def test_pictures_that_cannot_be_drawn_are_refused_at_once(
    generator_config: GeneratorConfig,
    tokenizer: SpectralTokenizer,
    pictured: tuple[int, ...],
    settings: SamplingSettings,
    message: str,
) -> None:
    model = SpectralGenerator(generator_config)
    with pytest.raises(ValueError, match=f"the pictured samples cannot be drawn: {message}"):
        GeneratorTask(model, tokenizer=tokenizer, pictured=pictured, settings=settings)
    GeneratorTask(model, pictured=pictured, settings=settings)


def test_a_tokenizer_that_does_not_fit_is_refused(
    generator_config: GeneratorConfig, tokenizer: SpectralTokenizer
) -> None:
    other = SpectralGenerator(replace(generator_config, codebook_size=32))
    with pytest.raises(ValueError, match="disagree on codebook_size: 32 and 16"):
        GeneratorTask(other, tokenizer=tokenizer, pictured=(0,))
