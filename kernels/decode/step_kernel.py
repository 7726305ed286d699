"""The Triton kernel of a whole decoding step for few rows; `launch.py` starts it.

One program stays on each multiprocessor and all go through the operations of `reference.py` together. There is no
barrier: what one operation hands to the next lies in mailboxes (`mailbox.py`), so that the way between them is one
write and one read, without fences, which would wait for all other loads. Weights are on their way all the time
(`weight_stream.py`).

Products run on tensor cores, and weights go there from the registers that they were loaded to. A tile holds 8 lines of
weights, or 8 rows, and a thread 8 inputs side by side in one line; a tensor core wants two pairs of a line from that
thread, in either of two products. Which inputs the pairs are does not matter where rows and weights agree, so
`_operand` only names them in that order, and nothing moves between threads until the sums over warps at the end.

A warp has six counters of loads on their way, and waits for one to be zero. The compiler gives weights, and what is
used much later, the same one, so small loads behind weights are either waited for at once (`_arrived`), or used only
after the weights that were asked for before them.
"""

# Triton's tuples grow by addition only, and its arguments are pointers and constants without types.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .mailbox import empty, halves, pairs, post, receive, stack, zeros_beside
from .weight_stream import block_products, first_tiles, prefetch, start_of, stream_of, tile_ahead, tile_of

# A shorter vector is divided by this instead of its length, as in torch.nn.functional.normalize.
_LEAST_LENGTH = tl.constexpr(1e-12)
_EPS = tl.constexpr(1e-6)


@triton.jit
def _zero(SYNC: tl.constexpr):
    """A zero that the compiler does not know. With it, addresses are computed where they are used: held across all
    blocks they would take the registers that weights wait in."""
    if SYNC:
        return tl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
    return 0


@triton.jit
def _leave(p_turn, PROGRAMS: tl.constexpr, SYNC: tl.constexpr):
    """The last program to leave gives the turn to the other set of mailboxes; all others know theirs already."""
    if SYNC:
        tl.debug_barrier()
        if tl.atomic_add(p_turn + 32, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
            tl.store(p_turn + 32, 0)
            tl.store(p_turn, 1 - tl.load(p_turn))


@triton.jit
def _by_warps(tiles):
    """Tiles `[8 warps, 32]` as `[warps, 8, 32]`."""
    found = ()
    for i in tl.static_range(len(tiles)):
        found = found + (tl.reshape(tiles[i], [tiles[i].shape[0] // 8, 8, 32]),)
    return found


@triton.jit
def _received_rows(
    p_box, o_line, b_zero, ROWS: tl.constexpr, K: tl.constexpr, FROM: tl.constexpr, SLICES: tl.constexpr, DTYPE:
    tl.constexpr, WARPS: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """SLICES slices of all rows, from slice FROM on; of fewer than 8 rows the last is there more often."""
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth  # numbers in a word
    SLICE: tl.constexpr = 32 * WARPS
    LAST: tl.constexpr = (FROM + SLICES - 1) * SLICE
    o_k = (o_line >> 3) * 32 + 8 * tl.arange(0, 4)[None, :]
    p_row = p_box + tl.minimum(o_line & 7, ROWS - 1) * (K // PER) + b_zero
    p_first = p_row + (o_k + FROM * SLICE) // PER
    if LAST + SLICE > K:
        # What is beyond the end is read at the beginning instead.
        p_last = p_row + tl.where(o_k + LAST < K, o_k + LAST, 0) // PER
    else:
        p_last = p_row + (o_k + LAST) // PER
    tiles = receive(p_first, p_last, SLICE // PER, SLICES, DTYPE, 1, SYNC)
    if LAST + SLICE > K:
        m_last = (o_line >> 3) * 32 + tl.arange(0, 32)[None, :] + LAST < K
        tiles = tiles[: SLICES - 1] + (tl.where(m_last, tiles[SLICES - 1], 0.0),)
    return _by_warps(tiles)


@triton.jit
def _modulation(
    p_in, o_line, ROWS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr, K: tl.constexpr, WARPS: tl.constexpr
):
    """All slices of the modulations of rows, which lie STRIDE apart, each for GROUP rows."""
    SLICE: tl.constexpr = 32 * WARPS
    o_k = (o_line >> 3) * 32 + tl.arange(0, 32)[None, :]
    p_first = p_in + tl.minimum(o_line & 7, ROWS - 1) // GROUP * STRIDE + o_k
    tiles = ()
    for i in tl.static_range((K + SLICE - 1) // SLICE):
        if (i + 1) * SLICE > K:
            tiles = tiles + (tl.load(p_first + i * SLICE, mask=o_k < K - i * SLICE, other=0.0),)
        else:
            tiles = tiles + (tl.load(p_first + i * SLICE),)
    return _by_warps(tiles)


@triton.jit
def _operand(b_tile):
    """A tile `[warps, 8, 32]` as `[warps, 32, 8]`, its 32 inputs in the order in which tensor cores want them from the
    threads that have them: the eight of a thread as two products' first and second pairs."""
    WARPS: tl.constexpr = b_tile.shape[0]
    b_tile = tl.reshape(b_tile, [WARPS, 8, 4, 2, 2, 2])  # warp, line, thread, product, half, one of a pair
    return tl.reshape(tl.permute(b_tile, [0, 3, 4, 2, 5, 1]), [WARPS, 32, 8])


@triton.jit
def _opaque(b_tile, SYNC: tl.constexpr):
    """The same. The compiler would choose another order of inputs by how a tile came about, did it know."""
    if SYNC & (b_tile.dtype.primitive_bitwidth == 16):
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_tile], b_tile.dtype, is_pure=False, pack=2)
    return b_tile


@triton.jit
def _arrived(b_tile, SYNC: tl.constexpr):
    """The same in fp32, waited for here: later on it would be waited for behind all weights that are on their way."""
    b_tile = b_tile.to(tl.float32)
    if SYNC:
        return tl.inline_asm_elementwise(
            "add.f32 $0, $1, 0f00000000;", "=f,f", [b_tile], tl.float32, is_pure=False, pack=1
        )
    return b_tile


@triton.jit
def _rows_operand(b_tile, SYNC: tl.constexpr):
    """Rows `[warps, 8, 32]` as `[warps, 16, 32]`, each twice: a tensor core wants 16."""
    WARPS: tl.constexpr = b_tile.shape[0]
    b_tile = tl.permute(_operand(_opaque(b_tile, SYNC)), [0, 2, 1])
    return tl.reshape(tl.broadcast_to(b_tile[:, None, :, :], [WARPS, 2, 8, 32]), [WARPS, 16, 32])


@triton.jit
def _weights_operand(b_tile, DTYPE: tl.constexpr, SYNC: tl.constexpr):
    """A tile of `tile_ahead` as `[warps, 32, 8]`."""
    if DTYPE.primitive_bitwidth == 16:
        b_tile = halves(b_tile, DTYPE)
    return _operand(_opaque(tl.reshape(b_tile, [b_tile.shape[0] // 8, 8, 32]), SYNC))


@triton.jit
def _add_both(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _normed(b_x, b_scale, b_shift, K: tl.constexpr, DTYPE: tl.constexpr):
    """modulated_layer_norm of tiles of rows `[warps, 8, 32]`."""
    b_sum = tl.zeros_like(b_x[0])
    b_square = tl.zeros_like(b_x[0])
    for i in tl.static_range(len(b_x)):
        b_sum += b_x[i]
        b_square += b_x[i] * b_x[i]
    b_sum, b_square = tl.reduce((tl.sum(b_sum, axis=2), tl.sum(b_square, axis=2)), 0, _add_both)
    b_mean = b_sum / K
    b_inverse = tl.rsqrt(tl.maximum(b_square / K - b_mean * b_mean, 0.0) + _EPS)
    b_less = (-b_mean * b_inverse)[None, :, None]
    b_inverse = b_inverse[None, :, None]
    tiles = ()
    for i in tl.static_range(len(b_x)):
        b_normed = (b_x[i] * b_inverse + b_less) * (1 + b_scale[i].to(tl.float32)) + b_shift[i].to(tl.float32)
        tiles = tiles + (b_normed.to(DTYPE),)
    return tiles


@triton.jit
def _multiply(
    sums, b_inputs, ring, weights, o_line, i_program, i_layer, i_end, POSITION: tl.constexpr, EIGHTS: tl.constexpr,
    STREAM: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """Adds the products of slices to `sums`, in turn; their weights leave `ring`, whose first tile is at POSITION of
    the stream, and as many later ones enter it.

    `sums` has a sum `[warps, 16, 8]` for every eight, and that several times: a tensor core's sums follow each other
    slowly, so some are under way together.
    """
    LATER: tl.constexpr = POSITION + len(ring)
    for i_slice in tl.static_range(len(b_inputs)):
        b_rows = _rows_operand(b_inputs[i_slice], SYNC)
        for i in tl.static_range(EIGHTS):
            b_tile = tile_ahead(
                weights, o_line, i_program, i_layer, i_end, LATER + i_slice * EIGHTS + i, STREAM, WARPS, PROGRAMS
            )
            b_weight = _weights_operand(ring[0], weights[0].dtype.element_ty, SYNC)
            sums = sums[1:] + (tl.dot(b_rows, b_weight, sums[0], input_precision="ieee"),)
            ring = ring[1:] + (b_tile,)
    return sums, ring


@triton.jit
def _cells(i_program, EIGHTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Rows `[8, 1, 1]` and columns `[1, 8, eights]` of a program's results, and which of these are there."""
    PADDED: tl.constexpr = triton.next_power_of_2(EIGHTS)
    o_row = tl.arange(0, 8)[:, None, None]
    o_eight = tl.arange(0, PADDED)[None, None, :] * PROGRAMS + i_program
    o_column = o_eight * 8 + tl.arange(0, 8)[None, :, None]
    return o_row, o_column, (o_row < ROWS) & (o_column < COLUMNS)


@triton.jit
def _terms(
    p_bias, p_gate, b_x, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STRIDE: tl.constexpr,
    GATED: tl.constexpr, PROGRAMS: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """Biases, and gates and `b_x` if GATED, of a program's columns."""
    zero = _zero(SYNC)
    o_row, o_column, m_out = _cells(
        tl.program_id(0) + zero, (COLUMNS + 8 * PROGRAMS - 1) // (8 * PROGRAMS), COLUMNS, ROWS, PROGRAMS
    )
    # An unknown zero keeps numbers from arriving two by two: they would be sorted, and waited for, here.
    o_single = o_column + _zero(SYNC)
    b_bias = tl.load(p_bias + o_single, mask=o_column < COLUMNS, other=0.0)
    if GATED:
        return b_bias, tl.load(p_gate + o_row // GROUP * STRIDE + o_single, mask=m_out, other=0.0), b_x
    else:
        return (b_bias,)


@triton.jit
def _product(
    p_box, p_scale, p_shift, terms, ring, weights, i_layer, i_end,
    PRODUCT: tl.constexpr, NORMED: tl.constexpr, KIND: tl.constexpr, STREAM: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
    PREFETCH: tl.constexpr, SYNC: tl.constexpr,
):  # fmt: skip
    """f(inputs @ weight.T + bias) of this program's columns `[8, 8, eights]`, f by KIND: nothing, gelu, or
    x + gate * ..., with the rows and columns of these numbers, which of them are there, and the ring behind."""
    POSITION: tl.constexpr = start_of(STREAM, PRODUCT)
    K: tl.constexpr = tile_of(STREAM, POSITION, 1)
    COLUMNS: tl.constexpr = tile_of(STREAM, POSITION, 2)
    SLICES: tl.constexpr = (K + 32 * WARPS - 1) // (32 * WARPS)
    EIGHTS: tl.constexpr = (COLUMNS + 8 * PROGRAMS - 1) // (8 * PROGRAMS)
    PARTS: tl.constexpr = min(SLICES, max(1, 4 // EIGHTS))
    # More at once would not find room in registers; a norm needs all.
    PIECE: tl.constexpr = SLICES if NORMED else 16
    DTYPE: tl.constexpr = weights[0].dtype.element_ty
    zero = _zero(SYNC)
    i_program = tl.program_id(0) + zero
    o_line = tl.arange(0, 8 * WARPS)[:, None] + zero
    # All that does not depend on what other programs do now is asked for before waiting for them.
    if PREFETCH > 0:
        prefetch(weights, i_program, i_layer, i_end, start_of(STREAM, PRODUCT, PREFETCH), STREAM, PROGRAMS)
    if NORMED:
        b_scale = _modulation(p_scale, o_line, ROWS, GROUP, STRIDE, K, WARPS)
        b_shift = _modulation(p_shift, o_line, ROWS, GROUP, STRIDE, K, WARPS)
    sums = ()
    for _ in tl.static_range(EIGHTS * PARTS):
        sums = sums + (tl.zeros([WARPS, 16, 8], tl.float32),)
    b_zero = zeros_beside(ring[0], 4)
    for i in tl.static_range((SLICES + PIECE - 1) // PIECE):
        if NORMED:
            b_inputs = _received_rows(p_box, o_line, b_zero, ROWS, K, 0, SLICES, tl.float32, WARPS, SYNC)
            b_inputs = _normed(b_inputs, b_scale, b_shift, K, DTYPE)
        else:
            b_inputs = _received_rows(
                p_box, o_line, b_zero, ROWS, K, i * PIECE, min(PIECE, SLICES - i * PIECE), DTYPE, WARPS, SYNC
            )
        sums, ring = _multiply(
            sums, b_inputs, ring, weights, o_line, i_program, i_layer, i_end, POSITION + i * PIECE * EIGHTS, EIGHTS,
            STREAM, WARPS, PROGRAMS, SYNC,
        )  # fmt: skip
    eights = ()
    for i in tl.static_range(EIGHTS):
        b_sum = sums[i]
        for j in tl.static_range(1, PARTS):
            b_sum += sums[j * EIGHTS + i]
        b_sum, _ = tl.split(tl.permute(tl.reshape(b_sum, [WARPS, 2, 64]), [0, 2, 1]))
        eights = eights + (b_sum,)
    b_out = tl.sum(stack(eights, EIGHTS), axis=0)
    b_out = tl.reshape(b_out, [8, 8, b_out.shape[1]]) + terms[0].to(tl.float32)
    if KIND == "gelu":
        # tanh in exponentials: v * sigmoid(2 u)
        b_out = b_out / (1 + tl.exp(-1.5957691216057308 * (b_out + 0.044715 * b_out * b_out * b_out)))
    if KIND == "residual":
        b_out = terms[2] + terms[1].to(tl.float32) * b_out
    o_row, o_column, m_out = _cells(i_program, EIGHTS, COLUMNS, ROWS, PROGRAMS)
    return b_out, o_row, o_column, m_out, ring


@triton.jit
def _unit(b_vectors):
    b_length = tl.sqrt(tl.sum(b_vectors * b_vectors, axis=1))
    return b_vectors / tl.maximum(b_length, _LEAST_LENGTH)[:, None]


@triton.jit
def _attend(
    p_box, p_posted, kept, first, p_query_scale, p_keys, p_values, p_attended,
    BATCH: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr,
    D: tl.constexpr, WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
    SYNC: tl.constexpr,
):  # fmt: skip
    """One piece is a token's query in one head. Earlier keys and values are asked for before the new ones are there.

    The new vectors are loaded in the shape of the cache, with equal lines, so that they need not move between threads.
    """
    WIDTH: tl.constexpr = HEADS * D
    PIECES: tl.constexpr = BATCH * GROUP * HEADS
    DTYPE: tl.constexpr = p_keys.dtype.element_ty
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    PACK: tl.constexpr = 2 if PADDED * D // 8 % (64 * WARPS) == 0 else 1
    o_n = tl.arange(0, PADDED)[:, None]
    o_cell = tl.arange(0, D)[None, :] + tl.zeros([PADDED, D], tl.int32)
    for i_turn in tl.static_range((PIECES + PROGRAMS - 1) // PROGRAMS):
        i_piece = i_turn * PROGRAMS + tl.program_id(0)
        if i_piece < PIECES:
            i_token = i_piece // HEADS
            i_row = i_token // GROUP
            i_head = i_piece % HEADS
            i_cache = (i_row * HEADS + i_head) * (LENGTH * D)
            o_cache = i_cache + o_n * D + o_cell
            m_cache = (o_n < first) & (o_cell >= 0)
            b_keys = tl.load(p_keys + o_cache, mask=m_cache, other=0.0)
            b_values = tl.load(p_values + o_cache, mask=m_cache, other=0.0)
            scale = _arrived(tl.load(p_query_scale + i_head), SYNC)
            # A line waits for the key and the value of its own token, or of any in the group.
            o_token = i_row * GROUP + tl.minimum(tl.maximum(o_n - first, 0), GROUP - 1)
            o_eight = zeros_beside(b_keys, D // 8) + 8 * tl.arange(0, D // 8)[None, :]
            p_key = p_box + WIDTH + i_head * D + (o_eight + o_token * (3 * WIDTH))
            p_query = p_box + i_token * (3 * WIDTH) + i_head * D + o_eight
            b_key, b_value, b_query = receive(p_key, p_query, WIDTH, 3, tl.float32, PACK, SYNC)
            m_new = (o_n >= first) & (o_n < first + GROUP)
            b_keys = tl.where(m_new, _unit(b_key).to(DTYPE), b_keys)
            b_values = tl.where(m_new, b_value.to(DTYPE), b_values)
            b_query = (_unit(b_query) * scale).to(DTYPE).to(tl.float32)
            b_score = tl.sum(b_keys.to(tl.float32) * b_query, axis=1)[:, None]
            b_score = tl.where(o_n < first + GROUP, b_score, float("-inf"))
            b_share = tl.broadcast_to(tl.exp(b_score - tl.max(b_score, axis=0)[None, :]), [PADDED, D])
            b_sum, b_out = tl.reduce((b_share, b_share * b_values.to(tl.float32)), 0, _add_both)
            b_out = (b_out / b_sum)[None, :].to(DTYPE)
            o_out = i_token * WIDTH + i_head * D
            if PER == 2:
                b_low, b_high = tl.split(tl.reshape(b_out, [1, D // 2, 2]))
                o_pair = tl.arange(0, D // 2)[None, :]
                post(p_posted + o_out // 2 + o_pair, pairs(b_low, b_high), o_pair >= 0, SYNC)
            else:
                o_single = tl.arange(0, D)[None, :]
                post(p_posted + o_out + o_single, b_out, o_single >= 0, SYNC)
            if kept > 0:
                tl.store(p_attended + o_out + tl.arange(0, D)[None, :], b_out)
            m_own = (o_n == first + i_token % GROUP) & (o_cell >= 0)
            tl.store(p_keys + o_cache, b_keys, mask=m_own)
            tl.store(p_values + o_cache, b_values, mask=m_own)


@triton.jit
def _embedded(
    first, p_tokens, p_start, p_table, p_positions, p_starts, o_column, o_row, m_out,
    GROUP: tl.constexpr, IMAGES: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """content + position: the class row and the learned start, or the token drawn one group before."""
    o_image = o_row // GROUP
    o_place = o_row % GROUP
    if first == 0:
        b_x = tl.load(p_start + o_image * WIDTH + o_column, mask=m_out, other=0.0).to(tl.float32)
        b_x += tl.load(p_starts + o_place * WIDTH + o_column, mask=m_out, other=0.0).to(tl.float32)
    else:
        p_token = p_tokens + (o_image % IMAGES) * LENGTH + first - GROUP + o_place
        b_token = tl.load(p_token + 0 * o_column, mask=m_out, other=0)
        b_x = tl.load(p_table + b_token * WIDTH + o_column, mask=m_out, other=0.0).to(tl.float32)
    return b_x + tl.load(p_positions + (first + o_place) * WIDTH + o_column, mask=m_out, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["i_begin", "i_end"])
def decode_step_kernel(
    p_first, p_tokens, p_start, p_modulations, p_head_modulation, p_keys, p_values,  # as in DecodeState
    p_x, p_qkv, p_attended, p_hidden, p_logits,
    p_table, p_positions, p_starts,  # as in DecodeWeights: tokens, ...
    p_qkv_weight, p_qkv_bias, p_query_scale, p_proj_weight, p_proj_bias,
    p_fc1_weight, p_fc1_bias, p_fc2_weight, p_fc2_bias, p_head_weight, p_head_bias,
    p_mailboxes,  # as in DecodeState
    p_turn,  # DecodeState.turn
    i_begin,  # blocks from this one
    i_end,  # to before this one
    IMAGES: tl.constexpr, BATCH: tl.constexpr, GROUP: tl.constexpr, LENGTH: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, CODES: tl.constexpr, WORDS: tl.constexpr,
    AHEAD: tl.constexpr, PREFETCH: tl.constexpr,
    WARPS: tl.constexpr, PROGRAMS: tl.constexpr,
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
    DTYPE: tl.constexpr = p_qkv_weight.dtype.element_ty
    # Words of a block's mailboxes, one after the other: x before it, qkv, x after proj, attended, hidden.
    X: tl.constexpr = ROWS * WIDTH
    PER: tl.constexpr = 32 // DTYPE.primitive_bitwidth
    BLOCK: tl.constexpr = 5 * X + 5 * X // PER
    EIGHTS: tl.constexpr = (WIDTH + 8 * PROGRAMS - 1) // (8 * PROGRAMS)
    STREAM: tl.constexpr = stream_of(block_products(WIDTH, FIRST_OP, LAST_OP), WARPS, PROGRAMS)
    weights = (p_qkv_weight, p_proj_weight, p_fc1_weight, p_fc2_weight)
    p_set = p_mailboxes
    if SYNC:
        turn = tl.load(p_turn)
        p_set += turn * WORDS
    first = tl.load(p_first).to(tl.int32)
    o_line = tl.arange(0, 8 * WARPS)[:, None]
    ring = first_tiles(
        weights, o_line, tl.program_id(0), tl.zeros([], tl.int64) + i_begin, i_end, AHEAD, STREAM, WARPS, PROGRAMS
    )
    if SYNC:
        empty(p_mailboxes + (1 - turn) * WORDS, WORDS, PROGRAMS, WARPS)
    # The residual stream of this program's columns stays in its registers.
    o_own, o_x, m_x = _cells(tl.program_id(0), EIGHTS, WIDTH, ROWS, PROGRAMS)
    if EMBED:
        b_x = _embedded(
            first, p_tokens, p_start, p_table, p_positions, p_starts, o_x, o_own, m_x, GROUP, IMAGES, LENGTH,
            WIDTH,
        )  # fmt: skip
    else:
        b_x = tl.load(p_x + o_own * WIDTH + o_x, mask=m_x, other=0.0)
    post(p_set + i_begin * BLOCK + o_own * WIDTH + o_x, b_x, m_x, SYNC)
    for i in tl.range(i_begin, i_end, num_stages=1):
        i_layer = tl.zeros([], tl.int64) + i
        kept = tl.where(i == i_end - 1, 1, 0)
        p_block = p_set + i * BLOCK
        p_modulation = p_modulations + i_layer * (BATCH * STRIDE)
        if (FIRST_OP <= 0) & (LAST_OP > 0):
            p_bias = p_qkv_bias + i_layer * (3 * WIDTH)
            terms = _terms(p_bias, p_modulation, b_x, 3 * WIDTH, ROWS, GROUP, STRIDE, False, PROGRAMS, SYNC)
            b_out, o_row, o_out, m_out, ring = _product(
                p_block, p_modulation + 2 * WIDTH, p_modulation + 4 * WIDTH, terms, ring, weights, i_layer, i_end, 0,
                True, "plain", STREAM, ROWS, GROUP, STRIDE, WARPS, PROGRAMS, PREFETCH, SYNC,
            )  # fmt: skip
            b_out = b_out.to(DTYPE)
            o_out += o_row * (3 * WIDTH)
            post(p_block + X + o_out, b_out.to(tl.float32), m_out, SYNC)
            if kept > 0:
                tl.store(p_qkv + o_out, b_out, mask=m_out)
        if (FIRST_OP <= 2) & (LAST_OP > 2):
            p_bias = p_proj_bias + i_layer * WIDTH
            b_bias, b_gate, _ = _terms(p_bias, p_modulation, b_x, WIDTH, ROWS, GROUP, STRIDE, True, PROGRAMS, SYNC)
            proj_terms = (_arrived(b_bias, SYNC), _arrived(b_gate, SYNC), b_x)
        if (FIRST_OP <= 1) & (LAST_OP > 1):
            _attend(
                p_block + X, p_block + 5 * X, kept, first, p_query_scale + i_layer * HEADS,
                p_keys + i_layer * (BATCH * HEADS * LENGTH * D), p_values + i_layer * (BATCH * HEADS * LENGTH * D),
                p_attended, BATCH, GROUP, HEADS, LENGTH, PADDED, D, WARPS, PROGRAMS, SYNC,
            )  # fmt: skip
        if (FIRST_OP <= 2) & (LAST_OP > 2):
            b_x, o_row, o_out, m_out, ring = _product(
                p_block + 5 * X, p_modulation, p_modulation, proj_terms, ring, weights, i_layer, i_end, 1, False,
                "residual", STREAM, ROWS, GROUP, STRIDE, WARPS, PROGRAMS, PREFETCH, SYNC,
            )  # fmt: skip
            post(p_block + 4 * X + o_row * WIDTH + o_out, b_x, m_out, SYNC)
        if (FIRST_OP <= 3) & (LAST_OP > 3):
            p_bias = p_fc1_bias + i_layer * WIDE
            terms = _terms(p_bias, p_modulation, b_x, WIDE, ROWS, GROUP, STRIDE, False, PROGRAMS, SYNC)
            b_out, o_row, o_out, m_out, ring = _product(
                p_block + 4 * X, p_modulation + 3 * WIDTH, p_modulation + 5 * WIDTH, terms, ring, weights, i_layer,
                i_end, 2, True, "gelu", STREAM, ROWS, GROUP, STRIDE, WARPS, PROGRAMS, PREFETCH, SYNC,
            )  # fmt: skip
            b_out = b_out.to(DTYPE)
            o_out += o_row * WIDE
            if PER == 2:
                # Two neighbours leave in one word.
                PADDED_EIGHTS: tl.constexpr = b_out.shape[2]
                b_low, b_high = tl.split(tl.permute(tl.reshape(b_out, [8, 4, 2, PADDED_EIGHTS]), [0, 1, 3, 2]))
                o_eight = tl.arange(0, PADDED_EIGHTS)[None, None, :] * PROGRAMS + tl.program_id(0) + _zero(SYNC)
                o_word = o_eight * 4 + tl.arange(0, 4)[None, :, None]
                m_word = (o_word < WIDE // 2) & (o_row < ROWS)
                p_word = p_block + 5 * X + X // 2 + o_row * (WIDE // 2) + o_word
                post(p_word, pairs(b_low, b_high), m_word, SYNC)
            else:
                post(p_block + 6 * X + o_out, b_out, m_out, SYNC)
            if kept > 0:
                tl.store(p_hidden + o_out, b_out, mask=m_out)
        if (FIRST_OP <= 4) & (LAST_OP > 4):
            p_bias = p_fc2_bias + i_layer * WIDTH
            p_gate = p_modulation + WIDTH
            terms = _terms(p_bias, p_gate, b_x, WIDTH, ROWS, GROUP, STRIDE, True, PROGRAMS, SYNC)
            b_x, o_row, o_out, m_out, ring = _product(
                p_block + 5 * X + X // PER, p_modulation, p_modulation, terms, ring, weights, i_layer, i_end, 3, False,
                "residual", STREAM, ROWS, GROUP, STRIDE, WARPS, PROGRAMS, PREFETCH, SYNC,
            )  # fmt: skip
            post(p_block + BLOCK + o_row * WIDTH + o_out, b_x, m_out, SYNC)
    o_own, o_x, m_x = _cells(tl.program_id(0), EIGHTS, WIDTH, ROWS, PROGRAMS)
    tl.store(p_x + o_own * WIDTH + o_x, b_x, mask=m_x)
    if HEAD:
        HEAD_STREAM: tl.constexpr = stream_of(((0, WIDTH, CODES),), WARPS, PROGRAMS)
        heads = (p_head_weight,)
        zero = tl.zeros([], tl.int32)
        ring = first_tiles(heads, o_line, tl.program_id(0), zero, 1, AHEAD, HEAD_STREAM, WARPS, PROGRAMS)
        terms = _terms(p_head_bias, p_head_bias, b_x, CODES, ROWS, GROUP, 2 * WIDTH, False, PROGRAMS, SYNC)
        b_out, o_row, o_out, m_out, ring = _product(
            p_set + i_end * BLOCK, p_head_modulation, p_head_modulation + WIDTH, terms, ring, heads, zero, 1, 0, True,
            "plain", HEAD_STREAM, ROWS, GROUP, 2 * WIDTH, WARPS, PROGRAMS, 0, SYNC,
        )  # fmt: skip
        tl.store(p_logits + o_row * CODES + o_out, b_out, mask=m_out)
    _leave(p_turn, PROGRAMS, SYNC)
