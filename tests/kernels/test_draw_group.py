"""Drawing a whole group in place: the draws of `draw_tokens`, on the CPU, in Triton's interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spectralar.kernels.draw import draw_group, draw_tokens, kernel, ops
from spectralar.kernels.draw.config import DrawConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 8
FILTERS: list[dict[str, Any]] = [{}, {"top_k": 20, "top_p": 0.8, "temperature": 1.3}, {"greedy": True}]
# The interpreter computes with NumPy, which reports what a GPU does silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=["reference", "kernel"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The operator runs the reference, or the kernel (on CPU tensors in Triton's interpreter)."""
    monkeypatch.setattr(ops, "runs_kernels", lambda logits: request.param == "kernel")
    return request.param


def inputs(
    images: int, group: int, guided: bool, codes: int = 50, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(3)
    values = {
        "logits": (2 * torch.randn(images * (1 + guided), group, codes, generator=draw)).to(dtype),
        "seeds": torch.arange(images) * 7919 - 5,
        "scales": torch.linspace(1, 4, LENGTH // group),
    }
    return {name: value.to(DEVICE) for name, value in values.items()}


def number(value: int) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def one_by_one(tokens: Tensor, first: int, given: int, values: dict[str, Any], **options: Any) -> Tensor:
    """The definition: `draw_tokens` for every position."""
    tokens, images, group = tokens.clone(), len(tokens), values["logits"].shape[1]
    scale = float(values["scales"][first // group]) if len(values["logits"]) > images else 1.0
    for j in range(group):
        if first + j >= given:
            tokens[:, first + j] = draw_tokens(
                values["logits"][:images, j],
                values["seeds"],
                first + j,
                unconditional=values["logits"][images:, j] if scale != 1 else None,
                guidance=scale,
                **options,
            )
    return tokens


def test_columns_of_seeds_and_scales(implementation: str) -> None:
    """Numbers in memory with gaps between them."""
    values = inputs(3, 1, True)
    apart = {**values, **{name: values[name][:, None].repeat(1, 5)[:, 0] for name in ("seeds", "scales")}}
    assert not apart["seeds"].is_contiguous() and not apart["scales"].is_contiguous()
    found = [torch.zeros(3, LENGTH, dtype=torch.int64, device=DEVICE) for _ in range(2)]
    for tokens, given in zip(found, (values, apart), strict=True):
        draw_group(tokens, first=number(LENGTH - 1), given=number(0), **given)
    assert found[0].any() and torch.equal(*found)


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_draws_of_draw_tokens(implementation: str, group: int, guided: bool, options: dict[str, Any]) -> None:
    values = inputs(2, group, guided)
    tokens = torch.full((2, LENGTH), 77, device=DEVICE)
    for first in (0, LENGTH - group):
        for given in (0, first + 1):
            expected = one_by_one(tokens, first, given, values, **options)
            assert torch.equal(expected[:, :given], tokens[:, :given])
            found = tokens.clone()
            draw_group(found, first=number(first), given=number(given), **values, **options)
            assert torch.equal(found, expected), (first, given)
            assert torch.equal(found != tokens, (expected != tokens))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float64]
)
def test_dtypes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "runs_kernels", lambda logits: logits.dtype != torch.float64)
    values = inputs(2, 4, True, dtype=dtype)
    for scales in (values["scales"], values["scales"].double()):
        tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device=DEVICE)
        expected = one_by_one(tokens, 4, 0, values)
        draw_group(tokens, first=number(4), given=number(0), **{**values, "scales": scales})
        assert torch.equal(tokens, expected)


def test_a_scale_of_one_is_the_conditional_logits_themselves(implementation: str) -> None:
    """The way to the unconditional logits and back would lose the better code's 2."""
    logits = torch.tensor([[[1.0, 2.0]], [[0.0, 1e8]]], device=DEVICE)
    tokens, zero = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), number(0)
    mixed = logits[1:] + (logits[:1] - logits[1:])
    assert mixed.argmax() != logits[:1].argmax()
    draw_group(tokens, logits, zero[None], zero, torch.ones(1, device=DEVICE), zero, greedy=True)
    assert tokens.item() == logits[0].argmax()


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = inputs(2, 2, True)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device=DEVICE)
    expected = one_by_one(tokens, 2, 0, values, top_k=20, top_p=0.8)
    monkeypatch.setattr(ops, "runs_kernels", lambda logits: True)
    monkeypatch.setattr(kernel, "draw_config", lambda codes: DrawConfig(block=16, warps=1))
    draw_group(tokens, first=number(2), given=number(0), **values, top_k=20, top_p=0.8)
    assert torch.equal(tokens, expected)


def test_rows_of_a_wider_buffer_and_none(implementation: str) -> None:
    values = inputs(3, 2, True)
    wide = torch.full((3, LENGTH + 5), 77, device=DEVICE)
    tokens = wide[:, :LENGTH]
    expected = one_by_one(tokens, 6, 0, values)
    draw_group(tokens, first=number(6), given=number(0), **values)
    assert torch.equal(tokens, expected) and bool((wide[:, LENGTH:] == 77).all())
    nothing = torch.zeros(0, LENGTH, dtype=torch.int64, device=DEVICE)
    draw_group(nothing, first=number(0), given=number(0), **inputs(0, 2, True))


def test_operator() -> None:
    values = inputs(2, 2, True)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device=DEVICE)
    arguments = (tokens, values["logits"], values["seeds"], number(2), values["scales"], number(0))
    torch.library.opcheck(ops.draw_group, (*arguments, 0.9, 5, 0.8, False))
    with torch.inference_mode():
        made_here = tokens.clone()
        draw_group(made_here, first=number(2), given=number(0), **values)
        draw_group(tokens, first=number(2), given=number(0), **values)
    assert torch.equal(made_here, tokens)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tokens": torch.zeros(2, 8)}, TypeError, "tokens must be an integer tensor"),
        ({"tokens": torch.zeros(2, 8).int()}, ValueError, "tokens must be int64, got torch.int32"),
        ({"tokens": torch.zeros(8, 2).long().T}, ValueError, r"tokens must have shape \[B, N\] with unit stride"),
        ({"tokens": torch.zeros(8).long()}, ValueError, r"tokens must have shape \[B, N\]"),
        (
            {"logits": torch.zeros(3, 2, 5)},
            ValueError,
            r"logits must be contiguous of shape \[2, G, K\] or \[4, G, K\]",
        ),
        ({"logits": torch.zeros(4, 5)}, ValueError, "logits must be contiguous of shape"),
        ({"logits": torch.zeros(4, 5, 2).mT}, ValueError, "logits must be contiguous of shape"),
        ({"logits": torch.zeros(4, 9, 5)}, ValueError, "logits must be those of 1 to 8 tokens, got 9"),
        ({"logits": torch.full((4, 2, 5), torch.nan)}, ValueError, "logits must be finite or -inf"),
        ({"seeds": torch.zeros(3).long()}, ValueError, r"seeds must have shape \[2\], got \[3\]"),
        ({"seeds": torch.zeros(2)}, TypeError, "seeds must be an integer tensor"),
        ({"first": torch.zeros(1).long()}, ValueError, r"first must have shape \[\], got \[1\]"),
        ({"first": torch.tensor(7)}, ValueError, "first must lie from 0 to 6, got 7"),
        ({"first": torch.tensor(-1)}, ValueError, "first must lie from 0 to 6, got -1"),
        ({"first": 0}, TypeError, "first must be an integer tensor"),
        ({"given": torch.tensor(0.0)}, TypeError, "given must be an integer tensor"),
        ({"given": torch.zeros((), device="meta").long()}, ValueError, "given must be on the device of logits, cpu"),
        ({"scales": torch.ones(3)}, ValueError, r"scales must have shape \[steps\] with at least 4 steps, got \[3\]"),
        ({"scales": torch.ones(4).long()}, TypeError, "scales must be a floating tensor"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and positive"),
        ({"top_k": 6}, ValueError, "top_k must lie from 0 to the number of codes, 5, got 6"),
        ({"top_p": 1.1}, ValueError, "top_p must lie from 0 to 1"),
    ],
)
def test_bad_input(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "tokens": torch.zeros(2, LENGTH, dtype=torch.int64),
        "logits": torch.zeros(4, 2, 5),
        "seeds": torch.zeros(2, dtype=torch.int64),
        "first": torch.tensor(0),
        "scales": torch.ones(4),
        "given": torch.tensor(0),
    }
    with pytest.raises(error, match=message):
        draw_group(**{**good, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_one_graph_draws_all_groups(group: int) -> None:
    torch.manual_seed(0)
    seeds, codes, length = torch.arange(64, device="cuda"), 4096, 64
    logits = 2 * torch.randn(128, group, codes, device="cuda")
    first, given = number(0), number(5)
    scales = torch.linspace(1, 3, length // group, device="cuda")
    tokens = torch.full((64, length), 7, device="cuda")
    options: dict[str, Any] = {"top_k": 900, "top_p": 0.96}

    def step() -> None:
        draw_group(tokens, logits, seeds, first, scales, given, **options)
        first.add_(group)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    tokens.fill_(7)
    first.zero_()
    expected = tokens.clone()
    values = {"logits": logits, "seeds": seeds, "scales": scales}
    for place in range(0, length, group):
        graph.replay()
        expected = one_by_one(expected, place, 5, values, **options)
    assert torch.equal(tokens, expected)
    assert bool((tokens[:, :5] == 7).all()) and first.item() == length
