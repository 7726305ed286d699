"""The VQGAN pixel decoder against a second statement of it, its sizes, its layout in memory, published weights."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from spectralar.config import VQGANConfig
from spectralar.images import to_float, to_uint8
from spectralar.pixels import VQGANDecoder
from spectralar.weights import WeightsError
from spectralar.weights.maskgit_vqgan import import_maskgit_vqgan

# Levels with and without a change of channels, as at full size.
TINY = VQGANConfig(16, channels=8, multipliers=(1, 2, 2), groups=4, codebook_size=32, code_dim=6)
SHAPES = [
    TINY,
    dataclasses.replace(TINY, image_size=4),  # a single code
    dataclasses.replace(TINY, image_size=3, multipliers=(1,), blocks=1),  # no upsampling, odd size
    dataclasses.replace(TINY, image_size=10, multipliers=(3, 1), blocks=3, groups=1),  # coarse levels may be narrower
]
Names = dict[str, Tensor]


def make(config: VQGANConfig = TINY) -> VQGANDecoder:
    """Weights of ordinary size everywhere, norms included, so that no term can be left out unseen."""
    torch.manual_seed(3)
    model = VQGANDecoder(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(mean=0.5, std=0.5)
    return model


def random_codes(batch: int, config: VQGANConfig = TINY) -> Tensor:
    draw = torch.Generator().manual_seed(8)
    return torch.randint(config.codebook_size, (batch, config.grid, config.grid), generator=draw)


def vectors_of(model: VQGANDecoder, codes: Tensor) -> Tensor:
    return model.codebook.detach()[codes]


# The decoder once more, from its description, on rows of channels [B, H, W, C] and with no layer of PyTorch.


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum over the taps of a kernel; outside the map lie zeros."""
    reach = weight.shape[-1] // 2
    height, width = x.shape[1:3]
    padded = x.new_zeros(len(x), height + 2 * reach, width + 2 * reach, x.shape[3])
    padded[:, reach : reach + height, reach : reach + width] = x
    total = x.new_zeros(len(x), height, width, len(weight))
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            total = total + padded[:, i : i + height, j : j + width] @ weight[:, :, i, j].T
    return total if bias is None else total + bias


def norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    split = x.unflatten(-1, (groups, -1))  # [B, H, W, groups, C / groups]
    mean = split.mean((1, 2, 4), keepdim=True)
    variance = (split - mean).square().mean((1, 2, 4), keepdim=True)
    y = ((split - mean) / (variance + 1e-6).sqrt()).flatten(-2) * weight + bias
    return y / (1 + (-y).exp())


def residual(x: Tensor, w: Names, name: str, groups: int) -> Tensor:
    h = norm_silu(x, w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"], groups)
    h = conv(h, w[f"{name}.conv1.weight"])
    h = norm_silu(h, w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"], groups)
    h = conv(h, w[f"{name}.conv2.weight"])
    if x.shape[-1] == h.shape[-1]:
        return h + x
    return h + h @ w[f"{name}.nin_shortcut.weight"][:, :, 0, 0].T


def restated(w: Names, vectors: Tensor, config: VQGANConfig) -> Tensor:
    x = conv(vectors, w["conv_in.weight"], w["conv_in.bias"])
    for i in range(config.blocks):
        x = residual(x, w, f"mid.{i}", config.groups)
    for level in range(len(config.multipliers) - 1, -1, -1):
        for i in range(config.blocks):
            x = residual(x, w, f"up.{level}.block.{i}", config.groups)
        if level > 0:
            x = x.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
            x = conv(x, w[f"up.{level}.upsample_conv.weight"], w[f"up.{level}.upsample_conv.bias"])
    x = norm_silu(x, w["norm_out.weight"], w["norm_out.bias"], config.groups)
    return conv(x, w["conv_out.weight"], w["conv_out.bias"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", SHAPES)
def test_the_decoder_equals_its_description(config: VQGANConfig, batch: int) -> None:
    model = make(config).double()
    vectors = vectors_of(model, random_codes(batch, config))
    images = model(vectors)
    assert images.shape == (batch, 3, config.image_size, config.image_size) and images.is_contiguous()
    expected = restated(model.state_dict(), vectors, config)
    assert (images - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_dtypes_stay_within_the_error_of_plain_pytorch(dtype: torch.dtype) -> None:
    """Against fp64 with the same weights; the peer works in the dtype too, in the other memory layout."""
    model = make().to(dtype)
    vectors = vectors_of(model, random_codes(5))
    exact = restated({name: t.double() for name, t in model.state_dict().items()}, vectors.double(), TINY)
    images = model(vectors)
    assert images.dtype == torch.float32
    peer = make().to(dtype=dtype, memory_format=torch.contiguous_format)
    peer.conv_out.double()  # the last convolution's own rounding counts as ours
    seen = peer.norm_out(peer.up[0](peer.up[1](peer.up[2](_through_the_middle(peer, vectors)))))
    budget = 2 * (peer.conv_out(seen.double()) - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (images - exact).abs().max() <= budget


def _through_the_middle(model: VQGANDecoder, vectors: Tensor) -> Tensor:
    x = model.conv_in(vectors.permute(0, 3, 1, 2).contiguous())
    for block in model.mid:
        x = block(x)
    return x


def test_autocast_shortens_the_convolutions_but_not_the_pixels() -> None:
    model, codes = make(), random_codes(2)
    exact = model.decode(codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = model.decode(codes)
    assert images.dtype == torch.float32
    assert 0 < (images - exact).abs().max() < 0.1
    shades = images[(images > 0.5) & (images < 1)]
    assert not torch.equal(shades, shades.bfloat16().float())


def test_decode_looks_codes_up_and_clamps() -> None:
    model, codes = make(), random_codes(3)
    raw = model(model.codebook[codes])
    assert raw.min() < 0 and raw.max() > 1, "or there is nothing to clamp"
    images = model.decode(codes)
    assert torch.equal(images, raw.clamp(0, 1))
    to_float(images, size=16)  # checks the range
    assert torch.equal(to_uint8(images), to_uint8(raw)) and to_uint8(images).float().std() > 10


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_of_any_integer_dtype(dtype: torch.dtype) -> None:
    model, codes = make(), random_codes(2)
    assert torch.equal(model.decode(codes.to(dtype)), model.decode(codes))


def test_images_do_not_depend_on_the_batch() -> None:
    model, codes = make().double(), random_codes(5)
    together = model.decode(codes)
    for b in range(5):
        assert (together[b] - model.decode(codes[b : b + 1])[0]).abs().max() <= 1e-12
    assert not torch.equal(together[0], together[1])
    assert torch.equal(together, model.decode(codes)), "twice the same"


def test_an_empty_batch() -> None:
    model = make()
    assert model.decode(random_codes(0)).shape == model(torch.rand(0, 4, 4, 6)).shape == (0, 3, 16, 16)


def test_a_soft_mixture_of_codes_passes_gradients_to_everything() -> None:
    model, draw = make().double(), torch.Generator().manual_seed(5)
    logits = torch.randn(2, 4, 4, 32, generator=draw, dtype=torch.float64, requires_grad=True)
    model(logits.softmax(-1) @ model.codebook).square().mean().backward()
    for name, tensor in {"logits": logits, **dict(model.named_parameters())}.items():
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), name


def test_gradients_are_those_of_the_description() -> None:
    """Of the vectors and of every weight, the 1x1 convolutions among them."""
    model = make().double()
    inputs = vectors_of(model, random_codes(2)).requires_grad_()
    weights = {name: t for name, t in model.named_parameters() if name != "codebook"}
    ours, theirs = (
        torch.autograd.grad(images.sin().sum(), [inputs, *weights.values()])
        for images in (model(inputs), restated(weights, inputs, TINY))
    )
    for name, a, b in zip(["vectors", *weights], ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-10 * b.abs().max(), name


def test_decode_passes_gradients_to_the_codes_in_use_only() -> None:
    model, codes = make(), random_codes(2) // 2
    model.decode(codes).sum().backward()
    assert model.codebook.grad is not None
    assert torch.equal(model.codebook.grad.any(1).nonzero().flatten(), codes.unique())


def test_feature_maps_stay_channels_last() -> None:
    model = make()
    maps: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: maps.extend([inputs[0], output]))
    model.decode(random_codes(2))
    assert len(maps) == 2 * (len(list(TINY.convolutions())) - 1), "all but the last, which has its own dtype"
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)


@pytest.mark.parametrize("config", [VQGANConfig(), VQGANConfig(image_size=512), *SHAPES])
def test_costs(config: VQGANConfig) -> None:
    with FakeTensorMode():  # shapes only
        model = VQGANDecoder(config)
        assert sum(p.numel() for p in model.parameters()) == config.parameters()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, config.grid, config.grid, config.code_dim))
    assert counter.get_total_flops() == config.flops()


def test_the_defaults_are_the_published_decoder() -> None:
    config = VQGANConfig()
    assert config.parameters() - config.codebook_size * config.code_dim == 30_478_339
    assert config.flops() == pytest.approx(186.5e9, rel=1e-3)
    assert (config.grid, config.scale, config.widths) == (16, 16, (128, 128, 256, 256, 512))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_size": 250}, "image_size must be a multiple of 16, not 250"),
        ({"image_size": 0}, "image_size must be positive, not 0"),
        ({"channels": 100}, "channels must be a multiple of groups 32, not 100"),
        ({"blocks": 0}, "blocks must be positive, not 0"),
        ({"groups": -1}, "groups must be positive, not -1"),
        ({"code_dim": 0}, "code_dim must be positive, not 0"),
        ({"multipliers": ()}, "multipliers must be one or more positive integers, not ()"),
        ({"multipliers": (1, 0)}, "multipliers must be one or more positive integers, not (1, 0)"),
        ({"codebook_size": 1}, "codebook_size must be 2..65536, not 1"),
    ],
)
def test_impossible_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        VQGANConfig(**fields)


@pytest.mark.parametrize(
    "codes, error, message",
    [
        ([[[0]]], TypeError, "codes must be a tensor, not list"),
        (torch.zeros(1, 4, 4), TypeError, "codes must be integers, not torch.float32"),
        (torch.zeros(1, 4, 4).bool(), TypeError, "codes must be integers, not torch.bool"),
        (torch.zeros(1, 4, 4).cfloat(), TypeError, "codes must be integers, not torch.complex64"),
        (torch.zeros(4, 4).long(), ValueError, "codes must have shape [B, 4, 4], not [4, 4]"),
        (torch.zeros(1, 16).long(), ValueError, "codes must have shape [B, 4, 4], not [1, 16]"),
        (torch.zeros(1, 4, 5).long(), ValueError, "codes must have shape [B, 4, 4], not [1, 4, 5]"),
        (torch.full((1, 4, 4), 32), ValueError, "codes must be in 0..31, not 32..32"),
        (torch.arange(-1, 15).view(1, 4, 4), ValueError, "codes must be in 0..31, not -1..14"),
        (torch.zeros(1, 4, 4, device="meta").long(), ValueError, "codes must be on the model's device cpu, not meta"),
    ],
)
def test_wrong_codes_are_refused_before_any_work(codes: Any, error: type[Exception], message: str) -> None:
    refuses("decode", codes, error, message)


@pytest.mark.parametrize(
    "vectors, error, message",
    [
        (None, TypeError, "vectors must be a tensor, not NoneType"),
        (torch.zeros(1, 4, 4, 6).long(), TypeError, "vectors must be floating, not torch.int64"),
        (torch.zeros(4, 4, 6), ValueError, "vectors must have shape [B, 4, 4, 6], not [4, 4, 6]"),
        (torch.zeros(1, 6, 4, 4), ValueError, "vectors must have shape [B, 4, 4, 6], not [1, 6, 4, 4]"),
        (torch.zeros(1, 4, 4, 6, device="meta"), ValueError, "vectors must be on the model's device cpu, not meta"),
    ],
)
def test_wrong_vectors_are_refused_before_any_work(vectors: Any, error: type[Exception], message: str) -> None:
    refuses("forward", vectors, error, message)


def refuses(method: str, argument: Any, error: type[Exception], message: str) -> None:
    model, worked = make(), []
    model.conv_in.register_forward_hook(lambda *_: worked.append(True))
    with pytest.raises(error, match=re.escape(message)):
        getattr(model, method)(argument)
    assert not worked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_survives_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    model, codes = make().to(dtype), random_codes(2)
    loaded = VQGANDecoder.from_pretrained(model.save_pretrained(tmp_path), dtype=dtype)
    assert loaded.config == TINY and not loaded.training
    assert torch.equal(loaded.decode(codes), model.decode(codes))
    assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


# Published weights: their names and shapes, written down once more.


def published(prefix: str = "", codes: int = 1024) -> Names:
    """The decoder's 88 tensors and the codebook under their published names, with random values."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}quantize.embedding.weight": (codes, 256)}
    decoder = f"{prefix}decoder"

    def block(name: str, inputs: int, outputs: int) -> None:
        for norm, width in (("norm1", inputs), ("norm2", outputs)):
            shapes[f"{name}.{norm}.weight"] = shapes[f"{name}.{norm}.bias"] = (width,)
        shapes[f"{name}.conv1.weight"] = (outputs, inputs, 3, 3)
        shapes[f"{name}.conv2.weight"] = (outputs, outputs, 3, 3)
        if inputs != outputs:
            shapes[f"{name}.nin_shortcut.weight"] = (outputs, outputs, 1, 1)

    shapes[f"{decoder}.conv_in.weight"], shapes[f"{decoder}.conv_in.bias"] = (512, 256, 3, 3), (512,)
    for i in (0, 1):
        block(f"{decoder}.mid.{i}", 512, 512)
    for level, inputs, outputs in ((4, 512, 512), (3, 512, 256), (2, 256, 256), (1, 256, 128), (0, 128, 128)):
        block(f"{decoder}.up.{level}.block.0", inputs, outputs)
        block(f"{decoder}.up.{level}.block.1", outputs, outputs)
        if level:
            shapes[f"{decoder}.up.{level}.upsample_conv.weight"] = (outputs, outputs, 3, 3)
            shapes[f"{decoder}.up.{level}.upsample_conv.bias"] = (outputs,)
    shapes[f"{decoder}.norm_out.weight"] = shapes[f"{decoder}.norm_out.bias"] = (128,)
    shapes[f"{decoder}.conv_out.weight"], shapes[f"{decoder}.conv_out.bias"] = (3, 128, 3, 3), (3,)
    assert len(shapes) == 89
    draw = torch.Generator().manual_seed(9)
    return {name: torch.randn(shape, generator=draw).mul_(0.05) for name, shape in shapes.items()}


SMALL_IMAGES = VQGANConfig(image_size=32)
"""The published decoder on 2 x 2 codes: the weights are the same at any size."""


@pytest.fixture(scope="module")
def maskgit() -> Names:
    """As in the VQGAN's own file: with an encoder, of which the decoder needs nothing."""
    return {"encoder.conv_in.weight": torch.ones(128, 3, 3, 3), **published()}


def test_published_weights_draw_what_the_description_says(maskgit: Names) -> None:
    model = import_maskgit_vqgan(maskgit, SMALL_IMAGES)
    assert not model.training and len(model.state_dict()) == 89
    codes = random_codes(1, SMALL_IMAGES)
    vectors = maskgit["quantize.embedding.weight"][codes]
    weights = {name.removeprefix("decoder."): t for name, t in maskgit.items()}
    expected = restated(weights, vectors, SMALL_IMAGES)
    with torch.no_grad():
        images = model(vectors)
        assert (images - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(model.decode(codes), images.clamp(0, 1))


def test_the_decoder_inside_a_titok_checkpoint(maskgit: Names) -> None:
    """TiTok's own encoder, decoder and quantizer bear the names that the VQGAN's have in its file."""
    titok = {
        "latent_tokens": torch.ones(64, 768),
        "encoder.patch_embed.bias": torch.ones(768),
        "decoder.ln_pre.bias": torch.ones(768),
        "quantize.embedding.weight": torch.ones(4096, 12),
        **{f"pixel_{name}": t for name, t in maskgit.items() if not name.startswith("encoder.")},
    }
    ours, same = (import_maskgit_vqgan(w, SMALL_IMAGES).state_dict() for w in (titok, maskgit))
    assert all(torch.equal(tensor, same[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["vqgan.bin", "vqgan.safetensors"])
def test_files_of_published_weights(maskgit: Names, tmp_path: Path, name: str) -> None:
    torch.save(maskgit, tmp_path / name) if name.endswith("bin") else save_file(maskgit, tmp_path / name)
    model = import_maskgit_vqgan(tmp_path / name)
    assert model.config == VQGANConfig()
    assert torch.equal(model.codebook, maskgit["quantize.embedding.weight"])
    stored = load_file(model.save_pretrained(tmp_path / "ours") / "model.safetensors")
    assert torch.equal(stored["up.3.block.0.nin_shortcut.weight"], maskgit["decoder.up.3.block.0.nin_shortcut.weight"])


def test_published_weights_are_taken_strictly(maskgit: Names) -> None:
    wrong = dict(maskgit)
    del wrong["decoder.mid.1.conv2.weight"]
    wrong["decoder.up.0.upsample_conv.bias"] = torch.zeros(128)
    wrong["codebook"] = torch.zeros(1024, 256)  # our name of a weight is none of theirs
    wrong["decoder.conv_out.bias"] = torch.zeros(4)
    with pytest.raises(WeightsError) as caught:
        import_maskgit_vqgan(wrong, SMALL_IMAGES)
    assert str(caught.value) == (
        "the state dict does not fit VQGANDecoder: missing mid.1.conv2.weight; "
        "extra 'decoder.up.0.upsample_conv.bias'; extra 'codebook'; conv_out.bias has shape [4], expected [3]"
    )


@pytest.mark.parametrize("name", ["vqgan.bin", "vqgan.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", bytes(64)])
def test_damaged_files_of_published_weights(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    problem = "missing" if content is None else "damaged"
    with pytest.raises(WeightsError, match=re.escape(f"{problem} file: {path}")):
        import_maskgit_vqgan(path)


@pytest.mark.parametrize("content", [torch.zeros(3), {"state_dict": {"decoder.conv_in.bias": torch.zeros(512)}}])
def test_a_file_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "vqgan.bin")
    with pytest.raises(WeightsError, match=re.escape(f"damaged file: {tmp_path / 'vqgan.bin'} holds no state dict")):
        import_maskgit_vqgan(tmp_path / "vqgan.bin")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_gpu_draws_the_same_also_from_a_captured_graph(dtype: torch.dtype) -> None:
    model, codes = make().to(dtype), random_codes(3)
    vectors = vectors_of(model, codes)
    exact = restated({name: t.double() for name, t in model.state_dict().items()}, vectors.double(), TINY)
    budget = 2 * (model(vectors) - exact).abs().max() + 1e-5 * exact.abs().max()
    model, codes, vectors = model.cuda(), codes.cuda(), vectors.cuda()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        plain = model(vectors)
        assert (plain.cpu() - exact).abs().max() <= budget
        assert torch.equal(model.decode(codes), plain.clamp(0, 1))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(vectors)
        graph.replay()
        assert torch.equal(captured, plain)
