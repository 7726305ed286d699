"""The decoding step for many rows against the plain one, operation by operation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from spectralar.kernels.decode import DecodeState, DecodeWeights, batch_kernel, quantized, reference
from spectralar.kernels.decode.batch_config import (
    FP32,
    PARTIAL,
    PARTS,
    SHORTEST,
    WHOLE,
    ProductConfig,
    attend_heads,
    attend_slots,
    attend_tiles,
    parts,
    product_config,
    releases_early,
    shares,
)
from tests.kernels.launches_decode_batch import random_weights


def random_state(
    weights: DecodeWeights, images: int, first: int, guided: bool = True, device: str = "cpu"
) -> DecodeState:
    """A state before the step at `first`: an earlier cache, and NaN wherever nothing may be read."""
    state = DecodeState.allocate(weights, images, (2 if guided else 1) * images)
    generator = torch.Generator(device=device).manual_seed(1)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=device).to(like.dtype)

    for field in dataclasses.fields(state):
        buffer = getattr(state, field.name)
        if buffer.dtype.is_floating_point:
            buffer.fill_(torch.nan)
    state.first.fill_(first)
    # What is not drawn yet would be an index past every end.
    state.tokens.fill_(2**40)
    state.tokens[:, :first] = torch.randint(weights.codes, (images, first), generator=generator, device=device)
    state.start.copy_(normal(state.start))
    state.modulations.copy_(normal(state.modulations) * 0.3)
    state.head_modulation.copy_(normal(state.head_modulation) * 0.3)
    old = state.keys[..., :first, :]
    old.copy_(torch.nn.functional.normalize(normal(old).float(), dim=-1))
    state.values[..., :first, :] = normal(state.values[..., :first, :])
    return state


def copy(source: DecodeState, dtype: torch.dtype | None = None) -> DecodeState:
    """Its own buffers, the floating ones in another dtype if asked for."""
    return DecodeState(
        **{
            field.name: buffer.to(dtype, copy=True) if dtype and buffer.dtype.is_floating_point else buffer.clone()
            for field in dataclasses.fields(source)
            for buffer in [getattr(source, field.name)]
        }
    )


def double(weights: DecodeWeights) -> DecodeWeights:
    """The same in fp64; what is fp8 stays so."""
    tensors = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    return dataclasses.replace(
        weights, **{k: v.double() for k, v in tensors.items() if v is not None and v.dtype != torch.float8_e4m3fn}
    )


def assert_close(found: Tensor, plain: Tensor, exact: Tensor, name: str) -> None:
    """At most twice the plain error, in the mean square and at the worst element, and one rounding."""
    # What the plain step leaves unwritten stays so.
    assert torch.equal(found.isnan(), plain.isnan()), name
    found, plain, exact = (t.nan_to_num() for t in (found, plain, exact))
    scale, eps = exact.abs().amax().item(), torch.finfo(found.dtype).eps
    ours, theirs = (found.double() - exact).abs(), (plain.double() - exact).abs()
    assert ours.square().mean().sqrt() <= 2 * theirs.square().mean().sqrt() + eps * scale / 4, name
    assert ours.amax() <= 2 * theirs.amax() + eps * scale, f"{name}: {ours.amax()} at {ours.argmax()}"


def check(weights: DecodeWeights, state: DecodeState, until: tuple[int, str] | None) -> None:
    """Compares every buffer after that operation."""
    found, plain, exact = copy(state), copy(state), copy(state, torch.float64)
    batch_kernel.launch_step(weights, found, until)
    reference.decode_step(weights, plain, until)
    reference.decode_step(double(weights), exact, until)
    for field in dataclasses.fields(state):
        ours, theirs, right = (getattr(s, field.name) for s in (found, plain, exact))
        if ours.dtype.is_floating_point:
            assert_close(ours, theirs, right, f"{field.name} at {int(state.first)} until {until}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("op", reference.OPS)
def test_every_operation_is_the_references(op: str, dtype: torch.dtype) -> None:
    weights = random_weights(2, 64, 4, 6, 2, 33, dtype)
    for first, layer in ((0, 0), (4, 1)):
        check(weights, random_state(weights, 1, first), (layer, op))


@pytest.mark.parametrize(
    ("depth", "width", "heads", "length", "group", "codes", "images"),
    [(1, 192, 3, 4, 1, 2, 1), (2, 48, 3, 9, 3, 40, 2), (1, 64, 1, 5, 5, 7, 1), (1, 192, 3, 2, 1, 65, 9)],
)
def test_whole_steps(
    depth: int, width: int, heads: int, length: int, group: int, codes: int, images: int, poisoned_empty: None
) -> None:
    weights = random_weights(depth, width, heads, length, group, codes, torch.float32)
    for first in sorted({0, length - group}):
        check(weights, random_state(weights, images, first, guided=False), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("until", [*((1, op) for op in reference.OPS if op != "attend"), None])
def test_fp8_weights(until: tuple[int, str] | None, dtype: torch.dtype, poisoned_empty: None) -> None:
    weights = random_weights(2, 64, 4, 6, 2, 33, dtype)
    # Sums that are beyond fp16 before their scale, and a channel of nothing.
    weights.fc1_bias.add_(8)
    weights.fc2[:, 5] = 0.1
    weights.fc1[:, 3] = 0
    check(quantized(weights), random_state(weights, 1, 4), until)


@pytest.mark.parametrize("images", [1, 2, 7, 8, 16])
def test_few_and_many_rows_with_fp8_weights(images: int) -> None:
    weights = quantized(random_weights(1, 64, 1, 4, 1, 33, torch.float16))
    check(weights, random_state(weights, images, 2, guided=False), None)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("first", [15, 16, 33])
def test_attention_over_several_tiles_of_keys(first: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_kernel, "attend_tiles", lambda rows: tiles)  # of 16 keys
    weights = random_weights(1, 64, 4, 40, 2, 7, torch.float32)
    check(weights, random_state(weights, 1, first), (0, "attend"))


def test_no_rows() -> None:
    weights = random_weights(1, 64, 1, 2, 1, 3, torch.float32)
    batch_kernel.launch_step(weights, random_state(weights, 0, 0))


def test_rows_do_not_see_each_other() -> None:
    weights = random_weights(1, 64, 2, 4, 1, 33, torch.float32)
    one = random_state(weights, 2, 2)
    other = copy(one)
    other.start[1:], other.tokens[1:] = 7.0, 5
    other.values[:, 1:, :, :2] = -3.0
    other.modulations[:, 1:] = 0.5
    for state in (one, other):
        batch_kernel.launch_step(weights, state)
    assert torch.equal(one.logits[0], other.logits[0])
    assert not torch.equal(one.logits[1], other.logits[1])


@pytest.mark.parametrize("columns", [16, 32])
@pytest.mark.parametrize("narrow", [3, 4])
def test_products_in_parts(columns: int, narrow: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 512 channels in two parts of 256: the sums of small models are too short for parts.
    config = ProductConfig(rows=16, columns=columns, step=128, warps=4, stages=2)
    monkeypatch.setattr(batch_kernel, "product_config", lambda rows, element_size, partial: config)
    monkeypatch.setattr(batch_kernel, "NARROW_PARTS", narrow)
    a, weight = torch.randn(3, 1, 512, dtype=torch.float16), torch.randn(20, 512, dtype=torch.float16)
    found = batch_kernel._product_parts(a, weight, weight)
    assert found.shape == (2, 3, 1, 20)
    assert found.dtype == (torch.float16 if narrow == 3 else torch.float32)
    exact = a.double().view(3, 1, 2, 256).movedim(2, 0) @ weight.double().view(20, 2, 256).permute(1, 2, 0)[:, None]
    # Half a unit in the last place of what a part is kept in, and the sum's own error in fp32.
    error = torch.finfo(found.dtype).eps / 2 + 1e-6
    assert (found - exact).abs().amax() <= error * exact.abs().amax()


@pytest.mark.parametrize("width", [256, 384, 1024, 1280, 1536, 1920])
def test_parts_are_whole_steps(width: int) -> None:
    for config in (*WHOLE.values(), *PARTIAL.values()):
        for inner in (width, 4 * width):
            count = parts(-(-width // config.columns), inner, config.step)
            assert inner % count == 0 and (count == 1 or inner % (count * config.step) == 0)
            assert count == 1 or (count <= PARTS and inner // count >= SHORTEST)


def test_tables() -> None:
    assert [product_config(rows, 2, True).rows for rows in (1, 16, 17, 65, 100_000)] == [16, 16, 32, 64, 128]
    assert [product_config(rows, 2, False).columns for rows in (64, 65, 512, 513)] == [32, 64, 128, 128]
    assert product_config(512, 4, True) is FP32
    # As many programs as run side by side; too few tiles for one wave, and a last wave that is nearly full.
    assert [parts(tiles, 4096, 128) for tiles in (32, 64, 132)] == [4, 2, 1]
    assert parts(48, 6144, 128) == 8
    assert [attend_heads(heads) for heads in (1, 6, 16, 20)] == [1, 2, 4, 4]
    assert [attend_slots(channels) for channels in (16, 64, 128)] == [16, 4, 2]
    assert [attend_tiles(rows) for rows in (1, 128, 129)] == [4, 4, 2]
    assert [releases_early(rows) for rows in (16, 17, 128, 129)] == [False, True, True, False]


@pytest.mark.parametrize("size", [96, 128, 129, 65 * 128 * 2, 1536 * 1536 * 2, 4096 * 1024 * 2])
@pytest.mark.parametrize("threads", [1, 128, 96 * 128])
def test_pieces_of_the_next_weights(size: int, threads: int) -> None:
    # One for each thread at most, none past the end, and less than one missing; requests are multiples of 16 bytes.
    piece, count = shares(size, threads)
    assert piece % 16 == 0 and count <= threads
    assert 0 <= size - count * piece < piece


@pytest.mark.gpu
@pytest.mark.parametrize("images", [4, 31, 33, 64, 300])
@pytest.mark.parametrize("group", [1, 4])
def test_large_steps_on_a_gpu(images: int, group: int) -> None:
    weights = random_weights(2, 1024, 16, 64, group, 4096, torch.bfloat16, "cuda")
    for first in (0, 28, 64 - group):
        state = random_state(weights, images, first, device="cuda")
        for op in reference.OPS:
            check(weights, state, (1, op))
        check(weights, state, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [256, 320, 1280])
def test_widths_and_types_on_a_gpu(width: int, dtype: torch.dtype) -> None:
    weights = random_weights(1, width, width // 64, 256, 16, 1000, dtype, "cuda")
    check(weights, random_state(weights, 2, 48, device="cuda"), None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("images", [1, 4, 8, 16, 32, 64, 128, 300])
def test_fp8_weights_on_a_gpu(images: int, dtype: torch.dtype) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    weights = quantized(random_weights(2, 1024, 16, 64, 1, 4096, dtype, "cuda"))
    for first in (0, 63):
        state = random_state(weights, images, first, device="cuda")
        for op in reference.OPS:
            check(weights, state, (1, op))
        check(weights, state, None)


@pytest.mark.gpu
@pytest.mark.parametrize("images", [4, 32, 64, 256])
def test_replayed_steps_are_the_same_to_the_bit(images: int) -> None:
    weights = random_weights(4, 1024, 16, 64, 1, 4096, torch.bfloat16, "cuda")
    state = random_state(weights, images, 8, device="cuda")
    batch_kernel.launch_step(weights, state)
    first = state.logits.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(4):
            batch_kernel.launch_step(weights, state)
    for _ in range(25):
        state.logits.zero_()
        graph.replay()
        assert torch.equal(state.logits, first)
