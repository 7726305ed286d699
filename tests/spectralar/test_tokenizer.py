"""The nested spectral tokenizer: shapes, prefixes, who depends on whom, gradients, errors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralar.config import ViTConfig
from spectralar.kernels.dct import spectral_targets
from spectralar.tokenizer import SpectralTokenizer
from spectralar.tokenizer.heads import DirectPixelHead, ProxyCodeHead

MASKS = ["figure", "strict", "none"]
Make = Callable[..., SpectralTokenizer]


def random_tokens(batch: int, length: int = 8, codes: int = 32) -> Tensor:
    return torch.randint(codes, (batch, length), generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "image_size, patch_size, tokens", [(32, 8, 8), (32, 32, 1), (24, 8, 24), (12, 4, 5), (5, 1, 3), (20, 10, 20)]
)
def test_shapes(make_tokenizer: Make, image_size: int, patch_size: int, tokens: int, mask: str) -> None:
    model = make_tokenizer(image_size=image_size, patch_size=patch_size, tokens=tokens, mask=mask)
    encoded = model.encode(torch.rand(2, 3, image_size, image_size))
    assert encoded.shape == (2, tokens) and encoded.dtype == torch.int64
    assert 0 <= encoded.min() and encoded.max() < 32
    for n in (1, tokens):
        decoded = model.decode(encoded[:, :n])
        assert decoded.shape == (2, 3, image_size, image_size) and decoded.dtype == torch.float32


def test_encoder_and_decoder_may_differ_in_size(make_tokenizer: Make, photos: Tensor) -> None:
    model = make_tokenizer(encoder=ViTConfig(16, 1, 2), decoder=ViTConfig(48, 3, 4))
    assert model.reconstruct(photos).shape == photos.shape


def test_patches_are_embedded_by_the_convolution(make_tokenizer: Make) -> None:
    encoder = make_tokenizer(image_size=24, patch_size=8).double().encoder
    images = torch.rand(2, 3, 24, 24, dtype=torch.float64)
    expected = encoder.patch_embed(images).flatten(2).transpose(1, 2)
    assert (encoder._embed_patches(images) - expected).abs().max() <= 1e-14


@pytest.mark.parametrize("mask", MASKS)
def test_decode_prefixes_equals_decode_of_the_truncated_tokens(make_tokenizer: Make, mask: str) -> None:
    """Every length from 1 to N in one batch, in fp64, and also where fewer than N tokens are given."""
    model = make_tokenizer(mask=mask).double()
    tokens, lengths = random_tokens(8), torch.arange(1, 9)
    together = model.decode_prefixes(tokens, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = model.decode(tokens[b : b + 1, :n])
        assert (together[b] - alone[0]).abs().max() <= 1e-12
    shorter = model.decode_prefixes(tokens[:2, :5], torch.tensor([5, 2]))
    assert (shorter[1] - model.decode(tokens[1:2, :2])[0]).abs().max() <= 1e-12
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("mask", MASKS)
def test_a_prefix_does_not_depend_on_later_tokens(make_tokenizer: Make, mask: str) -> None:
    """Bit for bit; and it does depend on its own last token."""
    model = make_tokenizer(mask=mask)
    tokens = random_tokens(1)
    for n in (1, 4, 7):
        changed, touched = tokens.clone(), tokens.clone()
        changed[:, n:] = (changed[:, n:] + 7) % 32
        touched[:, n - 1] = (touched[:, n - 1] + 7) % 32
        picture = model.decode_prefixes(tokens, torch.tensor([n]))
        assert torch.equal(model.decode_prefixes(changed, torch.tensor([n])), picture)
        assert not torch.equal(model.decode_prefixes(touched, torch.tensor([n])), picture)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
def test_latents_depend_on_the_queries_that_the_mask_allows(
    make_tokenizer: Make, photos: Tensor, mask: str, depth: int
) -> None:
    """Latent i comes from query i. Under `strict` it never depends on later queries; under `figure` it does so only
    from the second block on, through the image rows, as drawn in the paper."""
    encoder = make_tokenizer(mask=mask, encoder=ViTConfig(32, depth, 2)).encoder
    latents = encoder(photos[:1].float() / 255)[0]  # [N, D]
    reached = torch.stack(
        [torch.autograd.grad(row.sum(), encoder.queries, retain_graph=True)[0].abs().amax(1) > 0 for row in latents]
    )
    lower = torch.ones(8, 8).tril().bool()
    expected = torch.ones_like(lower) if mask == "none" or (mask == "figure" and depth > 1) else lower
    assert torch.equal(reached, expected)


def test_permuted_queries_give_permuted_latents(make_tokenizer: Make, photos: Tensor) -> None:
    """Without a mask the encoder treats all queries alike, so a latent belongs to its query as a whole row; a reshape
    that mixes rows and channels would break this."""
    encoder = make_tokenizer(mask="none").double().encoder
    images = photos.double() / 255
    latents, order = encoder(images), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    with torch.no_grad():
        encoder.queries.copy_(encoder.queries[order])
    assert (encoder(images) - latents[:, order]).abs().max() <= 1e-12


def test_patches_enter_row_by_row(make_tokenizer: Make) -> None:
    """Row p of the patches that enter the transformer belongs to the patch in row p // 4 and column p % 4."""
    encoder = make_tokenizer().encoder
    seen: list[Tensor] = []
    encoder.vit.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    images = torch.zeros(1, 3, 32, 32, requires_grad=True)
    encoder(images)
    for p in range(16):
        (gradient,) = torch.autograd.grad(seen[0][0, p].square().sum() + seen[0][0, p].sum(), images, retain_graph=True)
        rows, columns = gradient[0].abs().sum(0).nonzero().unbind(1)
        assert {(r // 8, c // 8) for r, c in zip(rows.tolist(), columns.tolist(), strict=True)} == {(p // 4, p % 4)}


def test_the_pixel_head_puts_every_patch_in_its_place() -> None:
    head = DirectPixelHead(5, 2)
    head.start()
    torch.nn.init.normal_(head.to_patch.bias)
    head.smooth.register_parameter("bias", torch.nn.Parameter(torch.zeros(3)))
    features = torch.randn(2, 3, 3, 5)
    pixels = head(features)
    for r, c in ((0, 0), (0, 2), (2, 1)):
        patch = (head.to_patch(features[:, r, c]).view(2, 2, 2, 3).permute(0, 3, 1, 2) + 1) / 2  # [B, 3, p, p]
        assert torch.allclose(pixels[:, :, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2], patch, atol=1e-6)


@pytest.mark.parametrize(("patch", "grid"), [(2, 3), (4, 1), (1, 4)])
def test_the_pixel_head_is_a_linear_map_and_a_convolution(patch: int, grid: int) -> None:
    """Pixels and all gradients, also where the convolution looks into other patches and over the border."""
    torch.manual_seed(0)
    head = DirectPixelHead(5, patch).double()
    features = torch.randn(2, grid, grid, 5, dtype=torch.float64, requires_grad=True)
    patches = head.to_patch(features).view(2, grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
    expected = (head.smooth(patches.reshape(2, 3, grid * patch, grid * patch)) + 1) / 2
    pixels = head(features)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-14)
    learned, direction = [features, *head.parameters()], torch.randn_like(pixels)
    for got, right in zip(
        torch.autograd.grad(pixels, learned, direction), torch.autograd.grad(expected, learned, direction), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-13)


def test_the_proxy_code_head_mixes_codes_and_decodes_them() -> None:
    torch.manual_seed(0)
    head = ProxyCodeHead(6, 32).double().eval()
    features = torch.randn(2, 2, 2, 6, dtype=torch.float64)
    first, second = head.to_hidden, head.to_logits
    logits = (features @ first.weight.T + first.bias).tanh() @ second.weight.T + second.bias
    shares = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert torch.allclose(head(features), head.vqgan((shares[..., None] * head.vqgan.codebook).sum(-2)))
    # A feature that is sure of one code gives that code's picture.
    with torch.no_grad():
        second.weight.zero_()
        second.bias.copy_(torch.nn.functional.one_hot(torch.tensor(7), 1024) * 1000.0)
    codes = torch.full((2, 2, 2), 7)
    assert torch.allclose(head(features).clamp(0, 1), head.vqgan.decode(codes))


def test_a_tokenizer_with_proxy_codes_trains_saves_and_decodes_prefixes(
    make_tokenizer: Make, photos: Tensor, tmp_path: Path
) -> None:
    model = make_tokenizer(pixel_head="vqgan", patch_size=16).train()
    lengths = torch.tensor([1, 8])
    out = model(photos[:2], lengths)
    assert out.images.shape == (2, 3, 32, 32) and out.images.dtype == torch.float32
    (model.pixel_loss(out.images, photos[:2], lengths) + out.commitment_loss + out.codebook_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = SpectralTokenizer.from_pretrained(model.eval().save_pretrained(tmp_path))
    tokens = random_tokens(2)
    assert torch.equal(again.decode(tokens), model.decode(tokens))
    exact = model.double()
    assert torch.allclose(exact.decode_prefixes(tokens, torch.tensor([3, 8]))[0], exact.decode(tokens[:1, :3])[0])


def test_pixels_are_fp32_under_autocast_and_from_bf16_weights(make_tokenizer: Make) -> None:
    model, tokens = make_tokenizer(), random_tokens(2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.decode(tokens).dtype == torch.float32
    exact = model.decode(tokens)
    rounded = model.bfloat16().decode(tokens)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, rounded.bfloat16().float()), "not a picture of bf16 pixels"
    assert (rounded - exact).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("latent_norm", ["none", "batch"])
def test_every_floating_dtype_of_images_and_weights(
    make_tokenizer: Make, photos: Tensor, dtype: torch.dtype, latent_norm: str
) -> None:
    model, images = make_tokenizer(latent_norm=latent_norm), photos.float() / 255
    assert torch.equal(model.encode(images.to(dtype)), model.encode(images.to(dtype).float()))
    if dtype != torch.float16:
        model = model.to(dtype)
        assert model.encode(photos).shape == model.encode(images.to(dtype)).shape == (3, 8)
        assert model.decode(random_tokens(1)).dtype == torch.promote_types(dtype, torch.float32)


def test_uint8_and_float_images_agree(tokenizer: SpectralTokenizer, photos: Tensor) -> None:
    images, lengths = photos.float() / 255, torch.tensor([1, 4, 8])
    assert torch.equal(tokenizer.encode(photos), tokenizer.encode(images))
    assert torch.equal(tokenizer.targets(photos, lengths), tokenizer.targets(images, lengths))
    for a, b in zip(tokenizer(photos, lengths), tokenizer(images, lengths), strict=True):
        assert torch.equal(a, b)


def test_an_image_s_tokens_do_not_depend_on_its_batch(tokenizer: SpectralTokenizer, photos: Tensor) -> None:
    together = tokenizer.encode(photos)
    assert torch.equal(torch.cat([tokenizer.encode(photos[i : i + 1]) for i in range(3)]), together)
    assert torch.equal(tokenizer.encode(photos), together)


def test_reconstruct_is_encode_then_decode(tokenizer: SpectralTokenizer, photos: Tensor) -> None:
    tokens = tokenizer.encode(photos)
    assert torch.equal(tokenizer.reconstruct(photos), tokenizer.decode(tokens))
    for n in (1, 5, 8):
        assert torch.equal(tokenizer.reconstruct(photos, n), tokenizer.decode(tokens[:, :n]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_tokens_of_any_integer_dtype(tokenizer: SpectralTokenizer, dtype: torch.dtype) -> None:
    tokens = random_tokens(2)
    assert torch.equal(tokenizer.decode(tokens.to(dtype)), tokenizer.decode(tokens))


def test_an_empty_batch(tokenizer: SpectralTokenizer, photos: Tensor) -> None:
    tokens = tokenizer.encode(photos[:0])
    assert tokens.shape == (0, 8)
    assert tokenizer.decode(tokens).shape == (0, 3, 32, 32)
    assert tokenizer.decode_prefixes(tokens, torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 32, 32)


def test_targets_are_sub_images_or_the_image(make_tokenizer: Make, photos: Tensor) -> None:
    lengths = torch.tensor([1, 5, 8])
    model = make_tokenizer()
    images = photos.float() / 255
    targets = model.targets(photos, lengths)
    cutoffs = torch.tensor([model.config.cutoffs[n - 1] for n in lengths.tolist()])
    assert torch.equal(targets, spectral_targets(images, cutoffs))
    assert torch.equal(targets[2], images[2]), "I'_N = I"
    mean = images[0].mean((1, 2), keepdim=True).expand(3, 32, 32)
    assert torch.allclose(targets[0], mean, atol=1e-5), "a cutoff of 1 leaves the mean colour"
    assert torch.equal(make_tokenizer(supervision="full").targets(photos, lengths), images)
    uniform = make_tokenizer(mapping="uniform")
    assert uniform.cutoffs.tolist() == [4, 8, 12, 16, 20, 24, 28, 32]
    assert not torch.equal(uniform.targets(photos, lengths)[1], targets[1])


def test_a_training_pass_agrees_with_encode_and_decode(tokenizer: SpectralTokenizer, photos: Tensor) -> None:
    lengths = torch.tensor([2, 8, 5])
    out = tokenizer(photos, lengths)
    assert torch.equal(out.tokens, tokenizer.encode(photos))
    assert (out.images - tokenizer.decode_prefixes(out.tokens, lengths)).abs().max() <= 1e-5
    assert out.images.shape == photos.shape
    for loss in (out.commitment_loss, out.codebook_loss):
        assert loss.shape == () and loss > 0
    assert out.commitment_loss.item() == pytest.approx(0.25 * out.codebook_loss.item(), rel=1e-5)
    for a, b in zip(tokenizer(photos, lengths), out, strict=True):
        assert torch.equal(a, b)


def test_several_prefixes_of_an_image_share_its_tokens(tokenizer: SpectralTokenizer, photos: Tensor) -> None:
    lengths = torch.tensor([2, 8, 5, 1, 8, 7])
    encoded: list[int] = []
    handle = tokenizer.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    out = tokenizer(photos, lengths)
    handle.remove()
    assert encoded == [3] and torch.equal(out.tokens, tokenizer.encode(photos))
    assert (out.images - tokenizer.decode_prefixes(out.tokens.repeat(2, 1), lengths)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="lengths must be 3 integers, one per sample"):
        tokenizer(photos, lengths[:5])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("latent_norm", ["none", "batch"])
def test_gradients_reach_every_parameter(
    make_tokenizer: Make, photos: Tensor, mask: str, normalize: bool, latent_norm: str
) -> None:
    model = make_tokenizer(mask=mask, normalize_codes=normalize, latent_norm=latent_norm).train()
    lengths = torch.tensor([1, 8, 4])
    out = model(photos, lengths)
    pixel = (out.images - model.targets(photos, lengths)).square().mean()
    (pixel + out.commitment_loss + out.codebook_loss).backward()
    for name, parameter in model.named_parameters():
        if latent_norm == "batch" and name == "encoder.to_latent.bias":
            continue  # subtracting the batch's mean takes a constant away
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    used = out.tokens.unique()
    assert model.codebook.grad is not None
    assert model.codebook.grad.any(1).nonzero().flatten().tolist() == used.tolist(), "exactly the codes in use"


def test_latents_are_standardised_over_the_batch_in_training_only(make_tokenizer: Make, photos: Tensor) -> None:
    """Each coordinate of each position; outside training an image's tokens depend on that image alone."""
    model = make_tokenizer(latent_norm="batch").double()
    images = torch.rand(16, 3, 32, 32, dtype=torch.float64)
    plain = make_tokenizer().double().encoder(images)
    latents = model.train().encoder(images)
    deviation = (plain.var(0, unbiased=False) + 1e-5).sqrt()
    assert (latents - (plain - plain.mean(0)) / deviation).abs().max() <= 1e-9
    for _ in range(3):
        model.encoder(images)
    norm: Any = model.eval().encoder.latent_norm.norm
    weight = 1 - 0.99**4
    assert (norm.running_mean - weight * plain.mean(0).flatten()).abs().max() <= 1e-12
    expected = (1 - weight) + weight * plain.var(0).flatten()
    assert (norm.running_var - expected).abs().max() <= 1e-12
    together = model.encode(photos)
    assert torch.equal(torch.cat([model.encode(photos[i : i + 1]) for i in range(3)]), together)


def test_dead_codes_are_drawn_to_latents_in_training_only(make_tokenizer: Make, photos: Tensor) -> None:
    """All codes but one point away from every latent: left alone they stay dead, restarted they come to life."""

    def trained(dead_codes: str) -> SpectralTokenizer:
        model = make_tokenizer(dead_codes=dead_codes)
        assert ("usage" in model.state_dict()) == (dead_codes == "restart")
        with torch.no_grad():
            mean = model.encoder(photos).mean((0, 1))
            model.codebook[:] = -mean + 0.01 * torch.randn(model.codebook.shape)
            model.codebook[7] = mean
        before = model.codebook.detach().clone()
        if dead_codes == "restart":
            model.usage.copy_(torch.arange(32) == 7)  # what a long time of this leads to
        model(photos, torch.full((len(photos),), 8))
        assert torch.equal(model.codebook, before)
        model.train()(photos, torch.full((len(photos),), 8))
        assert torch.equal(model.codebook[7], before[7])
        assert torch.equal(model.codebook, before) == (dead_codes == "keep")
        return model.eval()

    used = {choice: len(trained(choice).encode(photos).unique()) for choice in ("keep", "restart")}
    assert used["keep"] == 1 < used["restart"]


def test_the_loss_of_pixels_is_that_of_the_targets(make_tokenizer: Make, photos: Tensor) -> None:
    lengths = torch.tensor([1, 4, 8, 2][: len(photos)])
    rebuilt = torch.rand_like(photos.float())
    for supervision in ("spectral", "full"):
        model = make_tokenizer(supervision=supervision)
        plain = (rebuilt - model.targets(photos[: len(lengths)], lengths)).square().mean()
        assert model.pixel_loss(rebuilt, photos, lengths).item() == pytest.approx(plain.item(), rel=1e-5)


def test_pixels_reach_the_encoder_straight_through(make_tokenizer: Make, photos: Tensor) -> None:
    """Without the quantizer's losses: the encoder learns from the pixels, the codebook does not."""
    model = make_tokenizer()
    model(photos, torch.tensor([8, 8, 8])).images.square().mean().backward()
    assert model.encoder.queries.grad is not None and model.encoder.queries.grad.any()
    assert model.codebook.grad is None or not model.codebook.grad.any()


def test_codes_start_at_unit_length_and_the_convolution_as_the_identity(tokenizer: SpectralTokenizer) -> None:
    assert torch.allclose(tokenizer.codebook.norm(dim=1), torch.ones(32), atol=1e-6)
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(tokenizer.decoder.head.smooth(image), image)


BAD_IMAGES: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "images must be a tensor, not NoneType"),
    (torch.zeros(1, 3, 32, 32).int(), TypeError, "images must be uint8 or floating in [0, 1], not torch.int32"),
    (torch.zeros(3, 32, 32), ValueError, "images must have shape [B, 3, H, W], not [3, 32, 32]"),
    (torch.zeros(1, 4, 32, 32), ValueError, "images must have shape [B, 3, H, W], not [1, 4, 32, 32]"),
    (torch.zeros(1, 3, 16, 16), ValueError, "images must be 32 x 32 pixels, not 16 x 16"),
]


@pytest.mark.parametrize("images, error, message", BAD_IMAGES)
def test_errors_of_images(tokenizer: SpectralTokenizer, images: Any, error: type[Exception], message: str) -> None:
    lengths = torch.ones(1, dtype=torch.int64)
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer.encode(images),
        lambda: tokenizer.reconstruct(images),
        lambda: tokenizer.targets(images, lengths),
        lambda: tokenizer(images, lengths),
    ]
    for call in calls:
        with pytest.raises(error, match=re.escape(message)):
            call()


@pytest.mark.parametrize("value, shown", [(1.25, "0..1.25"), (-1.0, "-1..0"), (float("nan"), "nan..nan")])
def test_encode_checks_the_range(tokenizer: SpectralTokenizer, value: float, shown: str) -> None:
    images = torch.zeros(1, 3, 32, 32)
    images[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=re.escape(f"images must be in [0, 1] when floating, not {shown}")):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        (torch.zeros(1, 8), TypeError, "tokens must be integers, not torch.float32"),
        (torch.zeros(1, 8).bool(), TypeError, "tokens must be integers, not torch.bool"),
        (torch.zeros(8).long(), ValueError, "tokens must have shape [B, n] with n in 1..8, not [8]"),
        (torch.zeros(1, 0).long(), ValueError, "tokens must have shape [B, n] with n in 1..8, not [1, 0]"),
        (torch.zeros(1, 9).long(), ValueError, "tokens must have shape [B, n] with n in 1..8, not [1, 9]"),
        (torch.tensor([[0, 32]]), ValueError, "tokens must be in 0..31, not 0..32"),
        (torch.tensor([[-1, 3]]), ValueError, "tokens must be in 0..31, not -1..3"),
    ],
)
def test_errors_of_tokens(tokenizer: SpectralTokenizer, tokens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        tokenizer.decode(tokens)
    with pytest.raises(error, match=re.escape(message)):
        tokenizer.decode_prefixes(tokens, torch.ones(1, dtype=torch.int64))


@pytest.mark.parametrize(
    "lengths, message",
    [
        (torch.tensor([0, 1]), "lengths must be 1..8, not 0..1"),
        (torch.tensor([1, 9]), "lengths must be 1..8, not 1..9"),
        (torch.tensor([1]), "lengths must be 2 integers, one per sample, not torch.int64 [1]"),
        (torch.tensor([[1], [2]]), "lengths must be 2 integers, one per sample, not torch.int64 [2, 1]"),
        (torch.tensor([1.0, 2.0]), "lengths must be 2 integers, one per sample, not torch.float32 [2]"),
        (torch.tensor([True, True]), "lengths must be 2 integers, one per sample, not torch.bool [2]"),
    ],
)
def test_errors_of_prefix_lengths(tokenizer: SpectralTokenizer, photos: Tensor, lengths: Tensor, message: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: tokenizer.decode_prefixes(random_tokens(2), lengths),
        lambda: tokenizer.targets(photos[:2], lengths),
        lambda: tokenizer(photos[:2], lengths),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


def test_a_prefix_is_no_longer_than_the_given_tokens(tokenizer: SpectralTokenizer) -> None:
    with pytest.raises(ValueError, match=r"lengths must be 1\.\.3, not 4\.\.4"):
        tokenizer.decode_prefixes(random_tokens(1, 3), torch.tensor([4]))


@pytest.mark.parametrize("length", [0, 9, -1])
def test_reconstruct_checks_its_length(tokenizer: SpectralTokenizer, photos: Tensor, length: int) -> None:
    with pytest.raises(ValueError, match=f"length must be 1..8, not {length}"):
        tokenizer.reconstruct(photos, length)
