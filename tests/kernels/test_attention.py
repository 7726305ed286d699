"""Attention against its definition in fp64: values, gradients, and who may see whom."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralar.kernels.attention import (
    cached_attention,
    causal_attention,
    group_causal_attention,
    spectral_attention,
)

MASKS = ["figure", "strict", "none"]
ROLES = ["encoder", "decoder"]
BACKENDS = ["sdpa", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, seed: int = 3) -> list[Tensor]:
    """q, k, v `[B, T, H, D]`; queries are large enough that the softmax is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return [(3 * q).to(dtype), k.to(dtype), v.to(dtype)]


def sees(row: int, key: int, n_image: int, mask: str, role: str) -> bool:
    """Section 3.2 and Figure 3, one pair at a time."""
    if mask == "none":
        return True
    if row < n_image:  # an image row: all image keys; spectral keys unless the strict encoder forbids it
        return key < n_image or not (mask == "strict" and role == "encoder")
    if key < n_image:  # a spectral row and an image key
        return not (mask == "strict" and role == "decoder")
    return key <= row


def visible(length: int, n_image: int, mask: str, role: str) -> Tensor:
    rows = [[sees(row, key, n_image, mask, role) for key in range(length)] for row in range(length)]
    return torch.tensor(rows, dtype=torch.bool).view(length, length)


def exact(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """Softmax attention in fp64, one row at a time over the keys that the row sees."""
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for t in range(q.shape[1]):
        seen = allowed[t].nonzero().flatten()
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, seen]) * scale
        rows.append(torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, seen]))
    return torch.stack(rows, dim=1) if rows else torch.zeros_like(q)


def plain(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """What a user of PyTorch would write, all of it in the dtype of the inputs."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~allowed, float("-inf")).softmax(-1), v)


def assert_within_budget(result: Tensor, expected: Tensor, baseline: Tensor) -> None:
    error, budget = (result.double() - expected).abs(), (baseline.double() - expected).abs().max()
    rounding = torch.finfo(result.dtype).eps * (1 + expected.abs().max())
    worst = torch.unravel_index(error.argmax(), error.shape)
    assert error.max() <= 2 * budget + rounding, f"{error.max():.3g} at {[int(i) for i in worst]}, budget {budget:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length, n_image", [(1, 0), (1, 1), (2, 1), (7, 0), (7, 7), (13, 5), (37, 17)])
def test_spectral_attention_equals_its_definition(
    length: int, n_image: int, mask: Any, role: Any, backend: Any, poisoned_empty: None
) -> None:
    q, k, v = inputs((2, length, 3, 5))
    result = spectral_attention(q, k, v, n_image, None, mask, role, backend=backend)
    expected = exact(q, k, v, visible(length, n_image, mask, role), 5**-0.5)
    assert result.shape == q.shape and result.dtype == torch.float64
    assert (result - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_spectral_attention_is_within_the_error_budget(dtype: torch.dtype, mask: Any, role: Any, backend: Any) -> None:
    q, k, v = inputs((2, 81, 2, 32), dtype)
    allowed = visible(81, 17, mask, role)
    result = spectral_attention(q, k, v, 17, None, mask, role, backend=backend)
    assert result.dtype == dtype
    assert_within_budget(result, exact(q, k, v, allowed, 32**-0.5), plain(q, k, v, allowed, 32**-0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", MASKS)
def test_prefix_lengths_equal_dropping_the_hidden_tokens(mask: Any, role: Any, backend: Any) -> None:
    """For every length; the rows that matter are the image rows and the spectral rows of the prefix."""
    n_image, tokens = 5, 6
    q, k, v = inputs((tokens, n_image + tokens, 2, 8))
    lengths = torch.arange(1, tokens + 1)
    result = spectral_attention(q, k, v, n_image, lengths, mask, role, backend=backend)
    assert result.isfinite().all()
    for i, n in enumerate(lengths.tolist()):
        q_n, k_n, v_n = (x[i : i + 1, : n_image + n] for x in (q, k, v))
        truncated = spectral_attention(q_n, k_n, v_n, n_image, None, mask, role, backend="reference")
        assert (result[i, : n_image + n] - truncated[0]).abs().max() <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", MASKS)
def test_hidden_tokens_send_nothing_to_rows_that_matter(mask: Any, role: Any, backend: Any) -> None:
    """Not even NaN times zero: large values in hidden places leave the result as it is, bit for bit."""
    q, k, v = inputs((2, 9, 1, 4))
    lengths = torch.tensor([2, 4])
    clean = spectral_attention(q, k, v, 4, lengths, mask, role, backend=backend)
    for i, n in enumerate(lengths.tolist()):
        k[i, 4 + n :], v[i, 4 + n :], q[i, 4 + n :] = 1e3, 1e30, -7.0
    soiled = spectral_attention(q, k, v, 4, lengths, mask, role, backend=backend)
    for i, n in enumerate(lengths.tolist()):
        assert torch.equal(soiled[i, : 4 + n], clean[i, : 4 + n])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", MASKS)
def test_information_flows_exactly_where_the_mask_says(mask: Any, role: Any, backend: Any) -> None:
    """The gradient of each output row is non-zero at exactly the keys and values that the row may see."""
    length, n_image = 8, 3
    q, k, v = (x.requires_grad_() for x in inputs((1, length, 1, 4)))
    out = spectral_attention(q, k, v, n_image, None, mask, role, backend=backend)
    expected = visible(length, n_image, mask, role)
    for row in range(length):
        d_q, d_k, d_v = torch.autograd.grad(out[0, row].square().sum(), (q, k, v), retain_graph=True)
        reached_q, reached_k, reached_v = ((d[0].abs().amax((1, 2)) > 0) for d in (d_q, d_k, d_v))
        assert reached_v.tolist() == expected[row].tolist()
        # A row with a single key does not depend on queries and keys: its softmax is 1.
        if expected[row].sum() > 1:
            assert reached_k.tolist() == expected[row].tolist()
            assert reached_q.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n_image, prefix", [(0, False), (0, True), (4, False), (4, True), (9, False)])
def test_all_gradients_of_spectral_attention(n_image: int, mask: Any, role: Any, prefix: bool) -> None:
    tokens = 9 - n_image
    lengths = torch.tensor([1, tokens]) if prefix else None
    last = n_image + torch.tensor([1, tokens] if prefix else [tokens, tokens])
    matters = (torch.arange(9) < last[:, None])[:, :, None, None]
    gradients = []
    for backend in ("sdpa", "reference"):
        q, k, v = (x.requires_grad_() for x in inputs((2, 9, 2, 3)))
        out = spectral_attention(q, k, v, n_image, lengths, mask, role, backend=backend)
        weights = inputs((2, 9, 2, 3), seed=5)[1]
        gradients.append(torch.autograd.grad((out * weights * matters).sum(), (q, k, v)))
    for ours, reference in zip(*gradients, strict=True):
        assert (ours - reference).abs().max() <= 1e-13


def test_the_reference_passes_gradcheck() -> None:
    q, k, v = (x.requires_grad_() for x in inputs((1, 5, 1, 2)))
    assert torch.autograd.gradcheck(
        lambda q, k, v: spectral_attention(q, k, v, 2, None, "figure", backend="reference"), (q, k, v)
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v: group_causal_attention(q, k, v, (2, 3), 0.7, backend="reference"), (q, k, v)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 7, 3, 5), (1, 65, 2, 64)])
def test_causal_attention(shape: tuple[int, int, int, int], dtype: torch.dtype, backend: Any) -> None:
    q, k, v = inputs(shape, dtype)
    allowed = torch.ones(shape[1], shape[1]).tril().bool()
    result = causal_attention(q, k, v, 0.3, backend=backend)
    assert result.dtype == dtype
    assert_within_budget(result, exact(q, k, v, allowed, 0.3), plain(q, k, v, allowed, 0.3))


def group_visible(sizes: list[int]) -> Tensor:
    group = [i for i, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor([[group[key] <= group[row] for key in range(len(group))] for row in range(len(group))])


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), backend=st.sampled_from(BACKENDS))
def test_group_causal_attention_with_unequal_groups(sizes: list[int], backend: Any) -> None:
    q, k, v = inputs((2, sum(sizes), 2, 3))
    result = group_causal_attention(q, k, v, sizes, 0.9, backend=backend)
    assert (result - exact(q, k, v, group_visible(sizes), 0.9)).abs().max() <= 1e-13


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_causal_attention_is_within_the_error_budget(dtype: torch.dtype, backend: Any) -> None:
    sizes = [1, 4, 9, 3]
    q, k, v = inputs((2, 17, 2, 16), dtype)
    allowed = group_visible(sizes)
    result = group_causal_attention(q, k, v, sizes, 0.5, backend=backend)
    assert result.dtype == dtype
    assert_within_budget(result, exact(q, k, v, allowed, 0.5), plain(q, k, v, allowed, 0.5))


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 1, 3], [6]])
def test_all_gradients_of_group_causal_attention(sizes: list[int]) -> None:
    gradients = []
    for backend in ("sdpa", "reference"):
        q, k, v = (x.requires_grad_() for x in inputs((2, 6, 2, 3)))
        out = group_causal_attention(q, k, v, sizes, 0.8, backend=backend)
        gradients.append(torch.autograd.grad((out * inputs((2, 6, 2, 3), seed=5)[1]).sum(), (q, k, v)))
    for ours, reference in zip(*gradients, strict=True):
        assert (ours - reference).abs().max() <= 1e-13


def test_groups_of_one_are_causal_attention() -> None:
    q, k, v = inputs((2, 9, 2, 4))
    assert torch.equal(group_causal_attention(q, k, v, [1] * 9, 0.4), causal_attention(q, k, v, 0.4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[1] * 5, [2, 2, 2], [3, 1, 2]])
def test_cached_attention_equals_full_attention(sizes: list[int], backend: Any) -> None:
    """Group by group over a cache whose later places still hold NaN."""
    q, k, v = inputs((2, sum(sizes), 2, 4))
    full = group_causal_attention(q, k, v, sizes, 0.6, backend="reference")
    k_cache, v_cache = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))
    end = 0
    for size in sizes:
        start, end = end, end + size
        k_cache[:, start:end], v_cache[:, start:end] = k[:, start:end], v[:, start:end]
        step = cached_attention(q[:, start:end], k_cache, v_cache, end, 0.6, backend=backend)
        assert (step - full[:, start:end]).abs().max() <= 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_attention_is_within_the_error_budget(dtype: torch.dtype, backend: Any) -> None:
    q, k, v = inputs((3, 33, 2, 16), dtype)
    newest, allowed = q[:, 29:30], torch.ones(1, 30, dtype=torch.bool)
    result = cached_attention(newest, k, v, 30, 0.5, backend=backend)
    assert result.dtype == dtype
    k, v = k[:, :30], v[:, :30]
    assert_within_budget(result, exact(newest, k, v, allowed, 0.5), plain(newest, k, v, allowed, 0.5))


CALLS: dict[str, Callable[..., Tensor]] = {
    "figure": lambda q, k, v, b: spectral_attention(q, k, v, min(2, q.shape[1]), backend=b),
    "strict encoder": lambda q, k, v, b: spectral_attention(q, k, v, 0, None, "strict", "encoder", backend=b),
    "strict decoder": lambda q, k, v, b: spectral_attention(q, k, v, q.shape[1], None, "strict", "decoder", backend=b),
    "causal": lambda q, k, v, b: causal_attention(q, k, v, 1.0, backend=b),
    "group": lambda q, k, v, b: group_causal_attention(q, k, v, [q.shape[1]] * bool(q.shape[1]), 1.0, backend=b),
    "cached": lambda q, k, v, b: cached_attention(q, k, v, 3, 1.0, backend=b),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_an_empty_batch_gives_an_empty_result(call: str, backend: str) -> None:
    q, k, v = inputs((0, 4, 2, 3))
    assert CALLS[call](q, k, v, backend).shape == (0, 4, 2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", [name for name in CALLS if name != "cached"])
def test_an_empty_sequence_gives_an_empty_result(call: str, backend: str) -> None:
    q, k, v = inputs((2, 0, 2, 3))
    assert CALLS[call](q, k, v, backend).shape == (2, 0, 2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS)
def test_a_second_run_gives_the_same_bits(call: str, backend: str) -> None:
    q, k, v = inputs((2, 6, 2, 8), torch.float32)
    assert torch.equal(CALLS[call](q, k, v, backend), CALLS[call](q, k, v, backend))


def test_the_reference_computes_in_fp32_under_autocast() -> None:
    q, k, v = inputs((1, 6, 1, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = causal_attention(q, k, v, 1.0, backend="reference")
    assert torch.equal(inside, causal_attention(q, k, v, 1.0, backend="reference"))


def test_prefix_lengths_of_any_integer_type() -> None:
    q, k, v = inputs((2, 5, 1, 2))
    expected = spectral_attention(q, k, v, 2, torch.tensor([1, 3]))
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(spectral_attention(q, k, v, 2, torch.tensor([1, 3], dtype=dtype)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mask": "full"}, "mask must be one of figure, strict, none, not 'full'"),
        ({"role": "teacher"}, "role must be one of encoder, decoder, not 'teacher'"),
        ({"n_image": -1}, r"n_image must be 0..5 \(the sequence length\), not -1"),
        ({"n_image": 6}, r"n_image must be 0..5 \(the sequence length\), not 6"),
        ({"prefix_lengths": torch.tensor([0, 1])}, "prefix_lengths must be 1..3, not 0..1"),
        ({"prefix_lengths": torch.tensor([1, 4])}, "prefix_lengths must be 1..3, not 1..4"),
        ({"prefix_lengths": torch.tensor([1])}, r"prefix_lengths must be integers of shape \[2\], not torch.int64 \(1"),
        ({"prefix_lengths": torch.ones(2, 1).long()}, r"integers of shape \[2\], not torch.int64 \(2, 1\)"),
        ({"prefix_lengths": torch.ones(2)}, r"integers of shape \[2\], not torch.float32 \(2,\)"),
        ({"prefix_lengths": torch.ones(2, dtype=torch.bool)}, r"integers of shape \[2\], not torch.bool \(2,\)"),
        ({"n_image": 5, "prefix_lengths": torch.tensor([1, 1])}, "prefix_lengths must be 1..0, not 1..1"),
    ],
)
def test_errors_of_spectral_attention(arguments: dict[str, Any], message: str, backend: Any) -> None:
    q, k, v = inputs((2, 5, 1, 2))
    with pytest.raises(ValueError, match=message):
        spectral_attention(q, k, v, **{"n_image": 2, **arguments}, backend=backend)


@pytest.mark.parametrize("call", [name for name in CALLS if name != "cached"])
def test_shapes_must_agree(call: str) -> None:
    q, k, v = inputs((2, 4, 1, 2))
    for wrong in ((q, k[:, :3], v), (q, k, v[..., :1]), (q[0], k[0], v[0])):
        with pytest.raises(ValueError, match=r"q, k, v must share one shape \[B, T, H, D\], not \("):
            CALLS[call](*wrong, "sdpa")


@pytest.mark.parametrize("sizes", [(2, 3), (4, 0), (5, -1), ()])
def test_group_sizes_must_be_positive_and_sum_to_the_length(sizes: tuple[int, ...]) -> None:
    q, k, v = inputs((2, 4, 1, 2))
    with pytest.raises(ValueError, match="group_sizes must be positive and sum to 4, not "):
        group_causal_attention(q, k, v, sizes, 1.0)


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_backend_is_refused(call: str) -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        CALLS[call](*inputs((2, 4, 1, 2)), "flash")


def test_errors_of_cached_attention() -> None:
    q, k, v = inputs((2, 4, 3, 2))
    for wrong in ((q[:1], k, v), (q[:, :, :2], k, v), (q[..., :1], k, v), (q, k, v[:, :3])):
        with pytest.raises(ValueError, match="does not fit caches"):
            cached_attention(*wrong, 1, 1.0)
    for length in (0, 5):
        with pytest.raises(ValueError, match=rf"length must be 1..4 \(the cache\), not {length}"):
            cached_attention(q, k, v, length, 1.0)
