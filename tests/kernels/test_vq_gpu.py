"""The quantiser on a GPU: large sizes, bf16, memory, CUDA graphs, the compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.kernels.vq import assign_codes, launch, lookup, nearest_code, reference, vector_quantize
from spectralar.kernels.vq.config import SCAN

pytestmark = pytest.mark.gpu


def pair(
    vectors: int, codes: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    z = torch.randn(vectors, width, generator=generator, device="cuda", dtype=dtype)
    return z, torch.randn(codes, width, generator=generator, device="cuda", dtype=dtype)


def assert_nearest(z: Tensor, codebook: Tensor, normalize: bool) -> None:
    """The reference's codes, but for pairs of codes that even fp64 tells apart only by its rounding."""
    found, expected = (search(z, codebook, normalize=normalize) for search in (nearest_code, reference.nearest_code))
    differ = (found != expected).nonzero().flatten()
    ours, theirs = (scores(z, codebook[chosen], normalize)[differ] for chosen in (found, expected))
    wrong = differ[(ours - theirs).abs() > 1e-15 * (1 + theirs.abs())]
    assert not len(wrong), f"{len(wrong)} rows, first {wrong[0]}: {found[wrong[0]]} instead of {expected[wrong[0]]}"


def scores(z: Tensor, codewords: Tensor, normalize: bool) -> Tensor:
    """Of each vector with its codeword, in fp64."""
    z, codewords = z.double(), codewords.double()
    if normalize:
        return (F.normalize(z, dim=-1) * F.normalize(codewords, dim=-1)).sum(-1)
    return (z * codewords).sum(-1) - codewords.square().sum(-1) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("vectors", "codes", "width"),
    [
        (16_384, 4096, 12),
        (174_080, 4096, 32),
        (16_384, 65_536, 16),
        (3001, 262_144, 8),
        (5000, 4096, 4),
        (20_001, 16, 12),
        (1999, 8191, 64),
        (1500, 5000, 128),
        (1001, 3000, 200),
        (700, 2049, 256),
    ],
)
def test_large(vectors: int, codes: int, width: int, normalize: bool, dtype: torch.dtype) -> None:
    assert_nearest(*pair(vectors, codes, width, dtype), normalize)


@pytest.mark.parametrize("normalize", [True, False])
def test_near_ties_and_duplicates(normalize: bool) -> None:
    z, few = pair(8192, 64, 12)
    assert_nearest(z, few.repeat(64, 1), normalize)
    for apart in (1e-4, 1e-6, 1e-7):
        noise = torch.randn(4096, 12, generator=torch.Generator("cuda").manual_seed(1), device="cuda")
        for near in (few.repeat(64, 1), few.repeat_interleave(64, 0)):
            assert_nearest(z, near * (1 + apart * noise), normalize)
    assert_nearest(torch.zeros_like(z), few, normalize)
    # The scan does not tell negative cosines apart.
    assert_nearest(-z.abs(), few.abs(), normalize)


def test_no_kernel_starts_before_its_numbers_are_there() -> None:
    # On a Hopper each of the three kernels is launched while the one before runs, in memory that the last call used.
    for seed in range(50):
        z, codebook = pair(16_384, 4096, 12, seed=seed)
        found = [nearest_code(z, codebook) for _ in range(4)]
        assert all(torch.equal(found[0], again) for again in found[1:])
        assert_nearest(z, codebook, True)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width", [12, 16, 64, 256])
def test_the_scan_keeps_its_error_bound_where_all_products_add_up(width: int, normalize: bool) -> None:
    # Positive components: every rounding and every truncation of the tensor cores' sums goes the same way.
    z, codebook = (x.abs() + 0.5 for x in pair(4096, 2048, width))
    config = SCAN[max(16, width)]
    copies = codebook.repeat_interleave(config.group, 0)
    scores, _ = launch.scan(launch.prepare(copies, normalize, z), normalize)
    wide_z, wide = z.double(), codebook.double()
    if normalize:
        exact = F.normalize(wide_z, dim=-1) @ F.normalize(wide, dim=-1).T
    else:
        longest = wide.norm(dim=-1).max()
        length = torch.maximum(wide_z.norm(dim=-1, keepdim=True), longest)
        exact = (wide_z @ wide.T - wide.square().sum(-1) / 2) / (longest * length)
    three = scores.permute(2, 0, 1).flatten(1).topk(3).values
    error = (three - exact.topk(3).values).abs().max().item()
    print(f"width {width}, normalize {normalize}: error {error:.3g}, bound {launch.scan_error(width):.3g}")
    assert error <= launch.scan_error(width)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_nothing_else(dtype: torch.dtype, normalize: bool) -> None:
    z, codebook = pair(50_000, 4096, 12, dtype)
    whole = assign_codes(z, codebook, normalize=normalize)
    for start, stop in ((0, 1), (777, 1033), (17, 40_000)):
        part = assign_codes(z[start:stop], codebook, normalize=normalize)
        for ours, theirs in zip(part[:3], whole[:3], strict=True):
            assert torch.equal(ours, theirs[start:stop])
    assert torch.equal(whole.quantized, lookup(whole.indices, codebook, normalize=normalize))
    assert torch.equal(lookup(whole.indices[5], codebook, normalize=normalize), whole.quantized[5])


def test_more_than_two_to_the_31_scores() -> None:
    z, codebook = pair(33_000, 65_536, 8)
    assert z.shape[0] * codebook.shape[0] > 2**31
    assert_nearest(z, codebook, True)


def test_more_than_two_to_the_31_components() -> None:
    vectors = 2**27 + 1000
    codebook = pair(1, 16, 16, torch.bfloat16)[1]
    z = torch.empty(vectors, 16, device="cuda", dtype=torch.bfloat16).normal_()
    found = vector_quantize(z, codebook)
    for rows in (slice(0, 500), slice(-1500, None)):
        alone = vector_quantize(z[rows].clone(), codebook)
        assert torch.equal(found.indices[rows], alone.indices)
        assert torch.equal(found.quantized[rows], alone.quantized)
        assert torch.equal(alone.indices, reference.nearest_code(z[rows], codebook))


def test_no_table_of_scores() -> None:
    z, codebook = pair(65_536, 65_536, 16)
    nearest_code(z, codebook)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nearest_code(z, codebook)
    # The fp16 codebook, 64 bytes a code; six numbers and an index a vector. The scores would be 16 GiB.
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_the_same_to_the_bit_and_within_the_budget(normalize: bool) -> None:
    z, codebook = pair(65_536, 1024, 12)
    mask = torch.rand(65_536, device="cuda", generator=torch.Generator("cuda").manual_seed(2)) < 0.6

    def gradients(quantize: object, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (z, codebook)]
        result = quantize(*leaves, normalize=normalize, token_mask=mask)  # type: ignore[operator]
        return torch.autograd.grad(result.quantized.sin().sum() + result.commitment_loss + result.codebook_loss, leaves)

    found = gradients(vector_quantize, torch.float32)
    plain, exact = (
        gradients(reference.vector_quantize, torch.float32),
        gradients(reference.vector_quantize, torch.float64),
    )
    for ours, theirs, truth in zip(found, plain, exact, strict=True):
        budget = 2 * (theirs - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= budget
    for _ in range(3):
        again = gradients(vector_quantize, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_in_a_cuda_graph() -> None:
    z, codebook = (x.requires_grad_() for x in pair(3000, 500, 12))

    def step() -> tuple[Tensor, ...]:
        result = vector_quantize(z, codebook)
        loss = result.quantized.sin().sum() + result.commitment_loss + result.codebook_loss
        return (*(x.detach() for x in result), *torch.autograd.grad(loss, (z, codebook)))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (3, 4):
        with torch.no_grad():
            for held, fresh in zip((z, codebook), pair(3000, 500, 12, seed=seed), strict=True):
                held.copy_(fresh)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_compiled_whole() -> None:
    def loss(z: Tensor, codebook: Tensor) -> Tensor:
        result = vector_quantize(z * 2, codebook)
        return result.quantized.sin().sum() + result.commitment_loss + result.codebook_loss

    leaves = [x.requires_grad_() for x in pair(2000, 300, 12, torch.bfloat16)]
    plain = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours - theirs).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * theirs.abs().max()
