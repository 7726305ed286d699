"""The sampling head on a GPU: large codebooks and batches, its distribution, bf16, CUDA graphs, the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from spectralar.kernels.draw import draw_tokens, filter_logits, gumbel_noise, kernel, mix_guidance, reference
from spectralar.kernels.draw.config import DrawConfig

pytestmark = pytest.mark.gpu

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 900},
    {"top_p": 0.96},
    {"top_k": 900, "top_p": 0.96, "temperature": 0.9},
]


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_as_reference(found: Tensor, mixed: Tensor, seeds: Tensor, position: int, **options: Any) -> None:
    """The tokens of the reference on the CPU, but where fp64 arithmetic at the border of top-p may round otherwise."""
    mixed, seeds, found = mixed.cpu(), seeds.cpu(), found.cpu()
    expected = reference.draw_tokens(mixed, seeds, position, **options)
    differ = (found != expected).nonzero().flatten()
    print(f"{len(differ)} of {len(found)} draws differ")
    assert len(differ) <= 1e-4 * len(found)
    mixed = mixed.float()
    tempered = (mixed - mixed.amax(1, keepdim=True)) / options.get("temperature", 1.0)
    for row in differ.tolist():
        kept = reference.filter_logits(tempered[row : row + 1], top_k=options.get("top_k", 0))
        ordered, order = kept[0].sort(descending=True, stable=True)
        share = ordered.double().softmax(0)
        ahead = (share.cumsum(0) - share)[order.argsort()]
        scores = kept[0] + gumbel_noise(seeds[row : row + 1], position, mixed.shape[1])[0]
        ours, theirs = found[row], expected[row]
        near_tie = (scores[ours] - scores[theirs]).abs() <= 2 * torch.finfo(torch.float32).eps * scores[theirs].abs()
        at_border = min(abs(float(ahead[code]) - options.get("top_p", 0.0)) for code in (ours, theirs)) < 1e-9
        assert near_tie or at_border, f"row {row}: {ours} instead of {theirs}"


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "codes"), [(1, 4096), (64, 4096), (256, 4096), (97, 1000), (64, 8192), (40, 16_384), (16, 65_536)]
)
def test_draws_of_the_reference(batch: int, codes: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    both = torch.cat([random_logits(batch, codes, seed=s, dtype=dtype) for s in (0, 1)])
    seeds = torch.arange(batch) * 7919 - 5
    held, mixed = both.cuda(), mix_guidance(both[:batch], both[batch:], 1.5)
    found = draw_tokens(held[:batch], seeds.cuda(), 63, unconditional=held[batch:], guidance=1.5, **options)
    assert_as_reference(found, mixed, seeds, 63, **options)
    for _ in range(3):
        again = draw_tokens(held[:batch], seeds.cuda(), 63, unconditional=held[batch:], guidance=1.5, **options)
        assert torch.equal(again, found)


def test_many_draws_differ_from_the_reference_hardly_ever() -> None:
    logits = random_logits(8, 4096).repeat(128, 1)
    seeds = torch.arange(len(logits))
    for position, options in enumerate(FILTERS):
        found = draw_tokens(logits.cuda(), seeds.cuda(), position, **options)
        assert_as_reference(found, logits, seeds, position, **options)


def test_scores_that_fp32_noise_cannot_tell_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = torch.arange(64)
    for codes in (4096, 40_000):
        logits = 5 - gumbel_noise(seeds, 2, codes)
        assert_as_reference(draw_tokens(logits.cuda(), seeds.cuda(), 2), logits, seeds, 2)
    # The exact noise alone, everywhere, gives the same.
    logits = random_logits(64, 4096).cuda()
    whole = [draw_tokens(logits, seeds.cuda(), 2, **options) for options in FILTERS]
    monkeypatch.setattr(kernel, "MARGIN", 100.0)
    for options, tokens in zip(FILTERS, whole, strict=True):
        assert torch.equal(draw_tokens(logits, seeds.cuda(), 2, **options), tokens)


@pytest.mark.parametrize("options", FILTERS)
def test_a_row_depends_on_nothing_else(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logits, seeds = random_logits(256, 4096).bfloat16().cuda(), torch.arange(256, device="cuda")
    whole = draw_tokens(logits, seeds, 7, **options)
    order = torch.randperm(256, device="cuda")
    assert torch.equal(draw_tokens(logits[order], seeds[order], 7, **options), whole[order])
    for b in (0, 100, 255):
        assert torch.equal(draw_tokens(logits[b : b + 1], seeds[b : b + 1], 7, **options), whole[b : b + 1])
    # Nor on how a row is cut: probabilities are summed as integers.
    for config in (DrawConfig(1024, 4), DrawConfig(4096, 4), DrawConfig(4096, 16)):
        monkeypatch.setattr(kernel, "draw_config", lambda codes, config=config: config)
        assert torch.equal(draw_tokens(logits, seeds, 7, **options), whole)


@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("codes", [32, 4096])
def test_draws_follow_the_distribution(codes: int, options: dict[str, Any]) -> None:
    count = 100_000
    options = {**options, "top_k": min(options.get("top_k", 0), codes // 2)}
    logits = random_logits(codes)
    drawn = draw_tokens(logits.cuda().expand(count, codes), torch.arange(count, device="cuda"), 3, **options)
    tempered = logits / options.get("temperature", 1.0)
    kept = filter_logits(tempered, top_k=options["top_k"], top_p=options.get("top_p", 0.0))
    expected = count * kept.double().softmax(0)
    observed = drawn.cpu().bincount(minlength=codes).double()
    assert (observed[expected == 0] == 0).all()
    # Codes that are expected less than ten times count as one.
    rare = expected < 10
    expected, observed = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (expected, observed))
    likely = expected > 0
    statistic = ((observed - expected)[likely].square() / expected[likely]).sum().item()
    # Fixed seeds: one draw of the p-value, which lies below 1e-4 once in ten thousand if the sampler is right.
    assert chi2.sf(statistic, int(likely.sum()) - 1) > 1e-4


def test_more_than_two_to_the_31_logits() -> None:
    rows = 2**31 // 65_536 + 3
    logits = torch.zeros(rows, 65_536, device="cuda", dtype=torch.bfloat16)
    logits[-1] = random_logits(65_536).bfloat16()
    seeds = torch.arange(rows, device="cuda")
    found = draw_tokens(logits, seeds, 1, top_k=100)
    assert torch.equal(found[-1:], draw_tokens(logits[-1:].clone(), seeds[-1:], 1, top_k=100))


def test_one_graph_serves_all_positions() -> None:
    both, seeds = random_logits(128, 4096).cuda(), torch.arange(64, device="cuda")
    position = torch.zeros((), dtype=torch.int64, device="cuda")
    options: dict[str, Any] = {"guidance": 1.5, "top_k": 900, "top_p": 0.96}

    def step() -> Tensor:
        return draw_tokens(both[:64], seeds, position, unconditional=both[64:], **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
        position.add_(1)
    for number in range(5):
        graph.replay()
        expected = draw_tokens(both[:64], seeds, number, unconditional=both[64:], **options)
        assert torch.equal(captured, expected)
    assert position.item() == 5


def test_no_synchronisation_and_no_memory() -> None:
    logits, seeds = random_logits(256, 4096).cuda(), torch.arange(256, device="cuda")
    draw_tokens(logits, seeds, 0, top_k=900, top_p=0.96)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = draw_tokens(logits, seeds, 0, top_k=900, top_p=0.96)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.shape == (256,)
    assert torch.cuda.max_memory_allocated() - before <= 4096


def test_compiled_whole() -> None:
    logits, seeds = random_logits(16, 4096).cuda(), torch.arange(16, device="cuda")

    def draw(logits: Tensor, position: Tensor) -> Tensor:
        return draw_tokens(logits * 2, seeds, position, unconditional=logits, guidance=1.5, top_k=50) + 1

    position = torch.tensor(5, device="cuda")
    assert torch.equal(torch.compile(draw, fullgraph=True)(logits, position), draw(logits, position))
