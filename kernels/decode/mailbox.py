"""Mailboxes: what one operation of the persistent decoding step hands to the next, in words of 32 bits.

A word holds `config.EMPTY` when a step begins and is written once; who needs it reads until something else is there. It
needs no fence, because it is itself the sign that it is there. Two sets of mailboxes take turns: a step empties the set
of the one before, and steps are launches, so nothing else has to keep them apart.
"""

# Triton's tuples grow by addition only, and its arguments are pointers and constants without types.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from .config import EMPTY

_EMPTY = tl.constexpr(EMPTY)


@triton.constexpr_function
def _receiving(step: int, chunks: int, count: int, pack: int) -> str:
    """PTX that reads `chunks` times `count` words, until none is empty: the last at a pointer of its own, the others
    `step` words apart. It does so for `pack` places together, and all lanes of a warp go on together."""
    outputs = chunks * count * pack
    firsts, lasts = ([f"${outputs + i * pack + place}" for place in range(pack)] for i in range(2))
    loads = []
    for chunk in range(chunks):
        for place in range(pack):
            for i in range(0, count, 4):
                words = ", ".join(f"${(chunk * count + i + j) * pack + place}" for j in range(4))
                start = f"{firsts[place]}+{4 * (chunk * step + i)}" if chunk < chunks - 1 else f"{lasts[place]}+{4 * i}"
                loads.append(f"ld.relaxed.gpu.global.v4.b32 {{{words}}}, [{start}];")
    any_empty = "setp.eq.u32 empty, highest, 0xffffffff; vote.sync.any.pred empty, empty, 0xffffffff;"
    return "\n".join(
        [
            "{",
            ".reg .pred empty;",
            ".reg .u32 highest;",
            "again:",
            *loads,
            "mov.u32 highest, $0;",
            *(f"max.u32 highest, highest, ${i};" for i in range(1, outputs)),
            any_empty,
            "@empty bra again;",
            "}",
        ]
    )


@triton.constexpr_function
def _receiving_operands(outputs: int, pack: int) -> str:
    return ",".join(["=&r"] * (outputs * pack) + ["l"] * (2 * pack))


@triton.constexpr_function
def _receiving_types(outputs: int) -> tuple:
    return (tl.int32,) * outputs


@triton.jit
def stack(blocks, COUNT: tl.constexpr):
    """Blocks of one shape side by side in a new last axis, whose length is the next power of two; the rest repeats the
    last block."""
    PADDED: tl.constexpr = triton.next_power_of_2(COUNT)
    LEVELS: tl.constexpr = PADDED.bit_length() - 1
    SHAPE: tl.constexpr = blocks[0].shape
    for _ in tl.static_range(PADDED - COUNT):
        blocks = blocks + (blocks[COUNT - 1],)
    for level in tl.static_range(LEVELS):
        joined = ()
        for i in tl.static_range(PADDED >> (level + 1)):
            joined = joined + (tl.join(blocks[i], blocks[i + (PADDED >> (level + 1))]),)
        blocks = joined
    return tl.reshape(blocks[0], SHAPE + (PADDED,))


@triton.jit
def halves(b_words, DTYPE: tl.constexpr):
    """The two 16-bit numbers of each word, in a last axis."""
    b_low = b_words.to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(b_low, (b_words >> 16).to(tl.int16).to(DTYPE, bitcast=True))


@triton.jit
def zeros_beside(b_tile, B: tl.constexpr):
    """Zeros `[A, B]`, each in the thread that has the numbers of its place of a tile `[A, B times some]`.

    An order of the threads reaches what is read from mailboxes only by what the addresses are computed from.
    """
    A: tl.constexpr = b_tile.shape[0]
    if b_tile.dtype.primitive_bitwidth == 16:
        b_tile = b_tile.to(tl.int16, bitcast=True).to(tl.int32)
    b_tile = tl.reshape(b_tile.to(tl.uint32, bitcast=True), [A, B, b_tile.shape[1] // B])
    return (tl.min(b_tile, axis=2) >> 31) >> 1


@triton.jit
def receive(
    p_first, p_last, STEP: tl.constexpr, CHUNKS: tl.constexpr, DTYPE: tl.constexpr, PACK: tl.constexpr,
    SYNC: tl.constexpr,
):  # fmt: skip
    """CHUNKS tiles `[A, 8 B]` of a mailbox from pointers `[A, B]` to eight numbers each, two 16-bit numbers in a word:
    the last at `p_last`, the others STEP words apart from `p_first` on."""
    A: tl.constexpr = p_first.shape[0]
    B: tl.constexpr = p_first.shape[1]
    COUNT: tl.constexpr = DTYPE.primitive_bitwidth // 4
    words = ()
    if SYNC:
        words = tl.inline_asm_elementwise(
            _receiving(STEP, CHUNKS, COUNT, PACK), _receiving_operands(CHUNKS * COUNT, PACK), [p_first, p_last],
            _receiving_types(CHUNKS * COUNT), is_pure=False, pack=PACK,
        )  # fmt: skip
    else:
        for i in tl.static_range(CHUNKS * COUNT):
            if i // COUNT == CHUNKS - 1:
                words = words + (tl.load(p_last + i % COUNT),)
            else:
                words = words + (tl.load(p_first + i // COUNT * STEP + i % COUNT),)
    tiles = ()
    for i in tl.static_range(CHUNKS):
        b_words = stack(words[i * COUNT : (i + 1) * COUNT], COUNT)
        if COUNT == 8:
            b_tile = b_words.to(tl.float32, bitcast=True)
        else:
            b_tile = halves(b_words, DTYPE)
        tiles = tiles + (tl.reshape(b_tile, [A, 8 * B]),)
    return tiles


@triton.jit
def pairs(b_low, b_high):
    """Two 16-bit numbers each as a word."""
    b_low = b_low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return b_low | (b_high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def post(p_word, b_word, m_word, SYNC: tl.constexpr):
    """Writes words to a mailbox; by atomics, as a plain store beside reads of another program has no meaning in PTX."""
    b_word = b_word.to(tl.int32, bitcast=True)
    if SYNC:
        tl.atomic_min(p_word.to(tl.pointer_type(tl.uint32)), b_word.to(tl.uint32, bitcast=True), m_word, sem="relaxed")
    else:
        tl.store(p_word, b_word, mask=m_word)


@triton.jit
def empty(p_other, WORDS: tl.constexpr, PROGRAMS: tl.constexpr, WARPS: tl.constexpr):
    """Empties the set of mailboxes that the step before used."""
    BLOCK: tl.constexpr = 128 * WARPS
    for i in range(tl.program_id(0) * BLOCK, WORDS, PROGRAMS * BLOCK):
        o_word = i + tl.arange(0, BLOCK)
        tl.store(p_other + o_word, tl.full([BLOCK], _EMPTY, tl.int32), mask=o_word < WORDS)
