"""The Triton kernels of the sampling head, and their launches.

One program draws one code. It holds no sorted codes: the border of top-k and that of top-p are found by a search on the
bits of the logits, which sort like the logits themselves. Tempered logits are not positive, so a code's key is its
distance below the best, an fp32 number whose bits read as an integer: 0 for the best, more for less likely codes,
that of infinity for codes that cannot be drawn.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import MARGIN, DrawConfig, draw_config

# The first pass of a search looks from an eighth of the largest distance on, where borders mostly are; later ones
# anywhere.
_FIRST_SPAN = tl.constexpr(3 << 23)
_ANY_SPAN = tl.constexpr(0x7FFFFFFF)
# u = 0 stands for this; see the reference.
_SMALLEST_UNIFORM = tl.constexpr(2.0**-32)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _mixed(p_cond, p_uncond, guidance, i_chunk, K: tl.constexpr, BLOCK: tl.constexpr, GUIDED: tl.constexpr):
    """A chunk of the guided logits, rounded to the dtype of the logits as by `mix_guidance`; -inf past the end."""
    o_code = i_chunk * BLOCK + tl.arange(0, BLOCK)
    m_code = o_code < K
    b_logit = tl.load(p_cond + o_code, mask=m_code, other=0.0).to(tl.float32)
    if GUIDED:
        b_uncond = tl.load(p_uncond + o_code, mask=m_code, other=0.0).to(tl.float32)
        b_mixed = b_uncond + guidance * (b_logit - b_uncond)
        b_mixed = b_mixed.to(p_cond.dtype.element_ty).to(tl.float32)
        b_logit = tl.where(guidance == 1.0, b_logit, b_mixed)
    return tl.where(m_code, b_logit, float("-inf"))


@triton.jit
def _over_temperature(b_logit, best, temperature, TEMPERED: tl.constexpr):
    """Tempered logits, the best of them 0; `temperature` is 1 without TEMPERED."""
    b_x = b_logit - best
    return tl.div_rn(b_x, temperature) if TEMPERED else b_x


@triton.jit
def _tempered(
    b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk,
    K: tl.constexpr, BLOCK: tl.constexpr, GUIDED: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """A chunk of the tempered logits: the registers that hold the whole row, or read again."""
    if K <= BLOCK:
        return b_held
    else:
        return _over_temperature(
            _mixed(p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED), best, temperature, TEMPERED
        )


@triton.jit
def _key(b_x):
    # Not tl.abs, which takes the smallest numbers for 0 on a GPU.
    return b_x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def _weights(b_x, key_k, SCALE: tl.constexpr):
    """Probabilities over that of the best, as integers: sums of them have no rounding and no order."""
    b_share = tl.exp(b_x.to(tl.float64))
    return tl.where(_key(b_x) <= key_k, (b_share * SCALE + 0.5).to(tl.int64), 0)


@triton.jit
def _held_weights(b_held, b_x, key_k, K: tl.constexpr, BLOCK: tl.constexpr, TOP_P: tl.constexpr, SCALE: tl.constexpr):
    if (K <= BLOCK) | (not TOP_P):
        return b_held
    else:
        return _weights(b_x, key_k, SCALE)


@triton.jit
def _probes(low, high, span):
    """Two keys between `low` and `high`, which cut what lies at most `span` below `high` into thirds."""
    floor = tl.maximum(low, high - span)
    third = tl.maximum((high - floor) // 3, 1)
    return floor + third, high - third


@triton.jit
def _narrowed(low, high, sum_low, sum_high, one, two, sum_one, sum_two, target):
    """The bracket in which a growing sum reaches the target, after two probes inside, `one` up to `two`."""
    m_one = sum_one >= target
    m_two = sum_two >= target
    new_high = tl.where(m_one, one, tl.where(m_two, two, high))
    new_sum_high = tl.where(m_one, sum_one, tl.where(m_two, sum_two, sum_high))
    new_low = tl.where(m_one, low, tl.where(m_two, one, two))
    new_sum_low = tl.where(m_one, sum_low, tl.where(m_two, sum_one, sum_two))
    return new_low, new_high, new_sum_low, new_sum_high


@triton.jit
def _middle(low, high, span):
    """A key between `low` and `high`, in the middle of what lies at most `span` below `high`."""
    floor = tl.maximum(low, high - span)
    return floor + (high - floor) // 2


@triton.jit
def _extremes(most_a, least_a, most_b, least_b):
    return tl.maximum(most_a, most_b), tl.minimum(least_a, least_b)


@triton.jit
def _best_and_worst(b_logit):
    """The best logit, and the least that is finite: one reduction for both."""
    return tl.reduce((b_logit, tl.where(b_logit > float("-inf"), b_logit, float("inf"))), 0, _extremes)


@triton.jit
def _best_two(top_a, code_a, next_a, top_b, code_b, next_b):
    """The best score with its code, of equals the lowest, and the next best score."""
    m_a = (top_a > top_b) | ((top_a == top_b) & (code_a < code_b))
    next_score = tl.maximum(tl.minimum(top_a, top_b), tl.maximum(next_a, next_b))
    return tl.where(m_a, top_a, top_b), tl.where(m_a, code_a, code_b), next_score


@triton.jit
def _kept(b_x, b_weight, low, high, m_tied, room, TOP_P: tl.constexpr):
    """What stays: all up to key `high`; if several lie above `low`, these in their order while there is room.

    A single one always stays. The order of several takes a running sum over the block, so it is asked for first.
    """
    b_key = _key(b_x)
    m_kept = b_key <= high
    if TOP_P:  # noqa: SIM102 - known to the compiler, the other one is not
        if m_tied:
            b_border = tl.where(m_kept & (b_key > low), b_weight, 0)
            m_kept = m_kept & ((b_key <= low) | (tl.cumsum(b_border, axis=0) - b_border < room))
            room -= tl.sum(b_border, axis=0)
    return m_kept, room


@triton.jit
def _uniform(seed, first, i_chunk, BLOCK: tl.constexpr):
    """The chunk's random numbers: four codes in a row have the four words of one counter."""
    u_0, u_1, u_2, u_3 = tl.rand4x(seed, first + (i_chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)))
    b_u = tl.interleave(tl.interleave(u_0, u_2), tl.interleave(u_1, u_3))
    return tl.maximum(b_u, _SMALLEST_UNIFORM)


@triton.jit
def _gumbel(b_u):
    """Standard Gumbel noise. In fp32 it is off by up to 2.5e-6: libdevice's logarithm is good to one unit."""
    return -tl.log(-tl.log(b_u))


@triton.jit
def _draw(
    p_cond,  # [K]
    p_uncond,  # [K]; only read with GUIDED
    seed,
    position,
    guidance,
    temperature,
    top_k,
    top_p_bits,  # the bits of top-p as fp64, which a float argument would round to fp32
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SCALE: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """The code drawn from one row of logits."""
    CHUNKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    o_block = tl.arange(0, BLOCK)

    if GREEDY:
        best = tl.full([], float("-inf"), tl.float32)
        code = tl.full([], 0, tl.int32)
        for i_chunk in range(CHUNKS):
            b_logit = _mixed(p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED)
            chunk_best, chunk_code = tl.max(b_logit, axis=0, return_indices=True)
            code = tl.where(chunk_best > best, i_chunk * BLOCK + chunk_code, code)
            best = tl.maximum(best, chunk_best)
    else:
        b_logit = _mixed(p_cond, p_uncond, guidance, 0, K, BLOCK, GUIDED)
        first = position * ((K + 3) // 4)
        best, worst = _best_and_worst(b_logit)
        for i_chunk in range(1, CHUNKS):
            chunk_best, chunk_worst = _best_and_worst(_mixed(p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED))
            best, worst = _extremes(best, worst, chunk_best, chunk_worst)
        b_held = _over_temperature(b_logit, best, temperature, TEMPERED)

        # The k-th best key lies above `low` and not above `key_k`; once no other code lies there, the exact key of the
        # k-th best changes nothing. All codes that can be drawn lie up to the first `key_k`.
        key_k = _key(_over_temperature(worst, best, temperature, TEMPERED))
        if TOP_K:
            low = tl.full([], -1, tl.int32)
            count_low = tl.full([], 0, tl.int32)
            count_k = tl.full([], K, tl.int32)
            span = tl.full([], _FIRST_SPAN, tl.int32)
            while (key_k - low > 1) & (count_k - count_low > 1):
                one, two = _probes(low, key_k, span)
                count_one = tl.full([], 0, tl.int32)
                count_two = tl.full([], 0, tl.int32)
                for i_chunk in range(CHUNKS):
                    b_x = _tempered(
                        b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED, TEMPERED
                    )  # fmt: skip
                    # 16 bits hold a block's count, so that one sum serves two probes.
                    b_both = (_key(b_x) <= one).to(tl.int32) + ((_key(b_x) <= two).to(tl.int32) << 16)
                    both = tl.sum(b_both, axis=0)
                    count_one += both & 0xFFFF
                    count_two += both >> 16
                low, key_k, count_low, count_k = _narrowed(
                    low, key_k, count_low, count_k, one, two, count_one, count_two, top_k
                )  # fmt: skip
                span = tl.full([], _ANY_SPAN, tl.int32)

        # The same for the key at which the mass reaches top-p, by one probe, as sums of masses are dear. Codes up to
        # `low` stay, those between in the order of their index while there is room. Two of them weigh at least twice
        # the lightest that could lie there.
        low = tl.full([], -1, tl.int32)
        high = key_k
        room = tl.full([], 0, tl.int64)
        m_several = high >= 0
        b_held_weight = b_held  # without top-p nothing has a weight
        if TOP_P:
            b_held_weight = _weights(b_held, key_k, SCALE)
            mass_low = tl.full([], 0, tl.int64)
            mass_high = tl.sum(b_held_weight, axis=0)
            for i_chunk in range(1, CHUNKS):
                b_x = _tempered(
                    b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED, TEMPERED
                )  # fmt: skip
                mass_high += tl.sum(_weights(b_x, key_k, SCALE), axis=0)
            top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
            target = tl.ceil(top_p * mass_high.to(tl.float64)).to(tl.int64)
            span = tl.full([], _FIRST_SPAN, tl.int32)
            while (high - low > 1) & m_several:
                middle = _middle(low, high, span)
                mass = tl.full([], 0, tl.int64)
                for i_chunk in range(CHUNKS):
                    b_x = _tempered(
                        b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED, TEMPERED
                    )  # fmt: skip
                    b_weight = _held_weights(b_held_weight, b_x, key_k, K, BLOCK, TOP_P, SCALE)
                    mass += tl.sum(tl.where(_key(b_x) <= middle, b_weight, 0), axis=0)
                m_enough = mass >= target
                high = tl.where(m_enough, middle, high)
                mass_high = tl.where(m_enough, mass, mass_high)
                low = tl.where(m_enough, low, middle)
                mass_low = tl.where(m_enough, mass_low, mass)
                span = tl.full([], _ANY_SPAN, tl.int32)
                two_lightest = tl.exp(-high.to(tl.float32, bitcast=True)) * (1.99 * SCALE)
                m_several = (mass_high - mass_low).to(tl.float32) + 1.0 >= two_lightest
            room = target - mass_low

        # The best noisy score, and the next best to see whether noise in fp32 decides.
        top_score = tl.full([], float("-inf"), tl.float32)
        next_score = top_score
        code = tl.full([], 0, tl.int32)
        b_none = tl.full([BLOCK], float("-inf"), tl.float32)
        left = room
        for i_chunk in range(CHUNKS):
            b_x = _tempered(
                b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED, TEMPERED
            )  # fmt: skip
            b_weight = _held_weights(b_held_weight, b_x, key_k, K, BLOCK, TOP_P, SCALE)
            m_kept, left = _kept(b_x, b_weight, low, high, m_several, left, TOP_P)
            b_score = tl.where(m_kept, b_x + _gumbel(_uniform(seed, first, i_chunk, BLOCK)), float("-inf"))
            chunk_top, chunk_code, chunk_next = tl.reduce((b_score, i_chunk * BLOCK + o_block, b_none), 0, _best_two)
            top_score, code, next_score = _best_two(top_score, code, next_score, chunk_top, chunk_code, chunk_next)

        if next_score >= top_score - MARGIN:
            exact_top = tl.full([], float("-inf"), tl.float32)
            left = room
            for i_chunk in range(CHUNKS):
                b_x = _tempered(
                    b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED, TEMPERED
                )  # fmt: skip
                b_weight = _held_weights(b_held_weight, b_x, key_k, K, BLOCK, TOP_P, SCALE)
                m_kept, left = _kept(b_x, b_weight, low, high, m_several, left, TOP_P)
                b_u = _uniform(seed, first, i_chunk, BLOCK).to(tl.float64)
                b_score = tl.where(m_kept, b_x + _gumbel(b_u).to(tl.float32), float("-inf"))
                chunk_top, chunk_code = tl.max(b_score, axis=0, return_indices=True)
                code = tl.where(chunk_top > exact_top, i_chunk * BLOCK + chunk_code, code)
                exact_top = tl.maximum(exact_top, chunk_top)

    # A row with NaN has no best code; what is given for it is at least a code.
    return tl.minimum(code, K - 1).to(tl.int64)


@triton.jit(do_not_specialize=["position", "top_k", "top_p_bits"])
def draw_fwd_kernel(
    p_logits,  # [B, K], rows `stride_logits` apart
    p_unconditional,  # as p_logits; only read with GUIDED
    p_seeds,  # [B] integers
    p_position,  # [] int64; only read with POSITION_ON_DEVICE
    p_tokens,  # [B] int64
    stride_logits,
    stride_unconditional,
    position,
    guidance,
    temperature,
    top_k,
    top_p_bits,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    POSITION_ON_DEVICE: tl.constexpr,
    SCALE: tl.constexpr,
    MARGIN: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    if POSITION_ON_DEVICE:
        place = tl.load(p_position)
    else:
        place = position.to(tl.int64)
    code = _draw(
        p_logits + i_row * stride_logits, p_unconditional + i_row * stride_unconditional,
        tl.load(p_seeds + i_row).to(tl.int64), place, guidance, temperature, top_k, top_p_bits,
        K, BLOCK, GUIDED, GREEDY, TEMPERED, TOP_K, TOP_P, SCALE, MARGIN,
    )  # fmt: skip
    tl.store(p_tokens + i_row, code)


@triton.jit(do_not_specialize=["batch", "group", "top_k", "top_p_bits"])
def draw_group_fwd_kernel(
    p_tokens,  # [B, N] int64
    p_logits,  # [B, G, K], with GUIDED [2 B, G, K]
    p_seeds,  # [B] int64
    p_first,  # [] int64
    p_scales,  # [steps]; only read with GUIDED
    p_given,  # [] int64
    stride_tokens,
    batch,
    group,
    temperature,
    top_k,
    top_p_bits,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    GUIDED: tl.constexpr,
    GREEDY: tl.constexpr,
    TEMPERED: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SCALE: tl.constexpr,
    MARGIN: tl.constexpr,
):
    # Divisions of 32 bits: those of 64 are slow, and the loads below wait for them.
    i_image = (tl.program_id(0) // group).to(tl.int64)
    i_place = (tl.program_id(0) % group).to(tl.int64)
    first = tl.load(p_first)
    position = first + i_place
    if position >= tl.load(p_given):
        guidance = 1.0
        if GUIDED:
            guidance = tl.load(p_scales + first.to(tl.int32) // group).to(tl.float32)
        code = _draw(
            p_logits + (i_image * group + i_place) * K, p_logits + ((batch + i_image) * group + i_place) * K,
            tl.load(p_seeds + i_image), position, guidance, temperature, top_k, top_p_bits,
            K, BLOCK, GUIDED, GREEDY, TEMPERED, TOP_K, TOP_P, SCALE, MARGIN,
        )  # fmt: skip
        tl.store(p_tokens + i_image * stride_tokens + position, code)


def weight_scale(codes: int) -> float:
    """What the best code weighs: as much as lets the weights of a row add up in 63 bits."""
    return 2.0 ** (62 - (codes - 1).bit_length())


def _options(
    codes: int, temperature: float, top_k: int, top_p: float, greedy: bool, config: DrawConfig | None
) -> dict[str, Any]:
    """Constants and options of a launch that follow from how is drawn."""
    config = config or draw_config(codes)
    # No fused multiply-add: mixing then rounds as the reference does.
    return {
        "K": codes, "BLOCK": config.block, "GREEDY": greedy, "TEMPERED": temperature != 1,
        "TOP_K": 0 < top_k < codes, "TOP_P": 0 < top_p < 1,
        "SCALE": weight_scale(codes), "MARGIN": MARGIN, "num_warps": config.warps, "maxnreg": config.registers,
        "enable_fp_fusion": False,
    }  # fmt: skip


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]


def launch(
    logits: Tensor,
    unconditional: Tensor | None,
    seeds: Tensor,
    position: int | Tensor,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    config: DrawConfig | None = None,
) -> Tensor:
    # [B, K] with unit stride along K, [B, K] likewise, [B] -> [B]
    batch, codes = logits.shape
    tokens = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return tokens
    other = logits if unconditional is None else unconditional
    on_device = isinstance(position, Tensor)
    draw_fwd_kernel[(batch,)](
        logits, other, seeds, position if on_device else seeds, tokens, logits.stride(0), other.stride(0),
        0 if on_device else position, guidance, temperature, top_k, _bits(top_p),
        GUIDED=unconditional is not None, POSITION_ON_DEVICE=on_device,
        **_options(codes, temperature, top_k, top_p, greedy, config),
    )  # fmt: skip
    return tokens


def launch_group(
    tokens: Tensor,
    logits: Tensor,
    seeds: Tensor,
    first: Tensor,
    scales: Tensor,
    given: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    config: DrawConfig | None = None,
) -> None:
    # [B, N] with unit stride along N, [B or 2 B, G, K] contiguous, [B], [], [steps], []
    batch, (rows, group, codes) = len(tokens), logits.shape
    if batch == 0:
        return
    draw_group_fwd_kernel[(batch * group,)](
        tokens, logits, seeds, first, scales, given, tokens.stride(0), batch, group, temperature, top_k, _bits(top_p),
        GUIDED=rows > batch, **_options(codes, temperature, top_k, top_p, greedy, config),
    )  # fmt: skip
