"""The attention kernels, in the interpreter on a CPU, and their operator: values, gradients, masks, backends."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralar.kernels.attention import (
    backends,
    causal_attention,
    group_causal_attention,
    launch,
    ops,
    packed_spectral_attention,
    reference,
    spectral_attention,
)
from spectralar.kernels.attention.config import (
    MAX_WIDTH,
    ROUND,
    TAIL,
    TileConfig,
    backward_configs,
    forward_config,
    tail_width,
)

Configs = tuple[TileConfig, ...]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = [("figure", "encoder"), ("strict", "encoder"), ("strict", "decoder"), ("none", "encoder")]
SQUARE = (TileConfig(rows=16, keys=16, warps=4, stages=1),) * 2
# The first of each is the forward's as well. In some their tiles of rows and of keys begin at different places; the
# last takes whole heads.
STREAMS = {
    "16x16": SQUARE,
    "32x16": (TileConfig(rows=32, keys=16, warps=4, stages=1),) * 2,
    "16x32": (TileConfig(rows=16, keys=32, warps=4, stages=1), TileConfig(rows=16, keys=16, warps=4, stages=1)),
    "64x64": (TileConfig(rows=64, keys=64, warps=4, stages=1), TileConfig(rows=32, keys=64, warps=4, stages=1)),
}
CONFIGS = STREAMS | {"heads": (TileConfig(rows=64, keys=64, warps=4, stages=1),)}
every_config = pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
# Those whose tiles are wider than a tail.
TAILED = {name: STREAMS[name] for name in ("32x16", "64x64")}
needs_no_gpu = pytest.mark.skipif(DEVICE == "cuda", reason="checks what a machine without a GPU does")


def inputs(batch: int, length: int, heads: int, width: int, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    """q, k, v as slices of one packed tensor, and a gradient; queries are large, so that the softmax is not uniform."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(batch, length, 4, heads, width, generator=generator)
    x[:, :, 0] *= 3
    *qkv, grad = x.to(dtype).to(DEVICE).unbind(2)
    return [*qkv, grad.contiguous()]


def run(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, n_image: int = 0, mask: str = "figure", role: str = "encoder",
    prefix: Tensor | None = None, sizes: Sequence[int] = (), scale: float = 0.3,
    configs: Configs | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Output and gradients of the kernels."""
    rules, ends = launch.rules_of(mask, role), launch.group_ends(tuple(sizes), q.device)
    out, sums = launch.forward(q, k, v, prefix, ends, n_image, rules, scale, config=configs and configs[0])
    grads = launch.backward(grad, q, k, v, out, sums, prefix, ends, n_image, rules, scale, configs=configs)
    return out, *grads.unbind(2)


def visible(
    length: int, n_image: int, mask: str, role: str, prefix: Tensor | None = None, sizes: Sequence[int] = ()
) -> Tensor:
    device = torch.device(DEVICE)
    if sizes:
        return reference.group_causal_mask(sizes, device)[None]
    return reference.spectral_mask(length, n_image, prefix, mask, role, device)


def exact(inputs: Sequence[Tensor], allowed: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Output and gradients in fp64, by PyTorch's own differentiation."""
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out = reference.masked_attention(q, k, v, allowed, scale)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].double())


def plain(inputs: Sequence[Tensor], allowed: Tensor, scale: float) -> tuple[Tensor, ...]:
    """What a user of PyTorch would write, all of it in the dtype of the inputs."""
    q, k, v = (x.detach().clone().requires_grad_() for x in inputs[:3])
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    out = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1), v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])


def assert_within_budget(results: Sequence[Tensor], inputs: Sequence[Tensor], allowed: Tensor, scale: float) -> None:
    expected, baseline = exact(inputs, allowed, scale), plain(inputs, allowed, scale)
    for name, result, want, base in zip(("out", "dq", "dk", "dv"), results, expected, baseline, strict=True):
        error, budget = (result.double() - want).abs(), (base.double() - want).abs().max()
        rounding = torch.finfo(result.dtype).eps * (1 + want.abs().max())
        worst = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
        assert error.max() <= 2 * budget + rounding, f"{name}: {error.max():.3g} at {worst}, budget {budget:.3g}"


@every_config
@pytest.mark.parametrize("mask, role", MASKS)
@pytest.mark.parametrize(
    "length, n_image, heads, width", [(1, 0, 1, 16), (1, 1, 3, 8), (19, 7, 2, 16), (33, 17, 1, 24)]
)
def test_values_and_gradients(
    length: int, n_image: int, heads: int, width: int, mask: str, role: str, configs: Configs, poisoned_empty: None
) -> None:
    x = inputs(1, length, heads, width)
    results = run(*x, n_image=n_image, mask=mask, role=role, configs=configs)
    assert_within_budget(results, x, visible(length, n_image, mask, role), 0.3)


@pytest.mark.parametrize("configs", TAILED.values(), ids=TAILED)
@pytest.mark.parametrize("mask, role", MASKS)
@pytest.mark.parametrize("length, n_image", [(15, 4), (64, 20), (65, 64), (80, 33), (81, 81), (129, 70)])
def test_lengths_about_whole_tiles_and_tails(
    length: int, n_image: int, mask: str, role: str, configs: Configs, poisoned_empty: None
) -> None:
    x = inputs(1, length, 1, 16)
    results = run(*x, n_image=n_image, mask=mask, role=role, configs=configs)
    assert_within_budget(results, x, visible(length, n_image, mask, role), 0.3)


@pytest.mark.parametrize("length, width, tail", [(1, 16, 16), (16, 64, 16), (17, 64, 0), (64, 64, 0), (65, 64, 16),
    (80, 64, 16), (81, 64, 0), (321, 64, 16), (321, 128, 0)])  # fmt: skip
def test_a_tail_holds_the_rest_of_a_length(length: int, width: int, tail: int) -> None:
    assert tail_width(length, width) == tail


@every_config
def test_fp32_arithmetic_is_that_of_the_definition(configs: Configs) -> None:
    """In fp32, which only the interpreter runs, nothing hides behind rounding."""
    if DEVICE == "cuda":
        pytest.skip("a GPU's products of fp32 are TF32")
    x = inputs(1, 37, 1, 16, torch.float32)
    for (mask, role), n_image in zip(MASKS, (20, 20, 20, 0), strict=True):
        results = run(*x, n_image=n_image, mask=mask, role=role, configs=configs)
        for got, want in zip(results, exact(x, visible(37, n_image, mask, role), 0.3), strict=True):
            assert (got.double() - want).abs().max() <= 2e-5


@pytest.mark.parametrize(
    "configs, n_image, length, prefixes",
    [*((config, 6, 24, (1, 11, 18)) for config in CONFIGS.values()),
     # All of a tail is hidden, some of it, none.
     *((config, 40, 73, (1, 24, 25, 33)) for config in TAILED.values())],
    ids=[*CONFIGS, *(f"{name} with a tail" for name in TAILED)],
)  # fmt: skip
@pytest.mark.parametrize("mask, role", MASKS)
def test_prefix_lengths_equal_dropping_the_hidden_tokens(
    mask: str, role: str, configs: Configs, n_image: int, length: int, prefixes: tuple[int, ...], poisoned_empty: None
) -> None:
    """Not even a NaN among the hidden tokens reaches a row, key or value that matters; their own results are zero."""
    scale, prefix = 0.3, torch.tensor(prefixes, device=DEVICE)
    x = inputs(len(prefixes), length, 1, 16)
    for i, n in enumerate(prefixes):
        for part in x:
            part[i, n_image + n :] = float("nan")
    results = run(*x, n_image=n_image, mask=mask, role=role, prefix=prefix, configs=configs, scale=scale)
    for i, n in enumerate(prefixes):
        end = n_image + n
        kept = [part[i : i + 1, :end] for part in x]
        assert_within_budget(
            [result[i : i + 1, :end] for result in results], kept, visible(end, n_image, mask, role), scale
        )
        assert all((result[i, end:] == 0).all() for result in results)


@pytest.mark.parametrize(
    "configs, sizes",
    [*((config, sizes) for config in CONFIGS.values() for sizes in ((1,) * 21, (3, 14, 1, 9), (40,))),
     *((config, sizes) for config in TAILED.values() for sizes in ((64, 1), (3, 60, 5), (1,) * 70))],
)  # fmt: skip
def test_groups(sizes: tuple[int, ...], configs: Configs, poisoned_empty: None) -> None:
    length = sum(sizes)
    x = inputs(1, length, 1, 16)
    assert_within_budget(run(*x, sizes=sizes, configs=configs), x, visible(length, 0, "", "", sizes=sizes), 0.3)


@every_config
@pytest.mark.parametrize("mask, role", MASKS)
def test_information_flows_exactly_where_the_mask_says(mask: str, role: str, configs: Configs) -> None:
    """With unit vectors as values the output is the matrix of weights; with them as gradients, dv is its transpose."""
    length, n_image = 20, 7
    q, k, v, _ = inputs(1, length, 1, 32)
    unit = torch.eye(length, 32, device=DEVICE, dtype=v.dtype)[None, :, None]
    out, _, _, d_v = run(q, k, unit, unit, n_image=n_image, mask=mask, role=role, scale=0.05, configs=configs)
    allowed = visible(length, n_image, mask, role)[0]
    assert torch.equal(out[0, :, 0, :length] > 0, allowed)
    assert torch.equal(d_v[0, :, 0, :length].T > 0, allowed)


@pytest.mark.parametrize("scale", [1e-6, 30.0])
def test_extreme_scales(scale: float) -> None:
    """A softmax of equals, and one that picks a single key."""
    x = inputs(1, 21, 1, 16, torch.float16)
    out = run(*x, n_image=9, scale=scale, configs=SQUARE)[0]
    want = exact(x, visible(21, 9, "figure", "encoder"), scale)[0]
    assert (out.double() - want).abs().max() <= 4e-3


@every_config
@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)])
def test_nothing_gives_nothing(shape: tuple[int, int, int, int], configs: Configs) -> None:
    for result in run(*inputs(*shape), configs=configs):
        assert result.shape == shape


@pytest.mark.parametrize(
    "configs, length",
    [*((config, 37) for config in CONFIGS.values()), *((config, 70) for config in TAILED.values())],
)
def test_a_second_run_gives_the_same_bits(configs: Configs, length: int) -> None:
    x = inputs(1, length, 1, 16)
    first, second = (run(*x, n_image=20, configs=configs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "mask, role, n_image, rows, keys",
    [
        ("figure", "encoder", 0, slice(0, 32), slice(32, 68)),
        ("figure", "encoder", 0, slice(0, 64), slice(64, 68)),
        ("strict", "encoder", 32, slice(0, 32), slice(32, 68)),
        ("strict", "encoder", 32, slice(32, 64), slice(64, 68)),
        ("strict", "decoder", 64, slice(64, 68), slice(0, 64)),
    ],
    ids=["causal", "causal, tail", "strict encoder", "strict encoder, tail", "strict decoder, tail"],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about the NaN
def test_tiles_that_nobody_sees_are_never_read(mask: str, role: str, n_image: int, rows: slice, keys: slice) -> None:
    """A NaN under a mask, times its weight of zero, would be a NaN: these rows and keys must not even meet."""
    q, k, v, grad = inputs(1, 68, 1, 16)
    configs = (TileConfig(rows=32, keys=32, warps=4, stages=1),) * 2
    options: dict[str, Any] = {"n_image": n_image, "mask": mask, "role": role, "configs": configs}
    clean = run(q, k, v, grad, **options)
    soiled_k, soiled_v, soiled_q, soiled_grad = (x.clone() for x in (k, v, q, grad))
    soiled_k[:, keys] = soiled_v[:, keys] = float("nan")
    soiled_q[:, rows] = soiled_grad[:, rows] = float("nan")
    out, d_q, _, _ = run(q, soiled_k, soiled_v, grad, **options)
    assert torch.equal(out[:, rows], clean[0][:, rows]) and torch.equal(d_q[:, rows], clean[1][:, rows])
    _, _, d_k, d_v = run(soiled_q, k, v, soiled_grad, **options)
    assert torch.equal(d_k[:, keys], clean[2][:, keys]) and torch.equal(d_v[:, keys], clean[3][:, keys])


def test_tiles_end_where_a_tail_begins_and_kept_numbers_end() -> None:
    """A length alone says whether all launches have a tail, and what they keep of rows is stored and read unmasked."""
    for width, capability in itertools.product((16, 32, 64, 128), (80, 90)):
        forward, configs = forward_config(width), backward_configs(65, width, capability)
        for config in (forward, *configs):
            assert ROUND % config.rows == ROUND % config.keys == 0
            assert min(config.rows, config.keys) >= TAIL
        assert all(forward.rows % config.rows == 0 for config in configs)
        assert configs[0].rows % configs[1].rows == 0


@pytest.mark.parametrize("length, width, capability, launches", [(1, 64, 90, 1), (64, 16, 90, 1), (65, 64, 90, 2),
    (64, 128, 90, 2), (64, 64, 80, 2)])  # fmt: skip
def test_heads_of_one_tile_take_one_launch_on_hopper(length: int, width: int, capability: int, launches: int) -> None:
    configs = backward_configs(length, width, capability)
    assert len(configs) == launches
    assert launches == 2 or configs[0].rows >= length


def test_the_kernels_get_rows_that_they_can_number() -> None:
    """Rows far apart, or with gaps between the channels, are copied; a slice of a packed tensor is not."""
    packed = torch.empty(2, 5, 3, 4, 16).unbind(2)[1]
    assert ops._rows(packed) is packed
    far = torch.empty_strided((1, 3, 1, 4), (1, 2**30, 1, 1), device="meta")
    for x in (far, packed.transpose(1, 3)):
        assert ops._rows(x).is_contiguous()


def op_arguments(dtype: torch.dtype, prefix: bool = True, **options: Any) -> tuple[Any, ...]:
    q, k, v, _ = inputs(2, 9, 2, 16, dtype)
    lengths = torch.tensor([1, 4], device=DEVICE) if prefix else None
    rest = {"sizes": (), "n_image": 4, "mask": "figure", "role": "encoder", "scale": 0.3} | options
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), lengths, *rest.values()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix": False, "mask": "strict", "role": "decoder"},
        {"prefix": False, "sizes": (4, 5), "n_image": 0},
    ],
)
def test_the_operator_passes_pytorchs_checks(options: dict[str, Any]) -> None:
    torch.library.opcheck(ops.attention, op_arguments(torch.float16 if DEVICE == "cuda" else torch.float32, **options))


def test_the_packed_operator_passes_pytorchs_checks() -> None:
    q, k, v, *rest = op_arguments(torch.float16 if DEVICE == "cuda" else torch.float32)
    qkv = torch.stack([q, k, v], 2).detach().requires_grad_()
    torch.library.opcheck(ops.attention_packed, (qkv, *rest))


@pytest.mark.parametrize("mask, role", MASKS)
def test_the_operators_gradient_on_a_cpu(mask: str, role: str) -> None:
    q, k, v, grad = (x.cpu().double() for x in inputs(2, 9, 2, 16))
    results = []
    for call in (
        lambda q, k, v: ops.attention(q, k, v, None, (), 4, mask, role, 0.25)[0],
        lambda q, k, v: ops.attention_packed(torch.stack([q, k, v], 2), None, (), 4, mask, role, 0.25)[0],
        lambda q, k, v: reference.spectral_attention(q, k, v, 4, None, mask, role),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = call(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, grad)))
    for ours, packed, wanted in zip(*results, strict=True):
        assert (ours - wanted).abs().max() <= 1e-13
        assert torch.equal(packed, ours)


def test_a_whole_graph_compiles() -> None:
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    q, k, v, _ = inputs(2, 9, 2, 16, dtype)
    q = q.requires_grad_()
    prefix = torch.tensor([1, 4], device=DEVICE)

    def step(q: Tensor) -> Tensor:
        out = spectral_attention(q, k, v, 4, prefix) + group_causal_attention(q, k, v, (4, 5), 0.3)
        out = out + causal_attention(q, k, v, 0.3) + ops.attention(q, k, v, prefix, (), 4, "figure", "encoder", 0.3)[0]
        packed = torch.stack([q, k, v], 2)
        out = out + packed_spectral_attention(packed, 4, prefix, "strict")
        out = out + ops.attention_packed(packed, prefix, (), 4, "figure", "encoder", 0.3)[0]
        return out.square().sum()

    wanted = torch.autograd.grad(step(q), q)[0]
    torch.compiler.reset()
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(q), q)[0]
    assert torch.equal(got, wanted)


@needs_no_gpu
@pytest.mark.parametrize("backend", ["triton", "flash2", "flash4"])
def test_a_forced_backend_that_needs_a_gpu_says_so(backend: Any) -> None:
    q, k, v, _ = inputs(1, 4, 1, 16)
    for call in (
        lambda: spectral_attention(q, k, v, 2, backend=backend),
        lambda: packed_spectral_attention(torch.stack([q, k, v], 2), 2, backend=backend),
        lambda: causal_attention(q, k, v, 1.0, backend=backend),
        lambda: group_causal_attention(q, k, v, (2, 2), 1.0, backend=backend),
    ):
        with pytest.raises(ValueError, match=f"backend '{backend}' needs a CUDA device, not cpu"):
            call()


class OnAGpu:
    """A tensor as the choice of a backend sees it."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, (2, 9, 3, width)


@pytest.mark.parametrize(
    "backend, q, case, training, message",
    [
        ("triton", OnAGpu(torch.float32), "plain", False, "needs bfloat16 or float16, not torch.float32"),
        ("triton", OnAGpu(width=MAX_WIDTH + 1), "plain", False, "takes heads of up to 128, not 129"),
        ("flash2", OnAGpu(width=20), "plain", False, "takes heads of up to 256 in steps of 8, not 20"),
        ("flash4", OnAGpu(), "prefixes", False, "has no mask for prefixes"),
        ("flash2", OnAGpu(), "groups", False, "has no mask for groups"),
        ("flash4", OnAGpu(), "plain", True, "has no backward for compute capability 8"),
    ],
)
def test_what_a_forced_backend_cannot_do(
    monkeypatch: pytest.MonkeyPatch, backend: Any, q: Any, case: Any, training: bool, message: str
) -> None:
    monkeypatch.setattr(backends, "version", lambda backend: "1")
    monkeypatch.setattr(backends, "_capability", lambda device: 8)
    with pytest.raises(ValueError, match=f"backend '{backend}' {message}"):
        backends.choose(backend, q, case, training)
    assert backends.choose("sdpa", q, case, training) == "sdpa"


def test_a_backend_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    backends.version.cache_clear()
    for backend, package in (("flash2", "flash-attn"), ("flash4", "flash-attn-4")):
        assert backends.obstacle(backend, OnAGpu(), "plain", False) == f"{package} is not installed"  # type: ignore[arg-type]
    backends.version.cache_clear()


def test_the_choice_and_its_reason_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_capability", lambda device: 9)
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setitem(backends._FASTEST, (9, "inference"), "triton")
    half, single = OnAGpu(), OnAGpu(torch.float32)
    with caplog.at_level(logging.INFO, logger="spectralar.kernels.attention.backends"):
        for q in (half, half, single, single):
            backends.choose(None, q, "plain", False)  # type: ignore[arg-type]
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend: triton (fastest for inference on compute capability 9)",
        "attention backend: sdpa (triton needs bfloat16 or float16, not torch.float32)",
    ]
    assert backends.choose(None, torch.zeros(1, 1, 1, 16), "plain", False) == "sdpa"
    monkeypatch.delitem(backends._FASTEST, (9, "training"))
    with caplog.at_level(logging.INFO, logger="spectralar.kernels.attention.backends"):
        assert backends.choose(None, half, "plain", True) == "sdpa"  # type: ignore[arg-type]
    told = "attention backend: sdpa (nothing else is tested for training on compute capability 9)"
    assert caplog.records[-1].getMessage() == told


@pytest.mark.parametrize("mask, role", MASKS)
@pytest.mark.parametrize("backend", ["flash2", "flash4"])
def test_two_calls_of_a_flash_attention_make_the_spectral_mask(
    monkeypatch: pytest.MonkeyPatch, backend: Any, mask: Any, role: Any
) -> None:
    """With PyTorch standing in for the package, which aligns causal masks at the bottom right."""
    monkeypatch.setattr(backends, "obstacle", lambda *_: None)
    monkeypatch.setattr(backends, "_flash", lambda backend: backends.sdpa)
    q, k, v, _ = (x.cpu().double() for x in inputs(2, 9, 2, 16))
    got = spectral_attention(q, k, v, 4, None, mask, role, backend=backend)
    assert (got - reference.spectral_attention(q, k, v, 4, None, mask, role)).abs().max() <= 1e-13
    causal = causal_attention(q, k, v, 0.3, backend=backend)
    assert (causal - reference.causal_attention(q, k, v, 0.3)).abs().max() <= 1e-13


@pytest.mark.parametrize("backend", ["sdpa", "reference", None])
def test_packed_attention_is_that_of_its_parts(backend: Any) -> None:
    qkv = torch.stack([x.float() for x in inputs(2, 9, 2, 16)[:3]], 2).requires_grad_()
    prefix = torch.tensor([1, 4], device=DEVICE)
    results = []
    for call in (
        lambda: packed_spectral_attention(qkv, 4, prefix, "strict", "decoder", backend=backend),
        lambda: spectral_attention(*qkv.unbind(2), 4, prefix, "strict", "decoder", backend=backend),
    ):
        out = call()
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_packed() -> None:
    for shape in ((2, 9, 2, 16), (2, 9, 2, 2, 16)):
        with pytest.raises(ValueError, match=r"qkv must be \[B, T, 3, H, D\], not \(2, 9, "):
            packed_spectral_attention(torch.zeros(shape), 4)
    with pytest.raises(ValueError, match=r"n_image must be 0..9 \(the sequence length\), not 10"):
        packed_spectral_attention(torch.zeros(2, 9, 3, 2, 16), 10)


def test_bad_dtypes_devices_and_scales() -> None:
    q, k, v, _ = inputs(1, 4, 1, 16)
    with pytest.raises(TypeError, match="q, k, v must share one floating dtype, not"):
        causal_attention(q, k.float(), v, 1.0)
    with pytest.raises(TypeError, match="one floating dtype, not"):
        causal_attention(*(x.long() for x in (q, k, v)), 1.0)
    with pytest.raises(ValueError, match="q, k, v must be on one device, not"):
        causal_attention(q, k, v.to("meta"), 1.0)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"scale must be positive and finite, not {scale}"):
            group_causal_attention(q, k, v, (2, 2), scale)


GPU_CASES = {
    "figure": {"n_image": 257},
    "strict encoder": {"n_image": 257, "mask": "strict"},
    "strict decoder": {"n_image": 257, "mask": "strict", "role": "decoder"},
    "none": {"n_image": 257, "mask": "none"},
    "figure, prefixes": {"n_image": 257, "prefix": True},
    "strict decoder, prefixes": {"n_image": 257, "mask": "strict", "role": "decoder", "prefix": True},
    "causal": {},
    "groups": {"sizes": (100, 1, 220)},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GPU_CASES)
@pytest.mark.parametrize(
    "length, width", [(321, 64), (321, 128), (321, 40), (336, 64), (337, 64), (384, 64), (833, 64)]
)
def test_on_a_gpu(length: int, width: int, case: str, dtype: torch.dtype, poisoned_empty: None) -> None:
    options: dict[str, Any] = dict(GPU_CASES[case])
    n_image = options.setdefault("n_image", 0) and length - 64
    options["n_image"] = n_image
    if sizes := options.get("sizes"):
        options["sizes"] = sizes = (*sizes, length - 321) if length > 321 else sizes
    x = inputs(3, length, 2, width, dtype)
    if options.pop("prefix", False):
        options["prefix"] = torch.tensor([1, 33, 64], device=DEVICE)
        for i, n in enumerate((1, 33, 64)):
            x[3][i, n_image + n :] = 0
    results = run(*x, scale=width**-0.5, **options)
    again = run(*x, scale=width**-0.5, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    mask, role, prefix = options.get("mask", "figure"), options.get("role", "encoder"), options.get("prefix")
    allowed = visible(length, n_image, mask, role, prefix, sizes or ())
    if prefix is not None:
        # Rows of hidden tokens are zero here, and anything in the definition.
        out = results[0].clone()
        for i, n in enumerate(prefix.tolist()):
            assert (out[i, n_image + n :] == 0).all()
            out[i, n_image + n :] = exact(x, allowed, width**-0.5)[0][i, n_image + n :]
        results = (out, *results[1:])
    assert_within_budget(results, x, allowed, width**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1,) * 17, (16,), (4,) * 16, (1,) * 64, (1,) * 65, (64, 17)])
@pytest.mark.parametrize("width", [24, 64, 128])
def test_short_heads_on_a_gpu(width: int, sizes: tuple[int, ...], dtype: torch.dtype, poisoned_empty: None) -> None:
    x = inputs(3, sum(sizes), 4, width, dtype)
    results, again = (run(*x, sizes=sizes, scale=width**-0.5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert_within_budget(results, x, visible(sum(sizes), 0, "", "", sizes=sizes), width**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("mask, role", MASKS)
def test_a_training_batch_on_a_gpu(mask: Any, role: Any) -> None:
    """256 images of 257 + 64 tokens through the public function, against PyTorch's fused attention in fp32."""
    q, k, v, grad = inputs(256, 321, 12, 64, torch.bfloat16)
    results = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float32, "sdpa"), (torch.bfloat16, "sdpa")):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out = spectral_attention(*leaves, 257, None, mask, role, backend=backend)  # type: ignore[arg-type]
        results.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))))
    packed = torch.stack([q, k, v], 2).requires_grad_()
    out = packed_spectral_attention(packed, 257, None, mask, role, backend="triton")
    (grads,) = torch.autograd.grad(out, packed, grad)
    assert all(torch.equal(a, b) for a, b in zip(results[0], (out.detach(), *grads.unbind(2)), strict=True))
    for ours, wanted, fused in zip(*results, strict=True):
        assert (ours - wanted).abs().max() <= 2 * (fused - wanted).abs().max() + 2**-8 * (1 + wanted.abs().max())
