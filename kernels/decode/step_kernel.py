"""The Triton kernel of a whole decoding step for few rows; `launch.py` starts it.

One program stays on each multiprocessor and all go through the operations of `reference.py` together, with a barrier
of the grid after each. What bounds a step is the reading of the weights, and after that the way from one operation to
the next; so an operation's first weights are under way before the barrier that it waits for.

Products run on tensor cores, and weights go there from the registers that they were loaded to. A warp has 32 of
every 32 x warps inputs. Of these a tile holds 8 lines of weights, or 8 rows, and a thread 8 side by side in one line; a
tensor core wants two pairs of a line from that thread, in either of two products. Which inputs the pairs are does not
matter where rows and weights agree, so `_operand` only names them in that order, and nothing moves between threads
until the sums over warps at the end.
"""

# Triton's tuples grow by addition only, and its arguments are pointers and constants without types.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# A shorter vector is divided by this instead of its length, as in torch.nn.functional.normalize.
_LEAST_LENGTH = tl.constexpr(1e-12)
_EPS = tl.constexpr(1e-6)

# The first thread waits for a counter to reach a number. Its acquire empties the L1 cache, so that everybody's loads
# after the block's barrier see what others wrote before they arrived.
_WAIT = tl.constexpr("""{
.reg .pred first, early;
.reg .u32 thread, seen;
mov.u32 thread, %tid.x;
mov.u32 $0, 0;
setp.eq.u32 first, thread, 0;
@!first bra done;
again:
ld.acquire.gpu.global.u32 seen, [$1];
setp.lt.s32 early, seen, $2;
@early bra again;
done:
}""")


@triton.jit
def _arrive(p_sync, SYNC: tl.constexpr):
    if SYNC:
        tl.debug_barrier()
        tl.atomic_add(p_sync, 1, sem="release", scope="gpu")


@triton.jit
def _wait(p_sync, arrivals, SYNC: tl.constexpr):
    if SYNC:
        tl.inline_asm_elementwise(_WAIT, "=r,l,r", [p_sync, arrivals], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()


@triton.jit
def _zero(SYNC: tl.constexpr):
    """A zero that the compiler does not know. With it, addresses are computed where they are used: held across all
    blocks they would take the registers that weights wait in."""
    if SYNC:
        return tl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
    return 0


@triton.jit
def _leave(p_sync, PROGRAMS: tl.constexpr, SYNC: tl.constexpr):
    """The last program to leave sets the counters back to zero: nobody waits any more."""
    if SYNC:
        tl.debug_barrier()
        if tl.atomic_add(p_sync + 32, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
            tl.store(p_sync, 0)
            tl.store(p_sync + 32, 0)


@triton.jit
def _inputs(
    p_in, o_line, ROWS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr,
    FRESH: tl.constexpr,
):  # fmt: skip
    """All slices of rows that lie STRIDE apart, each read by GROUP rows; of fewer than 8 the last is there more often.

    What was written in this launch is FRESH: read in this order, and past the L1 cache.
    """
    SLICE: tl.constexpr = 32 * WARPS
    o_k = (o_line >> 3) * 32 + tl.arange(0, 32)[None, :]
    p_first = p_in + tl.minimum(o_line & 7, ROWS - 1) // GROUP * STRIDE + o_k
    tiles = ()
    for i in tl.static_range((K + SLICE - 1) // SLICE):
        if (i + 1) * SLICE > K:
            tiles = tiles + (tl.load(p_first + i * SLICE, mask=o_k < K - i * SLICE, other=0.0, volatile=FRESH),)
        else:
            tiles = tiles + (tl.load(p_first + i * SLICE, volatile=FRESH),)
    return tiles


@triton.jit
def _weight_tile(
    p_weight, o_line, i_program, i_share, i_slice, K: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Slice `i_slice` of this program's columns `i_share`."""
    SLICE: tl.constexpr = 32 * WARPS
    o_column = (i_share * PROGRAMS + i_program) * 8 + (o_line & 7)
    o_k = (o_line >> 3) * 32 + tl.arange(0, 32)[None, :]
    m_tile = (o_column < COLUMNS) & (o_k < K - i_slice * SLICE)
    p_tile = p_weight + o_column * K + o_k + i_slice * SLICE
    return tl.load(p_tile, mask=m_tile, other=0.0, eviction_policy="evict_first")


@triton.jit
def _weights(
    p_weight, o_line, i_program, i_share, COUNT: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The first COUNT slices from columns `i_share` on."""
    SLICES: tl.constexpr = (K + 32 * WARPS - 1) // (32 * WARPS)
    tiles = ()
    for i in tl.static_range(COUNT):
        tiles = tiles + (
            _weight_tile(p_weight, o_line, i_program, i_share + i // SLICES, i % SLICES, K, COLUMNS, WARPS, PROGRAMS),
        )
    return tiles


@triton.jit
def _operand(b_tile):
    """A tile as `[warps, 32, 8]`, its 32 inputs in the order in which tensor cores want them from the threads that
    have them: the eight of a thread as two products' first and second pairs."""
    WARPS: tl.constexpr = b_tile.shape[0] // 8
    b_tile = tl.reshape(b_tile, [WARPS, 8, 4, 2, 2, 2])  # warp, line, thread, product, half, one of a pair
    return tl.reshape(tl.permute(b_tile, [0, 3, 4, 2, 5, 1]), [WARPS, 32, 8])


@triton.jit
def _rows_operand(b_tile):
    """Rows as `[warps, 16, 32]`, each twice: a tensor core wants 16."""
    b_tile = tl.permute(_operand(b_tile), [0, 2, 1])
    WARPS: tl.constexpr = b_tile.shape[0]
    return tl.reshape(tl.broadcast_to(b_tile[:, None, :, :], [WARPS, 2, 8, 32]), [WARPS, 16, 32])


@triton.jit
def _add_both(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _normed(b_x, b_scale, b_shift, K: tl.constexpr, DTYPE: tl.constexpr):
    """modulated_layer_norm of tiles of rows."""
    WARPS: tl.constexpr = b_x[0].shape[0] // 8
    b_sum = tl.zeros([8 * WARPS, 32], tl.float32)
    b_square = tl.zeros([8 * WARPS, 32], tl.float32)
    for i in tl.static_range(len(b_x)):
        b_sum += b_x[i]
        b_square += b_x[i] * b_x[i]
    b_sum = tl.reshape(tl.sum(b_sum, axis=1), [WARPS, 8])
    b_square = tl.reshape(tl.sum(b_square, axis=1), [WARPS, 8])
    b_sum, b_square = tl.reduce((b_sum, b_square), 0, _add_both)
    b_mean = b_sum / K
    b_inverse = tl.rsqrt(tl.maximum(b_square / K - b_mean * b_mean, 0.0) + _EPS)
    b_mean = tl.reshape(tl.broadcast_to(b_mean[None, :], [WARPS, 8]), [8 * WARPS, 1])
    b_inverse = tl.reshape(tl.broadcast_to(b_inverse[None, :], [WARPS, 8]), [8 * WARPS, 1])
    tiles = ()
    for i in tl.static_range(len(b_x)):
        b_normed = (b_x[i] - b_mean) * b_inverse * (1 + b_scale[i].to(tl.float32)) + b_shift[i].to(tl.float32)
        tiles = tiles + (b_normed.to(DTYPE),)
    return tiles


@triton.jit
def _stack(blocks, COUNT: tl.constexpr):
    """`[A, B]` blocks as `[A, B, PADDED]` with PADDED the next power of two; the rest repeats the last block."""
    A: tl.constexpr = blocks[0].shape[0]
    B: tl.constexpr = blocks[0].shape[1]
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    LEVELS: tl.constexpr = PADDED.bit_length() - 1
    for _ in tl.static_range(PADDED - COUNT):
        blocks = blocks + (blocks[COUNT - 1],)
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(PADDED >> (level + 1)):
            joined = joined + (tl.join(blocks[i], blocks[i + (PADDED >> (level + 1))]),)
        blocks = joined
    return tl.reshape(blocks[0], [A, B, PADDED])


@triton.jit
def _product(
    p_sync, arrivals, p_in, p_scale, p_shift, p_weight, p_bias, p_out, p_gate,
    ROWS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
    SHARED: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr, NORMED: tl.constexpr,
    KIND: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """out = f(inputs @ weight.T + bias) after the barrier before it, f by KIND: nothing, gelu, or out + gate * ...

    Program p has the columns 8 (p + i PROGRAMS) to 8 (p + i PROGRAMS) + 7, SHARE of these eights in a turn.
    """
    TILES: tl.constexpr = ((COLUMNS + 7) // 8 + PROGRAMS - 1) // PROGRAMS
    TURNS: tl.constexpr = (TILES + SHARED - 1) // SHARED
    SHARE: tl.constexpr = (TILES + TURNS - 1) // TURNS
    SLICES: tl.constexpr = (K + 32 * WARPS - 1) // (32 * WARPS)
    FIRST: tl.constexpr = min(AHEAD, SHARE * SLICES)
    PADDED: tl.constexpr = triton.next_power_of_2(SHARE)
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    zero = _zero(SYNC)
    i_program = tl.program_id(0) + zero
    o_line = tl.arange(0, 8 * WARPS)[:, None] + zero
    o_row = tl.arange(0, 8)[:, None, None]
    o_tile = tl.arange(0, PADDED)[None, None, :]
    # All that does not depend on what other programs do now is asked for before the wait.
    b_weights = _weights(p_weight, o_line, i_program, 0, FIRST, K, COLUMNS, WARPS, PROGRAMS)
    if NORMED:
        b_scale = _inputs(p_scale, o_line, ROWS, GROUP, STRIDE, K, WARPS, False)
        b_shift = _inputs(p_shift, o_line, ROWS, GROUP, STRIDE, K, WARPS, False)
    for i_turn in tl.static_range(TURNS):
        o_column = ((i_turn * SHARE + o_tile) * PROGRAMS + i_program) * 8 + tl.arange(0, 8)[None, :, None]
        m_column = (o_column < COLUMNS) & (o_tile < SHARE)
        m_out = m_column & (o_row < ROWS)
        p_cell = p_out + o_row * COLUMNS + o_column
        b_bias = tl.load(p_bias + o_column, mask=m_column, other=0.0)
        if KIND == "residual":
            # Written by this program alone, and by all before two barriers.
            b_before = tl.load(p_cell, mask=m_out, other=0.0)
            b_gate = tl.load(p_gate + o_row // GROUP * STRIDE + o_column, mask=m_out, other=0.0)
        if i_turn == 0:
            _wait(p_sync, arrivals, SYNC)
            b_inputs = _inputs(p_in, o_line, ROWS, 1, K, K, WARPS, SYNC)
            if NORMED:
                b_inputs = _normed(b_inputs, b_scale, b_shift, K, DTYPE)
        else:
            b_weights = _weights(p_weight, o_line, i_program, i_turn * SHARE, FIRST, K, COLUMNS, WARPS, PROGRAMS)
        sums = ()
        for i_share in tl.static_range(SHARE):
            # A tensor core's sums follow each other slowly, so several are under way.
            parts = ()
            for i_slice in tl.static_range(SLICES):
                if i_share * SLICES + i_slice + AHEAD < SHARE * SLICES:
                    b_later = _weight_tile(
                        p_weight, o_line, i_program, i_turn * SHARE + i_share + (i_slice + AHEAD) // SLICES,
                        (i_slice + AHEAD) % SLICES, K, COLUMNS, WARPS, PROGRAMS,
                    )  # fmt: skip
                    b_weights = b_weights + (b_later,)
                b_weight = _operand(b_weights[i_share * SLICES + i_slice])
                if i_slice % 4 == 0:
                    parts = parts + (tl.zeros([WARPS, 16, 8], tl.float32),)
                b_part = tl.dot(_rows_operand(b_inputs[i_slice]), b_weight, parts[i_slice // 4], input_precision="ieee")
                parts = parts[: i_slice // 4] + (b_part,)
            b_sum = parts[0]
            for i in tl.static_range(1, len(parts)):
                b_sum += parts[i]
            b_sum, _ = tl.split(tl.permute(tl.reshape(b_sum, [WARPS, 2, 64]), [0, 2, 1]))
            sums = sums + (b_sum,)
        b_out = tl.reshape(tl.sum(_stack(sums, SHARE), axis=0), [8, 8, PADDED]) + b_bias.to(tl.float32)
        if KIND == "gelu":
            # tanh in exponentials: v * sigmoid(2 u)
            b_out = b_out / (1 + tl.exp(-1.5957691216057308 * (b_out + 0.044715 * b_out * b_out * b_out)))
        if KIND == "residual":
            b_out = b_before + b_gate.to(tl.float32) * b_out
        tl.store(p_cell, b_out.to(p_out.dtype.element_ty), mask=m_out)
    _arrive(p_sync, SYNC)


@triton.jit
def _cached(p_cache, i_piece, first, LENGTH: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, USED: tl.constexpr):
    """Earlier keys or values of one row and head, 0 elsewhere: `[PADDED, D]`."""
    o_n = tl.arange(0, PADDED)[:, None]
    o_cell = o_n * D + tl.arange(0, D)[None, :]
    m_cell = (o_n < first) & (i_piece + tl.zeros([PADDED, D], tl.int32) < USED)
    return tl.load(p_cache + i_piece * (LENGTH * D) + o_cell, mask=m_cell, other=0.0)


@triton.jit
def _unit(b_vectors):
    b_vectors = b_vectors.to(tl.float32)
    b_length = tl.sqrt(tl.sum(b_vectors * b_vectors, axis=1))
    return b_vectors / tl.maximum(b_length, _LEAST_LENGTH)[:, None]


@triton.jit
def _attend(
    p_sync, arrivals, first, p_qkv, p_query_scale, p_keys, p_values, p_attended,
    BATCH: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, PROGRAMS: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """One piece is a token's query in one head. Earlier keys and values are asked for before the barrier.

    The new vectors are loaded in the shape of the cache, with equal lines, so that they need not move between threads.
    """
    WIDTH: tl.constexpr = HEADS * D
    PIECES: tl.constexpr = BATCH * GROUP * HEADS
    o_n = tl.arange(0, PADDED)[:, None]
    o_cell = tl.arange(0, D)[None, :] + tl.zeros([PADDED, D], tl.int32)
    for i_turn in tl.static_range((PIECES + PROGRAMS - 1) // PROGRAMS):
        i_piece = i_turn * PROGRAMS + tl.program_id(0)
        i_token = i_piece // HEADS
        i_row = i_token // GROUP
        i_head = i_piece % HEADS
        i_cache = i_row * HEADS + i_head
        b_keys = _cached(p_keys, i_cache, first, LENGTH, PADDED, D, BATCH * HEADS)
        b_values = _cached(p_values, i_cache, first, LENGTH, PADDED, D, BATCH * HEADS)
        scale = tl.load(p_query_scale + i_head)
        if i_turn == 0:
            _wait(p_sync, arrivals, SYNC)
        if i_piece < PIECES:
            p_query = p_qkv + i_token * (3 * WIDTH) + i_head * D + o_cell
            p_first = p_qkv + i_row * (GROUP * 3 * WIDTH) + i_head * D + o_cell
            b_query = tl.load(p_query)
            for i in tl.static_range(GROUP):
                b_key = _unit(tl.load(p_first + (3 * i + 1) * WIDTH)).to(b_keys.dtype)
                b_value = tl.load(p_first + (3 * i + 2) * WIDTH)
                b_keys = tl.where(o_n == first + i, b_key, b_keys)
                b_values = tl.where(o_n == first + i, b_value, b_values)
            p_new = i_cache * (LENGTH * D) + o_n * D + o_cell
            m_new = (o_n == first + i_token % GROUP) & (o_cell >= 0)
            b_query = (_unit(b_query) * scale).to(b_keys.dtype).to(tl.float32)
            b_score = tl.sum(b_keys.to(tl.float32) * b_query, axis=1)[:, None]
            b_score = tl.where(o_n < first + GROUP, b_score, float("-inf"))
            b_share = tl.broadcast_to(tl.exp(b_score - tl.max(b_score, axis=0)[None, :]), [PADDED, D])
            b_sum, b_out = tl.reduce((b_share, b_share * b_values.to(tl.float32)), 0, _add_both)
            b_out = tl.broadcast_to((b_out / b_sum)[None, :], [PADDED, D]).to(p_attended.dtype.element_ty)
            tl.store(p_attended + i_token * WIDTH + i_head * D + o_cell, b_out, mask=(o_n == 0) & (o_cell >= 0))
            tl.store(p_keys + p_new, b_keys, mask=m_new)
            tl.store(p_values + p_new, b_values, mask=m_new)
    _arrive(p_sync, SYNC)


@triton.jit
def _embed(
    p_first, p_tokens, p_start, p_table, p_positions, p_starts, p_x,
    ROWS: tl.constexpr, GROUP: tl.constexpr, IMAGES: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """x = content + position: the class row and the learned start, or the token drawn one group before."""
    BLOCK: tl.constexpr = 64
    first = tl.load(p_first).to(tl.int32)
    o_w = tl.arange(0, BLOCK)
    for i_piece in range(tl.program_id(0), ROWS * (WIDTH // BLOCK), PROGRAMS):
        i_row = i_piece // (WIDTH // BLOCK)
        i_w = (i_piece % (WIDTH // BLOCK)) * BLOCK
        i_image = i_row // GROUP
        i_place = i_row % GROUP
        if first == 0:
            b_x = tl.load(p_start + i_image * WIDTH + i_w + o_w).to(tl.float32)
            b_x += tl.load(p_starts + i_place * WIDTH + i_w + o_w).to(tl.float32)
        else:
            token = tl.load(p_tokens + (i_image % IMAGES) * LENGTH + first - GROUP + i_place)
            b_x = tl.load(p_table + token * WIDTH + i_w + o_w).to(tl.float32)
        b_x += tl.load(p_positions + (first + i_place) * WIDTH + i_w + o_w).to(tl.float32)
        tl.store(p_x + i_row * WIDTH + i_w + o_w, b_x)


@triton.jit(do_not_specialize=["i_begin", "i_end"])
def decode_step_kernel(
    p_first, p_tokens, p_start, p_modulations, p_head_modulation, p_keys, p_values,  # as in DecodeState
    p_x, p_qkv, p_attended, p_hidden, p_logits,
    p_table, p_positions, p_starts,  # as in DecodeWeights: tokens, ...
    p_qkv_weight, p_qkv_bias, p_query_scale, p_proj_weight, p_proj_bias,
    p_fc1_weight, p_fc1_bias, p_fc2_weight, p_fc2_bias, p_head_weight, p_head_bias,
    p_sync,  # [COUNTERS] int32, zero before and after
    i_begin,  # blocks from this one
    i_end,  # to before this one
    IMAGES: tl.constexpr, BATCH: tl.constexpr, GROUP: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, CODES: tl.constexpr,
    SHARED: tl.constexpr, AHEAD: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
    EMBED: tl.constexpr,
    FIRST_OP: tl.constexpr,  # of each block, by its place in `reference.OPS`
    LAST_OP: tl.constexpr,  # the one after
    HEAD: tl.constexpr,
    SYNC: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BATCH * GROUP
    WIDTH: tl.constexpr = HEADS * D
    WIDE: tl.constexpr = 4 * WIDTH
    STRIDE: tl.constexpr = 6 * WIDTH
    first = tl.load(p_first).to(tl.int32)
    arrivals = 0
    if EMBED:
        _embed(
            p_first, p_tokens, p_start, p_table, p_positions, p_starts, p_x, ROWS, GROUP, IMAGES, LENGTH, WIDTH,
            PROGRAMS,
        )  # fmt: skip
        _arrive(p_sync, SYNC)
        arrivals += PROGRAMS
    for i in range(i_begin, i_end):
        i_layer = tl.zeros([], tl.int64) + i
        p_modulation = p_modulations + i_layer * (BATCH * STRIDE)
        p_proj = p_proj_weight + i_layer * (WIDTH * WIDTH)
        p_fc1 = p_fc1_weight + i_layer * (WIDE * WIDTH)
        p_fc2 = p_fc2_weight + i_layer * (WIDE * WIDTH)
        if (FIRST_OP <= 0) & (LAST_OP > 0):
            _product(
                p_sync, arrivals, p_x, p_modulation + 2 * WIDTH, p_modulation + 4 * WIDTH,
                p_qkv_weight + i_layer * (3 * WIDTH * WIDTH), p_qkv_bias + i_layer * (3 * WIDTH), p_qkv, p_modulation,
                ROWS, GROUP, STRIDE, WIDTH, 3 * WIDTH, SHARED, AHEAD, WARPS, PROGRAMS, True, "plain", SYNC,
            )  # fmt: skip
            arrivals += PROGRAMS
        if (FIRST_OP <= 1) & (LAST_OP > 1):
            _attend(
                p_sync, arrivals, first, p_qkv, p_query_scale + i_layer * HEADS,
                p_keys + i_layer * (BATCH * HEADS * LENGTH * D), p_values + i_layer * (BATCH * HEADS * LENGTH * D),
                p_attended, BATCH, GROUP, HEADS, LENGTH, PADDED, D, PROGRAMS, SYNC,
            )  # fmt: skip
            arrivals += PROGRAMS
        if (FIRST_OP <= 2) & (LAST_OP > 2):
            _product(
                p_sync, arrivals, p_attended, p_attended, p_attended, p_proj, p_proj_bias + i_layer * WIDTH, p_x,
                p_modulation, ROWS, GROUP, STRIDE, WIDTH, WIDTH, SHARED, AHEAD, WARPS, PROGRAMS, False,
                "residual", SYNC,
            )  # fmt: skip
            arrivals += PROGRAMS
        if (FIRST_OP <= 3) & (LAST_OP > 3):
            _product(
                p_sync, arrivals, p_x, p_modulation + 3 * WIDTH, p_modulation + 5 * WIDTH, p_fc1,
                p_fc1_bias + i_layer * WIDE, p_hidden, p_modulation, ROWS, GROUP, STRIDE, WIDTH, WIDE,
                SHARED, AHEAD, WARPS, PROGRAMS, True, "gelu", SYNC,
            )  # fmt: skip
            arrivals += PROGRAMS
        if (FIRST_OP <= 4) & (LAST_OP > 4):
            _product(
                p_sync, arrivals, p_hidden, p_hidden, p_hidden, p_fc2, p_fc2_bias + i_layer * WIDTH, p_x,
                p_modulation + WIDTH, ROWS, GROUP, STRIDE, WIDE, WIDTH, SHARED, AHEAD, WARPS, PROGRAMS,
                False, "residual", SYNC,
            )  # fmt: skip
            arrivals += PROGRAMS
    if HEAD:
        _product(
            p_sync, arrivals, p_x, p_head_modulation, p_head_modulation + WIDTH, p_head_weight, p_head_bias, p_logits,
            p_head_modulation, ROWS, GROUP, 2 * WIDTH, WIDTH, CODES, SHARED, AHEAD, WARPS, PROGRAMS, True,
            "plain", SYNC,
        )  # fmt: skip
    _leave(p_sync, PROGRAMS, SYNC)
