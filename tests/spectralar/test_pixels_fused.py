"""The VQGAN decoder for sampling against the plain one: its identities, its pixels, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.config import VQGANConfig
from spectralar.images import to_uint8
from spectralar.pixels import FusedVQGAN, VQGANDecoder, fused
from spectralar.pixels.fused import doubled_weight, shortcut_weight

TINY = VQGANConfig(16, channels=16, multipliers=(1, 2, 2), groups=8, codebook_size=32, code_dim=6)
CONFIGS = [
    TINY,
    VQGANConfig(3, channels=8, multipliers=(1,), blocks=1, groups=4, codebook_size=32, code_dim=6),  # no doubling
    VQGANConfig(4, channels=8, multipliers=(1, 2, 2), groups=4, codebook_size=32, code_dim=6),  # a single code
    VQGANConfig(10, channels=4, multipliers=(3, 1), blocks=3, groups=1, codebook_size=32, code_dim=6),
]


def make(config: VQGANConfig = TINY) -> VQGANDecoder:
    torch.manual_seed(3)
    model = VQGANDecoder(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.normal_(mean=0.5, std=0.5)
    return model


def random_codes(batch: int, config: VQGANConfig = TINY) -> Tensor:
    return torch.randint(32, (batch, config.grid, config.grid), generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (4, 3)])
def test_four_small_convolutions_are_doubling_and_a_large_one(size: tuple[int, int]) -> None:
    """At the borders too."""
    x, weight = torch.randn(2, 3, *size).double(), torch.randn(5, 3, 3, 3).double()
    phases = F.conv2d(x, doubled_weight(weight), padding=1)
    large = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    height, width = size
    for i in (0, 1):
        for j in (0, 1):
            phase = phases[:, 5 * (2 * i + j) : 5 * (2 * i + j + 1), i : i + height, j : j + width]
            assert (phase - large[:, :, i::2, j::2]).abs().max() <= 1e-13 * large.abs().max()


def test_the_shortcut_is_part_of_the_convolution() -> None:
    x, weight, shortcut = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(5, 5, 1, 1)
    x, weight, shortcut = x.double(), weight.double(), shortcut.double()
    h = F.conv2d(x, weight, padding=1)
    expected = h + F.conv2d(h, shortcut)
    assert (F.conv2d(x, shortcut_weight(weight, shortcut), padding=1) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("config", CONFIGS)
def test_pixels_in_fp64_are_the_decoders(config: VQGANConfig) -> None:
    model, codes = make(config), random_codes(3, config)
    plain = model.decode(codes)
    pixels = FusedVQGAN(model, torch.float64).decode_uint8(codes)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous() and pixels.float().std() > 5
    # Also where a value lies on the border of two levels, to the last bits.
    assert ((pixels - plain * 255).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_dtypes_stay_within_the_error_of_plain_pytorch(dtype: torch.dtype) -> None:
    model, codes = make(), random_codes(4)
    exact = model.decode(codes) * 255
    peer = make().to(dtype)
    budget = (to_uint8(peer.decode(codes)) - exact).square().mean().sqrt()
    error = (FusedVQGAN(model, dtype).decode_uint8(codes) - exact).square().mean().sqrt()
    assert error <= 2 * budget


def test_mixtures_of_codes() -> None:
    model = make()
    vectors = torch.randn(2, 4, 4, 32, dtype=torch.float64).softmax(-1) @ model.codebook.detach()
    pixels = FusedVQGAN(model, torch.float64).to_uint8(vectors)
    assert ((pixels - model(vectors).clamp(0, 1) * 255).abs() <= 0.5 + 1e-4).all()
    with pytest.raises(ValueError, match=re.escape("vectors must have shape [B, 4, 4, 6], not [2, 4, 4, 5]")):
        FusedVQGAN(model).to_uint8(vectors[..., :5])


def test_it_is_a_copy() -> None:
    model, codes = make(), random_codes(2)
    quick = FusedVQGAN(model)
    before = quick.decode_uint8(codes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(quick.decode_uint8(codes), before)


def test_large_batches_go_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, codes = FusedVQGAN(make(), torch.float64), random_codes(5)
    together = quick.decode_uint8(codes)
    monkeypatch.setattr(fused, "IMAGES", 2)
    assert torch.equal(quick.decode_uint8(codes), together)
    assert quick.decode_uint8(codes[:0]).shape == (0, 3, 16, 16)


def test_any_integers_autocast_and_gradients_off() -> None:
    quick, codes = FusedVQGAN(make(), torch.float32), random_codes(2)
    pixels = quick.decode_uint8(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick.decode_uint8(codes.to(torch.uint8), check_range=False), pixels)


@pytest.mark.parametrize(
    "codes, error, message",
    [
        ([[[0]]], TypeError, "codes must be a tensor, not list"),
        (torch.zeros(1, 4, 4), TypeError, "codes must be integers, not torch.float32"),
        (torch.zeros(1, 16).long(), ValueError, "codes must have shape [B, 4, 4], not [1, 16]"),
        (torch.full((1, 4, 4), 32), ValueError, "codes must be in 0..31, not 32..32"),
        (torch.zeros(1, 4, 4, device="meta").long(), ValueError, "codes must be on the model's device cpu, not meta"),
    ],
)
def test_wrong_codes_are_refused(codes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        FusedVQGAN(make()).decode_uint8(codes)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TINY, VQGANConfig(image_size=64, codebook_size=32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_draws_the_same_also_from_a_captured_graph(config: VQGANConfig, dtype: torch.dtype) -> None:
    model, codes = make(config), random_codes(3, config)
    exact = model.decode(codes).detach() * 255
    peer = make(config).to(dtype).cuda()
    codes = codes.cuda()
    budget = (to_uint8(peer.decode(codes)).cpu() - exact).square().mean().sqrt()
    quick = FusedVQGAN(model.cuda(), dtype)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        pixels = quick.decode_uint8(codes)
        assert (pixels.cpu() - exact).square().mean().sqrt() <= 2 * budget
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = quick.decode_uint8(codes, check_range=False)
        graph.replay()
        assert torch.equal(captured, pixels)
