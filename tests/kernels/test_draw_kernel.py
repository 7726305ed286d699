"""The sampling head's Triton kernel against the reference: in Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from spectralar.kernels.draw import draw_tokens, gumbel_noise, kernel, mix_guidance, ops, philox_uniform, reference
from spectralar.kernels.draw.config import CHUNKED, DRAW, MARGIN, DrawConfig, draw_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
# Triton's interpreter computes bf16 wrongly.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 7},
    {"top_p": 0.6},
    {"top_k": 20, "top_p": 0.8, "temperature": 1.3},
]
# The interpreter computes with NumPy, which reports what a GPU does silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs the kernel on CPU tensors too, in Triton's interpreter."""
    if DEVICE == "cpu":
        monkeypatch.setattr(ops, "runs_kernels", lambda logits: logits.dtype in (torch.float32, torch.float16))


@pytest.fixture
def blocks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "draw_config", lambda codes: DrawConfig(block=16, warps=1))


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_as_reference(
    logits: Tensor,
    seeds: Tensor,
    position: int,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    **options: Any,
) -> None:
    """Equal tokens, with the reference on the CPU: on a GPU PyTorch divides by the temperature less exactly."""
    mixed = logits if unconditional is None else mix_guidance(logits, unconditional, guidance)
    expected = reference.draw_tokens(mixed, seeds, position, **options)
    other = None if unconditional is None else unconditional.to(DEVICE)
    found = draw_tokens(
        logits.to(DEVICE), seeds.to(DEVICE), position, unconditional=other, guidance=guidance, **options
    ).cpu()
    assert found.dtype == torch.int64
    wrong = (found != expected).nonzero().flatten().tolist()
    assert not wrong, f"{len(wrong)} rows, first {wrong[0]}: {found[wrong[0]]} instead of {expected[wrong[0]]}"


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("options", FILTERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", [64, 50])
def test_draws_of_the_reference(codes: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits, seeds = random_logits(6, codes, dtype=dtype), torch.arange(6) * 7919 - 5
    assert_as_reference(logits, seeds, 9, random_logits(6, codes, seed=1, dtype=dtype), 2.5, **options)


@pytest.mark.usefixtures("poisoned_empty", "blocks_of_16")
@pytest.mark.parametrize("options", [FILTERS[0], FILTERS[3]])
@pytest.mark.parametrize("codes", [50, 32])
def test_rows_in_chunks(codes: int, options: dict[str, Any]) -> None:
    assert_as_reference(random_logits(4, codes), torch.arange(4), 3, random_logits(4, codes, seed=1), 1.5, **options)


@pytest.mark.parametrize(("codes", "options"), [(1, {}), (1, {"top_p": 0.5}), (2, {"top_k": 1}), (3, {"top_p": 1e-9})])
def test_tiny_codebooks(codes: int, options: dict[str, Any]) -> None:
    assert_as_reference(random_logits(4, codes), torch.arange(4), 0, **options)


def test_launch_table() -> None:
    for codes in (1, 16, 300, 4096, 8192):
        config = draw_config(codes)
        assert config.block >= codes and config.block & (config.block - 1) == 0
    assert draw_config(max(DRAW) + 1) == CHUNKED
    # All weights at their largest still add up below 2^63.
    for codes in (1, 2, 3, 4096, 4097, 65_536, 10**6):
        assert codes * kernel.weight_scale(codes) + codes / 2 < 2**63


@pytest.mark.parametrize(
    ("top_k", "top_p", "block"),
    [
        (3, 0.0, 16),
        (5, 0.0, 16),
        (0, 0.5, 16),
        (0, 0.25, 16),
        (0, math.pi / 10, 16),
        (8, 0.5, 16),
        (8, math.e / 3, 16),
        (3, 0.0, 8),
        (0, 0.25, 8),
        (8, math.e / 3, 8),
    ],
)
def test_the_borders_of_the_filters(top_k: int, top_p: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "draw_config", lambda codes: DrawConfig(block, 1))
    rows = [[0.0] * 16, [0.0, 0.5] * 8, [1.0, -INF, 0.5, 0.5, 0.5, 1.0, 0.0, 0.5] + [0.0] * 8]
    rows += random_logits(3, 16, scale=1.0).tolist()
    noise = gumbel_noise(torch.arange(4000), 1, 16)
    logits, seeds = [], []
    for row in map(torch.tensor, rows):
        order = row.sort(descending=True, stable=True).indices
        kept = int(reference.filter_logits(row, top_k=top_k, top_p=top_p).isfinite().sum())
        # Seeds for which the last code that stays, or the first that does not, would win over all.
        for code in order[kept - 1 : kept + 1]:
            won = ((row + noise).argmax(1) == code).nonzero().flatten()
            logits += [row] * len(won[:1])
            seeds += won[:1].tolist()
    assert len(seeds) >= 2 * len(rows) - 1
    assert_as_reference(torch.stack(logits), torch.tensor(seeds), 1, top_k=top_k, top_p=top_p)


@triton.jit
def seed_as_number(seed, first, i_chunk, BLOCK: tl.constexpr):
    o_code = i_chunk * BLOCK + tl.arange(0, BLOCK)
    return tl.where(o_code == seed, 1.0, 0.0)


@triton.jit
def infinite_at_one(b_u):
    return tl.where(b_u == 1.0, float("inf"), 0.0)


TOP_P = [math.pi / 10, math.e / 4, math.pi / 3.15]


def row_of(kind: str, codes: int, seed: int) -> Tensor:
    """Logits of which a search may find the border hard."""
    draw = torch.Generator().manual_seed(seed)
    row = 3 * torch.randn(codes, generator=draw)
    numbers = torch.randint(4, (codes,), generator=draw)
    match kind:
        case "heavy":
            row = row / torch.rand(codes, generator=draw).clamp_min(1e-6)
        case "peaked":
            row[-1] += 40
        case "equal":
            row = torch.full((codes,), -2.5)
        case "few":
            row = numbers * 0.7
        case "forbidden":
            row[1:][numbers[1:] == 0] = -INF
        case "subnormal":
            row = numbers.cumsum(0) * 2.0**-145
        case "bf16":
            row = row.bfloat16().float()
    return row


@pytest.mark.skipif(DEVICE == "cuda", reason="what a compiled kernel calls cannot be replaced")
@pytest.mark.parametrize("kind", ["normal", "heavy", "peaked", "equal", "few", "forbidden", "subnormal", "bf16"])
def test_the_codes_that_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise that lets the code `seed` win, a code is drawn exactly if the filters keep it."""
    monkeypatch.setattr(kernel, "_uniform", seed_as_number)
    monkeypatch.setattr(kernel, "_gumbel", infinite_at_one)
    choose = random.Random(kind)
    filters = [(True, 0.0)] * 4 + [(False, p) for p in TOP_P] + [(True, p) for p in TOP_P]
    for case, (filters_top_k, top_p) in enumerate(filters):
        codes = choose.choice([1, 3, 33, 40, 47, 48])
        top_k = choose.randint(1, codes) if filters_top_k else 0
        temperature = choose.choice([1.0, 1.0, 0.1, 7.0, 1e-30, 1e30])
        row = row_of(kind, codes, case)
        tempered = (row - row.max()) / temperature
        kept = reference.filter_logits(tempered, top_k=top_k, top_p=top_p).isfinite()
        # The last that stay and the first that do not; what cannot be drawn is never asked for.
        order = tempered.sort(descending=True, stable=True).indices[: int(tempered.isfinite().sum())]
        last = int(kept.sum())
        asked = order[max(last - 2, 0) : last + 2]
        rows = row.expand(len(asked), codes)
        config = DrawConfig(block=16 if case % 3 == 0 else 64, warps=1)
        drawn = kernel.launch(rows, None, asked, 0, 1.0, temperature, top_k, top_p, False, config)
        assert (drawn == asked).tolist() == kept[asked].tolist(), (codes, top_k, top_p, temperature)


def test_scores_that_fp32_noise_cannot_tell_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every score is 5 but for rounding: the exact noise decides, and equal scores go to the lowest index.
    seeds = torch.arange(12)
    logits = 5 - gumbel_noise(seeds, 2, 60)
    scores = logits - logits.amax(1, keepdim=True) + gumbel_noise(seeds, 2, 60)
    assert (scores.amax(1) - scores.amin(1)).max() < MARGIN / 4
    for config in (DrawConfig(64, 1), DrawConfig(16, 1)):
        monkeypatch.setattr(kernel, "draw_config", lambda codes, config=config: config)
        rows = slice(0, 12 if config.block == 64 else 3)
        assert_as_reference(logits[rows], seeds[rows], 2)
    # With filters, the exact comparison looks at the same codes.
    monkeypatch.undo()
    monkeypatch.setattr(ops, "runs_kernels", lambda logits: True)
    monkeypatch.setattr(kernel, "MARGIN", 100.0)
    assert_as_reference(logits, seeds, 2, top_k=9, top_p=0.6)


@pytest.mark.parametrize("shift", [0.0, 1e30])
def test_extreme_values(shift: float) -> None:
    logits = random_logits(4, 33)
    logits[:, [0, 20]] = -INF
    assert_as_reference(logits, torch.tensor([-1, 2**63 - 1, -(2**63), 2**32]), 2**40, top_k=30, top_p=0.999)
    scaled = random_logits(4, 33) * 1e30 + shift
    assert_as_reference(scaled, torch.arange(4), 0, temperature=1e-30, top_p=0.9)
    assert_as_reference(scaled, torch.arange(4), 0, temperature=1e30)


def test_logits_that_differ_by_less_than_the_least_normal_number() -> None:
    logits = torch.arange(16) * 2.0**-140
    assert_as_reference(logits.expand(3, 16), torch.arange(3), 0, top_k=1)


def test_a_row_depends_on_nothing_else() -> None:
    both, seeds = random_logits(10, 40).to(DEVICE), (torch.arange(5) * 31 - 7).to(DEVICE)
    cond, uncond = both[:5], both[5:]
    options: dict[str, Any] = {"guidance": 1.5, "top_k": 12, "top_p": 0.9}
    whole = draw_tokens(cond, seeds, 4, unconditional=uncond, **options)
    for b in range(5):
        alone = draw_tokens(cond[b : b + 1], seeds[b : b + 1], 4, unconditional=uncond[b : b + 1], **options)
        assert torch.equal(alone, whole[b : b + 1])
    apart = both.T.contiguous().T  # codes are not side by side
    assert torch.equal(draw_tokens(apart[:5], seeds.int(), 4, unconditional=apart[5:], **options), whole)
    every_other = both.reshape(5, 2, 40).transpose(0, 1).reshape(10, 40)[:5]
    assert torch.equal(draw_tokens(both[::2], seeds, 4), draw_tokens(every_other, seeds, 4))
    assert torch.equal(draw_tokens(cond, seeds, 4, unconditional=uncond), draw_tokens(cond, seeds, 4))
    assert draw_tokens(cond[:0], seeds[:0], 4, unconditional=uncond[:0], **options).shape == (0,)


def test_position_on_the_device() -> None:
    logits, seeds = random_logits(5, 40).to(DEVICE), torch.arange(5, device=DEVICE)
    for position in (0, 1, 63, 2**33):
        found = draw_tokens(logits, seeds, torch.tensor(position, device=DEVICE))
        assert torch.equal(found, draw_tokens(logits, seeds, position))
    assert torch.equal(found.cpu(), reference.draw_tokens(logits.cpu(), seeds.cpu(), torch.tensor(2**33)))


def test_greedy() -> None:
    cond, uncond = random_logits(5, 40), random_logits(5, 40, seed=1)
    cond[0] = uncond[0] = 1.0
    assert_as_reference(cond, torch.arange(5), 0, uncond, 3.0, greedy=True, top_k=3)
    assert_as_reference(cond, torch.arange(5), 0, greedy=True)


def test_guided_logits_are_rounded_as_by_mix_guidance() -> None:
    # 1.5 times these is 2047.5 and 2049, both 2048 in fp16.
    cond = torch.tensor([[1365.0, 1366.0]]).half()
    assert_as_reference(cond, torch.arange(1), 0, torch.zeros_like(cond), 1.5, greedy=True)
    assert mix_guidance(cond, torch.zeros_like(cond), 1.5).tolist() == [[2048.0, 2048.0]]


@pytest.mark.usefixtures("blocks_of_16")
def test_greedy_in_chunks_takes_the_first_of_equals() -> None:
    logits = torch.zeros(2, 50)
    logits[0, [20, 21, 40]] = 1.0
    assert draw_tokens(logits.to(DEVICE), torch.arange(2, device=DEVICE), 0, greedy=True).tolist() == [20, 0]


def test_a_row_of_nan_gives_a_code() -> None:
    if DEVICE == "cpu":  # the public function looks at values in CPU memory
        drawn = kernel.launch(torch.full((1, 9), math.nan), None, torch.zeros(1).long(), 0, 1.0, 1.0, 3, 0.5, False)
    else:
        bad = torch.full((1, 9), math.nan, device=DEVICE)
        drawn = draw_tokens(bad, torch.zeros(1, device=DEVICE).long(), 0, top_k=3, top_p=0.5)
    assert 0 <= drawn.item() < 9


@triton.jit
def noise_kernel(p_u, p_noise, COUNT: tl.constexpr):
    o = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(p_noise + o, kernel._gumbel(tl.load(p_u + o)))


def test_noise_in_fp32_keeps_its_error_bound() -> None:
    count = 2**18 if DEVICE == "cpu" else 2**24
    # All values from 1/2 on lie on this grid: on a GPU half of its steps are tried, and the others below.
    steps = torch.arange(1, count // 2 + 1)
    drawn = philox_uniform(torch.tensor([1]), torch.arange(count // 4)).flatten()
    u = torch.cat([1 - steps * 2.0**-24, steps * 2.0**-32, drawn])
    u = u.float().clamp_min(2.0**-32)
    noise = torch.empty_like(u, device=DEVICE)
    noise_kernel[(len(u) // 4096,)](u.to(DEVICE), noise, COUNT=4096, enable_fp_fusion=False)
    exact = -(-u.double().log()).log()
    error = (noise.cpu().double() - exact).abs().max().item()
    print(f"largest error {error:.3g} of 2.5e-6")
    # Both scores also carry half a step below 32 for their sum, and the reference's two: for its noise and its sum.
    assert error <= 2.5e-6
    assert 2 * (2.5e-6 + 3 * 2.0**-20) < MARGIN


# The operator


def call(logits: Tensor, seeds: Tensor, position: Tensor | None) -> Tensor:
    return ops.draw_tokens(logits * 2, logits, seeds, 3, position, 1.5, 0.9, 5, 0.8, False)


def test_operator() -> None:
    logits, seeds = random_logits(3, 20).to(DEVICE), torch.arange(3, device=DEVICE)
    for other, position in itertools.product((None, logits), (None, torch.tensor(3, device=DEVICE))):
        torch.library.opcheck(ops.draw_tokens, (logits, other, seeds, 3, position, 1.5, 0.9, 5, 0.8, False))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for position in (None, torch.tensor(4, device=DEVICE)):
        assert torch.equal(compiled(logits, seeds, position), call(logits, seeds, position))


def test_fp64_runs_the_reference() -> None:
    logits, seeds = random_logits(3, 20).double(), torch.arange(3)
    mixed = mix_guidance(logits, logits.flip(0), 2.0)
    found = draw_tokens(
        logits.to(DEVICE), seeds.to(DEVICE), 1, unconditional=logits.flip(0).to(DEVICE), guidance=2.0, top_p=0.9
    )
    assert torch.equal(found.cpu(), reference.draw_tokens(mixed, seeds, 1, top_p=0.9))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance": 2.0}, ValueError, "guidance must be 1 without"),
        ({"guidance": INF, "unconditional": torch.zeros(2, 8)}, ValueError, "guidance must be finite"),
        ({"unconditional": torch.zeros(2, 7)}, ValueError, "unconditional must have shape"),
        ({"unconditional": torch.zeros(2, 8).half()}, TypeError, "unconditional must be torch.float32"),
        ({"unconditional": [0.0]}, TypeError, "unconditional must be a floating tensor"),
        ({"position": torch.zeros(1).long()}, ValueError, "position must be a tensor"),
        ({"position": torch.tensor(1, dtype=torch.int32)}, ValueError, "position must be a tensor"),
        ({"position": torch.tensor(1.0)}, TypeError, "position must be an integer tensor"),
        ({"position": torch.tensor(-2)}, ValueError, "position must not be negative, got -2"),
        ({"position": torch.zeros((), dtype=torch.int64, device="meta")}, ValueError, "position must be on the device"),
        ({"temperature": 1e-50}, ValueError, "temperature must be finite and positive"),
        ({"temperature": 1e39}, ValueError, "temperature must be finite and positive"),
    ],
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw_tokens(torch.zeros(2, 8), torch.arange(2), **{"position": 0, **options})
