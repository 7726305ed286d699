"""The sampling head: random bits against Philox and Triton, draws against the distribution they claim."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from spectralar.kernels.draw import draw_tokens, filter_logits, gumbel_noise, mix_guidance, philox_uniform
from spectralar.kernels.draw import reference as draw_reference

INF = math.inf

# Known-answer vectors published with Random123: counter, key, result.
PHILOX_VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]

SEEDS = [0, 1, 7, 2**31, 2**32 + 3, 2**63 - 1, -1, -(2**63)]
OFFSETS = [0, 1, 2, 4095, 64 * 4096, 2**31 - 1, 2**31, 2**32, 2**40 + 17, 2**63 - 1, -1, -(2**40)]

TRITON_PROGRAM = """
import json, sys
import torch, triton, triton.language as tl

@triton.jit
def uniform_kernel(p_seed, p_offset, p_bits, LENGTH: tl.constexpr):
    o = tl.arange(0, LENGTH)
    u = tl.rand4x(tl.load(p_seed + o), tl.load(p_offset + o))
    for word in tl.static_range(4):
        tl.store(p_bits + 4 * o + word, u[word].to(tl.int32, bitcast=True))

seeds, offsets = json.loads(sys.argv[1])
bits = torch.zeros(len(seeds), 4, dtype=torch.int32)
uniform_kernel[(1,)](torch.tensor(seeds), torch.tensor(offsets), bits, len(seeds))
print(json.dumps(bits.tolist()))
"""


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    words = draw_reference.philox(
        tuple(torch.tensor(word) for word in counter), (torch.tensor(key[0]), torch.tensor(key[1]))
    )
    assert [int(word) for word in words] == expected


def test_philox_is_tritons_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(5)
    pairs = [(seed, offset) for seed in SEEDS for offset in OFFSETS]
    drawn = torch.randint(-(2**63), 2**63 - 1, (1024 - len(pairs), 2), generator=generator)
    pairs += [(int(a), int(b)) for a, b in drawn]
    seeds, offsets = [list(column) for column in zip(*pairs, strict=True)]
    program = tmp_path / "uniform.py"  # Triton reads a kernel's source from its file.
    program.write_text(TRITON_PROGRAM)
    done = subprocess.run(
        [sys.executable, str(program), json.dumps([seeds, offsets])],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    expected = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.int32)
    found = philox_uniform(torch.tensor(seeds), torch.tensor(offsets)).view(torch.int32)
    assert torch.equal(found, expected)


def test_uniform_is_in_range_and_uniform() -> None:
    u = philox_uniform(torch.arange(64)[:, None], torch.arange(4096))
    assert u.shape == (64, 4096, 4) and u.dtype == torch.float32
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 256, 0, 1).double()
    mean = u.numel() / 256
    statistic = ((counts - mean).square() / mean).sum().item()
    assert chi2.sf(statistic, 255) > 1e-3
    assert len(u[:, :16].unique()) > 4000


def test_extreme_words_become_floats_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, expected in ((0, 0.0), (0xFFFFFFFF, 0.0), (0x7FFFFFFF, 1 - 2.0**-24), (0x80000000, 1 - 2.0**-24)):
        monkeypatch.setattr(draw_reference, "philox", lambda *_, w=word: (torch.tensor([w]),) * 4)
        assert philox_uniform(torch.tensor([0]), torch.tensor([0])).tolist() == [[expected] * 4]
        noise = gumbel_noise(torch.tensor([0]), 0, 1).item()
        assert noise == pytest.approx(-3.0992 if expected == 0 else 16.6355, abs=1e-4)


def test_gumbel_noise() -> None:
    seeds = torch.tensor([3, -9, 2**40])
    noise = gumbel_noise(seeds, 5, 1000)
    u = philox_uniform(seeds[:, None], 5 * 250 + torch.arange(250)).flatten(1).double()
    assert noise.dtype == torch.float32 and noise.shape == (3, 1000)
    assert torch.equal(noise, (-(-u.log()).log()).float())
    many = gumbel_noise(torch.arange(100), 2, 1000).double()
    # Mean 0.5772 and variance pi^2 / 6; four standard errors.
    assert abs(many.mean() - 0.5772156649) <= 4 * math.sqrt(math.pi**2 / 6 / many.numel())
    assert abs(many.var() / (math.pi**2 / 6) - 1) <= 4 * math.sqrt(4.4 / many.numel())


@pytest.mark.parametrize("codes", [1, 2, 3, 5, 1001])
def test_noise_by_its_definition(codes: int) -> None:
    """A number of codes that is not divided by four leaves words of the last offset unused."""
    offsets = math.ceil(codes / 4)
    for position in (0, 3, 2**40):
        noise = gumbel_noise(torch.tensor([-4]), position, codes)[0]
        assert noise.shape == (codes,)
        for code in range(0, codes, 1 if codes < 10 else 97):
            u = philox_uniform(torch.tensor(-4), torch.tensor(position * offsets + code // 4))[code % 4].double()
            assert noise[code] == (-(-u.log()).log()).float()


def test_noise_of_neighbouring_positions_does_not_overlap() -> None:
    seed = torch.tensor([11])
    rows = torch.cat([gumbel_noise(seed, position, 500) for position in range(20)]).flatten()
    assert torch.equal(rows, gumbel_noise(seed, 0, 10_000)[0])
    assert len(rows.unique()) > 9990


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 0.0), (0.5, 0, 0.0), (2.0, 6, 0.0), (1.0, 8, 0.7)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    count = 40_000
    logits = random_logits(12)
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    drawn = draw_tokens(logits.expand(count, 12), torch.arange(count), 3, **options)
    probability = filter_logits(logits / temperature, top_k=top_k, top_p=top_p).double().softmax(0)
    observed = drawn.bincount(minlength=12).double()
    assert (observed[probability == 0] == 0).all()
    likely = probability > 0
    expected = count * probability[likely]
    statistic = ((observed[likely] - expected).square() / expected).sum().item()
    # Fixed seeds: one draw of the p-value, which lies below 1e-3 once in a thousand if the sampler is right.
    assert chi2.sf(statistic, int(likely.sum()) - 1) > 1e-3


def test_positions_and_seeds_are_independent() -> None:
    logits = torch.zeros(20_000, 4)
    first = draw_tokens(logits, torch.arange(20_000), 0)
    for second in (draw_tokens(logits, torch.arange(20_000), 1), draw_tokens(logits, torch.arange(20_000) + 1, 0)):
        table = (first * 4 + second).bincount(minlength=16).double()
        statistic = ((table - 1250).square() / 1250).sum().item()
        assert chi2.sf(statistic, 15) > 1e-3


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}, {"greedy": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_image_does_not_see_its_batch(options: dict[str, Any], dtype: torch.dtype) -> None:
    logits, seeds = random_logits(37, 101).to(dtype), torch.arange(37) * 7919 - 5
    whole = draw_tokens(logits, seeds, 9, **options)
    assert whole.dtype == torch.int64 and whole.shape == (37,)
    for b in range(37):
        assert torch.equal(draw_tokens(logits[b : b + 1], seeds[b : b + 1], 9, **options), whole[b : b + 1])
    order = torch.randperm(37)
    assert torch.equal(draw_tokens(logits[order], seeds[order], 9, **options), whole[order])
    assert torch.equal(draw_tokens(logits.T.contiguous().T, seeds.int(), 9, **options), whole)
    assert draw_tokens(logits[:0], seeds[:0], 9, **options).shape == (0,)


def test_seed_and_position_matter() -> None:
    logits = torch.zeros(50, 1000)
    seeds = torch.arange(50)
    base = draw_tokens(logits, seeds, 0)
    assert (base != draw_tokens(logits, seeds, 1)).sum() > 40
    assert (base != draw_tokens(logits, seeds + 50, 0)).sum() > 40


def test_draw_is_the_argmax_of_noisy_logits() -> None:
    logits, seeds = random_logits(200, 33), torch.arange(200)
    assert torch.equal(draw_tokens(logits, seeds, 4), (logits + gumbel_noise(seeds, 4, 33)).argmax(-1))


def test_greedy_and_its_limits() -> None:
    logits, seeds = random_logits(40, 65), torch.arange(40)
    best = logits.argmax(-1)
    assert torch.equal(draw_tokens(logits, seeds, 0, greedy=True), best)
    assert torch.equal(draw_tokens(logits, seeds, 0, top_k=1), best)
    assert torch.equal(draw_tokens(logits, seeds, 0, top_p=1e-9), best)
    # The largest logits over the smallest temperature would leave fp32 if it were divided as it is.
    assert torch.equal(draw_tokens(logits * 1e30, seeds, 0, temperature=1e-30), best)
    assert draw_tokens(torch.ones(3, 5), seeds[:3], 0, greedy=True).tolist() == [0, 0, 0]
    assert draw_tokens(torch.zeros(3, 1), seeds[:3], 0).tolist() == [0, 0, 0]


def test_forbidden_codes_are_never_drawn() -> None:
    logits = torch.zeros(2000, 6)
    logits[:, [0, 4]] = -INF
    assert set(draw_tokens(logits, torch.arange(2000), 0, top_p=0.99).tolist()) == {1, 2, 3, 5}


def test_guidance() -> None:
    cond, uncond = random_logits(3, 7), random_logits(3, 7, seed=1)
    assert torch.equal(mix_guidance(cond, uncond, 1.0), cond)
    assert torch.equal(mix_guidance(cond, uncond, 0.0), uncond)
    for scale in (-0.5, 1.5, 4.0):
        exact = uncond.double() + scale * (cond.double() - uncond.double())
        assert (mix_guidance(cond, uncond, scale).double() - exact).abs().max() <= 1e-5
        assert torch.equal(mix_guidance(cond.double(), uncond.double(), scale), exact)
        low = mix_guidance(cond.bfloat16(), uncond.bfloat16(), scale)
        rounded_once = mix_guidance(cond.bfloat16().float(), uncond.bfloat16().float(), scale).bfloat16()
        assert low.dtype == torch.bfloat16 and torch.equal(low, rounded_once)
    assert mix_guidance(cond[:0], uncond[:0], 2.0).shape == (0, 7)


def test_guidance_gradcheck() -> None:
    cond, uncond = (random_logits(2, 3, seed=s).double().requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: mix_guidance(a, b, 2.5), (cond, uncond))


def slow_filter(row: list[float], top_k: int, top_p: float) -> list[float]:
    """The definition, one code at a time."""
    kept = [x > -INF for x in row]
    if top_k:
        threshold = sorted(row, reverse=True)[top_k - 1]
        kept = [k and x >= threshold for x, k in zip(row, kept, strict=True)]
    if 0 < top_p < 1:
        order = sorted((code for code in range(len(row)) if kept[code]), key=lambda code: (-row[code], code))
        weights = [math.exp(row[code] - row[order[0]]) for code in order]
        mass_above = 0.0
        total = math.fsum(weights)
        for code, weight in zip(order, weights, strict=True):
            kept[code] = code == order[0] or mass_above / total < top_p
            mass_above += weight
    return [x if k else -INF for x, k in zip(row, kept, strict=True)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from([-INF, -3.0, -1.25, 0.0, 0.5, 0.75, 2.0, 3.5]), min_size=1, max_size=12).filter(
        lambda row: max(row) > -INF
    ),
    st.data(),
)
def test_filter_against_the_slow_one(row: list[float], data: st.DataObject) -> None:
    top_k = data.draw(st.integers(0, len(row)))
    # Irrational, so that no sum of probabilities meets it exactly.
    top_p = data.draw(st.sampled_from([0.0, 1.0, math.pi / 100, math.pi / 10, math.e / 4, math.pi / 3.2]))
    logits = torch.tensor([row, row])
    found = filter_logits(logits, top_k=top_k, top_p=top_p)
    assert found.tolist() == [slow_filter(row, top_k, top_p)] * 2
    assert logits.tolist() == [row, row] and found.data_ptr() != logits.data_ptr()


def test_filter_on_a_large_codebook() -> None:
    logits = random_logits(3, 4096)
    for top_k, top_p in ((900, 0.0), (900, 0.95), (0, 0.95), (0, 1e-6), (4096, 1.0)):
        found = filter_logits(logits, top_k=top_k, top_p=top_p)
        assert found.tolist() == [slow_filter(row, top_k, top_p) for row in logits.tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_filter_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    logits = random_logits(2, 3, 9).to(dtype)
    found = filter_logits(logits, top_k=3, top_p=0.9)
    assert found.dtype == dtype and found.shape == (2, 3, 9)
    kept = found > -INF
    assert torch.equal(found[kept], logits[kept]) and (kept.sum(-1) >= 1).all()
    assert filter_logits(logits[:0], top_k=3, top_p=0.9).shape == (0, 3, 9)
    assert filter_logits(logits[0, 0], top_k=1).isfinite().sum() == 1


def test_ties_at_the_k_th_place_all_stay() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert filter_logits(logits, top_k=2).tolist() == [-INF, 2.0, 2.0, 2.0, -INF]
    # Each of the three has a third of what is left: the first two codes are needed to hold a half.
    assert filter_logits(logits, top_k=2, top_p=0.5).tolist() == [-INF, 2.0, 2.0, -INF, -INF]


L, S = torch.zeros(2, 4), torch.arange(2)
BAD = torch.tensor([[0.0, 1.0], [0.0, math.nan]])
ERRORS: list[tuple[Any, type[Exception], str]] = [
    (lambda: philox_uniform(S.float(), S), TypeError, "seeds must be an integer tensor, got torch.float32"),
    (lambda: philox_uniform(S, S.bool()), TypeError, "offsets must be an integer tensor, got torch.bool"),
    (lambda: philox_uniform(3, S), TypeError, "seeds must be an integer tensor, got .*int"),  # type: ignore[arg-type]
    (lambda: philox_uniform(S, torch.arange(3)), ValueError, r"offsets must broadcast .*\[2\], got \[3\]"),
    (lambda: philox_uniform(S, S.to("meta")), ValueError, "offsets must be on the device of seeds, cpu, got meta"),
    (lambda: gumbel_noise(S[:, None], 0, 4), ValueError, r"seeds must have shape \[B\], got \[2, 1\]"),
    (lambda: gumbel_noise(S.double(), 0, 4), TypeError, "seeds must be an integer tensor"),
    (lambda: gumbel_noise(S, -1, 4), ValueError, "position must not be negative, got -1"),
    (lambda: gumbel_noise(S, 0, 0), ValueError, "codes must be at least 1, got 0"),
    (lambda: mix_guidance(L.int(), L, 2.0), TypeError, "conditional must be a floating tensor, got torch.int32"),
    (lambda: mix_guidance(L, L.int(), 2.0), TypeError, "unconditional must be a floating tensor"),
    (lambda: mix_guidance(L, L.double(), 2.0), TypeError, "unconditional must be torch.float32 .*got torch.float64"),
    (lambda: mix_guidance(L, L[:1], 2.0), ValueError, r"unconditional must have shape \[2, 4\].*got \[1, 4\]"),
    (lambda: mix_guidance(L, L.to("meta"), 2.0), ValueError, "unconditional must be on cpu .*got meta"),
    (lambda: mix_guidance(L, L, math.nan), ValueError, "scale must be finite, got nan"),
    (lambda: filter_logits(L.long()), TypeError, "logits must be a floating tensor, got torch.int64"),
    (lambda: filter_logits(L[:, :0]), ValueError, r"logits must have shape .*got \[2, 0\]"),
    (lambda: filter_logits(BAD), ValueError, "logits must be finite .*maximum nan"),
    (lambda: filter_logits(L, top_k=-1), ValueError, "top_k must lie from 0 to the number of codes, 4, got -1"),
    (lambda: filter_logits(L, top_k=5), ValueError, "top_k must lie .*got 5"),
    (lambda: filter_logits(L, top_p=1.1), ValueError, "top_p must lie from 0 to 1, got 1.1"),
    (lambda: filter_logits(L, top_p=math.nan), ValueError, "top_p must lie from 0 to 1, got nan"),
    (lambda: draw_tokens(L.long(), S, 0), TypeError, "logits must be a floating tensor"),
    (lambda: draw_tokens(L, S.float(), 0), TypeError, "seeds must be an integer tensor"),
    (lambda: draw_tokens(L[0], S, 0), ValueError, r"logits must have shape \[B, K\], got \[4\]"),
    (lambda: draw_tokens(L, S[:1], 0), ValueError, r"seeds must have shape \[2\], one per row of logits, got \[1\]"),
    (lambda: draw_tokens(L, S[:, None], 0), ValueError, r"seeds must have shape \[B\], got \[2, 1\]"),
    (lambda: draw_tokens(L, S.to("meta"), 0), ValueError, "seeds must be on the device of logits, cpu, got meta"),
    (lambda: draw_tokens(L, S, -1), ValueError, "position must not be negative"),
    (lambda: draw_tokens(L, S, 0, temperature=0), ValueError, "temperature must be finite and positive, got 0"),
    (lambda: draw_tokens(L, S, 0, temperature=-1.0), ValueError, "temperature must be .*got -1.0"),
    (lambda: draw_tokens(L, S, 0, temperature=math.inf), ValueError, "temperature must be .*got inf"),
    (lambda: draw_tokens(L, S, 0, top_k=5), ValueError, "top_k must lie"),
    (lambda: draw_tokens(L, S, 0, top_p=-0.1), ValueError, "top_p must lie from 0 to 1, got -0.1"),
    (lambda: draw_tokens(BAD, S, 0), ValueError, "logits must be finite .*maximum nan"),
    (lambda: draw_tokens(L / 0, S, 0), ValueError, "logits must be finite .*maximum nan"),
    (lambda: draw_tokens(L - INF, S, 0), ValueError, "logits must be finite .*maximum -inf"),
    (lambda: draw_tokens(L + INF, S, 0, greedy=True), ValueError, "logits must be finite .*maximum inf"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
