"""The quantiser's Triton kernels: on CPU tensors in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.kernels.vq import assign_codes, config, launch, lookup, nearest_code, ops, reference, vector_quantize
from spectralar.kernels.vq.config import MAX_WIDTH, SCAN, ScanConfig, SettleConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS32 = torch.finfo(torch.float32).eps
# Several chunks of several tiles already for a hundred codes.
SMALL = ScanConfig(rows=32, codes=16, group=4, warps=2, stages=2)
# Triton's interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]

# The interpreter computes with NumPy, which reports what a GPU does silently.
NUMPY_WARNS = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators run the kernels on CPU tensors too, in Triton's interpreter, with tiles to its measure."""
    if DEVICE == "cuda":
        return

    def runs_kernels(*tensors: Tensor) -> bool:
        return tensors[0].shape[1] <= MAX_WIDTH and all(x.dtype in (torch.float32, torch.float16) for x in tensors)

    monkeypatch.setattr(ops, "runs_kernels", runs_kernels)
    for width in (16, 32):
        monkeypatch.setitem(SCAN, width, SMALL)
    # Two splits of several chunks, and programs of more rows: a program costs the interpreter as much as its work.
    monkeypatch.setattr(launch, "PROGRAMS", 4)
    monkeypatch.setattr(launch, "SETTLE", SettleConfig(rows=16, elements=4096, codes=128, splits=4, warps=1))
    monkeypatch.setattr(config, "ROW_ELEMENTS", 512)


def pair(
    vectors: int, codes: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, codebook = torch.randn(vectors, width, generator=generator), torch.randn(codes, width, generator=generator)
    return z.to(DEVICE, dtype), codebook.to(DEVICE, dtype)


def assert_nearest(z: Tensor, codebook: Tensor, normalize: bool, row: ScanConfig | None = SMALL) -> None:
    found = launch.nearest_code(z, codebook, normalize, config=row)
    expected = reference.nearest_code(z, codebook, normalize=normalize)
    wrong = (found != expected).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} rows, first {wrong[0]}: {found[wrong[0]]} instead of {expected[wrong[0]]}"


def unit(x: Tensor, normalize: bool) -> Tensor:
    return F.normalize(x, dim=-1) if normalize else x


# The search


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("vectors", "codes", "width"), [(37, 200, 12), (16, 64, 16), (1, 1, 4), (3, 2, 1), (17, 33, 40), (5, 16, 5)]
)
def test_the_choice_is_that_of_the_reference(
    vectors: int, codes: int, width: int, normalize: bool, dtype: torch.dtype
) -> None:
    assert_nearest(*pair(vectors, codes, width, dtype), normalize)


@pytest.mark.parametrize(("vectors", "codes", "width"), [(70, 300, 12), (5, 40, 100), (3, 40, 200)])
def test_the_launch_table(vectors: int, codes: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert_nearest(*pair(vectors, codes, width), True, row=None)
    assert_nearest(*pair(vectors, codes, width), False, row=None)


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_go_to_the_lowest_index(normalize: bool) -> None:
    z, codes = pair(20, 11, 12)
    # Every codeword in nine groups: more than the two that the scan remembers.
    copies = codes.repeat(9, 1)
    found = launch.nearest_code(z, copies, normalize, config=SMALL)
    assert torch.equal(found, reference.nearest_code(z, codes, normalize=normalize))
    # Twice in neighbouring groups, and twice within one group.
    for order in ([0, 1, 2, 0, 1, 2], [3, 3, 4, 4, 5, 5]):
        assert_nearest(z, codes[order], normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("copies", [2, 3, 9])
@pytest.mark.parametrize("apart", [1e-5, 3e-7])
def test_near_ties(apart: float, copies: int, normalize: bool) -> None:
    # Too close for the scan, in as many groups: two are compared in fp64, with more all codes are. Then within groups.
    z, codebook = pair(10, 11, 6)
    for near in (codebook.repeat(copies, 1), codebook.repeat_interleave(copies, 0)):
        near = near * (1 + apart * torch.randn(near.shape).to(DEVICE))
        assert_nearest(z, near, normalize)
        assert_nearest(near[:10], near, normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("z_scale", "code_scale"), [(1e-30, 1.0), (1e30, 1.0), (1.0, 1e-18), (1.0, 1e15), (1e-20, 1e10)]
)
def test_every_length_of_vectors(z_scale: float, code_scale: float, normalize: bool) -> None:
    z, codebook = pair(20, 70, 12)
    assert_nearest(z * z_scale, codebook * code_scale, normalize)


@pytest.mark.parametrize("normalize", [True, False])
def test_lengths_that_differ_within_the_batch(normalize: bool) -> None:
    z, codebook = pair(20, 70, 12)
    spread = torch.logspace(-6, 6, 70, device=DEVICE).unsqueeze(1)
    assert_nearest(z, codebook * spread, normalize)
    assert_nearest(z * spread[:20] ** 2, codebook * spread.flip(0), normalize)


@pytest.mark.parametrize("normalize", [True, False])
def test_zeros(normalize: bool) -> None:
    z, codebook = pair(18, 70, 12)
    z[3] = 0
    codebook[::9] = 0
    assert_nearest(z, codebook, normalize)
    # All scores negative but those of the zero codewords.
    assert_nearest(-codebook.abs().sum(0, keepdim=True), codebook.abs(), normalize)
    # Nothing past the end of the codebook enters: every real score is negative.
    assert_nearest(-z.abs(), codebook[1:2].abs().repeat(19, 1), normalize)
    assert_nearest(z, torch.zeros_like(codebook), normalize)
    # The scan does not tell negative cosines apart.
    assert_nearest(-z[4:].abs(), pair(1, 64, 12)[1].abs(), normalize)


@NUMPY_WARNS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_gives_a_valid_code(value: float, normalize: bool) -> None:
    z, codebook = pair(20, 70, 12)
    expected = reference.nearest_code(z, codebook, normalize=normalize)
    z[7, 2] = value
    found = launch.nearest_code(z, codebook, normalize, config=SMALL)
    assert 0 <= found[7] < 70
    others = torch.arange(20) != 7
    assert torch.equal(found[others], expected[others])
    codebook[11, 3] = value
    found = launch.nearest_code(z, codebook, normalize, config=SMALL)
    assert found.min() >= 0 and found.max() < 70


@pytest.mark.parametrize("normalize", [True, False])
def test_a_row_depends_on_nothing_else(normalize: bool) -> None:
    z, codebook = pair(40, 150, 12)
    whole = launch.nearest_code(z, codebook, normalize, config=SMALL)
    for start, stop in ((0, 1), (7, 30), (39, 40)):
        part = launch.nearest_code(z[start:stop].contiguous(), codebook, normalize, config=SMALL)
        assert torch.equal(part, whole[start:stop])
    order = torch.randperm(40, device=DEVICE)
    assert torch.equal(launch.nearest_code(z[order], codebook, normalize, config=SMALL), whole[order])
    other = ScanConfig(rows=32, codes=64, group=8, warps=2, stages=1)
    assert torch.equal(launch.nearest_code(z, codebook, normalize, config=other), whole)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width", [12, 100])
def test_the_scan_keeps_its_error_bound(width: int, normalize: bool) -> None:
    z, codebook = pair(64, 130, width)
    # A group of copies of one code: the scan tells the scores of groups only.
    copies = codebook.repeat_interleave(SMALL.group, 0)
    scores, _ = launch.scan(launch.prepare(copies, normalize, z, SMALL), normalize)
    wide_z, wide = z.double(), codebook.double()
    if normalize:
        exact = F.normalize(wide_z, dim=-1) @ F.normalize(wide, dim=-1).T
    else:
        longest = wide.norm(dim=-1).max()
        length = torch.maximum(wide_z.norm(dim=-1, keepdim=True), longest)
        exact = (wide_z @ wide.T - wide.square().sum(-1) / 2) / (longest * length)
    # The three best of all splits are the three best codes.
    three = scores.permute(2, 0, 1).flatten(1).topk(3).values
    error = (three - exact.topk(3).values).abs().max().item()
    assert error <= launch.scan_error(width)
    # The bound is one of rounding: with an fp16 product alone the error would be far above it.
    assert error <= 2.0**-16


def test_nothing_past_the_end_of_the_codebook_is_a_rival() -> None:
    _, codebook = pair(1, 33, 12)
    scores, _ = launch.scan(launch.prepare(codebook, True, codebook[-1:], SMALL), True)
    first, second = scores[:, :2].flatten().sort(descending=True).values[:2]
    assert abs(first - 1) <= launch.scan_error(12) and second < 0.999
    alone, _ = launch.scan(launch.prepare(codebook[:1], True, codebook[:1], SMALL), True)
    assert (alone[0, 1:] <= 0).all()


# Codewords, distances and losses


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_assignment(normalize: bool, dtype: torch.dtype) -> None:
    z, codebook = pair(42, 50, 12, dtype)
    codebook[5] = 0
    found = assign_codes(z.view(6, 7, 12), codebook, normalize=normalize)
    indices, _, distances = reference.assign_codes(z.double(), codebook.double(), normalize=normalize)
    assert torch.equal(found.indices.flatten(), indices)
    assert torch.equal(found.quantized, lookup(found.indices, codebook, normalize=normalize))
    plain = reference.lookup(found.indices, codebook, normalize=normalize)
    assert (found.quantized - plain).abs().max() <= (2 * EPS32 if normalize else 0)
    assert found.squared_distances.shape == (6, 7) and found.squared_distances.dtype == torch.float32
    budget = reference.assign_codes(z, codebook, normalize=normalize)[2] - distances
    assert (found.squared_distances.flatten() - distances).abs().max() <= 2 * budget.abs().max() + 4 * EPS32
    assert found.usage.tolist() == [int((indices == k).sum()) for k in range(50)]


def test_lookup_of_a_code_out_of_range_is_nan_on_a_device() -> None:
    _, codebook = pair(1, 9, 12)
    found = ops.lookup(torch.tensor([0, 9, -1, 8], device=DEVICE), codebook, True)
    assert found[1:3].isnan().all() and found[[0, 3]].isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
def test_codewords_map_to_themselves(normalize: bool) -> None:
    _, codebook = pair(1, 60, 12)
    found = assign_codes(codebook, codebook, normalize=normalize)
    assert torch.equal(found.indices, torch.arange(60, device=DEVICE))
    assert found.squared_distances.max() <= EPS32**2


Outcome = list[Tensor]


def outcome(quantize: Callable[..., Any], z: Tensor, codebook: Tensor, normalize: bool, mask: Tensor | None) -> Outcome:
    """Both losses, and the gradients of all outputs together into both inputs."""
    z, codebook = z.detach().requires_grad_(), codebook.detach().requires_grad_()
    result = quantize(z, codebook, normalize=normalize, commitment=0.4, token_mask=mask)
    weight = torch.linspace(-1, 1, z.numel(), dtype=torch.float64, device=DEVICE).view(z.shape)
    total = (result.quantized * weight.to(result.quantized.dtype)).sum()
    total = total + 3 * result.commitment_loss + 2 * result.codebook_loss
    grads = torch.autograd.grad(total, (z, codebook))
    return [result.commitment_loss.detach(), result.codebook_loss.detach(), *grads]


def assert_within_budget(found: Outcome, plain: Outcome, exact: Outcome) -> None:
    for name, ours, theirs, truth in zip(
        ("commitment", "codebook", "d/dz", "d/dcodebook"), found, plain, exact, strict=True
    ):
        rounding = 4 * torch.finfo(ours.dtype).eps * truth.abs().max()
        budget = 2 * (theirs.double() - truth).abs().max() + rounding
        error = (ours.double() - truth).abs()
        assert error.max() <= budget, f"{name}: {error.max():.3g} over {budget:.3g} at {int(error.argmax())}"


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("masked", ["none", "some", "nothing"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_losses_and_gradients(normalize: bool, dtype: torch.dtype, masked: str) -> None:
    z, codebook = pair(45, 21, 6, dtype)
    mask = {"none": None, "some": torch.rand(45, device=DEVICE) < 0.5, "nothing": torch.zeros(45, device=DEVICE).bool()}
    arguments = (normalize, mask[masked])
    found = outcome(vector_quantize, z, codebook, *arguments)
    plain = outcome(reference.vector_quantize, z, codebook, *arguments)
    exact = outcome(reference.vector_quantize, z.double(), codebook.double(), *arguments)
    assert_within_budget(found, plain, exact)
    again = outcome(vector_quantize, z, codebook, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_a_collapsed_codebook(normalize: bool) -> None:
    # All vectors share one code; the others get exactly no gradient.
    z, codebook = pair(64, 7, 5)
    z, codebook = z.abs() + 1, torch.cat([z[:1].abs() + 1, -codebook.abs() - 5])
    found, plain, exact = (
        outcome(quantize, z.to(dtype), codebook.to(dtype), normalize, None)
        for quantize, dtype in (
            (vector_quantize, torch.float32),
            (reference.vector_quantize, torch.float32),
            (reference.vector_quantize, torch.float64),
        )
    )
    assert_within_budget(found, plain, exact)
    assert found[3][0].ne(0).all() and found[3][1:].eq(0).all()


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_gradients_of_vectors_far_apart_in_length(scale: float) -> None:
    z, codebook = (scale * x for x in pair(40, 9, 6))
    z = z * torch.logspace(-4, 4, 40, device=DEVICE).unsqueeze(1)
    found = outcome(vector_quantize, z, codebook, False, None)
    plain = outcome(reference.vector_quantize, z, codebook, False, None)
    assert_within_budget(found, plain, outcome(reference.vector_quantize, z.double(), codebook.double(), False, None))


def test_gradients_of_short_vectors_and_codewords() -> None:
    z, codebook = pair(20, 9, 6)
    z[4], z[5], codebook[2], codebook[3] = 0, 1e-15, 0, -1e-15 * codebook[3].abs()
    found = outcome(vector_quantize, z, codebook, True, None)
    exact = outcome(reference.vector_quantize, z.double(), codebook.double(), True, None)
    for ours, truth in zip(found, exact, strict=True):
        assert ours.isfinite().all()
        assert ((ours - truth).abs() <= 16 * EPS32 * truth.abs().amax(-1, keepdim=True)).all()


@NUMPY_WARNS
def test_not_finite_vectors_show_in_the_gradients() -> None:
    for normalize in (True, False):
        z, codebook = pair(20, 9, 6)
        z[4, 1], z[11, 0] = float("nan"), float("inf")
        z, codebook = z.requires_grad_(), codebook.requires_grad_()
        result = vector_quantize(z, codebook, normalize=normalize)
        assert result.indices.min() >= 0 and result.indices.max() < 9
        assert result.codebook_loss.isnan() or result.codebook_loss.isinf()
        result.codebook_loss.backward()
        bad = set(result.indices[[4, 11]].tolist())
        assert codebook.grad is not None
        assert {k for k in range(9) if codebook.grad[k].isnan().any()} == bad


@pytest.mark.parametrize("normalize", [True, False])
def test_lookup_gradient(normalize: bool) -> None:
    _, codebook = pair(1, 11, 6)
    indices = torch.randint(0, 8, (5, 7), device=DEVICE)
    weight = torch.randn(5, 7, 6, device=DEVICE) * torch.logspace(-5, 5, 7, device=DEVICE).unsqueeze(-1)

    def gradient(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        leaf = codebook.detach().to(dtype).clone().requires_grad_()
        (function(indices, leaf, normalize=normalize) * weight.to(dtype)).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    found = gradient(lookup, torch.float32)
    exact, plain = gradient(reference.lookup, torch.float64), gradient(reference.lookup, torch.float32)
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4 * EPS32 * exact.abs().max()
    assert found[8:].eq(0).all()
    assert torch.equal(found, gradient(lookup, torch.float32))


def test_only_the_wanted_gradient() -> None:
    z, codebook = pair(10, 9, 6)
    leaf = z.clone().requires_grad_()
    result = vector_quantize(leaf, codebook)
    assert result.quantized.requires_grad and not result.indices.requires_grad
    [alone] = torch.autograd.grad(result.commitment_loss, leaf)
    both = vector_quantize(leaf, codebook.clone().requires_grad_())
    assert torch.equal(torch.autograd.grad(both.commitment_loss, leaf)[0], alone)


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (12,), (3, 1, 2, 12)])
def test_shapes(shape: tuple[int, ...]) -> None:
    _, codebook = pair(1, 20, 12)
    z = torch.randn(shape).to(DEVICE).requires_grad_()
    leaf = codebook.clone().requires_grad_()
    result = vector_quantize(z, leaf)
    assert result.quantized.shape == shape and result.indices.shape == shape[:-1]
    (result.quantized.sum() + result.commitment_loss + result.codebook_loss).backward()
    assert z.grad is not None and z.grad.shape == shape
    assert leaf.grad is not None and leaf.grad.isfinite().all()
    assert assign_codes(z, codebook).squared_distances.shape == shape[:-1]
    assert lookup(result.indices, codebook).shape == shape


def test_strides_change_nothing() -> None:
    z, codebook = pair(24, 30, 12)
    strided = z.view(4, 6, 12).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    across = codebook.T.contiguous().T
    assert not strided.is_contiguous() and not across.is_contiguous()
    for normalize in (True, False):
        expected = outcome(vector_quantize, z.view(4, 6, 12), codebook, normalize, None)
        found = outcome(vector_quantize, strided, across, normalize, None)
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert torch.equal(nearest_code(strided[1:, ::2], across), nearest_code(z.view(4, 6, 12), codebook)[1:, ::2])


def test_a_column_of_indices_and_of_a_mask() -> None:
    # The first token of every image, as the shortest prefix is decoded: numbers in memory with gaps between them.
    z, codebook = pair(40, 30, 12)
    z = z.view(8, 5, 12)[:, :1]
    indices = torch.randint(30, (8, 5), device=DEVICE)[:, :1]
    mask = (torch.rand(8, 5, device=DEVICE) < 0.5)[:, :1]

    def gradient(chosen: Tensor) -> Tensor:
        leaf = codebook.clone().requires_grad_()
        (lookup(chosen, leaf) * z).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    assert torch.equal(lookup(indices, codebook), lookup(indices.contiguous(), codebook))
    assert torch.equal(gradient(indices), gradient(indices.contiguous()))
    expected = outcome(vector_quantize, z, codebook, True, mask.contiguous())
    found = outcome(vector_quantize, z, codebook, True, mask)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_wide_and_fp64_inputs_run_the_reference() -> None:
    for dtype, width in ((torch.float64, 12), (torch.float32, MAX_WIDTH + 1)):
        z, codebook = pair(9, 20, width, dtype)
        assert not ops.runs_kernels(codebook, z)
        assert torch.equal(nearest_code(z, codebook), reference.nearest_code(z, codebook))


# As operators of PyTorch


def samples() -> list[tuple[Any, tuple[Any, ...]]]:
    z, codebook = pair(6, 9, 4)
    indices, mask = torch.tensor([[0, 8], [3, 3]], device=DEVICE), torch.tensor([True, False, True] * 2, device=DEVICE)
    leaf, leaves = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    one = torch.ones((), device=DEVICE)
    return [
        (ops.nearest_code, (z, codebook, True)),
        (ops.assign_codes, (z, codebook, False)),
        (ops.lookup, (indices, leaves, True)),
        (ops.vector_quantize, (leaf, leaves, mask, True, 0.25)),
        (ops.vector_quantize, (leaf, codebook, None, False, 0.25)),
        (ops.vectors_backward, (z, one, z, codebook, mask.long(), mask, True, 0.25)),
        (ops.vectors_backward, (None, one, z, codebook, mask.long(), None, False, 0.25)),
        (ops.codebook_backward, (one, z, codebook, mask.long(), mask, True)),
        (ops.lookup_backward, (torch.ones(2, 2, 4, device=DEVICE), indices, codebook, True)),
    ]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("sample", range(9))
def test_operators(sample: int, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels:
        monkeypatch.setattr(ops, "runs_kernels", lambda *tensors: False)
    operator, arguments = samples()[sample]
    torch.library.opcheck(operator, arguments)


def test_compiled_whole() -> None:
    def step(z: Tensor, codebook: Tensor, mask: Tensor) -> Tensor:
        result = vector_quantize(z, codebook, token_mask=mask)
        return result.quantized.sin().sum() + result.commitment_loss + result.codebook_loss

    mask = torch.tensor([True, False] * 5, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for function in (step, compiled):
        leaves = [t.requires_grad_() for t in pair(10, 9, 4)]
        grads = torch.autograd.grad(function(*leaves, mask), leaves)
        if function is step:
            expected = grads
    assert all(torch.equal(a, b) for a, b in zip(expected, grads, strict=True))
