"""Group normalisation with SiLU: the public functions against fp64, and the Triton kernels in the interpreter."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.images import to_uint8
from spectralar.kernels.norm import group_norm_silu, group_norm_silu_to_pixels, join_group_norm_silu, kernel, ops

# Channels, groups, height, width: one pixel, odd sides, one group, groups of one channel, several chunks, a ragged last
# tile, and chunks of several tiles.
SHAPES = [(16, 4, 1, 1), (16, 1, 3, 5), (32, 32, 7, 2), (64, 8, 9, 17), (512, 32, 3, 3), (256, 8, 47, 53)]
PARTS = ["nothing", "residual", "residual and offset", "phases", "phases and offset"]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 5) -> Tensor:
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return numbers.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else numbers


def exact(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-6) -> Tensor:
    split = x.double().unflatten(1, (groups, -1))
    centred = split - split.mean((2, 3, 4), keepdim=True)
    normed = (centred / (centred.square().mean((2, 3, 4), keepdim=True) + eps).sqrt()).flatten(1, 2)
    y = normed * weight.double()[:, None, None] + bias.double()[:, None, None]
    return y / (1 + (-y).exp())


def exact_sum(x: Tensor, residual: Tensor | None, offset: Tensor | None, phases: bool) -> Tensor:
    x = x.double()
    if phases:
        batch, channels, height, width = len(x), x.shape[1] // 4, x.shape[2] - 1, x.shape[3] - 1
        large = x.new_empty(batch, channels, 2 * height, 2 * width)
        for i in (0, 1):
            for j in (0, 1):
                phase = x[:, (2 * i + j) * channels : (2 * i + j + 1) * channels]
                large[:, :, i::2, j::2] = phase[:, :, i : i + height, j : j + width]
        x = large
    x = x if offset is None else x + offset.double()[:, None, None]
    return x if residual is None else x + residual.double()


def parts(kind: str, channels: int, height: int, width: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Two images: x, residual, offset, whether x holds phases. The mean is three times the deviation."""
    phases = kind.startswith("phases")
    sides = (height + 1, width + 1) if phases else (height, width)
    size = (2 * height, 2 * width) if phases else (height, width)
    x = draw(2, channels * (4 if phases else 1), *sides, dtype=dtype) + 3
    residual = draw(2, channels, *size, dtype=dtype, seed=6) if "residual" in kind else None
    return x, residual, draw(channels, seed=7) if "offset" in kind else None, phases


def plain(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), 1e-6))


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.float32) for kind in PARTS), (PARTS[-1], torch.float16)])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), SHAPES[:5])
@pytest.mark.usefixtures("poisoned_empty")
def test_kernels_join_and_normalise(
    channels: int, groups: int, height: int, width: int, kind: str, dtype: torch.dtype
) -> None:
    given = parts(kind, channels, height, width, dtype)
    weight, bias = draw(channels, seed=8), draw(channels, seed=9)
    joined, found = kernel.statistics(*given, groups)
    y = kernel.normalize(joined, found, weight, bias, 1e-6)
    expected = exact_sum(*given)
    rounding = torch.finfo(dtype).eps
    assert joined.dtype == y.dtype == dtype and joined.shape == y.shape == expected.shape
    assert (joined.double() - expected).abs().max() <= rounding * expected.abs().max()
    check_norm(y, joined, weight, bias, groups)


def check_norm(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> None:
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    expected = exact(x, weight, bias, groups)
    budget = 2 * (plain(x, weight, bias, groups).double() - expected).abs().max()
    assert (y.double() - expected).abs().max() <= budget + torch.finfo(x.dtype).eps * (1 + expected.abs().max())


def test_kernels_on_chunks_of_several_tiles() -> None:
    channels, groups, height, width = SHAPES[5]
    x = draw(1, channels, height, width) * 2 - 1
    weight, bias = draw(channels, seed=8), draw(channels, seed=9)
    _, found = kernel.statistics(x, None, None, False, groups)
    assert 1 < found.shape[1] < 64 and height * width % found.shape[1]
    check_norm(kernel.normalize(x, found, weight, bias, 1e-6), x, weight, bias, groups)


def test_a_large_mean_does_not_drown_the_variance() -> None:
    x, ones, zeros = draw(1, 16, 9, 31) + 1000, torch.ones(16), torch.zeros(16)
    y = kernel.normalize(*kernel.statistics(x, None, None, False, 4), ones, zeros, 1e-6)
    expected = exact(x, ones, zeros, 4)
    budget = 2 * (plain(x, ones, zeros, 4).double() - expected).abs().max()
    # Scale and shift are about 1000: the rounding of their sum remains.
    assert (y.double() - expected).abs().max() <= budget + 1000 * torch.finfo(torch.float32).eps


def test_a_constant_map_gives_the_bias() -> None:
    bias = draw(16, seed=9)
    x = torch.full((1, 16, 5, 5), 3.0).contiguous(memory_format=torch.channels_last)
    y = kernel.normalize(*kernel.statistics(x, None, None, False, 4), torch.ones(16), bias, 1e-2)
    assert (y - F.silu(bias)[:, None, None]).abs().max() <= 1e-5


def test_kernels_do_not_depend_on_the_batch() -> None:
    x, r = draw(3, 32, 11, 13, dtype=torch.float16), draw(3, 32, 11, 13, dtype=torch.float16, seed=6)
    weight, bias = draw(32, seed=8), draw(32, seed=9)

    def run(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        joined, found = kernel.statistics(x, r, None, False, 8)
        taps = draw(3, 32, 3, 3, seed=10)
        return kernel.normalize(joined, found, weight, bias, 1e-6), kernel.to_pixels(
            joined, found, weight, bias, 1e-6, taps, torch.full((3,), 0.5)
        )

    for together, again, alone in zip(run(x, r), run(x, r), run(x[1:2], r[1:2]), strict=True):
        assert torch.equal(together, again) and torch.equal(together[1:2], alone)


@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"), [(16, 4, 1, 1), (16, 2, 3, 50), (128, 32, 9, 10), (256, 32, 4, 3)]
)
@pytest.mark.usefixtures("poisoned_empty")
def test_kernels_make_pixels(channels: int, groups: int, height: int, width: int) -> None:
    x = draw(2, channels, height, width, dtype=torch.float16)
    weight, bias = draw(channels, seed=8), draw(channels, seed=9)
    taps, offset = draw(3, channels, 3, 3, seed=10) / channels**0.5 / 3, torch.tensor([0.2, 0.5, 0.8])
    found = kernel.statistics(x, None, None, False, groups)[1]
    pixels = kernel.to_pixels(x, found, weight, bias, 1e-6, taps, offset)
    assert pixels.shape == (2, 3, height, width) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    colours = F.conv2d(exact(x, weight, bias, groups), taps.double(), offset.double(), padding=1)
    levels = colours.clamp(0, 1) * 255
    assert (pixels - levels).abs().max() <= 0.5 + 255 * 2 * torch.finfo(torch.float16).eps * (1 + colours.abs().max())
    assert pixels.float().std() > 1


def test_pixels_are_rounded_as_elsewhere() -> None:
    """Half levels to even, values out of range to the ends: a map of zeros leaves the bias."""
    x = torch.zeros(1, 16, 2, 2, dtype=torch.float16)
    found = kernel.statistics(x, None, None, False, 4)[1]
    per_channel, taps = torch.zeros(16), torch.zeros(3, 16, 3, 3)
    for colours in ([0.5, -3.0, 7.0], [0.5 / 255, 1.5 / 255, 2.5 / 255], [1.0, 0.0, 0.99]):
        bias = torch.tensor(colours)
        pixels = kernel.to_pixels(x, found, per_channel, per_channel, 1e-6, taps, bias)
        expected = to_uint8(bias[:, None, None].expand(1, 3, 2, 2))
        assert torch.equal(pixels, expected)
        public = group_norm_silu_to_pixels(x, per_channel, per_channel, taps, bias, groups=4)
        assert torch.equal(public, expected)


def test_kernels_leave_an_empty_batch() -> None:
    x, per_channel = torch.zeros(0, 16, 4, 4), torch.zeros(16)
    joined, found = kernel.statistics(x, x, None, False, 4)
    assert kernel.normalize(joined, found, per_channel, per_channel, 1e-6).shape == (0, 16, 4, 4)
    taps = torch.zeros(3, 16, 3, 3)
    assert kernel.to_pixels(x, found, per_channel, per_channel, 1e-6, taps, per_channel[:3]).shape == (0, 3, 4, 4)


# The public functions, which here run the reference.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", PARTS)
def test_public_functions(dtype: torch.dtype, kind: str) -> None:
    x, residual, offset, phases = parts(kind, 12, 4, 3, dtype)
    weight, bias = draw(12, seed=8), draw(12, seed=9)
    joined, y = join_group_norm_silu(
        x, weight, bias, groups=3, residual=residual, offset=offset, interleave=phases, eps=1e-6
    )
    expected = exact_sum(x, residual, offset, phases)
    assert joined.dtype == dtype and joined.is_contiguous(memory_format=torch.channels_last)
    assert (joined.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    check_norm(y, joined, weight, bias, 3)
    assert torch.equal(group_norm_silu(joined, weight, bias, groups=3), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(group_norm_silu(joined, weight, bias, groups=3), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_public_pixels(dtype: torch.dtype) -> None:
    x, residual = draw(2, 12, 5, 4, dtype=dtype), draw(2, 12, 5, 4, dtype=dtype, seed=6)
    weight, bias, taps, offset = draw(12, seed=8), draw(12, seed=9), draw(3, 12, 3, 3, seed=10) / 9, torch.rand(3)
    pixels = group_norm_silu_to_pixels(x, weight, bias, taps, offset, groups=4, residual=residual)
    colours = F.conv2d(exact((x + residual), weight, bias, 4), taps.double(), offset.double(), padding=1)
    assert (pixels - colours.clamp(0, 1) * 255).abs().max() <= 0.501


def test_layout_does_not_matter() -> None:
    x, weight, bias = draw(2, 16, 4, 6), draw(16, seed=8), draw(16, seed=9)
    assert torch.equal(
        group_norm_silu(x.contiguous(), weight, bias, groups=4), group_norm_silu(x, weight, bias, groups=4)
    )


@pytest.mark.parametrize("batch", [0, 2])
def test_operators_are_as_pytorch_wants_them(batch: int) -> None:
    x, per_channel = torch.rand(batch, 16, 3, 3), torch.rand(16)
    norm = (per_channel, per_channel, 4, 1e-6)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.group_norm_silu, (x, *norm), test_utils=tests)
    torch.library.opcheck(ops.join_group_norm_silu, (x, x.clone(), per_channel, False, *norm), test_utils=tests)
    phases = torch.rand(batch, 64, 3, 3)
    torch.library.opcheck(ops.join_group_norm_silu, (phases, None, None, True, *norm), test_utils=tests)
    torch.library.opcheck(ops.to_pixels, (x, None, *norm, torch.rand(3, 16, 3, 3), torch.rand(3)), test_utils=tests)


X, M, T = torch.rand(2, 8, 3, 3), torch.rand(8), torch.rand(3, 8, 3, 3)
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: group_norm_silu(X.int(), M, M, groups=4), TypeError, "x must be a floating tensor, got torch.int32"),
    (lambda: group_norm_silu(X, M, [1.0], groups=4), TypeError, "bias must be a floating tensor"),  # type: ignore[arg-type]
    (lambda: group_norm_silu(X[0], M, M, groups=4), ValueError, "x must have shape [B, C, H, W] with C, H and W"),
    (lambda: group_norm_silu(X[..., :0], M, M, groups=4), ValueError, "at least 1, got [2, 8, 3, 0]"),
    (lambda: group_norm_silu(X, M, M, groups=3), ValueError, "groups must be positive and divide 8 channels, got 3"),
    (lambda: group_norm_silu(X, M, M, groups=0), ValueError, "groups must be positive and divide 8 channels, got 0"),
    (lambda: group_norm_silu(X, M[:4], M, groups=4), ValueError, "weight must have shape [8], got [4]"),
    (lambda: group_norm_silu(X, M, M.to("meta"), groups=4), ValueError, "bias must be on x's device cpu, got meta"),
    (lambda: group_norm_silu(X, M, M, groups=4, eps=0), ValueError, "eps must be finite and positive, got 0"),
    (lambda: join_group_norm_silu(X, M, M, groups=4, interleave=True), ValueError, "divide 2 channels, got 4"),
    (
        lambda: join_group_norm_silu(X[..., :1], M[:2], M[:2], groups=2, interleave=True),
        ValueError,
        "x must have height and width of at least 2 to interleave, got [2, 8, 3, 1]",
    ),
    (
        lambda: join_group_norm_silu(X[:, :6], M, M, groups=4, interleave=True),
        ValueError,
        "x must have shape [B, 4 C, H, W]",
    ),
    (
        lambda: join_group_norm_silu(X, M[:2], M[:2], groups=2, interleave=True, residual=X),
        ValueError,
        "residual must have shape [2, 2, 4, 4], got [2, 8, 3, 3]",
    ),
    (
        lambda: join_group_norm_silu(X, M, M, groups=4, residual=X.half()),
        TypeError,
        "residual must be torch.float32 like x, got torch.float16",
    ),
    (lambda: join_group_norm_silu(X, M, M, groups=4, offset=M[:1]), ValueError, "offset must have shape [8], got [1]"),
    (
        lambda: group_norm_silu_to_pixels(X, M, M, T[:, :4], M[:3], groups=4),
        ValueError,
        "conv_weight must have shape [3, 8, 3, 3], got [3, 4, 3, 3]",
    ),
    (
        lambda: group_norm_silu_to_pixels(X, M, M, T, M, groups=4),
        ValueError,
        "conv_bias must have shape [3], got [8]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "groups", "height", "width"), [*SHAPES, (128, 32, 256, 250), (48, 3, 5, 5)])
@pytest.mark.usefixtures("poisoned_empty")
def test_on_a_gpu(channels: int, groups: int, height: int, width: int, dtype: torch.dtype, kind: str) -> None:
    x, residual, offset, phases = (
        t.cuda() if isinstance(t, Tensor) else t for t in parts(kind, channels, height, width, dtype)
    )
    weight, bias = draw(channels, seed=8).cuda(), draw(channels, seed=9).cuda()

    def run() -> tuple[Tensor, Tensor]:
        return join_group_norm_silu(x, weight, bias, groups=groups, residual=residual, offset=offset, interleave=phases)

    joined, y = run()
    expected = exact_sum(x, residual, offset, phases)
    assert (joined.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()
    check_norm(y, joined, weight, bias, groups)
    assert torch.equal(run()[1], y)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [16, 128, 256, 512])
def test_pixels_on_a_gpu(channels: int) -> None:
    x, residual = (draw(2, channels, 40, 33, seed=s).cuda().bfloat16() for s in (5, 6))
    weight, bias = draw(channels, seed=8).cuda(), draw(channels, seed=9).cuda()
    taps, offset = draw(3, channels, 3, 3, seed=10).cuda() / channels**0.5 / 3, torch.tensor([0.2, 0.5, 0.8]).cuda()
    pixels = group_norm_silu_to_pixels(x, weight, bias, taps, offset, groups=8, residual=residual)
    colours = F.conv2d(exact(x + residual, weight, bias, 8), taps.double(), offset.double(), padding=1)
    levels = colours.clamp(0, 1) * 255
    # The reference, which takes the widest maps, may use TF32: ten bits like fp16.
    assert (pixels - levels).abs().max() <= 0.5 + 255 * 2 * torch.finfo(torch.float16).eps * (1 + colours.abs().max())
