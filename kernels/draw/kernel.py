"""The Triton kernels of the sampling head, and their launches.

One program draws one code. It holds no sorted codes: the border of top-k and that of top-p are found by bisection on
the bits of the logits, which sort like the logits themselves. Tempered logits are not positive, so a code's key is its
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

_INFINITE_KEY = tl.constexpr(0x7F800000)
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
def _tempered(
    b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk,
    K: tl.constexpr, BLOCK: tl.constexpr, GUIDED: tl.constexpr,
):  # fmt: skip
    """A chunk of the tempered logits: the registers that hold the whole row, or read again."""
    if K <= BLOCK:
        return b_held
    else:
        return tl.div_rn(_mixed(p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED) - best, temperature)


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
def _kept(b_x, b_weight, low, high, room, TOP_P: tl.constexpr):
    """What stays: all up to key `low`, then in the order of their index codes up to key `high` while there is room."""
    b_key = _key(b_x)
    m_kept = b_key <= high
    if TOP_P:
        b_border = tl.where(m_kept & (b_key > low), b_weight, 0)
        m_kept = m_kept & ((b_key <= low) | (tl.cumsum(b_border, axis=0) - b_border < room))
        room -= tl.sum(b_border, axis=0)
    return m_kept, room


@triton.jit
def _uniform(seed, first, i_chunk, BLOCK: tl.constexpr):
    """The chunk's random numbers: a function of (seed, position * K + code)."""
    b_u = tl.rand(seed, first + (i_chunk * BLOCK + tl.arange(0, BLOCK)))
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
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SCALE: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """The code drawn from one row of logits."""
    CHUNKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    o_block = tl.arange(0, BLOCK)

    b_logit = _mixed(p_cond, p_uncond, guidance, 0, K, BLOCK, GUIDED)
    best, code = tl.max(b_logit, axis=0, return_indices=True)
    for i_chunk in range(1, CHUNKS):
        b_other = _mixed(p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED)
        chunk_best, chunk_code = tl.max(b_other, axis=0, return_indices=True)
        code = tl.where(chunk_best > best, i_chunk * BLOCK + chunk_code, code)
        best = tl.maximum(best, chunk_best)

    if not GREEDY:
        b_held = tl.div_rn(b_logit - best, temperature)
        first = position * K

        # The k-th best key lies above `low` and not above `key_k`; once no other code lies there, the exact key of the
        # k-th best changes nothing.
        key_k = tl.full([], _INFINITE_KEY, tl.int32)
        if TOP_K:
            low = tl.full([], -1, tl.int32)
            count_low = tl.full([], 0, tl.int32)
            count_k = tl.full([], K, tl.int32)
            while (key_k - low > 1) & (count_k - count_low > 1):
                middle = low + (key_k - low) // 2
                count = tl.full([], 0, tl.int32)
                for i_chunk in range(CHUNKS):
                    b_x = _tempered(
                        b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED
                    )  # fmt: skip
                    count += tl.sum((_key(b_x) <= middle).to(tl.int32), axis=0)
                m_enough = count >= top_k
                key_k = tl.where(m_enough, middle, key_k)
                count_k = tl.where(m_enough, count, count_k)
                low = tl.where(m_enough, low, middle)
                count_low = tl.where(m_enough, count_low, count)

        # The same for the key at which the mass reaches top-p. Codes up to `low` stay, those between in the order of
        # their index while there is room. Two of them weigh at least twice the lightest that could lie there.
        low = tl.full([], -1, tl.int32)
        high = key_k
        mass_low = tl.full([], 0, tl.int64)
        room = tl.full([], 0, tl.int64)
        b_held_weight = b_held  # without top-p nothing has a weight
        if TOP_P:
            b_held_weight = _weights(b_held, key_k, SCALE)
            mass_high = tl.sum(b_held_weight, axis=0)
            for i_chunk in range(1, CHUNKS):
                b_x = _tempered(b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED)
                mass_high += tl.sum(_weights(b_x, key_k, SCALE), axis=0)
            top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
            target = tl.ceil(top_p * mass_high.to(tl.float64)).to(tl.int64)
            m_several = high >= 0
            while (high - low > 1) & m_several:
                middle = low + (high - low) // 2
                mass = tl.full([], 0, tl.int64)
                for i_chunk in range(CHUNKS):
                    b_x = _tempered(
                        b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED
                    )  # fmt: skip
                    b_weight = _held_weights(b_held_weight, b_x, key_k, K, BLOCK, TOP_P, SCALE)
                    mass += tl.sum(tl.where(_key(b_x) <= middle, b_weight, 0), axis=0)
                m_enough = mass >= target
                high = tl.where(m_enough, middle, high)
                mass_high = tl.where(m_enough, mass, mass_high)
                low = tl.where(m_enough, low, middle)
                mass_low = tl.where(m_enough, mass_low, mass)
                two_lightest = tl.exp(-high.to(tl.float32, bitcast=True)) * (1.99 * SCALE)
                m_several = (mass_high - mass_low).to(tl.float32) + 1.0 >= two_lightest
            room = target - mass_low

        # The best noisy score, and the next best to see whether noise in fp32 decides.
        top_score = tl.full([], float("-inf"), tl.float32)
        next_score = top_score
        left = room
        code = tl.full([], 0, tl.int32)
        for i_chunk in range(CHUNKS):
            b_x = _tempered(b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED)
            b_weight = _held_weights(b_held_weight, b_x, key_k, K, BLOCK, TOP_P, SCALE)
            m_kept, left = _kept(b_x, b_weight, low, high, left, TOP_P)
            b_score = tl.where(m_kept, b_x + _gumbel(_uniform(seed, first, i_chunk, BLOCK)), float("-inf"))
            chunk_top, chunk_code = tl.max(b_score, axis=0, return_indices=True)
            chunk_next = tl.max(tl.where(o_block == chunk_code, float("-inf"), b_score), axis=0)
            next_score = tl.maximum(tl.maximum(next_score, chunk_next), tl.minimum(top_score, chunk_top))
            code = tl.where(chunk_top > top_score, i_chunk * BLOCK + chunk_code, code)
            top_score = tl.maximum(top_score, chunk_top)

        if next_score >= top_score - MARGIN:
            exact_top = tl.full([], float("-inf"), tl.float32)
            left = room
            for i_chunk in range(CHUNKS):
                b_x = _tempered(b_held, best, temperature, p_cond, p_uncond, guidance, i_chunk, K, BLOCK, GUIDED)
                b_weight = _held_weights(b_held_weight, b_x, key_k, K, BLOCK, TOP_P, SCALE)
                m_kept, left = _kept(b_x, b_weight, low, high, left, TOP_P)
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
        K, BLOCK, GUIDED, GREEDY, TOP_K, TOP_P, SCALE, MARGIN,
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
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    SCALE: tl.constexpr,
    MARGIN: tl.constexpr,
):
    i_image = tl.program_id(0).to(tl.int64) // group
    i_place = tl.program_id(0).to(tl.int64) % group
    first = tl.load(p_first)
    position = first + i_place
    if position >= tl.load(p_given):
        guidance = 1.0
        if GUIDED:
            guidance = tl.load(p_scales + first // group).to(tl.float32)
        code = _draw(
            p_logits + (i_image * group + i_place) * K, p_logits + ((batch + i_image) * group + i_place) * K,
            tl.load(p_seeds + i_image), position, guidance, temperature, top_k, top_p_bits,
            K, BLOCK, GUIDED, GREEDY, TOP_K, TOP_P, SCALE, MARGIN,
        )  # fmt: skip
        tl.store(p_tokens + i_image * stride_tokens + position, code)


def weight_scale(codes: int) -> float:
    """What the best code weighs: as much as lets the weights of a row add up in 63 bits."""
    return 2.0 ** (62 - (codes - 1).bit_length())


def _options(codes: int, top_k: int, top_p: float, greedy: bool, config: DrawConfig | None) -> dict[str, Any]:
    """Constants and options of a launch that follow from how is drawn."""
    config = config or draw_config(codes)
    # No fused multiply-add: mixing then rounds as the reference does.
    return {
        "K": codes, "BLOCK": config.block, "GREEDY": greedy, "TOP_K": 0 < top_k < codes, "TOP_P": 0 < top_p < 1,
        "SCALE": weight_scale(codes), "MARGIN": MARGIN, "num_warps": config.warps, "enable_fp_fusion": False,
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
        **_options(codes, top_k, top_p, greedy, config),
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
        GUIDED=rows > batch, **_options(codes, top_k, top_p, greedy, config),
    )  # fmt: skip
