"""The weights of all blocks and of the head as one stream of units (`ring_plan.py`) through a ring in shared memory.

Each line of a unit is a copy of its own by the unit that copies memory, so that a gap keeps lines in other banks:
eight lanes that read 16 bytes of two lines, or of fp8 sixteen that read 8 bytes of four, meet no other. What there is
no column for is not copied and holds what was there before; its results go nowhere.
"""

# Gluon's arguments are pointers and constants without types, its tuples grow by addition only.
# mypy: ignore-errors

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .ring_plan import GAP, unit_bytes
from .simt import (
    await_arrival,
    copy_to_shared,
    from_e4m3,
    from_shared,
    from_shared_where,
    make_arrivals,
    threads,
    threads_here,
)

_GAP = gl.constexpr(GAP)


@gluon.constexpr_function
def _asked_for(plan, position, count, product):
    """Whether any of `count` units from a position of the stream on is of a product of the block."""
    first, units = plan.products[product].first, plan.products[product].units
    return any(first <= (position + i) % plan.block < first + units for i in range(count))


@gluon.jit
def _source(p_weight, i_program, o_layer, o_within, o_line, PRODUCT: gl.constexpr, PLAN: gl.constexpr):
    """Whether a unit of a block is of a product, whether it has that column, and where its lines begin."""
    WIDTH: gl.constexpr = PLAN.width
    COLUMNS: gl.constexpr = PLAN.products[PRODUCT].columns
    TILES: gl.constexpr = PLAN.products[PRODUCT].tiles
    o_own = o_within - PLAN.products[PRODUCT].first
    o_column = (o_own % TILES * PLAN.programs + i_program) * 8 + o_line
    o_from = (o_layer.to(gl.int64) * COLUMNS + o_column) * (PLAN.size * PLAN.products[PRODUCT].quarters * WIDTH)
    o_from += o_own // TILES * (PLAN.size * WIDTH)
    m_own = (o_own >= 0) & (o_own < PLAN.products[PRODUCT].units)
    return m_own, o_column < COLUMNS, p_weight.to(gl.int64) + o_from


@gluon.jit
def requests(memory, weights, i_program, i_layer, i_end, slot, POSITION: gl.constexpr, COUNT: gl.constexpr,
             PLAN: gl.constexpr):  # fmt: skip
    """What `ask` needs to ask for COUNT units, at POSITION of the stream that begins with block `i_layer`, into slots
    from `slot` on. Lane i has unit i, each warp a line: a warp's copies start one after the other."""
    WIDTH: gl.constexpr = PLAN.width
    BLOCK: gl.constexpr = PLAN.block
    o_thread = threads_here()
    o_line = o_thread >> 5
    o_unit = o_thread & 31
    o_position = o_unit + POSITION
    o_block = o_position // BLOCK
    o_layer = o_block + i_layer
    o_within = o_position - o_block * BLOCK
    m_block = o_layer < i_end
    o_source = gl.zeros_like(o_thread).to(gl.int64)
    m_asked = m_block
    m_there = o_thread < 0
    for i in gl.static_range(4):
        if _asked_for(PLAN, POSITION, COUNT, i):
            m_own, m_column, o_own = _source(weights[i], i_program, o_layer, o_within, o_line, i, PLAN)
            m_own = m_own & m_block
            o_source = gl.where(m_own, o_own, o_source)
            m_there = m_there | (m_own & m_column)
    if PLAN.head:
        o_own = o_position + (i_layer - i_end) * BLOCK
        m_own = (o_own >= 0) & (o_own < PLAN.products[4].units)
        o_column = (o_own * PLAN.programs + i_program) * 8 + o_line
        o_source = gl.where(m_own, weights[4].to(gl.int64) + o_column.to(gl.int64) * (PLAN.size * WIDTH), o_source)
        m_there = m_there | (m_own & (o_column < PLAN.products[4].columns))
        m_asked = m_asked | m_own
    m_asked = m_asked & (o_unit < COUNT)
    o_slot = o_unit + slot
    o_slot = gl.where(o_slot >= PLAN.slots, o_slot - PLAN.slots, o_slot)
    arrival = memory + PLAN.barriers + o_slot * 8
    address = memory + o_slot * unit_bytes(WIDTH, PLAN.size) + o_line * (PLAN.size * (WIDTH + _GAP))
    return arrival, address, o_source, m_asked & ~m_there, m_asked & m_there


@gluon.jit
def ask(wanted, PLAN: gl.constexpr):
    """Asks for units into slots that all threads have read."""
    if len(wanted) > 0:
        copy_to_shared(wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], PLAN.size * PLAN.width)


@gluon.jit
def refill(memory, weights, i_program, i_layer, i_end, slot, OP: gl.constexpr, TIME: gl.constexpr, PLAN: gl.constexpr):
    """What `ask` needs when an operation takes units for the TIMEth time; `slot` is the one that is taken next."""
    UNITS: gl.constexpr = PLAN.refills[OP][TIME].units
    wanted = ()
    if UNITS > 0:
        wanted = requests(
            memory, weights, i_program, i_layer, i_end, slot + PLAN.refills[OP][TIME].behind,
            PLAN.refills[OP][TIME].position, UNITS, PLAN,
        )  # fmt: skip
    return wanted


@gluon.jit
def start(memory, weights, i_program, i_begin, i_end, PLAN: gl.constexpr):
    """Makes the units' barriers, a unit is there when its eight lines are, and asks for the first units."""
    make_arrivals(memory + PLAN.barriers, PLAN.slots, 8)
    ask(requests(memory, weights, i_program, i_begin, i_end, i_begin * 0, 0, PLAN.filled, PLAN), PLAN)


@gluon.jit
def threads_for(PLAN: gl.constexpr):
    """The number of each thread. What follows from it stays in registers across all blocks but for fp8 weights, with
    which compilers would run out of registers."""
    if PLAN.size == 1:
        o_thread = threads_here()
    else:
        o_thread = threads()
    return o_thread


@gluon.jit
def take(memory, slot, phase, COUNT: gl.constexpr, PLAN: gl.constexpr):
    """The next COUNT units in registers, and the slot and the phase behind them.

    Of each a thread 4 g + t of warp w has eight inputs side by side of column g, from 256 s + 32 w + 8 t on, for each
    slice s of 256 inputs: four words each, or two of fp8, by units, then by slices.
    """
    SIZE: gl.constexpr = PLAN.size
    WIDTH: gl.constexpr = PLAN.width
    SLICES: gl.constexpr = PLAN.slices
    o_thread = threads_for(PLAN)
    o_lane = o_thread & 31
    o_input = (o_thread >> 5) * 32 + (o_lane & 3) * 8
    o_address = memory + (o_lane >> 2) * (SIZE * (WIDTH + _GAP)) + o_input * SIZE
    words = ()
    for _ in gl.static_range(COUNT):
        await_arrival(memory + PLAN.barriers + 8 * slot, phase)
        o_unit = o_address + slot * unit_bytes(WIDTH, SIZE)
        for i in gl.static_range(SLICES):
            if 256 * (i + 1) <= WIDTH:
                words = words + from_shared(o_unit, 256 * SIZE * i, 2 * SIZE)
            else:
                words = words + from_shared_where(o_input < WIDTH - 256 * i, o_unit, 256 * SIZE * i, 2 * SIZE)
        last = slot == PLAN.slots - 1
        phase = gl.where(last, 1 - phase, phase)
        slot = gl.where(last, 0, slot + 1)
    return words, slot, phase


@gluon.jit
def widened(words, DTYPE: gl.constexpr, PLAN: gl.constexpr):
    """Weights that `take` gave, two of DTYPE a word, which holds those of fp8 exactly."""
    found = words
    if PLAN.size == 1:
        found = ()
        for i in gl.static_range(len(words)):
            found = found + from_e4m3(words[i], DTYPE)
    return found
