"""Triton kernels of attention under the masks of this package, forward and backward.

Every mask is an interval of keys for each row, so no mask is ever stored. A program takes one tile of a head and
streams past it what that tile sees, or what sees it, and reads no other tile; the backward of a head of one tile is one
program. The last tile of rows and that of keys are TAIL wide where that is enough for the rest of the length; TAIL is 0
elsewhere. Nothing is added atomically: the same inputs give the same bits.

`mask` is (n_image, end, length, rules, p_ends): image rows, the first hidden position, all rows, the integer below, and
where each row's group ends or None.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Lower than any score: a row that has seen nothing yet; minus infinity would make NaN of the first rescaling.
_LOWEST = tl.constexpr(-1.0e30)
_LN_2 = tl.constexpr(0.6931471805599453)

# What the integer `rules` says about rows and keys.
IMAGE_SEES_SPECTRAL = tl.constexpr(1)
SPECTRAL_SEES_IMAGE = tl.constexpr(2)
SPECTRAL_IS_CAUSAL = tl.constexpr(4)


@triton.jit
def _interval(i_row, i_key, mask, ROWS: tl.constexpr):
    """Each row sees the keys from lo up to and without hi; hidden rows, from `end` on, see none.

    Counted from key `i_key`: columns are then the same numbers in all tiles, and nothing of a mask is the same in all
    turns of a loop over keys. Either would be kept in registers, at the cost of what must be there.
    """
    n_image, end, _, rules, p_ends = mask
    o_row = i_row - i_key + tl.arange(0, ROWS)
    m_image = o_row < n_image - i_key
    m_hidden = o_row >= end - i_key
    b_lo = tl.where(m_image | ((rules & SPECTRAL_SEES_IMAGE) != 0), -i_key, n_image - i_key)
    if p_ends is not None:
        b_hi = tl.load(p_ends + i_key + o_row, mask=o_row < end - i_key, other=0) - i_key
    else:
        b_hi = tl.where((rules & SPECTRAL_IS_CAUSAL) != 0, o_row + 1, end - i_key)
    b_hi = tl.where(m_image, tl.where((rules & IMAGE_SEES_SPECTRAL) != 0, end, n_image) - i_key, b_hi)
    return b_lo, tl.where(m_hidden, -i_key, tl.minimum(b_hi, end - i_key))


@triton.jit
def _bounds(i_row, mask, ROWS: tl.constexpr):
    """No row of a tile sees keys outside of [first, last); all of its rows see the keys of [low, high)."""
    n_image, end, length, rules, p_ends = mask
    stop = tl.minimum(i_row + ROWS, end)
    image = i_row < n_image
    spectral = stop > n_image
    image_hi = tl.where((rules & IMAGE_SEES_SPECTRAL) != 0, end, n_image)
    start = tl.where((rules & SPECTRAL_SEES_IMAGE) != 0, 0, n_image)
    causal = (rules & SPECTRAL_IS_CAUSAL) != 0
    least = tl.where(causal, tl.maximum(i_row, n_image) + 1, end)
    most = tl.where(causal, stop, end)
    if p_ends is not None:
        most = tl.load(p_ends + stop - 1)
    first = tl.where(image, 0, start)
    last = tl.maximum(tl.where(image, image_hi, 0), tl.where(spectral, most, 0))
    low = tl.where(spectral, start, 0)
    high = tl.minimum(tl.where(image, image_hi, end), tl.where(spectral, least, end))
    # Hidden rows are masked wholly.
    high = tl.where(tl.minimum(i_row + ROWS, length) > end, 0, high)
    return first, tl.where(i_row < end, last, 0), low, high


@triton.jit
def _readers(i_key, mask, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """No row outside of [first, last) sees a key of this tile; first is the start of a tile of rows."""
    n_image, end, _, rules, p_ends = mask
    image = (n_image > 0) & ((i_key < n_image) | ((rules & IMAGE_SEES_SPECTRAL) != 0))
    spectral = (i_key + KEYS > n_image) | ((rules & SPECTRAL_SEES_IMAGE) != 0)
    first = 0
    if p_ends is None:
        # Under a causal mask the spectral rows before a key do not see it.
        first = tl.where(image | ((rules & SPECTRAL_IS_CAUSAL) == 0), 0, i_key // ROWS * ROWS)
    return first, tl.where(i_key < end, tl.where(spectral, end, n_image), 0)


@triton.jit
def _stop(last, length, SIZE: tl.constexpr, TAIL: tl.constexpr):
    """Where whole tiles end that begin before `last`: a rest up to there, if any, is the tail's."""
    if TAIL:
        last = tl.minimum(last, length // SIZE * SIZE)
    return last


@triton.jit
def _hide(b_s, o_key, b_lo, b_hi):
    """Scores of keys outside of [b_lo, b_hi) become minus infinity."""
    return tl.where((o_key >= b_lo) & (o_key < b_hi), b_s, -float("inf"))


@triton.jit
def _end(p_prefix, i_batch, n_image, length):
    """The first hidden position of a sample."""
    end = length
    if p_prefix is not None:
        end = n_image + tl.minimum(tl.maximum(tl.load(p_prefix + i_batch).to(tl.int32), 0), length - n_image)
    return end


@triton.jit
def _load(p_x, stride, o_row, stop, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows of one head, zero from `stop` on: [len(o_row), PADDED]."""
    o_d = tl.arange(0, PADDED)
    m_row = (o_row < stop)[:, None]
    if WIDTH != PADDED:
        m_row = m_row & (o_d < WIDTH)[None, :]
    return tl.load(p_x + o_row[:, None] * stride + o_d[None, :], mask=m_row, other=0.0)


@triton.jit
def _store(p_x, stride, o_row, stop, b_x, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    o_d = tl.arange(0, PADDED)
    m_row = (o_row < stop)[:, None]
    if WIDTH != PADDED:
        m_row = m_row & (o_d < WIDTH)[None, :]
    tl.store(p_x + o_row[:, None] * stride + o_d[None, :], b_x.to(p_x.dtype.element_ty), mask=m_row)


@triton.jit
def _forward_step(
    i_key, b_q, b_m, b_l, b_acc, b_lo, b_hi, low, high, keys, end, scale,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    p_k, k_row, p_v, v_row = keys
    o_key = i_key + tl.arange(0, KEYS)
    b_k = _load(p_k, k_row, o_key, end, WIDTH, PADDED)
    b_v = _load(p_v, v_row, o_key, end, WIDTH, PADDED)
    b_s = tl.dot(b_q, tl.trans(b_k))
    if (i_key < low) | (i_key + KEYS > high):
        b_s = _hide(b_s, tl.arange(0, KEYS)[None, :], (b_lo - i_key)[:, None], (b_hi - i_key)[:, None])
    b_max = tl.maximum(b_m, tl.max(b_s, axis=1) * scale)
    b_p = tl.exp2(b_s * scale - b_max[:, None])
    b_shrink = tl.exp2(b_m - b_max)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_shrink[:, None])
    return b_max, b_l * b_shrink + tl.sum(b_p, axis=1), b_acc


@triton.jit
def _forward_tile(
    i_row, p_q, q_row, p_out, out_row, p_lse, keys, mask, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    _, end, length, _, _ = mask
    o_row = i_row + tl.arange(0, ROWS)
    b_lo, b_hi = _interval(i_row, 0, mask, ROWS)
    first, last, low, high = _bounds(i_row, mask, ROWS)
    b_q = _load(p_q, q_row, o_row, length, WIDTH, PADDED)
    # Running maximum, sum and weighted values of the rows. Scores are powers of two.
    b_m = tl.full([ROWS], _LOWEST, dtype=tl.float32)
    b_l = tl.zeros([ROWS], dtype=tl.float32)
    b_acc = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    stop = _stop(last, length, KEYS, TAIL)
    for i_key in tl.range(first // KEYS * KEYS, stop, KEYS):
        b_m, b_l, b_acc = _forward_step(
            i_key, b_q, b_m, b_l, b_acc, b_lo, b_hi, low, high, keys, end, scale, KEYS, WIDTH, PADDED
        )
    if TAIL and last > stop:
        b_m, b_l, b_acc = _forward_step(
            stop, b_q, b_m, b_l, b_acc, b_lo, b_hi, low, high, keys, end, scale, TAIL, WIDTH, PADDED
        )
    # Hidden rows, which saw nothing, become zero.
    m_seen = b_l > 0
    b_l = tl.where(m_seen, b_l, 1.0)
    tl.store(p_lse + o_row, tl.where(m_seen, b_m + tl.log2(b_l), 0.0))
    _store(p_out, out_row, o_row, length, b_acc / b_l[:, None], WIDTH, PADDED)


@triton.jit(do_not_specialize=["n_image", "length", "rules", "programs"])
def attention_fwd_kernel(
    p_q,  # [B, T, H, D], like k, v and out with strides of its own for all but D
    p_k,
    p_v,
    p_out,
    p_lse,  # [B, H, kept] fp32: base-2 logarithms of the softmax sums
    p_prefix,  # [B] integers or None
    p_ends,  # [T] int32: where each row's group ends, or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    kept, n_image, length, heads, rules, programs, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) % programs * ROWS
    i_all = tl.program_id(0) // programs
    i_batch = (i_all // heads).to(tl.int64)
    i_head = (i_all % heads).to(tl.int64)
    p_q += i_batch * q_batch + i_head * q_head
    p_k += i_batch * k_batch + i_head * k_head
    p_v += i_batch * v_batch + i_head * v_head
    p_out += i_batch * out_batch + i_head * out_head
    p_lse += i_all.to(tl.int64) * kept
    mask = (n_image, _end(p_prefix, i_batch, n_image, length), length, rules, p_ends)
    keys = (p_k, k_row, p_v, v_row)
    if TAIL and i_row + ROWS > length:
        _forward_tile(
            i_row, p_q, q_row, p_out, out_row, p_lse, keys, mask, scale, TAIL, KEYS, TAIL, WIDTH, PADDED
        )  # fmt: skip
    else:
        _forward_tile(
            i_row, p_q, q_row, p_out, out_row, p_lse, keys, mask, scale, ROWS, KEYS, TAIL, WIDTH, PADDED
        )  # fmt: skip


@triton.jit
def _queries_step(
    i_key, b_q, b_do, b_lse, b_delta, b_dq, b_lo, b_hi, low, high, keys, end, scale,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    p_k, k_row, p_v, v_row = keys
    o_key = i_key + tl.arange(0, KEYS)
    b_k = _load(p_k, k_row, o_key, end, WIDTH, PADDED)
    b_v = _load(p_v, v_row, o_key, end, WIDTH, PADDED)
    b_s = tl.dot(b_q, tl.trans(b_k)) * scale - b_lse[:, None]
    if (i_key < low) | (i_key + KEYS > high):
        b_s = _hide(b_s, tl.arange(0, KEYS)[None, :], (b_lo - i_key)[:, None], (b_hi - i_key)[:, None])
    b_ds = tl.exp2(b_s) * (tl.dot(b_do, tl.trans(b_v)) - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq)


@triton.jit
def _queries_tile(
    i_row, p_q, q_row, p_out, p_do, out_row, p_dq, d_row, p_lse, p_delta, keys, mask, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    _, end, length, _, _ = mask
    o_row = i_row + tl.arange(0, ROWS)
    b_lo, b_hi = _interval(i_row, 0, mask, ROWS)
    first, last, low, high = _bounds(i_row, mask, ROWS)
    b_do = _load(p_do, out_row, o_row, end, WIDTH, PADDED)
    b_out = _load(p_out, out_row, o_row, end, WIDTH, PADDED)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    tl.store(p_delta + o_row, b_delta)
    b_lse = tl.load(p_lse + o_row)
    b_q = _load(p_q, q_row, o_row, end, WIDTH, PADDED)
    b_dq = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    stop = _stop(last, length, KEYS, TAIL)
    for i_key in tl.range(first // KEYS * KEYS, stop, KEYS):
        b_dq = _queries_step(
            i_key, b_q, b_do, b_lse, b_delta, b_dq, b_lo, b_hi, low, high, keys, end, scale, KEYS, WIDTH, PADDED
        )
    if TAIL and last > stop:
        b_dq = _queries_step(
            stop, b_q, b_do, b_lse, b_delta, b_dq, b_lo, b_hi, low, high, keys, end, scale, TAIL, WIDTH, PADDED
        )
    _store(p_dq, d_row, o_row, length, b_dq * (scale * _LN_2), WIDTH, PADDED)


@triton.jit(do_not_specialize=["n_image", "length", "rules", "programs"])
def attention_bwd_queries_kernel(
    p_q,  # [B, T, H, D], like k and v with strides of its own for all but D
    p_k,
    p_v,
    p_out,  # [B, T, H, D], with the same strides as do
    p_do,
    p_dq,  # [B, T, H, D], like the other gradients
    p_lse,  # [B, H, kept] fp32
    p_delta,  # [B, H, kept] fp32: sums of do x out, for the keys' kernel
    p_prefix,  # [B] integers or None
    p_ends,  # [T] int32 or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    d_batch, d_row, d_head, kept, n_image, length, heads, rules, programs, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0) % programs * ROWS
    i_all = tl.program_id(0) // programs
    i_batch = (i_all // heads).to(tl.int64)
    i_head = (i_all % heads).to(tl.int64)
    o_out = i_batch * out_batch + i_head * out_head
    p_q += i_batch * q_batch + i_head * q_head
    p_k += i_batch * k_batch + i_head * k_head
    p_v += i_batch * v_batch + i_head * v_head
    p_out += o_out
    p_do += o_out
    p_dq += i_batch * d_batch + i_head * d_head
    p_lse += i_all.to(tl.int64) * kept
    p_delta += i_all.to(tl.int64) * kept
    mask = (n_image, _end(p_prefix, i_batch, n_image, length), length, rules, p_ends)
    keys = (p_k, k_row, p_v, v_row)
    if TAIL and i_row + ROWS > length:
        _queries_tile(
            i_row, p_q, q_row, p_out, p_do, out_row, p_dq, d_row, p_lse, p_delta, keys, mask, scale,
            TAIL, KEYS, TAIL, WIDTH, PADDED,
        )  # fmt: skip
    else:
        _queries_tile(
            i_row, p_q, q_row, p_out, p_do, out_row, p_dq, d_row, p_lse, p_delta, keys, mask, scale,
            ROWS, KEYS, TAIL, WIDTH, PADDED,
        )  # fmt: skip


@triton.jit
def _keys_step(
    i_row, i_key, b_k, b_v, b_dk, b_dv, queries, mask, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    p_q, q_row, p_do, out_row, p_lse, p_delta = queries
    _, end, _, _, _ = mask
    o_row = i_row + tl.arange(0, ROWS)
    b_q = _load(p_q, q_row, o_row, end, WIDTH, PADDED)
    b_do = _load(p_do, out_row, o_row, end, WIDTH, PADDED)
    b_lse = tl.load(p_lse + o_row)
    b_delta = tl.load(p_delta + o_row)
    _, _, low, high = _bounds(i_row, mask, ROWS)
    b_s = tl.dot(b_k, tl.trans(b_q)) * scale - b_lse[None, :]  # [KEYS, ROWS]
    if (i_key < low) | (i_key + KEYS > high):
        b_lo, b_hi = _interval(i_row, i_key, mask, ROWS)
        b_s = _hide(b_s, tl.arange(0, KEYS)[:, None], b_lo[None, :], b_hi[None, :])
    b_p = tl.exp2(b_s)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv)
    b_ds = b_p * (tl.dot(b_v, tl.trans(b_do)) - b_delta[None, :])
    return tl.dot(b_ds.to(b_q.dtype), b_q, b_dk), b_dv


@triton.jit
def _keys_tile(
    i_key, p_k, k_row, p_v, v_row, p_dk, p_dv, d_row, queries, mask, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    _, end, length, _, _ = mask
    o_key = i_key + tl.arange(0, KEYS)
    b_k = _load(p_k, k_row, o_key, end, WIDTH, PADDED)
    b_v = _load(p_v, v_row, o_key, end, WIDTH, PADDED)
    b_dk = tl.zeros([KEYS, PADDED], dtype=tl.float32)
    b_dv = tl.zeros([KEYS, PADDED], dtype=tl.float32)
    first, last = _readers(i_key, mask, ROWS, KEYS)
    stop = _stop(last, length, ROWS, TAIL)
    for i_row in tl.range(first, stop, ROWS):
        b_dk, b_dv = _keys_step(i_row, i_key, b_k, b_v, b_dk, b_dv, queries, mask, scale, ROWS, KEYS, WIDTH, PADDED)
    if TAIL and last > stop:
        b_dk, b_dv = _keys_step(stop, i_key, b_k, b_v, b_dk, b_dv, queries, mask, scale, TAIL, KEYS, WIDTH, PADDED)
    _store(p_dk, d_row, o_key, length, b_dk * (scale * _LN_2), WIDTH, PADDED)
    _store(p_dv, d_row, o_key, length, b_dv, WIDTH, PADDED)


@triton.jit(do_not_specialize=["n_image", "length", "rules", "programs"])
def attention_bwd_keys_kernel(
    p_q,  # [B, T, H, D], like k and v with strides of its own for all but D
    p_k,
    p_v,
    p_do,  # [B, T, H, D]
    p_dk,  # [B, T, H, D], like dv
    p_dv,
    p_lse,  # [B, H, kept] fp32
    p_delta,  # [B, H, kept] fp32, of the queries' kernel
    p_prefix,  # [B] integers or None
    p_ends,  # [T] int32 or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    d_batch, d_row, d_head, kept, n_image, length, heads, rules, programs, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TAIL: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    i_key = tl.program_id(0) % programs * KEYS
    i_all = tl.program_id(0) // programs
    i_batch = (i_all // heads).to(tl.int64)
    i_head = (i_all % heads).to(tl.int64)
    o_grad = i_batch * d_batch + i_head * d_head
    p_q += i_batch * q_batch + i_head * q_head
    p_k += i_batch * k_batch + i_head * k_head
    p_v += i_batch * v_batch + i_head * v_head
    p_do += i_batch * out_batch + i_head * out_head
    p_dk += o_grad
    p_dv += o_grad
    p_lse += i_all.to(tl.int64) * kept
    p_delta += i_all.to(tl.int64) * kept
    mask = (n_image, _end(p_prefix, i_batch, n_image, length), length, rules, p_ends)
    queries = (p_q, q_row, p_do, out_row, p_lse, p_delta)
    if TAIL and i_key + KEYS > length:
        _keys_tile(
            i_key, p_k, k_row, p_v, v_row, p_dk, p_dv, d_row, queries, mask, scale, ROWS, TAIL, TAIL, WIDTH, PADDED
        )  # fmt: skip
    else:
        _keys_tile(
            i_key, p_k, k_row, p_v, v_row, p_dk, p_dv, d_row, queries, mask, scale, ROWS, KEYS, TAIL, WIDTH, PADDED
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_image", "length", "rules"])
def attention_bwd_head_kernel(
    p_q,  # [B, T, H, D], like k and v with strides of its own for all but D
    p_k,
    p_v,
    p_out,  # [B, T, H, D], with the same strides as do
    p_do,
    p_dq,  # [B, T, H, D], like dk and dv
    p_dk,
    p_dv,
    p_lse,  # [B, H, kept] fp32
    p_prefix,  # [B] integers or None
    p_ends,  # [T] int32 or None
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    d_batch, d_row, d_head, kept, n_image, length, heads, rules, scale,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program takes a head of at most ROWS rows: every tensor is read once, scores are computed once."""
    i_all = tl.program_id(0)
    i_batch = (i_all // heads).to(tl.int64)
    i_head = (i_all % heads).to(tl.int64)
    o_out = i_batch * out_batch + i_head * out_head
    o_grad = i_batch * d_batch + i_head * d_head
    end = _end(p_prefix, i_batch, n_image, length)
    o_row = tl.arange(0, ROWS)
    b_q = _load(p_q + i_batch * q_batch + i_head * q_head, q_row, o_row, end, WIDTH, PADDED)
    b_k = _load(p_k + i_batch * k_batch + i_head * k_head, k_row, o_row, end, WIDTH, PADDED)
    b_v = _load(p_v + i_batch * v_batch + i_head * v_head, v_row, o_row, end, WIDTH, PADDED)
    b_do = _load(p_do + o_out, out_row, o_row, end, WIDTH, PADDED)
    b_out = _load(p_out + o_out, out_row, o_row, end, WIDTH, PADDED)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    b_lse = tl.load(p_lse + i_all.to(tl.int64) * kept + o_row, mask=o_row < length, other=0.0)
    b_lo, b_hi = _interval(0, 0, (n_image, end, length, rules, p_ends), ROWS)
    b_s = tl.dot(b_q, tl.trans(b_k)) * scale - b_lse[:, None]
    b_p = tl.exp2(_hide(b_s, o_row[None, :], b_lo[:, None], b_hi[:, None]))
    b_ds = (b_p * (tl.dot(b_do, tl.trans(b_v)) - b_delta[:, None])).to(b_k.dtype)
    b_dv = tl.dot(tl.trans(b_p.to(b_k.dtype)), b_do)
    b_dk = tl.dot(tl.trans(b_ds), b_q) * (scale * _LN_2)
    b_dq = tl.dot(b_ds, b_k) * (scale * _LN_2)
    _store(p_dq + o_grad, d_row, o_row, length, b_dq, WIDTH, PADDED)
    _store(p_dk + o_grad, d_row, o_row, length, b_dk, WIDTH, PADDED)
    _store(p_dv + o_grad, d_row, o_row, length, b_dv, WIDTH, PADDED)
