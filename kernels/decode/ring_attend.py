"""Attention of the ring kernel: pieces over programs, the keys and values of a piece over the warps of a program."""

# Gluon's arguments are pointers and constants without types, its tuples grow by addition only.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .simt import (
    WARPS,
    barrier,
    exchanged,
    from_global_where,
    from_shared,
    mark,
    of_lane,
    packed,
    post,
    receive,
    threads,
    to_shared_2,
    unpacked,
)

_WARPS = gl.constexpr(WARPS)
# A shorter vector is divided by this instead of its length, as in torch.nn.functional.normalize.
_LEAST_LENGTH = gl.constexpr(1e-12)


@gluon.constexpr_function
def _piece_loads(width):
    """Loads of attention: from three addresses, of 16 numbers of a query, and of a key (bit 1), those at 8 t and at
    32 + 8 t; of two numbers of eight values (bits 2 to 9)."""
    vectors = tuple((i, offset, 4, i) for i in range(2) for offset in (0, 16, 128, 144))
    return vectors + tuple((2, 12 * width * i, 2, 2 + i) for i in range(8))


@gluon.jit
def _unit(words, b_factor):
    """16 numbers of a vector of which four lanes side by side have the others, divided by its length."""
    numbers = ()
    b_square = gl.zeros_like(threads()).to(gl.float32)
    for i in gl.static_range(16):
        number = words[i].to(gl.float32, bitcast=True)
        b_square = gl.fma(number, number, b_square)
        numbers = numbers + (number,)
    b_square += exchanged(b_square, 1)
    b_square += exchanged(b_square, 2)
    b_factor = b_factor / gl.maximum(gl.sqrt(b_square), _LEAST_LENGTH)
    found = ()
    for i in gl.static_range(16):
        found = found + (numbers[i] * b_factor,)
    return found


@gluon.jit
def attend(
    p_box, p_posted, kept, first, i_program, i_layer, p_query_scale, p_keys, p_values, p_attended, memory, p_trace,
    LENGTH: gl.constexpr, DTYPE: gl.constexpr, PLAN: gl.constexpr,
):  # fmt: skip
    """One piece is a token's query in one head, of 64 numbers. Warp w has the keys 8 w to 8 w + 7 and their values, of
    a key a thread has 16 numbers, of each value two. Earlier ones are asked for before the new ones are there."""
    WIDTH: gl.constexpr = PLAN.width
    HEADS: gl.constexpr = WIDTH // 64
    GROUP: gl.constexpr = PLAN.group
    PIECES: gl.constexpr = PLAN.rows * HEADS
    PROGRAMS: gl.constexpr = PLAN.programs
    o_thread = threads()
    o_lane = o_thread & 31
    o_warp = o_thread >> 5
    o_n = o_thread >> 2
    p_shares = memory + PLAN.shares
    # Programs with more columns of qkv are not the first to get a piece.
    for i_piece in range(PROGRAMS - 1 - i_program, PIECES, PROGRAMS):
        i_token = i_piece // HEADS
        i_row = i_token // GROUP
        i_head = i_piece % HEADS
        i_cache = (i_row * HEADS + i_head) * (LENGTH * 128)
        p_key = p_keys.to(gl.int64) + i_cache + o_n * 128 + (o_lane & 3) * 16
        p_value = p_values.to(gl.int64) + i_cache + o_warp * 1024 + o_lane * 4
        m_old = o_n < first
        keys = from_global_where(m_old, p_key, 0, 4) + from_global_where(m_old, p_key, 64, 4)
        values = ()
        for i in gl.static_range(8):
            values = values + from_global_where(o_warp * 8 + i < first, p_value, 128 * i, 1)
        b_scale = gl.load(p_query_scale + i_head)
        # A line waits for the key and the value of its own token.
        o_new = o_n - first
        m_new = (o_new >= 0) & (o_new < GROUP)
        o_mask = 1 + 2 * m_new.to(gl.int32)
        for i in gl.static_range(8):
            o_value = o_warp * 8 + i - first
            o_mask += ((o_value >= 0) & (o_value < GROUP)).to(gl.int32) * (4 << i)
        p_token = p_box.to(gl.int64) + i_head * 256 + (o_lane & 3) * 32
        p_query = p_token + i_token * (12 * WIDTH)
        p_new_key = p_token + 4 * WIDTH + (i_row * GROUP + o_new) * (12 * WIDTH)
        p_new_value = p_box.to(gl.int64) + 8 * WIDTH + i_head * 256 + o_lane * 8
        p_new_value += (i_row * GROUP + o_warp * 8 - first) * (12 * WIDTH)
        words = receive((p_query, p_new_key, p_new_value), o_mask, _piece_loads(WIDTH))
        if PLAN.trace:
            mark(p_trace, i_layer * 10 + 2)
        query = _unit(words[:16], b_scale)
        key = _unit(words[16:32], 1.0)
        b_score = gl.zeros_like(o_thread).to(gl.float32)
        new_keys = ()
        for i in gl.static_range(8):
            word = gl.where(m_new, packed(key[2 * i], key[2 * i + 1], DTYPE), keys[i])
            low, high = unpacked(packed(query[2 * i], query[2 * i + 1], DTYPE), DTYPE)
            key_low, key_high = unpacked(word, DTYPE)
            b_score = gl.fma(high, key_high, gl.fma(low, key_low, b_score))
            new_keys = new_keys + (word,)
        b_score += exchanged(b_score, 1)
        b_score += exchanged(b_score, 2)
        b_score = gl.where(o_n < first + GROUP, b_score, -float("inf"))
        # Each warp has its own greatest score; one without keys no share.
        b_most = gl.maximum(b_score, -1e30)
        for i in gl.static_range(3):
            b_most = gl.maximum(b_most, exchanged(b_most, 4 << i))
        b_share = gl.exp(b_score - b_most)
        b_sum = gl.zeros_like(b_share)
        b_low = gl.zeros_like(b_share)
        b_high = gl.zeros_like(b_share)
        own = i_token % GROUP + first
        own_value = gl.zeros_like(o_thread)
        for i in gl.static_range(8):
            share = of_lane(b_share, 4 * i)
            low = words[32 + 2 * i].to(gl.float32, bitcast=True)
            high = words[33 + 2 * i].to(gl.float32, bitcast=True)
            word = packed(low, high, DTYPE)
            word = gl.where((o_mask & (4 << i)) != 0, word, values[i])
            own_value = gl.where(o_warp * 8 + i == own, word, own_value)
            low, high = unpacked(word, DTYPE)
            b_sum += share
            b_low = gl.fma(share, low, b_low)
            b_high = gl.fma(share, high, b_high)
        to_shared_2(o_lane >= 0, p_shares + o_warp * 256 + o_lane * 8, b_low, b_high)
        to_shared_2(o_lane == 0, p_shares + 256 * _WARPS + o_warp * 8, b_most, b_sum)
        barrier()
        mosts = ()
        all_sums = ()
        for i in gl.static_range(_WARPS // 2):
            a, b, c, d = from_shared(p_shares + 256 * _WARPS + 0 * o_lane, 16 * i, 4)
            mosts = mosts + (a.to(gl.float32, bitcast=True), c.to(gl.float32, bitcast=True))
            all_sums = all_sums + (b.to(gl.float32, bitcast=True), d.to(gl.float32, bitcast=True))
        b_most = mosts[0]
        for i in gl.static_range(1, _WARPS):
            b_most = gl.maximum(b_most, mosts[i])
        b_sum = gl.zeros_like(b_sum)
        b_low = gl.zeros_like(b_sum)
        b_high = gl.zeros_like(b_sum)
        for i in gl.static_range(_WARPS):
            b_factor = gl.exp(mosts[i] - b_most)
            low, high = from_shared(p_shares + o_lane * 8, 256 * i, 2)
            b_sum = gl.fma(b_factor, all_sums[i], b_sum)
            b_low = gl.fma(b_factor, low.to(gl.float32, bitcast=True), b_low)
            b_high = gl.fma(b_factor, high.to(gl.float32, bitcast=True), b_high)
        word = packed(b_low / b_sum, b_high / b_sum, DTYPE)
        o_out = i_token * (WIDTH // 2) + i_head * 32 + o_lane
        post(o_warp == 0, p_posted + o_out, word)
        if PLAN.trace:
            mark(p_trace, i_layer * 10 + 3)
        p_words = p_attended.to(gl.pointer_type(gl.int32))
        gl.store(p_words + o_out, word, mask=(o_warp == 0) & (kept > 0))
        p_key = p_keys.to(gl.pointer_type(gl.int32)) + i_cache // 4 + o_n * 32 + (o_lane & 3) * 4
        for i in gl.static_range(8):
            gl.store(p_key + (i % 4 + i // 4 * 16), new_keys[i], mask=o_n == own)
        p_value_words = p_values.to(gl.pointer_type(gl.int32)) + i_cache // 4 + own * 32 + o_lane
        gl.store(p_value_words, own_value, mask=o_warp == own // 8)
        if PIECES > PROGRAMS:
            barrier()
