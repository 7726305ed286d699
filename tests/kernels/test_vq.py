"""The vector quantiser: the choice in fp64, both losses and every gradient by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectralar.kernels.vq import (
    VectorQuantized,
    assign_codes,
    code_usage,
    lookup,
    nearest_code,
    perplexity,
    restart_dead_codes,
    update_usage,
    vector_quantize,
)
from spectralar.kernels.vq import reference as vq_reference

EPS32 = torch.finfo(torch.float32).eps


def pair(
    shape: tuple[int, ...], codes: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(shape, generator=generator)
    return z.to(dtype), torch.randn(codes, shape[-1], generator=generator).to(dtype)


def distances(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    """Squared distances in fp64 by subtraction, the definition without any expansion."""
    z, codebook = z.double(), codebook.double()
    if normalize:
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    return (z.unsqueeze(-2) - codebook).square().sum(-1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "codes"), [((200, 12), 1000), ((3, 5, 7), 33), ((4, 1), 9), ((6,), 17), ((2, 3), 1)])
def test_the_choice_is_optimal(shape: tuple[int, ...], codes: int, dtype: torch.dtype, normalize: bool) -> None:
    z, codebook = pair(shape, codes, dtype)
    table = distances(z, codebook, normalize)
    chosen = nearest_code(z, codebook, normalize=normalize)
    assert chosen.dtype == torch.int64 and chosen.shape == shape[:-1]
    best = table.min(-1).values
    gap = table.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) - best
    assert (gap <= 1e-13 * (1 + best)).all()
    # fp64 leaves no near ties in random data, so the index itself must agree too, except on the line (D = 1).
    if shape[-1] > 1:
        assert torch.equal(chosen, table.argmin(-1))


@pytest.mark.parametrize("normalize", [True, False])
def test_codewords_map_to_themselves(normalize: bool) -> None:
    _, codebook = pair((1, 12), 4096)
    assert torch.equal(nearest_code(codebook, codebook, normalize=normalize), torch.arange(4096))
    quantized = vector_quantize(codebook, codebook, normalize=normalize)
    assert quantized.codebook_loss == 0 and quantized.commitment_loss == 0


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_go_to_the_lowest_index(normalize: bool) -> None:
    z, codes = pair((500, 12), 97)
    copies = codes.repeat(11, 1)
    assert torch.equal(nearest_code(z, copies, normalize=normalize), nearest_code(z, codes, normalize=normalize))
    corners = torch.tensor([[-1.0, 1], [1, 1], [1, -1]])
    assert nearest_code(torch.tensor([[1.0, 0], [0, -1], [0, 0]]), corners, normalize=normalize).tolist() == [1, 2, 0]


@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_depends_on_nothing_else(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = pair((257, 12), 300)
    whole = nearest_code(z, codebook, normalize=normalize)
    for start, stop in ((0, 1), (3, 5), (7, 256), (256, 257)):
        assert torch.equal(nearest_code(z[start:stop], codebook, normalize=normalize), whole[start:stop])
    order = torch.randperm(257)
    assert torch.equal(nearest_code(z[order], codebook, normalize=normalize), whole[order])
    monkeypatch.setattr(vq_reference, "_SCORE_BYTES", 300 * 8 * 10)
    assert torch.equal(nearest_code(z, codebook, normalize=normalize), whole)
    monkeypatch.setattr(vq_reference, "_SCORE_BYTES", 1)
    assert torch.equal(nearest_code(z[:9], codebook, normalize=normalize), whole[:9])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2.0**-30, 2.0**-3, 3.0, 2.0**30]))
def test_cosine_ignores_length(seed: int, factor: float) -> None:
    z, codebook = pair((20, 5), 31, seed=seed)
    expected = nearest_code(z, codebook)
    assert torch.equal(nearest_code(z * factor, codebook), expected)
    assert torch.equal(nearest_code(z, codebook * factor), expected)


def test_zero_vectors() -> None:
    codebook = torch.tensor([[-1.0, 0], [0, 0], [0, -1]])
    z = torch.tensor([[0.0, 0], [1, 1]])
    # Cosine 0 with the zero codeword beats the negative cosines of the others; a zero vector ties with all.
    assert nearest_code(z, codebook).tolist() == [0, 1]
    assert nearest_code(z, codebook, normalize=False).tolist() == [1, 1]
    result = vector_quantize(z, codebook)
    assert torch.equal(result.quantized, torch.tensor([[-1.0, 0], [0, 0]]))
    assert all(value.isfinite().all() for value in (result.commitment_loss, result.codebook_loss))


@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8])
@pytest.mark.parametrize("normalize", [True, False])
def test_lookup(integers: torch.dtype, normalize: bool) -> None:
    _, codebook = pair((1, 12), 50)
    indices = torch.tensor([[0, 49, 7], [7, 7, 1]]).to(integers)
    expected = codebook[indices.long()]
    if normalize:
        expected = expected / expected.norm(dim=-1, keepdim=True)
    result = lookup(indices, codebook, normalize=normalize)
    assert result.shape == (2, 3, 12) and result.dtype == torch.float32
    assert (result - expected).abs().max() <= 2 * EPS32
    assert torch.equal(result[0, 2], result[1, 0])
    assert lookup(indices[0, 1], codebook, normalize=normalize).shape == (12,)
    assert lookup(indices.int(), codebook.bfloat16()).dtype == torch.float32
    assert lookup(indices, codebook.double()).dtype == torch.float64


def test_lookup_gradient() -> None:
    codebook = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 2], [2, 4]])
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda c, n=normalize: lookup(indices, c, normalize=n), codebook)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_is_the_looked_up_codeword(normalize: bool, dtype: torch.dtype) -> None:
    z, codebook = pair((4, 9, 12), 64, dtype)
    result = vector_quantize(z, codebook, normalize=normalize)
    assert isinstance(result, VectorQuantized)
    assert result.quantized.dtype == result.commitment_loss.dtype == result.codebook_loss.dtype == torch.float32
    assert torch.equal(result.indices, nearest_code(z, codebook, normalize=normalize))
    assert torch.equal(result.quantized, lookup(result.indices, codebook, normalize=normalize))
    assert result.commitment_loss.shape == result.codebook_loss.shape == ()


def test_fp64_of_either_input_is_kept() -> None:
    z, codebook = pair((3, 4), 5)
    for first, second in ((z.double(), codebook), (z, codebook.double())):
        assert vector_quantize(first, second).quantized.dtype == torch.float64


def masks(name: str) -> Tensor | None:
    some = torch.rand(3, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    return {"none": None, "all": torch.ones_like(some), "some": some, "nothing": torch.zeros_like(some)}[name]


@pytest.mark.parametrize("mask", ["none", "all", "some", "nothing"])
@pytest.mark.parametrize("normalize", [True, False])
def test_losses_and_gradients_by_hand(normalize: bool, mask: str) -> None:
    z, codebook = (t.double().requires_grad_() for t in pair((3, 4, 6), 10))
    token_mask = masks(mask)
    result = vector_quantize(z, codebook, normalize=normalize, commitment=0.4, token_mask=token_mask)

    v, lengths = z.detach(), torch.ones(3, 4, 1, dtype=torch.float64)
    e, code_lengths = codebook.detach()[result.indices], torch.ones(3, 4, 1, dtype=torch.float64)
    if normalize:
        lengths, code_lengths = v.norm(dim=-1, keepdim=True), e.norm(dim=-1, keepdim=True)
        v, e = v / lengths, e / code_lengths
    weight = (torch.ones(3, 4) if token_mask is None else token_mask).double().unsqueeze(-1)
    count = max(1.0, weight.sum().item() * 6)
    expected = (weight * (e - v).square()).sum() / count
    assert abs(result.codebook_loss - expected) <= 1e-14
    assert abs(result.commitment_loss - 0.4 * expected) <= 1e-14
    if mask == "nothing":
        assert result.codebook_loss == 0 and result.commitment_loss == 0

    def through_norm(gradient: Tensor, unit: Tensor, length: Tensor) -> Tensor:
        """The normalisation lets pass what is tangent to the sphere, divided by the length."""
        return (gradient - unit * (unit * gradient).sum(-1, keepdim=True)) / length if normalize else gradient

    def gradients(output: Tensor, cotangent: Tensor | None = None) -> list[Tensor]:
        found = torch.autograd.grad(output, (z, codebook), cotangent, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, (z, codebook), strict=True)]

    by_z, by_codebook = gradients(result.commitment_loss)
    assert (by_z - through_norm(0.4 * 2 * weight * (v - e) / count, v, lengths)).abs().max() <= 1e-14
    assert torch.equal(by_codebook, torch.zeros_like(codebook))

    by_z, by_codebook = gradients(result.codebook_loss)
    rows = through_norm(2 * weight * (e - v) / count, e, code_lengths)
    scattered = torch.zeros_like(codebook).index_add(0, result.indices.flatten(), rows.flatten(0, 1))
    assert torch.equal(by_z, torch.zeros_like(z))
    assert (by_codebook - scattered).abs().max() <= 1e-14

    cotangent = torch.randn(3, 4, 6, dtype=torch.float64)
    by_z, by_codebook = gradients(result.quantized, cotangent)
    assert (by_z - through_norm(cotangent, v, lengths)).abs().max() <= 1e-14
    assert torch.equal(by_codebook, torch.zeros_like(codebook))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_the_plain_formula(normalize: bool) -> None:
    def plain(z: Tensor, codebook: Tensor) -> Tensor:
        if normalize:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        e = codebook[torch.cdist(z, codebook).argmin(-1)]
        straight = z + (e - z).detach()
        return straight.sin().sum() + 0.25 * F.mse_loss(z, e.detach()) + F.mse_loss(e, z.detach())

    def ours(z: Tensor, codebook: Tensor) -> Tensor:
        result = vector_quantize(z, codebook, normalize=normalize)
        return result.quantized.sin().sum() + result.commitment_loss + result.codebook_loss

    leaves = [t.double().requires_grad_() for t in pair((40, 6), 13)]
    expected, found = (torch.autograd.grad(loss(*leaves), leaves) for loss in (plain, ours))
    for want, got in zip(expected, found, strict=True):
        assert (want - got).abs().max() <= 1e-13


def test_mask_of_everything_equals_no_mask_and_part_equals_the_part() -> None:
    z, codebook = pair((3, 4, 6), 10)
    part = masks("some")
    assert part is not None
    whole = vector_quantize(z, codebook, token_mask=part)
    alone = vector_quantize(z[part], codebook)
    assert torch.equal(whole.indices[part], alone.indices)
    assert abs(whole.codebook_loss - alone.codebook_loss) <= 4 * EPS32 * alone.codebook_loss
    assert torch.equal(whole.quantized, vector_quantize(z, codebook).quantized)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (0, 4, 12)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    z, codebook = torch.zeros(shape, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    result = vector_quantize(z, codebook, token_mask=torch.zeros(shape[:-1], dtype=torch.bool))
    bare = vector_quantize(z, codebook)
    for outcome in (result, bare):
        assert outcome.quantized.shape == shape and outcome.indices.shape == shape[:-1]
        assert outcome.commitment_loss == 0 and outcome.codebook_loss == 0
    (bare.codebook_loss + bare.commitment_loss + bare.quantized.sum()).backward()
    assert codebook.grad is not None and torch.equal(codebook.grad, torch.zeros(5, 12))
    assert lookup(result.indices, codebook).shape == shape
    assert torch.equal(code_usage(result.indices, 5), torch.zeros(5, dtype=torch.int64))


def test_autocast_and_strides_change_nothing() -> None:
    z, codebook = pair((6, 8, 12), 50)
    plain = vector_quantize(z, codebook)
    strided = z.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    with torch.autocast("cpu", torch.bfloat16):
        under = vector_quantize(z, codebook)
        looked_up = lookup(plain.indices, codebook)
    assert all(torch.equal(a, b) for a, b in zip(plain, under, strict=True))
    assert torch.equal(looked_up, plain.quantized)
    assert torch.equal(vector_quantize(strided, codebook).indices, plain.indices)


def test_low_precision_losses_are_within_the_budget() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        z, codebook = pair((64, 12), 100, dtype)
        exact = vector_quantize(z.double(), codebook.double())
        result = vector_quantize(z, codebook)
        assert torch.equal(result.indices, exact.indices)
        assert abs(result.codebook_loss - exact.codebook_loss) <= 16 * EPS32 * exact.codebook_loss
        assert abs(result.commitment_loss - exact.commitment_loss) <= 16 * EPS32 * exact.commitment_loss


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=40), st.sampled_from([torch.int64, torch.uint16, torch.uint8]))
def test_usage_counts(values: list[int], integers: torch.dtype) -> None:
    usage = code_usage(torch.tensor(values, dtype=torch.int64).to(integers), 7)
    assert usage.dtype == torch.int64
    assert usage.tolist() == [values.count(code) for code in range(7)]


def test_perplexity() -> None:
    assert perplexity(torch.tensor([0, 9, 0])) == 1
    assert abs(perplexity(torch.full((4096,), 3)) - 4096) <= 4096 * EPS32
    assert abs(perplexity(torch.tensor([1, 1, 0, 2])) - 2 * math.sqrt(2)) <= 2 * EPS32
    assert abs(perplexity(torch.tensor([0.1, 0.1, 0.2])) - 2 * math.sqrt(2)) <= 4 * EPS32
    assert perplexity(torch.zeros(4, dtype=torch.int64)) == 0
    assert perplexity(torch.tensor([2**40, 2**40])) == 2
    assert perplexity(torch.ones(3)).dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_assignment(normalize: bool) -> None:
    z, codebook = pair((6, 7, 5), 30)
    found = assign_codes(z, codebook, normalize=normalize)
    assert torch.equal(found.indices, nearest_code(z, codebook, normalize=normalize))
    assert torch.equal(found.quantized, lookup(found.indices, codebook, normalize=normalize))
    expected = distances(z, codebook, normalize).min(-1).values
    assert (found.squared_distances - expected).abs().max() <= 8 * EPS32 * expected.max()
    assert torch.equal(found.usage, code_usage(found.indices, 30))
    leaf = z.clone().requires_grad_()
    assert not any(t.requires_grad for t in assign_codes(leaf, codebook))
    empty = assign_codes(z[:0], codebook)
    assert empty.quantized.shape == (0, 7, 5) and empty.usage.sum() == 0


def test_usage_average() -> None:
    average = torch.tensor([0.5, 0.25, 0.25, 0.0])
    moved = update_usage(average, torch.tensor([0, 3, 1, 0]), decay=0.75)
    assert (moved - torch.tensor([0.375, 0.375, 0.25, 0.0])).abs().max() <= EPS32
    assert torch.equal(update_usage(average, torch.zeros(4, dtype=torch.int64)), average)
    # Shares stay shares, and tend to those of the batches.
    for _ in range(2000):
        moved = update_usage(moved, torch.tensor([0, 0, 3, 1]))
    assert (moved - torch.tensor([0.0, 0.0, 0.75, 0.25])).abs().max() <= 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_dead_codes_restart(normalize: bool) -> None:
    z, codebook = pair((4, 10, 5), 8)
    average = torch.full((8,), 1 / 8)
    average[2] = 0
    moved = restart_dead_codes(codebook, average, z, normalize=normalize)
    # alpha of a dead code, its nearest vector found by the plain definition: with its own length.
    vectors = z.flatten(0, 1)
    nearest = vectors[distances(codebook, vectors, normalize)[2].argmin()]
    alpha = math.exp(-1e-3)
    assert (moved[2] - ((1 - alpha) * codebook[2] + alpha * nearest)).abs().max() <= 4 * EPS32
    others = [k for k in range(8) if k != 2]
    assert torch.equal(moved[others], codebook[others])
    # A hundredth of the fair share holds a code nearly still.
    alpha = math.exp(-10 * 0.01 / 0.01 - 1e-3)
    little = restart_dead_codes(codebook, average / 100, z, normalize=normalize)
    nearest_of_all = vectors[distances(codebook, vectors, normalize).argmin(-1)]
    expected = torch.lerp(codebook, nearest_of_all, alpha)
    assert (little - expected)[others].abs().max() <= 4 * EPS32 * 5
    assert torch.equal(restart_dead_codes(codebook, average, z[:0]), codebook)
    leaf = codebook.clone().requires_grad_()
    assert not restart_dead_codes(leaf, average, z).requires_grad


@pytest.mark.parametrize(("restart", "used"), [(False, 1), (True, 8)])
def test_training_uses_dead_codes_only_with_restarts(restart: bool, used: int) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(256, 3, generator=generator)
    codebook = torch.cat([torch.ones(1, 3), -torch.rand(7, 3, generator=generator)])
    average = torch.full((8,), 1 / 8)
    for _ in range(600):
        leaf = codebook.requires_grad_()
        result = vector_quantize(z, leaf)
        [gradient] = torch.autograd.grad(result.codebook_loss, leaf)
        codebook = codebook.detach() - 5 * gradient
        if restart:
            average = update_usage(average, code_usage(result.indices, 8))
            codebook = restart_dead_codes(codebook, average, z)
    assert (code_usage(nearest_code(z, codebook), 8) > 0).sum() == used


Z, C = torch.rand(2, 3, 4), torch.rand(5, 4)
U = torch.rand(5)
MASK = torch.ones(2, 3, dtype=torch.bool)
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: nearest_code(Z.int(), C), TypeError, "z must be a floating tensor, got torch.int32"),
    (lambda: nearest_code([1.0], C), TypeError, "z must be a floating tensor, got .*list"),  # type: ignore[arg-type]
    (lambda: nearest_code(Z, C.int()), TypeError, "codebook must be a floating tensor, got torch.int32"),
    (lambda: nearest_code(Z, C[0]), ValueError, r"codebook must have shape \[K, D\].*got \[4\]"),
    (lambda: nearest_code(Z, C[:0]), ValueError, r"codebook must have shape .*got \[0, 4\]"),
    (lambda: nearest_code(Z, C[:, :3]), ValueError, r"z must have shape \[\.\.\., 3\].*got \[2, 3, 4\]"),
    (lambda: nearest_code(torch.tensor(1.0), C), ValueError, r"z must have shape \[\.\.\., 4\].*got \[\]"),
    (lambda: nearest_code(Z.to("meta"), C), ValueError, "z must be on the codebook's device cpu, got meta"),
    (lambda: lookup(torch.tensor([0, 5]), C), ValueError, r"indices must lie in \[0, 5\), got 5"),
    (lambda: lookup(torch.tensor([-1, 5]), C), ValueError, r"indices must lie in \[0, 5\), got -1"),
    (lambda: lookup(torch.tensor([1.0]), C), TypeError, "indices must be an integer tensor, got torch.float32"),
    (lambda: lookup(MASK, C), TypeError, "indices must be an integer tensor, got torch.bool"),
    (lambda: lookup([1], C), TypeError, "indices must be an integer tensor, got .*list"),  # type: ignore[arg-type]
    (lambda: lookup(torch.tensor([1]), C[0]), ValueError, "codebook must have shape"),
    (lambda: lookup(torch.tensor([1], device="meta"), C), ValueError, "indices must be on the codebook's device cpu"),
    (
        lambda: vector_quantize(Z, C, commitment=-0.1),
        ValueError,
        "commitment must be finite and not negative, got -0.1",
    ),
    (lambda: vector_quantize(Z, C, commitment=math.inf), ValueError, "commitment must be finite .*got inf"),
    (lambda: vector_quantize(Z, C, token_mask=MASK.int()), TypeError, "token_mask must be a bool .*got torch.int32"),
    (lambda: vector_quantize(Z, C, token_mask=MASK[0]), ValueError, r"token_mask must have shape \[2, 3\].*got \[3\]"),
    (lambda: vector_quantize(Z, C, token_mask=MASK.to("meta")), ValueError, "token_mask must be on z's device cpu"),
    (lambda: vector_quantize(Z, C[:, :2]), ValueError, "z must have shape"),
    (lambda: vector_quantize(Z.long(), C), TypeError, "z must be a floating tensor"),
    (lambda: code_usage(torch.tensor([1]), 0), ValueError, "codebook_size must be at least 1, got 0"),
    (lambda: code_usage(torch.tensor([3]), 3), ValueError, r"indices must lie in \[0, 3\), got 3"),
    (lambda: code_usage(torch.tensor([0.5]), 3), TypeError, "indices must be an integer tensor"),
    (lambda: assign_codes(Z, C[:, :3]), ValueError, "z must have shape"),
    (lambda: assign_codes(Z, C.int()), TypeError, "codebook must be a floating tensor"),
    (lambda: update_usage(U.int(), U), TypeError, "average must be a floating tensor"),
    (lambda: update_usage(C, C), ValueError, r"average must have shape \[K\], got \[5, 4\]"),
    (lambda: update_usage(U, U[:4]), ValueError, r"usage must have shape \[5\] as average, got \[4\]"),
    (lambda: update_usage(U, U * 1j), TypeError, "usage must be a real tensor, got torch.complex64"),
    (lambda: update_usage(U, U.to("meta")), ValueError, "usage must be on average's device cpu, got meta"),
    (lambda: update_usage(U, U, decay=1.0), ValueError, "decay must be at least 0 and less than 1, got 1.0"),
    (lambda: restart_dead_codes(C, U[:4], Z), ValueError, r"average must have shape \[5\] as the codebook, got \[4\]"),
    (lambda: restart_dead_codes(C, U, Z[..., :3]), ValueError, "z must have shape"),
    (lambda: restart_dead_codes(C, U.to("meta"), Z), ValueError, "average must be on the codebook's device cpu"),
    (lambda: restart_dead_codes(C, U, Z, decay=math.nan), ValueError, "decay must be at least 0"),
    (lambda: perplexity(torch.ones(2, 2)), ValueError, r"usage must have shape \[K\], got \[2, 2\]"),
    (lambda: perplexity([1, 2]), TypeError, "usage must be a real tensor, got .*list"),  # type: ignore[arg-type]
    (lambda: perplexity(torch.ones(2) * 1j), TypeError, "usage must be a real tensor, got torch.complex64"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
