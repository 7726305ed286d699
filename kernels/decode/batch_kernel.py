"""The decoding step for many rows: Triton kernels and `launch_step`, which starts them in their order.

A block is seven launches: the four products, attention, and twice the same kernel behind a product that ends in the
residual stream. That one adds the product's parts, bias, gate and residual, and norms and modulates the row for the
next product, so that products read plain matrices: with the norm inside, every tile of columns would repeat it and read
four times as much. No product waits for another program and no sum is taken in an order that could change.

On Hopper a grid starts while the one before it runs, up to where it needs its results (`_wait`); what it loads above
that line no kernel of this step writes: weights, biases, modulations, the position, and keys and values of earlier
steps. It lets the next grid start when it is past that line itself, so that one grid at most waits beside the one that
runs: if more did, they would hold the places where programs of the next product should be spread evenly. Only the
residual kernel, which is short, lets the next product start before its own wait where that is faster
(`releases_early`). The first grid starts when everything before it is done. Every program waits, or what follows could
read too soon: a grid is only known to be done with what went before when all its programs have waited.

Shapes, dtypes and values are the callers' business. Tables: batch_config.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_config import (
    KEYS_AHEAD,
    NARROW_PARTS,
    NORM_WARPS,
    attend_heads,
    attend_slots,
    attend_tiles,
    parts,
    product_config,
    releases_early,
    shares,
)
from .reference import OPS
from .state import DecodeState, DecodeWeights

_EPS = tl.constexpr(1e-6)
_SMALLEST_NORM = tl.constexpr(1e-12)
# The score of a key that is not there
_NEVER = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
# sqrt(2 / pi)
_GELU = tl.constexpr(0.7978845608028654)
_GELU_CUBE = tl.constexpr(0.044715 * 0.7978845608028654)


@triton.jit
def _wait(EARLY: tl.constexpr, RELEASE: tl.constexpr = False):
    # Until the grid before this one is done. The next may start then, with RELEASE at once.
    if EARLY and RELEASE:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if EARLY and not RELEASE:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _store_normed(b_x, b_scale, b_shift, p_out, o_w, m_w, W: tl.constexpr):
    # The modulated layer norm of one row.
    b_d = tl.where(m_w, b_x - tl.sum(b_x) / W, 0.0)
    b_d *= 1.0 / tl.sqrt(tl.sum(b_d * b_d) / W + _EPS)
    tl.store(p_out + o_w, (b_d * (1.0 + b_scale) + b_shift).to(p_out.dtype.element_ty), mask=m_w)


@triton.jit
def embed_kernel(
    p_first,  # [] int64
    p_tokens,  # [B, N] int64
    p_table,  # [K, W]
    p_positions,  # [N, W]
    p_starts,  # [G, W]
    p_start,  # [R, W]
    p_scale,  # [R, W], rows `stride_norm` apart
    p_shift,  # as p_scale
    p_x,  # [R, G, W]
    p_normed,  # [R, G, W]
    images,
    stride_norm,
    N: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    EARLY: tl.constexpr,
):
    # It starts when all before it are done.
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    i_row = tl.program_id(0) // G
    i_group = tl.program_id(0) % G
    o_w = tl.arange(0, BW)
    m_w = o_w < W
    first = tl.load(p_first)
    b_scale = tl.load(p_scale + i_row * stride_norm + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_row * stride_norm + o_w, mask=m_w, other=0.0).to(tl.float32)
    if first == 0:
        b_x = tl.load(p_start + i_row * W + o_w, mask=m_w, other=0.0).to(tl.float32)
        b_x += tl.load(p_starts + i_group * W + o_w, mask=m_w, other=0.0).to(tl.float32)
    else:
        token = tl.load(p_tokens + (i_row % images) * N + first - G + i_group)
        b_x = tl.load(p_table + token * W + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_x += tl.load(p_positions + (first + i_group) * W + o_w, mask=m_w, other=0.0).to(tl.float32)
    o_out = tl.program_id(0) * W
    tl.store(p_x + o_out + o_w, b_x, mask=m_w)
    _store_normed(b_x, b_scale, b_shift, p_normed + o_out, o_w, m_w, W)


@triton.jit
def residual_kernel(
    p_parts,  # [PARTS, T, W]
    p_bias,  # [W]
    p_gate,  # [R, W], rows `stride_gate` apart
    p_scale,  # [R, W], rows `stride_norm` apart
    p_shift,  # as p_scale
    p_x,  # [T, W] fp32
    p_normed,  # [T, W]
    rows,
    stride_gate,
    stride_norm,
    G: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    PARTS: tl.constexpr,
    RELEASE: tl.constexpr,
    EARLY: tl.constexpr,
):
    # x += gate * (sum of the parts + bias), normed = modulated layer norm of x; one row
    i_t = tl.program_id(0)
    i_row = i_t // G
    o_w = tl.arange(0, BW)
    m_w = o_w < W
    b_bias = tl.load(p_bias + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + i_row * stride_gate + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_scale = tl.load(p_scale + i_row * stride_norm + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + i_row * stride_norm + o_w, mask=m_w, other=0.0).to(tl.float32)
    _wait(EARLY, RELEASE)
    b_x = tl.load(p_x + i_t * W + o_w, mask=m_w, other=0.0)
    b_sum = tl.load(p_parts + i_t * W + o_w, mask=m_w, other=0.0).to(tl.float32)
    for i_part in tl.static_range(1, PARTS):
        b_sum += tl.load(p_parts + (i_part * rows + i_t) * W + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_x += b_gate * (b_sum + b_bias)
    tl.store(p_x + i_t * W + o_w, b_x, mask=m_w)
    _store_normed(b_x, b_scale, b_shift, p_normed + i_t * W, o_w, m_w, W)


@triton.jit
def _gelu(b_y, APPROXIMATE: tl.constexpr):
    b_u = b_y * (_GELU + _GELU_CUBE * (b_y * b_y))
    if APPROXIMATE:
        # One instruction, right to 2^-11, instead of an exponential and a division.
        b_tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [b_u], dtype=tl.float32, is_pure=True, pack=1
        )
        b_half = 0.5 * b_y
        return b_half + b_half * b_tanh
    # tanh(u) = 2 sigmoid(2 u) - 1
    return b_y * tl.sigmoid(2.0 * b_u)


@triton.jit
def _bring_share(p_next, pieces, BYTES: tl.constexpr, THREADS: tl.constexpr):
    # This program's share of `pieces` pieces of BYTES bytes comes to the second-level cache, a piece for each thread.
    i = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    o_piece = i * THREADS + tl.arange(0, THREADS)
    p_piece = p_next + o_piece.to(tl.int64) * (BYTES * 8 // p_next.dtype.element_ty.primitive_bitwidth)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r", [p_piece.to(tl.uint64), (o_piece < pieces).to(tl.int32), BYTES], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@triton.jit
def product_kernel(
    p_a,  # [T, K]
    p_weight,  # [O, K]; fp8 or as a
    p_scale,  # [O] fp32, or None for 1
    p_bias,  # [O]; not read with PARTIAL
    p_out,  # [T, O]; with PARTIAL [PARTS, T, O]
    p_next,  # the next product's weights, `pieces` pieces of SHARE bytes; not read without SHARE
    rows,
    outputs,
    pieces,
    K: tl.constexpr,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    PIECES: tl.constexpr,
    SHARE: tl.constexpr,
    THREADS: tl.constexpr,
    GELU: tl.constexpr,
    PARTIAL: tl.constexpr,
    EARLY: tl.constexpr,
):
    # out = a weight^T scale + bias; with PARTIAL no bias, and one part of LENGTH channels for each index of the grid
    i_m = tl.program_id(0)
    i_n = tl.program_id(1)
    i_part = tl.program_id(2)
    o_m = i_m * ROWS + tl.arange(0, ROWS)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    o_k = i_part * LENGTH + tl.arange(0, STEP)
    # Past the end the last row is read again, and nothing is stored.
    p_row = p_a + tl.minimum(o_m, rows - 1).to(tl.int64)[:, None] * K + o_k[None, :]
    b_n = tl.minimum(o_n, outputs - 1)
    p_column = p_weight + b_n[:, None] * K + o_k[None, :]
    if PIECES:
        # The weights come closer while the kernel before this one runs, asked for by the first row of tiles: long
        # pieces of a column, since memory is slow to give scattered lines.
        o_piece = i_part * LENGTH + tl.arange(0, PIECES) * (LENGTH // PIECES)
        p_piece = p_weight + b_n[:, None] * K + o_piece[None, :]
        BYTES: tl.constexpr = LENGTH // PIECES * p_weight.dtype.element_ty.primitive_bitwidth // 8
        if i_m == 0:
            tl.inline_asm_elementwise(
                "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
                [p_piece.to(tl.uint64), BYTES], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
    if SHARE:
        _bring_share(p_next, pieces, SHARE, THREADS)
    if p_scale is not None:
        b_scale = tl.load(p_scale + b_n)
    if not PARTIAL:
        b_bias = tl.load(p_bias + b_n).to(tl.float32)
    _wait(EARLY)
    b_y = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for i_k in tl.range(0, LENGTH, STEP, num_stages=STAGES):
        b_a = tl.load(p_row + i_k)
        # fp8 is exact in every other dtype.
        b_w = tl.load(p_column + i_k).to(p_a.dtype.element_ty)
        if p_a.dtype.element_ty == tl.float32:
            # Step by step, which rounds less than one long chain of additions. A plain sum would become that chain: the
            # compiler makes it the product's accumulator.
            b_y = tl.fma(tl.dot(b_a, tl.trans(b_w), input_precision="ieee"), 1.0, b_y)
        else:
            b_y = tl.dot(b_a, tl.trans(b_w), b_y)
    if p_scale is not None:
        # Parts, too: in fp16 they may be too large without.
        b_y *= b_scale[None, :]
    if not PARTIAL:
        b_y += b_bias[None, :]
    if GELU:
        # Only bf16 rounds more than the approximation errs.
        b_y = _gelu(b_y, EARLY and p_out.dtype.element_ty == tl.bfloat16)
    p_tile = p_out + (i_part * rows + o_m).to(tl.int64)[:, None] * outputs + o_n[None, :]
    tl.store(p_tile, b_y.to(p_out.dtype.element_ty), mask=(o_m < rows)[:, None] & (o_n < outputs)[None, :])


@triton.jit
def _bring_closer(p_lines, m_lines):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [p_lines.to(tl.uint64), m_lines.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _earlier(p_cache, left, TILES: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr):
    # Every SLOTS-th of the next keys or values, of which so many are left, and zeros after them. They are read once, so
    # others may stay in the second-level cache.
    tiles = ()
    for i_tile in tl.static_range(TILES):
        m_tile = (left > i_tile * SLOTS)[:, None]
        tiles += (  # type: ignore[assignment]
            tl.load(p_cache + i_tile * SLOTS * D, mask=m_tile, other=0.0, eviction_policy="evict_first"),
        )
    return tiles


@triton.jit
def attend_kernel(
    p_first,  # [] int64
    p_qkv,  # [R, G, 3, H, D]
    p_query_scale,  # [H] fp32
    p_keys,  # [R, H, N, D]
    p_values,  # [R, H, N, D]
    p_out,  # [R, G, H, D]
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    SLOTS: tl.constexpr,
    LINES: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    # One query of HEADS heads, a warp each. Each of SLOTS rows of lanes reads every SLOTS-th key and has a running
    # softmax of its own, so that only the product of a query and a key crosses lanes. Keys of this group come straight
    # from the product. TILES * SLOTS keys and values are always on their way, the first of them before the wait.
    DTYPE: tl.constexpr = p_keys.dtype.element_ty
    SPAN: tl.constexpr = TILES * SLOTS
    i_group = tl.program_id(0) % G
    i_heads = tl.program_id(0) // G
    i_row = i_heads // (H // HEADS)
    i_head = i_heads % (H // HEADS) * HEADS
    o_r = tl.arange(0, HEADS * SLOTS)
    o_h = i_head + o_r // SLOTS
    o_slot = o_r % SLOTS
    o_d = tl.arange(0, D)
    first = tl.load(p_first).to(tl.int32)
    i_cache = (i_row * H + i_head).to(tl.int64) * (N * D)
    o_cache = (o_r // SLOTS * (N * D) + o_slot * D)[:, None] + o_d[None, :]
    p_key = p_keys + i_cache + o_cache
    p_value = p_values + i_cache + o_cache
    b_left = first - o_slot
    keys = _earlier(p_key, b_left, TILES, SLOTS, D)
    values = _earlier(p_value, b_left, TILES, SLOTS, D)
    if tl.program_id(0) < AHEAD:
        # The rest of what the first programs read comes closer while the product runs: a key of 64 channels of 16 bits
        # is one line.
        o_line = tl.arange(0, HEADS * LINES)
        m_line = (o_line % LINES < first) & (o_line % LINES >= SPAN)
        o_near = i_cache + o_line // LINES * (N * D) + o_line % LINES * D
        _bring_closer(p_keys + o_near, m_line)
        _bring_closer(p_values + o_near, m_line)
    b_factor = tl.load(p_query_scale + o_h)
    _wait(EARLY)
    p_q = p_qkv + i_row.to(tl.int64) * (3 * G * H * D) + o_h[:, None] * D + o_d[None, :]
    b_q = tl.load(p_q + 3 * i_group * (H * D)).to(tl.float32)  # [HEADS * SLOTS, D], as all that follows
    b_q *= (b_factor / tl.maximum(tl.sqrt(tl.sum(b_q * b_q, axis=1)), _SMALLEST_NORM))[:, None]
    b_q = b_q.to(DTYPE).to(tl.float32) * _LOG2_E
    # What a row sums up before its first key, if it has one, ends with the factor exp2(_NEVER - max) = 0.
    b_max = tl.full([HEADS * SLOTS], _NEVER, dtype=tl.float32)
    b_sum = tl.zeros([HEADS * SLOTS], dtype=tl.float32)
    b_o = tl.zeros([HEADS * SLOTS, D], dtype=tl.float32)
    for i_new in tl.static_range(G):
        b_k = tl.load(p_q + (3 * i_new + 1) * (H * D)).to(tl.float32)
        b_v = tl.load(p_q + (3 * i_new + 2) * (H * D))
        b_k = (b_k * (1.0 / tl.maximum(tl.sqrt(tl.sum(b_k * b_k, axis=1)), _SMALLEST_NORM))[:, None]).to(DTYPE)
        # One of the slots counts it.
        m_new = o_slot == i_new % SLOTS
        if i_group == i_new:
            tl.store(p_key + (first + i_new - i_new % SLOTS) * D, b_k, mask=m_new[:, None])
            tl.store(p_value + (first + i_new - i_new % SLOTS) * D, b_v, mask=m_new[:, None])
        b_s = tl.where(m_new, tl.sum(b_k.to(tl.float32) * b_q, axis=1), _NEVER)
        b_next = tl.maximum(b_max, b_s)
        b_old = tl.exp2(b_max - b_next)
        b_p = tl.exp2(b_s - b_next)
        b_sum = b_sum * b_old + b_p
        b_o = b_o * b_old[:, None] + b_p[:, None] * b_v.to(tl.float32)
        b_max = b_next
    for _ in range(0, first, SPAN):
        p_key += SPAN * D
        p_value += SPAN * D
        next_keys = _earlier(p_key, b_left - SPAN, TILES, SLOTS, D)
        next_values = _earlier(p_value, b_left - SPAN, TILES, SLOTS, D)
        scores = ()
        b_next = b_max
        for i_tile in tl.static_range(TILES):
            b_s = tl.sum(keys[i_tile].to(tl.float32) * b_q, axis=1)
            scores += (tl.where(b_left > i_tile * SLOTS, b_s, _NEVER),)  # type: ignore[assignment]
            b_next = tl.maximum(b_next, scores[i_tile])
        b_old = tl.exp2(b_max - b_next)
        b_sum *= b_old
        b_o *= b_old[:, None]
        for i_tile in tl.static_range(TILES):
            b_p = tl.exp2(scores[i_tile] - b_next)
            b_sum += b_p
            b_o += b_p[:, None] * values[i_tile].to(tl.float32)
        b_max = b_next
        keys = next_keys
        values = next_values
        b_left -= SPAN
    b_max = tl.reshape(b_max, [HEADS, SLOTS])
    b_old = tl.exp2(b_max - tl.max(b_max, axis=1)[:, None])
    b_sum = tl.sum(tl.reshape(b_sum, [HEADS, SLOTS]) * b_old, axis=1)
    b_y = tl.sum(tl.reshape(b_o, [HEADS, SLOTS, D]) * (b_old / b_sum[:, None])[:, :, None], axis=1)  # [HEADS, D]
    p_o = p_out + (i_row * G + i_group).to(tl.int64) * (H * D) + (i_head + tl.arange(0, HEADS))[:, None] * D
    tl.store(p_o + o_d[None, :], b_y.to(DTYPE))


def launch_step(weights: DecodeWeights, state: DecodeState, until: tuple[int, str] | None = None) -> None:
    """`reference.decode_step`; a row's result depends on the number of rows, never on other rows."""
    if state.x.numel() == 0:
        return
    w, s = weights, state
    normed = torch.empty_like(s.attended)
    _embed(w, s, normed)
    for layer in range(w.depth):
        for op in OPS:
            if op == "qkv":
                _product(normed, w.qkv[layer], w.qkv_bias[layer], s.qkv, w.proj[layer], w.scale(op, layer))
            elif op == "attend":
                _attend(w, s, layer)
            elif op == "proj":
                partial = _product_parts(s.attended, w.proj[layer], w.fc1[layer], w.scale(op, layer))
                _residual(partial, w.proj_bias[layer], s, 2 * layer, normed)
            elif op == "fc1":
                scale = w.scale(op, layer)
                _product(normed, w.fc1[layer], w.fc1_bias[layer], s.hidden, w.fc2[layer], scale, gelu=True)
            else:
                following = w.qkv[layer + 1] if layer + 1 < w.depth else w.head
                partial = _product_parts(s.hidden, w.fc2[layer], following, w.scale(op, layer))
                _residual(partial, w.fc2_bias[layer], s, 2 * layer + 1, normed)
            if until == (layer, op):
                return
    _product(normed, w.head, w.head_bias, s.logits, None, w.head_scale)


def _embed(weights: DecodeWeights, state: DecodeState, normed: Tensor) -> None:
    rows, group, width = state.x.shape
    scale, shift = _norm(state, 0)
    # Without `launch_pdl`: this grid starts when all before it are done.
    embed_kernel[(rows * group,)](
        state.first, state.tokens, weights.tokens, weights.positions, weights.starts, state.start, scale, shift,
        state.x, normed, len(state.tokens), scale.stride(0),
        N=weights.length, G=group, W=width, BW=triton.next_power_of_2(width), num_warps=NORM_WARPS,
        EARLY=_starts_early(state.x.device),
    )  # fmt: skip


def _product_parts(a: Tensor, weight: Tensor, following: Tensor, scale: Tensor | None = None) -> Tensor:
    """Linear layer without bias, `[R, G, K]` to `[parts, R, G, O]`, to be added; arguments as `_product`."""
    rows, inner = a.shape[0] * a.shape[1], a.shape[2]
    config = product_config(rows, a.element_size(), partial=True)
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(len(weight), config.columns)
    count = parts(tiles, inner, config.step)
    dtype = a.dtype if rows >= NARROW_PARTS else torch.float32
    out = a.new_empty((count, *a.shape[:2], len(weight)), dtype=dtype)
    _product(a, weight, None, out, following, scale, count)
    return out


def _product(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    following: Tensor | None,
    scale: Tensor | None = None,
    count: int = 1,
    gelu: bool = False,
) -> None:
    """Linear layer, `[R, G, K]` to `[R, G, O]`; without bias `count` parts of it, `[count, R, G, O]`.

    `following` are the weights of the next product, if there is one; `scale` belongs to fp8 weights, widened or not.
    """
    rows, inner, outputs = a.shape[0] * a.shape[1], a.shape[2], len(weight)
    config = product_config(rows, a.element_size(), partial=bias is None)
    length = inner // count
    # The greatest power of two that divides the length, so that no load of the inner dimension needs a mask.
    even = length & -length
    # One piece a thread, of whole 16 bytes.
    pieces = max(1, min(32 * config.warps // config.columns, even * weight.element_size() // 16))
    grid = (triton.cdiv(rows, config.rows), triton.cdiv(outputs, config.columns), count)
    threads = 32 * config.warps
    prefetch = config.prefetch if _starts_early(a.device) else None
    share = share_count = 0
    if prefetch == "next" and following is not None:
        share, share_count = shares(following.numel() * following.element_size(), math.prod(grid) * threads)
    product_kernel[grid](
        a, weight, scale, bias, out, following, rows, outputs, share_count,
        K=inner, LENGTH=length, ROWS=config.rows, COLUMNS=config.columns, STEP=min(config.step, even),
        STAGES=config.stages, PIECES=pieces if prefetch and not share else 0, SHARE=share, THREADS=threads,
        GELU=gelu, PARTIAL=bias is None, num_warps=config.warps, **_early(a.device),
    )  # fmt: skip


def _attend(weights: DecodeWeights, state: DecodeState, layer: int) -> None:
    keys, values = state.keys[layer], state.values[layer]
    rows, heads, length, channels = keys.shape
    group = weights.group
    many, slots = attend_heads(heads), attend_slots(channels)
    ahead = KEYS_AHEAD if _starts_early(keys.device) else 0
    attend_kernel[(rows * (heads // many) * group,)](
        state.first, state.qkv, weights.query_scale[layer], keys, values, state.attended,
        H=heads, N=length, D=channels, G=group, HEADS=many, TILES=attend_tiles(rows * group), SLOTS=slots,
        LINES=triton.next_power_of_2(length), AHEAD=ahead, num_warps=many, **_early(keys.device),
    )  # fmt: skip


def _residual(partial: Tensor, bias: Tensor, state: DecodeState, index: int, normed: Tensor) -> None:
    """Ends the residual branch of that index (a block has two), and norms for what follows."""
    rows, group, width = state.x.shape
    gate = state.modulations[index // 2, :, index % 2]
    scale, shift = _norm(state, index + 1)
    residual_kernel[(rows * group,)](
        partial, bias, gate, scale, shift, state.x, normed, rows * group, gate.stride(0), scale.stride(0),
        G=group, W=width, BW=triton.next_power_of_2(width), PARTS=len(partial),
        RELEASE=releases_early(rows * group), num_warps=NORM_WARPS, **_early(state.x.device),
    )  # fmt: skip


def _norm(state: DecodeState, index: int) -> tuple[Tensor, Tensor]:
    """Scale and shift before the residual branch of that index, or before the head, `[R, W]` each."""
    layer, second = divmod(index, 2)
    if layer == len(state.modulations):
        return state.head_modulation[:, 0], state.head_modulation[:, 1]
    return state.modulations[layer, :, 2 + second], state.modulations[layer, :, 4 + second]


def _early(device: torch.device) -> dict[str, bool]:
    """Options of a launch that may start while the one before it runs."""
    return {"EARLY": True, "launch_pdl": True} if _starts_early(device) else {"EARLY": False}


@lru_cache
def _starts_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 9
