"""The Gluon kernel of a whole decoding step for few rows on Hopper, in 16 bits, its weights in 16 or 8;
`launch.py` starts it.

As in `step_kernel.py` one program stays on each multiprocessor, and what one operation hands to the next lies in
mailboxes. But weights come through a ring in shared memory (`weight_ring.py`), and from there to registers before the
inputs are there. What takes their place in the ring is asked for only then.

Eight columns of two tiles are the 16 lines of a tensor core's tile, rows its eight columns. Thread 4 g + t of warp w
has inputs 256 s + 32 w + 8 t to ... + 7 of every slice s, of column g and of row g; these are its part of two products:
which input a tensor core calls which does not matter as long as rows and weights agree.

With few rows several slices lie side by side in the tensor core's columns: `PARTS` of them, each thread has a row's
inputs of every slice number `PARTS` alone. So norms are shared by all threads. Sums are taken in an order that does not
depend on it: first slices of the same number modulo 4, then 0 + 1 and 2 + 3, then both.
"""

# Gluon's arguments are pointers and constants without types, its tuples grow by addition only.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .config import EMPTY
from .ring_attend import attend
from .ring_plan import TAKEN, plan_of
from .simt import (
    THREADS,
    WARPS,
    barrier,
    exchanged,
    from_global_where,
    from_shared,
    leave,
    mark,
    multiplied,
    packed,
    post,
    receive,
    shared_memory,
    threads,
    to_shared,
    to_shared_2,
    unpacked,
)
from .weight_ring import ask, refill, start, take, threads_for, widened

_WARPS = gl.constexpr(WARPS)
_THREADS = gl.constexpr(THREADS)
_EMPTY = gl.constexpr(EMPTY)
_TAKEN = gl.constexpr(TAKEN)
_EPS = gl.constexpr(1e-6)


@gluon.constexpr_function
def _row_loads(plan, quarters, size):
    """Loads of a thread's inputs of numbers of `size` bytes: of each quarter, of every slice number `parts`."""
    turns = (plan.slices + plan.parts - 1) // plan.parts
    return tuple(
        (0, (quarter * plan.width + turn * plan.parts * 256) * size + offset, 4, int(turn == turns - 1))
        for quarter in range(quarters)
        for turn in range(turns)
        for offset in range(0, 8 * size, 16)
    )


@gluon.jit
def _place(PLAN: gl.constexpr):
    """Of each thread: its row among the inputs, its part of the slices, and its first input."""
    PARTS: gl.constexpr = PLAN.parts
    o_thread = threads_for(PLAN)
    o_lane = o_thread & 31
    o_row = (o_lane >> 2) & (8 // PARTS - 1)
    o_part = (o_lane >> 2) // (8 // PARTS)
    return o_row, o_part, o_part * 256 + (o_thread >> 5) * 32 + (o_lane & 3) * 8


@gluon.jit
def _mask(o_row, o_input, PLAN: gl.constexpr):
    """Which inputs each thread has: bit 0 for all slices but the last, bit 1 for that, of which none may be left."""
    LAST: gl.constexpr = (PLAN.slices - 1) // PLAN.parts * PLAN.parts * 256
    m_row = o_row < PLAN.rows
    return m_row.to(gl.int32) + 2 * (m_row & (o_input < PLAN.width - LAST)).to(gl.int32)


@gluon.jit
def _modulation(p_row, o_mask, PLAN: gl.constexpr):
    """A thread's inputs of modulations, two a word."""
    TURNS: gl.constexpr = (PLAN.slices + PLAN.parts - 1) // PLAN.parts
    words = ()
    for i in gl.static_range(TURNS):
        words = words + from_global_where(o_mask & (2 if i == TURNS - 1 else 1), p_row, i * PLAN.parts * 512, 4)
    return words


@gluon.jit
def _of_all_parts(x, LANE: gl.constexpr, PARTS: gl.constexpr):
    """The sum over parts: their numbers begin at bit LANE of a lane's."""
    if PARTS > 1:
        x += exchanged(x, LANE)
    if PARTS > 2:
        x += exchanged(x, 2 * LANE)
    return x


@gluon.jit
def _normed(words, scales, shifts, memory, o_row, DTYPE: gl.constexpr, PLAN: gl.constexpr):
    """modulated_layer_norm of a thread's inputs, rounded, two a word."""
    PARTS: gl.constexpr = PLAN.parts
    WIDTH: gl.constexpr = PLAN.width
    TURNS: gl.constexpr = len(words) // 8
    CLASSES: gl.constexpr = min(4 // PARTS, TURNS)
    o_thread = threads()
    numbers = ()
    for i in gl.static_range(len(words)):
        numbers = numbers + (words[i].to(gl.float32, bitcast=True),)
    sums = ()
    squares = ()
    for i in gl.static_range(CLASSES):
        b_sum = gl.zeros_like(numbers[0])
        b_square = gl.zeros_like(numbers[0])
        for j in gl.static_range(i, TURNS, CLASSES):
            for k in gl.static_range(8):
                b_sum += numbers[8 * j + k]
                b_square = gl.fma(numbers[8 * j + k], numbers[8 * j + k], b_square)
        sums = sums + (_of_all_parts(b_sum, 32 // PARTS, PARTS),)
        squares = squares + (_of_all_parts(b_square, 32 // PARTS, PARTS),)
    b_sum = _by_twos(sums)
    b_square = _by_twos(squares)
    for i in gl.static_range(2):
        b_sum += exchanged(b_sum, 1 << i)
        b_square += exchanged(b_square, 1 << i)
    p_norms = memory + PLAN.norms + o_row * (8 * _WARPS)
    to_shared_2((o_thread & 3) == 0, p_norms + (o_thread >> 5) * 8, b_sum, b_square)
    barrier()
    b_sum = gl.zeros_like(b_sum)
    b_square = gl.zeros_like(b_sum)
    for i in gl.static_range(_WARPS // 2):
        a, b, c, d = from_shared(p_norms, 16 * i, 4)
        b_sum += a.to(gl.float32, bitcast=True)
        b_square += b.to(gl.float32, bitcast=True)
        b_sum += c.to(gl.float32, bitcast=True)
        b_square += d.to(gl.float32, bitcast=True)
    b_mean = b_sum * (1.0 / WIDTH)
    b_inverse = gl.rsqrt(gl.maximum(b_square * (1.0 / WIDTH) - b_mean * b_mean, 0.0) + _EPS)
    b_less = -b_mean * b_inverse
    found = ()
    for i in gl.static_range(len(scales)):
        low, high = unpacked(scales[i], DTYPE)
        low_shift, high_shift = unpacked(shifts[i], DTYPE)
        low = gl.fma(gl.fma(numbers[2 * i], b_inverse, b_less), 1.0 + low, low_shift)
        high = gl.fma(gl.fma(numbers[2 * i + 1], b_inverse, b_less), 1.0 + high, high_shift)
        found = found + (packed(low, high, DTYPE),)
    return found


@gluon.jit
def _by_twos(sums):
    """(0 + 1) + (2 + 3) of up to four sums."""
    found = sums[0]
    if len(sums) > 1:
        found += sums[1]
    if len(sums) == 3:
        found += sums[2]
    if len(sums) == 4:
        found += sums[2] + sums[3]
    return found


@gluon.jit
def _zeros(COUNT: gl.constexpr):
    sums = ()
    for _ in gl.static_range(COUNT):
        sums = sums + (gl.zeros_like(threads()).to(gl.float32),)
    return sums


@gluon.jit
def _multiply_two(sums, units, b0, b1, zero, AT: gl.constexpr, LOWER: gl.constexpr, UPPER: gl.constexpr,
                  DTYPE: gl.constexpr):  # fmt: skip
    """Adds to four sums from AT on the product with two tiles: of the second, UPPER words behind, if there is one."""
    a1 = zero
    a3 = zero
    if UPPER > 0:
        a1 = units[LOWER + UPPER]
        a3 = units[LOWER + UPPER + 1]
    found = multiplied(sums[AT : AT + 4], units[LOWER], a1, units[LOWER + 1], a3, b0, b1, DTYPE)
    return sums[:AT] + (found[0], found[1], found[2], found[3]) + sums[AT + 4 :]


@gluon.jit
def _multiply(sums, inputs, units, o_part, FIRST: gl.constexpr, TILES: gl.constexpr, DTYPE: gl.constexpr,
              PLAN: gl.constexpr):  # fmt: skip
    """Adds the products of W inputs and of TILES units, from word FIRST on in `units`, to `sums`: for every two tiles
    and for slices of the same number modulo 4, the tensor core's four."""
    PARTS: gl.constexpr = PLAN.parts
    SLICES: gl.constexpr = PLAN.slices
    zero = gl.zeros_like(o_part)
    for i_slice in gl.static_range(SLICES):
        b = ()
        for k in gl.static_range(4):
            word = inputs[i_slice // PARTS * 4 + k]
            if PARTS > 1:
                word = gl.where(o_part == i_slice % PARTS, word, 0)
            b = b + (word,)
        for i_pair in gl.static_range((TILES + 1) // 2):
            for k in gl.static_range(0, 4, 2):
                sums = _multiply_two(
                    sums, units, b[k], b[k + 1], zero, (i_pair * 4 + i_slice % 4) * 4,
                    FIRST + (2 * i_pair * SLICES + i_slice) * 4 + k, 4 * SLICES if 2 * i_pair + 1 < TILES else 0, DTYPE,
                )  # fmt: skip
    return sums


@gluon.jit
def _one_of_four(sums, AT: gl.constexpr):
    return sums[AT], sums[AT + 4], sums[AT + 8], sums[AT + 12]


@gluon.jit
def _summed(sums, memory, TILES: gl.constexpr, PLAN: gl.constexpr):
    """The sums over warps, one a thread: thread 64 i + 8 r + c has row r and column c of tile i."""
    o_thread = threads()
    o_lane = o_thread & 31
    p_sums = memory + PLAN.sums
    p_own = p_sums + (o_thread >> 5) * 1024 + (o_lane & 3) * 64 + (o_lane >> 2) * 4
    m_row = (o_lane & 3) < 4 // PLAN.parts
    for i_tile in gl.static_range(TILES):
        for k in gl.static_range(2):
            found = _by_twos(_one_of_four(sums, i_tile // 2 * 16 + i_tile % 2 * 2 + k))
            found = _of_all_parts(found, 4 // PLAN.parts, PLAN.parts)
            to_shared(m_row, p_own + i_tile * 256 + k * 32, found)
    barrier()
    found = gl.zeros_like(o_thread).to(gl.float32)
    for i in gl.static_range(_WARPS):
        found += from_shared(p_sums + o_thread * 4, 1024 * i, 1)[0].to(gl.float32, bitcast=True)
    return found


@gluon.jit
def _cells(i_program, I_TILE: gl.constexpr, PRODUCT: gl.constexpr, PLAN: gl.constexpr):
    """Row and column of each thread's result of tiles from I_TILE on, as `_summed` has it, and whether it is there."""
    o_thread = threads_for(PLAN)
    o_tile = (o_thread >> 6) + I_TILE
    o_row = (o_thread >> 3) & 7
    o_column = (o_tile * PLAN.programs + i_program) * 8 + (o_thread & 7)
    m_there = (o_tile < PLAN.products[PRODUCT].tiles) & (o_row < PLAN.rows)
    return o_row, o_column, m_there & (o_column < PLAN.products[PRODUCT].columns)


@gluon.jit
def _scale(weights, i_layer, o_column, m_there, PRODUCT: gl.constexpr, PLAN: gl.constexpr):
    """What each thread's sum is multiplied by; 1 where weights have no scales."""
    factor = 1.0
    if PLAN.size == 1:
        p_scale = weights[5 + PRODUCT]
        if PRODUCT < 4:  # the head is of no block
            p_scale += i_layer.to(gl.int64) * PLAN.products[PRODUCT].columns
        factor = gl.load(p_scale + o_column, mask=m_there, other=0.0)
    return factor


@gluon.jit
def _wide_product(
    p_box, p_scale, p_shift, p_bias, p_gate, b_x, memory, weights, i_program, i_layer, i_end, kept, slot, phase,
    p_posted, p_kept, p_trace,
    OP: gl.constexpr, PRODUCT: gl.constexpr, KIND: gl.constexpr, STRIDE: gl.constexpr, PLAN: gl.constexpr,
):  # fmt: skip
    """A product of W inputs (qkv, proj, fc1, head), four tiles at once: posts its results, keeps them at `p_kept` where
    `kept` is not 0, and gives the residual stream where that is what it makes, and the ring's slot and phase."""
    COLUMNS: gl.constexpr = PLAN.products[PRODUCT].columns
    TILES: gl.constexpr = PLAN.products[PRODUCT].tiles
    WIDTH: gl.constexpr = PLAN.width
    GROUP: gl.constexpr = PLAN.group
    NORMED: gl.constexpr = PRODUCT != 1
    DTYPE: gl.constexpr = p_bias.dtype.element_ty
    o_row, o_part, o_input = _place(PLAN)
    o_mask = _mask(o_row, o_input, PLAN)
    # All that does not depend on what other programs do now is asked for before waiting for them.
    if NORMED:
        o_modulation = (o_row // GROUP * STRIDE + o_input) * 2
        scales = _modulation(p_scale.to(gl.int64) + o_modulation, o_mask, PLAN)
        shifts = _modulation(p_shift.to(gl.int64) + o_modulation, o_mask, PLAN)
    for i_tile in gl.static_range(0, TILES, _TAKEN):
        o_cell_row, o_column, m_out = _cells(i_program, i_tile, PRODUCT, PLAN)
        b_bias = gl.load(p_bias + o_column, mask=m_out, other=0.0)
        if KIND == "residual":
            b_gate = gl.load(p_gate + o_cell_row // GROUP * STRIDE + o_column, mask=m_out, other=0.0)
        b_scale = _scale(weights, i_layer, o_column, m_out, PRODUCT, PLAN)
        units, slot, phase = take(memory, slot, phase, min(_TAKEN, TILES - i_tile), PLAN)
        barrier()
        wanted = refill(memory, weights, i_program, i_layer, i_end, slot, OP, i_tile // _TAKEN, PLAN)
        units = widened(units, DTYPE, PLAN)
        if i_tile == 0:
            if NORMED:
                p_row = p_box.to(gl.int64) + (o_row * WIDTH + o_input) * 4
                words = receive((p_row,), o_mask, _row_loads(PLAN, 1, 4))
            else:
                p_row = p_box.to(gl.int64) + (o_row * WIDTH + o_input) * 2
                words = receive((p_row,), o_mask, _row_loads(PLAN, 1, 2))
            if PLAN.trace:
                mark(p_trace, i_layer * 10 + 2 * (OP % 5))
        # Not before, as mailboxes are read behind weights that are on their way.
        ask(wanted, PLAN)
        if i_tile == 0:
            if NORMED:
                inputs = _normed(words, scales, shifts, memory, o_row, DTYPE, PLAN)
            else:
                inputs = words
        sums = _multiply(
            _zeros((min(_TAKEN, TILES - i_tile) + 1) // 2 * 16), inputs, units, o_part, 0, min(_TAKEN, TILES - i_tile),
            DTYPE, PLAN,
        )  # fmt: skip
        b_out = _summed(sums, memory, min(_TAKEN, TILES - i_tile), PLAN) * b_scale + b_bias.to(gl.float32)
        if KIND == "residual":
            b_x += b_gate.to(gl.float32) * b_out
            post(m_out, p_posted + o_cell_row * WIDTH + o_column, b_x)
        if KIND == "plain":
            b_out = b_out.to(DTYPE)
            o_out = o_cell_row * COLUMNS + o_column
            post(m_out, p_posted + o_out, b_out.to(gl.float32))
            gl.store(p_kept + o_out, b_out, mask=m_out & (kept > 0))
        if KIND == "logits":
            gl.store(p_kept + o_cell_row * COLUMNS + o_column, b_out, mask=m_out)
        if KIND == "gelu":
            # tanh in exponentials: v * sigmoid(2 u)
            b_out = b_out / (1 + gl.exp(-1.5957691216057308 * (b_out + 0.044715 * b_out * b_out * b_out)))
            # Two neighbours leave in one word.
            word = packed(b_out, exchanged(b_out, 1), DTYPE)
            o_out = o_cell_row * COLUMNS + o_column
            post(m_out & ((threads() & 1) == 0), p_posted + o_out // 2, word)
            gl.store(p_kept + o_out, b_out.to(DTYPE), mask=m_out & (kept > 0))
    if PLAN.trace:
        mark(p_trace, i_layer * 10 + 2 * (OP % 5) + 1)
    return b_x, slot, phase


@gluon.jit
def _quarter(inputs, QUARTER: gl.constexpr, COUNT: gl.constexpr):
    return inputs[QUARTER * COUNT : (QUARTER + 1) * COUNT]


@gluon.jit
def _long_product(
    p_box, p_bias, p_gate, b_x, memory, weights, i_program, i_layer, i_end, slot, phase, p_posted, p_trace,
    STRIDE: gl.constexpr, PLAN: gl.constexpr,
):  # fmt: skip
    """fc2, whose 4 W inputs are taken by quarters: as many at once as registers hold."""
    TILES: gl.constexpr = PLAN.products[3].tiles
    WIDTH: gl.constexpr = PLAN.width
    DTYPE: gl.constexpr = p_bias.dtype.element_ty
    CHUNKS: gl.constexpr = PLAN.chunks
    TOGETHER: gl.constexpr = PLAN.together
    o_row, o_part, o_input = _place(PLAN)
    o_mask = _mask(o_row, o_input, PLAN)
    o_cell_row, o_column, m_out = _cells(i_program, 0, 3, PLAN)
    b_bias = gl.load(p_bias + o_column, mask=m_out, other=0.0)
    b_gate = gl.load(p_gate + o_cell_row // PLAN.group * STRIDE + o_column, mask=m_out, other=0.0)
    b_scale = _scale(weights, i_layer, o_column, m_out, 3, PLAN)
    p_row = p_box.to(gl.int64) + (o_row * (4 * WIDTH) + o_input) * 2
    sums = _zeros((TILES + 1) // 2 * 16)
    inputs = ()
    for i in gl.static_range(0, 4, CHUNKS):
        units, slot, phase = take(memory, slot, phase, CHUNKS * TILES, PLAN)
        barrier()
        wanted = refill(memory, weights, i_program, i_layer, i_end, slot, 4, i // CHUNKS, PLAN)
        units = widened(units, DTYPE, PLAN)
        if i % TOGETHER == 0:
            inputs = receive((p_row + i * (2 * WIDTH),), o_mask, _row_loads(PLAN, TOGETHER, 2))
            if PLAN.trace:
                mark(p_trace, i_layer * 10 + 8)
        ask(wanted, PLAN)
        for j in gl.static_range(CHUNKS):
            sums = _multiply(
                sums, _quarter(inputs, (i + j) % TOGETHER, len(inputs) // TOGETHER), units, o_part,
                j * TILES * PLAN.slices * 4, TILES, DTYPE, PLAN,
            )  # fmt: skip
    b_x += b_gate.to(gl.float32) * (_summed(sums, memory, TILES, PLAN) * b_scale + b_bias.to(gl.float32))
    post(m_out, p_posted + o_cell_row * WIDTH + o_column, b_x)
    if PLAN.trace:
        mark(p_trace, i_layer * 10 + 9)
    return b_x, slot, phase


@gluon.jit
def _embedded(
    first, p_tokens, p_start, p_table, p_positions, p_starts, o_row, o_column, m_out,
    GROUP: gl.constexpr, IMAGES: gl.constexpr, LENGTH: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """content + position: the class row and the learned start, or the token drawn one group before."""
    o_batch = o_row // GROUP
    o_place = o_row % GROUP
    if first == 0:
        b_x = gl.load(p_start + o_batch * WIDTH + o_column, mask=m_out, other=0.0).to(gl.float32)
        b_x += gl.load(p_starts + o_place * WIDTH + o_column, mask=m_out, other=0.0).to(gl.float32)
    else:
        p_token = p_tokens + (o_batch % IMAGES) * LENGTH + first - GROUP + o_place
        b_token = gl.load(p_token, mask=m_out, other=0)
        b_x = gl.load(p_table + b_token * WIDTH + o_column, mask=m_out, other=0.0).to(gl.float32)
    return b_x + gl.load(p_positions + (first + o_place) * WIDTH + o_column, mask=m_out, other=0.0).to(gl.float32)


@gluon.jit(do_not_specialize=["i_begin", "i_end"])
def decode_ring_kernel(
    p_first, p_tokens, p_start, p_modulations, p_head_modulation, p_keys, p_values,  # as in DecodeState
    p_x, p_qkv, p_attended, p_hidden, p_logits,
    p_table, p_positions, p_starts,  # as in DecodeWeights: tokens, ...
    p_qkv_weight, p_qkv_bias, p_query_scale, p_proj_weight, p_proj_bias,
    p_fc1_weight, p_fc1_bias, p_fc2_weight, p_fc2_bias, p_head_weight, p_head_bias,
    p_qkv_scale, p_proj_scale, p_fc1_scale, p_fc2_scale, p_head_scale,  # of fp8 weights, else None
    p_mailboxes,  # as in DecodeState
    p_turn,  # DecodeState.turn
    p_trace,  # int64 [programs, blocks + 1, 5, 2]: when each operation's inputs came and results left, with TRACE only
    i_begin,  # blocks from this one
    i_end,  # to before this one
    IMAGES: gl.constexpr, BATCH: gl.constexpr, GROUP: gl.constexpr, LENGTH: gl.constexpr, HEADS: gl.constexpr,
    CODES: gl.constexpr, WORDS: gl.constexpr, PROGRAMS: gl.constexpr,
    EMBED: gl.constexpr,
    LAST_OP: gl.constexpr,  # of each block, the one after by its place in `reference.OPS`
    HEAD: gl.constexpr,
    TRACE: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BATCH * GROUP
    WIDTH: gl.constexpr = HEADS * 64
    STRIDE: gl.constexpr = 6 * WIDTH
    DTYPE: gl.constexpr = p_qkv_bias.dtype.element_ty
    # Words of a block's mailboxes, one after the other: x before it, qkv, x after proj, attended, hidden.
    X: gl.constexpr = ROWS * WIDTH
    BLOCK: gl.constexpr = 5 * X + 5 * X // 2
    SIZE: gl.constexpr = 2 if p_qkv_scale is None else 1
    PLAN: gl.constexpr = plan_of(WIDTH, SIZE, ROWS, GROUP, CODES, PROGRAMS, LAST_OP, HEAD, TRACE)
    # Of the products, and then the scales.
    weights = (
        p_qkv_weight, p_proj_weight, p_fc1_weight, p_fc2_weight, p_head_weight,
        p_qkv_scale, p_proj_scale, p_fc1_scale, p_fc2_scale, p_head_scale,
    )  # fmt: skip
    i_program = gl.program_id(0)
    keep, memory = shared_memory(PLAN.end)
    start(memory, weights, i_program, i_begin, i_end, PLAN)
    slot = i_begin * 0
    phase = i_begin * 0
    turn = gl.load(p_turn)
    p_set = p_mailboxes + turn * WORDS
    first = gl.load(p_first).to(gl.int32)
    if TRACE:
        p_trace += i_program * (10 * (i_end + 1))
    # The set of mailboxes that the step before used is emptied.
    p_other = p_mailboxes + (1 - turn) * WORDS
    for i in range(i_program * (4 * _THREADS), WORDS, PROGRAMS * (4 * _THREADS)):
        for j in gl.static_range(4):
            o_word = i + j * _THREADS + threads()
            gl.store(p_other + o_word, gl.full_like(o_word, _EMPTY), mask=o_word < WORDS)
    # The residual stream of this program's columns stays in its registers.
    o_row, o_column, m_x = _cells(i_program, 0, 1, PLAN)
    o_x = o_row * WIDTH + o_column
    if EMBED:
        b_x = _embedded(
            first, p_tokens, p_start, p_table, p_positions, p_starts, o_row, o_column, m_x, GROUP, IMAGES, LENGTH, WIDTH
        )
    else:
        b_x = gl.load(p_x + o_x, mask=m_x, other=0.0)
    post(m_x, p_set + i_begin * BLOCK + o_x, b_x)
    for i in range(i_begin, i_end):
        kept = gl.where(i == i_end - 1, 1, 0)
        i_long = i.to(gl.int64)
        p_block = p_set + i * BLOCK
        p_modulation = p_modulations + i_long * (BATCH * STRIDE)
        b_x, slot, phase = _wide_product(
            p_block, p_modulation + 2 * WIDTH, p_modulation + 4 * WIDTH, p_qkv_bias + i_long * (3 * WIDTH),
            p_modulation, b_x, memory, weights, i_program, i, i_end, kept, slot, phase, p_block + X, p_qkv, p_trace,
            0, 0, "plain", STRIDE, PLAN,
        )  # fmt: skip
        if LAST_OP > 1:
            i_cache = i_long * (BATCH * HEADS * LENGTH * 64)
            attend(
                p_block + X, p_block + 5 * X, kept, first, i_program, i, p_query_scale + i_long * HEADS,
                p_keys + i_cache, p_values + i_cache, p_attended, memory, p_trace, LENGTH, DTYPE, PLAN,
            )  # fmt: skip
            # Behind it, as most programs have no piece to wait for.
            ask(refill(memory, weights, i_program, i, i_end, slot, 1, 0, PLAN), PLAN)
        if LAST_OP > 2:
            b_x, slot, phase = _wide_product(
                p_block + 5 * X, p_modulation, p_modulation, p_proj_bias + i_long * WIDTH, p_modulation, b_x, memory,
                weights, i_program, i, i_end, kept, slot, phase, p_block + 4 * X, p_x, p_trace, 2, 1, "residual",
                STRIDE, PLAN,
            )  # fmt: skip
        if LAST_OP > 3:
            b_x, slot, phase = _wide_product(
                p_block + 4 * X, p_modulation + 3 * WIDTH, p_modulation + 5 * WIDTH, p_fc1_bias + i_long * (4 * WIDTH),
                p_modulation, b_x, memory, weights, i_program, i, i_end, kept, slot, phase, p_block + 5 * X + X // 2,
                p_hidden, p_trace, 3, 2, "gelu", STRIDE, PLAN,
            )  # fmt: skip
        if LAST_OP > 4:
            b_x, slot, phase = _long_product(
                p_block + 5 * X + X // 2, p_fc2_bias + i_long * WIDTH, p_modulation + WIDTH, b_x, memory, weights,
                i_program, i, i_end, slot, phase, p_block + BLOCK, p_trace, STRIDE, PLAN,
            )  # fmt: skip
    gl.store(p_x + o_x, b_x, mask=m_x)
    if HEAD:
        b_x, slot, phase = _wide_product(
            p_set + i_end * BLOCK, p_head_modulation, p_head_modulation + WIDTH, p_head_bias, p_head_modulation, b_x,
            memory, weights, i_program, i_end, i_end, 1, slot, phase, p_set, p_logits, p_trace, 5, 4, "logits",
            2 * WIDTH, PLAN,
        )  # fmt: skip
    leave(p_turn, PROGRAMS)
    keep._keep_alive()
