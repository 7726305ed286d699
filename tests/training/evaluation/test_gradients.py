"""Gradients by position against a plain backward pass."""

from __future__ import annotations

import pytest
import torch

from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.evaluation.gradients import token_gradients
from spectralar.training.prefixes import PrefixConfig
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask

LENGTHS = torch.tensor([1, 3, 2, 3, 3, 1])


def pixel_loss(model: SpectralTokenizer, images: torch.Tensor) -> torch.Tensor:
    out = model(images, LENGTHS[: len(images)])
    return (out.images - model.targets(images, LENGTHS[: len(images)])).square().mean()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8)


def test_gradients_are_those_of_a_backward_pass(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    found = token_gradients(tokenizer, pixel_loss, [(images,), (images[:1],)])
    assert all(p.grad is None for p in tokenizer.parameters())
    pixel_loss(tokenizer, images.float() / 255).backward()
    queries = tokenizer.encoder.queries.grad
    assert queries is not None
    assert found.gradient_query == pytest.approx(queries.norm(dim=1).tolist(), rel=1e-5)
    # Image by image, each with a loss of its own, and the codes as leaves.
    squares = torch.zeros(4)
    for i, length in enumerate(LENGTHS.tolist()):
        image = images[i : i + 1]
        codes = tokenizer.quantize(tokenizer.encoder(image.float() / 255)).quantized.detach().requires_grad_()
        target = tokenizer.targets(image, torch.tensor([length]))
        error = (tokenizer.decoder(codes, torch.tensor([length])) - target).square().mean()
        (gradient,) = torch.autograd.grad(error, codes)
        squares += gradient[0].square().sum(1)
    assert found.gradient_code == pytest.approx((squares / 6).sqrt().tolist(), rel=1e-4)
    assert found.gradient_code[3] == 0 and min(found.gradient_code[:3]) > 0


def test_a_frozen_model_is_measured_and_stays_frozen(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    expected = token_gradients(tokenizer, pixel_loss, [(images,)])
    tokenizer.requires_grad_(False)
    with torch.no_grad():
        assert token_gradients(tokenizer, pixel_loss, [(images,)]) == expected
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_no_images_have_no_gradients(tokenizer: SpectralTokenizer) -> None:
    assert token_gradients(tokenizer, pixel_loss, []).gradient_query == (0.0,) * 4


def test_several_prefixes_of_an_image_count_together(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    """The gradient of an image's own loss, whatever the batch: here all images are one."""
    same = images[:1].expand(6, -1, -1, -1)

    def loss(model: SpectralTokenizer, images: torch.Tensor) -> torch.Tensor:
        lengths = torch.tensor([2, 4]).repeat_interleave(len(images))
        return TokenizerTask(model, TokenizerLossConfig()).objective(model, images, lengths)[0]

    six, one = (token_gradients(tokenizer, loss, [(x,)]) for x in (same, same[:1]))
    assert six.gradient_code == pytest.approx(one.gradient_code, rel=1e-4)
    assert six.gradient_query == pytest.approx(one.gradient_query, rel=1e-4)


def test_validation_leaves_the_random_state(tokenizer: SpectralTokenizer, images: torch.Tensor) -> None:
    config = TokenizerLossConfig(prefixes=PrefixConfig(per_image=2, full=0.5), emphasis=1.0)
    task = TokenizerTask(tokenizer, config, validation=lambda: [(images,)])
    state = torch.get_rng_state()
    figures = task.validate(tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(figures["val_gradient_query"]) == len(figures["val_gradient_code"]) == 4
    assert min(figures["val_gradient_code"]) > 0
