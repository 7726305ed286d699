"""Triton kernels of the search for the nearest code; `launch.py` starts them.

Sizes are not specialised: one compiled kernel serves them all, where Triton would make others for multiples of 16 and
for a size of 1.

The search runs in three steps. `prepare` writes every codeword as a sum of two fp16 parts. `scan` scores all codes on
the tensor cores and keeps, for each vector, the two groups of neighbouring codes with the largest scores and the third
largest score. `settle` scores the codes of the first group again in fp64 and decides; the second group's too, or all
codes, where their scores lie within the error of the scan. README.md derives the error.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A shorter vector is divided by this instead of its length, as in torch.nn.functional.normalize.
_LEAST_LENGTH = tl.constexpr(1e-12)
# Below every score, which is at least -1.5, and finite: its lowest bits can hold a number too.
_NOTHING = tl.constexpr(-4.0)


@triton.jit(do_not_specialize=["k"])
def prepare_codes_kernel(
    p_codebook,  # [K, D]
    p_longest,  # [] fp64, the length of the longest codeword; only read without NORMALIZE
    p_high,  # [tiles * CODES, WIDTH] fp16
    p_low,  # as p_high
    p_bias,  # [tiles * CODES] fp32, only written without NORMALIZE
    p_members,  # [tiles * CODES / GROUP, D, GROUP] fp32
    p_exact,  # [K] fp64: the inverse length, or half the squared length without NORMALIZE
    k,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    o_code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    # Past the end the last codeword stands in: within its own group it changes no maximum, and the scan leaves out
    # the groups that lie past the end as a whole.
    m_d = o_d[None, :] < D
    p_code = p_codebook + tl.minimum(o_code, k - 1)[:, None] * D + o_d[None, :]
    b_plain = tl.load(p_code, mask=m_d, other=0.0).to(tl.float32)  # [ROWS, WIDTH]
    b_code = b_plain.to(tl.float64)
    b_square = tl.sum(b_code * b_code, axis=1)

    # Four groups of neighbouring codes share 4 * GROUP rows in turns of two codes: the columns of a product that one
    # thread holds are then one group.
    o_member = o_code % GROUP
    o_group = o_code // GROUP
    o_row = (o_group // 4) * (4 * GROUP) + (o_member // 2) * 8 + (o_group % 4) * 2 + o_member % 2
    if NORMALIZE:
        b_exact = 1 / tl.maximum(tl.sqrt(b_square), _LEAST_LENGTH)
        b_unit = (b_code * b_exact[:, None]).to(tl.float32)
    else:
        b_exact = b_square / 2
        b_inverse = 1 / tl.maximum(tl.load(p_longest), 1e-300)
        b_unit = (b_code * b_inverse).to(tl.float32)
        tl.store(p_bias + o_row, (b_exact * b_inverse * b_inverse).to(tl.float32))
    tl.store(p_exact + o_code, b_exact, mask=o_code < k)
    p_member = p_members + (o_group * (D * GROUP) + o_member)[:, None] + o_d[None, :] * GROUP
    tl.store(p_member, b_plain, mask=m_d)

    b_high = b_unit.to(tl.float16)
    o_out = o_row[:, None] * WIDTH + o_d[None, :]
    tl.store(p_high + o_out, b_high)
    tl.store(p_low + o_out, (b_unit - b_high.to(tl.float32)).to(tl.float16))


@triton.jit
def _insert(b_x, b_x_group, b_first, b_first_group, b_second, b_second_group, b_third):
    """Place a score and its group among the three largest seen so far; the third keeps no group."""
    m_first = b_x > b_first
    m_second = b_x > b_second
    b_third = tl.maximum(b_third, tl.minimum(b_x, b_second))
    b_second_group = tl.where(m_first, b_first_group, tl.where(m_second, b_x_group, b_second_group))
    b_second = tl.where(m_first, b_first, tl.where(m_second, b_x, b_second))
    b_first_group = tl.where(m_first, b_x_group, b_first_group)
    b_first = tl.where(m_first, b_x, b_first)
    return b_first, b_first_group, b_second, b_second_group, b_third


@triton.jit
def _merge(
    b_first, b_first_group, b_second, b_second_group, b_third,
    b_other_first, b_other_first_group, b_other_second, b_other_second_group, b_other_third,
):  # fmt: skip
    """The three largest scores of two such triples."""
    b_first, b_first_group, b_second, b_second_group, b_third = _insert(
        b_other_first, b_other_first_group, b_first, b_first_group, b_second, b_second_group, b_third
    )
    b_first, b_first_group, b_second, b_second_group, b_third = _insert(
        b_other_second, b_other_second_group, b_first, b_first_group, b_second, b_second_group, b_third
    )
    return b_first, b_first_group, b_second, b_second_group, tl.maximum(b_third, b_other_third)


@triton.jit
def _across(b_first, b_first_group, b_second, b_second_group, b_third, COLUMNS: tl.constexpr):
    """The three largest scores of each row of such triples `[ROWS, COLUMNS]`."""
    o_column = tl.arange(0, COLUMNS)[None, :]
    b_top, b_column = tl.max(b_first, axis=1, return_indices=True)
    m_top = o_column == b_column[:, None]
    b_top_group = tl.sum(tl.where(m_top, b_first_group, 0), axis=1)
    # The column that held the first goes on with what it has left.
    b_first = tl.where(m_top, b_second, b_first)
    b_first_group = tl.where(m_top, b_second_group, b_first_group)
    b_second = tl.where(m_top, b_third, b_second)
    b_next, b_column = tl.max(b_first, axis=1, return_indices=True)
    m_next = o_column == b_column[:, None]
    b_next_group = tl.sum(tl.where(m_next, b_first_group, 0), axis=1)
    return b_top, b_top_group, b_next, b_next_group, tl.max(tl.where(m_next, b_second, b_first), axis=1)


@triton.jit(do_not_specialize=["n", "groups", "tiles", "splits"])
def scan_codes_kernel(
    p_z,  # [N, D]
    p_longest,  # [] fp64
    p_high,  # [tiles * CODES, WIDTH] fp16
    p_low,  # as p_high
    p_bias,  # [tiles * CODES] fp32
    p_scores,  # [splits, 3, N] fp32, the three largest group scores of each vector
    p_groups,  # [splits, 2, N] int32, the groups of the first two
    n,
    groups,
    tiles,
    splits,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    # The programs of one split run side by side and share its codes in the L2 cache.
    i_split = tl.program_id(1)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    o_column = tl.arange(0, CODES)
    SLOTS: tl.constexpr = CODES // GROUP
    o_slot = tl.arange(0, SLOTS)
    m_row = o_row < n

    m_z = m_row[:, None] & (o_d[None, :] < D)
    b_z = tl.load(p_z + o_row[:, None] * D + o_d[None, :], mask=m_z, other=0.0).to(tl.float32).to(tl.float64)
    b_length = tl.sqrt(tl.sum(b_z * b_z, axis=1))
    if NORMALIZE:
        b_share = tl.zeros([ROWS], tl.float32)
        b_unit = (b_z * (1 / tl.maximum(b_length, 1e-300))[:, None]).to(tl.float32)
    else:
        # z.c - |c|^2 / 2 over |longest| max(|z|, |longest|): no term exceeds one.
        b_longest = tl.load(p_longest)
        b_inverse = 1 / tl.maximum(tl.maximum(b_length, b_longest), 1e-300)
        b_share = (b_longest * b_inverse).to(tl.float32)
        b_unit = (b_z * b_inverse[:, None]).to(tl.float32)
    b_z_high = b_unit.to(tl.float16)
    b_z_low = (b_unit - b_z_high.to(tl.float32)).to(tl.float16)

    b_first = tl.full([ROWS, SLOTS], _NOTHING, tl.float32)
    b_second = b_first
    b_third = b_first
    b_first_group = tl.zeros([ROWS, SLOTS], tl.int32)
    b_second_group = b_first_group

    i_first = i_split * tiles // splits
    i_last = (i_split + 1) * tiles // splits
    o_first = i_first.to(tl.int64) * CODES
    p_high += o_first * WIDTH
    p_low += o_first * WIDTH
    p_bias += o_first
    o_tile = o_column[None, :] * WIDTH + o_d[:, None]  # [WIDTH, CODES]
    for i_chunk in range(i_first, i_last, CHUNK):
        b_top = tl.full([ROWS, SLOTS], _NOTHING, tl.float32)
        b_next = b_top
        b_last = b_top
        for i_tile in range(tl.minimum(CHUNK, i_last - i_chunk)):
            b_high = tl.load(p_high + o_tile)
            b_low = tl.load(p_low + o_tile)
            b_score = tl.dot(b_z_high, b_low)
            b_score = tl.dot(b_z_low, b_high, b_score)
            b_score = tl.dot(b_z_high, b_high, b_score)
            if not NORMALIZE:
                b_score -= b_share[:, None] * tl.load(p_bias + o_column)[None, :]
            p_high += CODES * WIDTH
            p_low += CODES * WIDTH
            p_bias += CODES

            # One instruction a score: the columns of one thread are a group, so that no value changes threads here.
            b_parts = tl.reshape(b_score, [ROWS, SLOTS // 4, GROUP // 2, 4, 2])
            b_x = tl.reshape(tl.max(tl.max(b_parts, axis=4), axis=2), [ROWS, SLOTS])
            # The lowest bits of a maximum give way to the number of its tile, so that the three largest are kept with
            # minima and maxima alone.
            b_x = ((b_x.to(tl.int32, bitcast=True) & -CHUNK) | i_tile).to(tl.float32, bitcast=True)
            m_slot = (i_chunk + i_tile) * SLOTS + o_slot < groups
            b_x = tl.where(m_slot[None, :], b_x, _NOTHING)
            b_smaller = tl.minimum(b_top, b_x)
            b_top = tl.maximum(b_top, b_x)
            b_last = tl.maximum(b_last, tl.minimum(b_next, b_smaller))
            b_next = tl.maximum(b_next, b_smaller)

        o_group = i_chunk * SLOTS + o_slot[None, :]
        b_top_group = (b_top.to(tl.int32, bitcast=True) & (CHUNK - 1)) * SLOTS + o_group
        b_next_group = (b_next.to(tl.int32, bitcast=True) & (CHUNK - 1)) * SLOTS + o_group
        b_first, b_first_group, b_second, b_second_group, b_third = _merge(
            b_first, b_first_group, b_second, b_second_group, b_third,
            b_top, b_top_group, b_next, b_next_group, b_last,
        )  # fmt: skip

    b_first, b_first_group, b_second, b_second_group, b_third = _across(
        b_first, b_first_group, b_second, b_second_group, b_third, SLOTS
    )
    p_score = p_scores + i_split.to(tl.int64) * 3 * n + o_row
    tl.store(p_score, b_first, mask=m_row)
    tl.store(p_score + n, b_second, mask=m_row)
    tl.store(p_score + n + n, b_third, mask=m_row)
    p_group = p_groups + i_split.to(tl.int64) * 2 * n + o_row
    tl.store(p_group, b_first_group, mask=m_row)
    tl.store(p_group + n, b_second_group, mask=m_row)


@triton.jit
def _best_code(
    p_z,
    p_members,
    p_exact,
    o_row,  # [ROWS]
    m_row,
    o_code,  # [ROWS, C]
    m_code,  # as o_code
    D: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STEP: tl.constexpr,
):
    """The largest exact score of each row over its codes, and the lowest code that has it.

    A product of two fp32 numbers is exact in fp64, and every sum here has the same order for every row and code: equal
    codewords have equal scores.
    """
    o_code = o_code.to(tl.int64)
    p_vector = p_z + o_row * D
    p_code = p_members + (o_code // GROUP) * (D * GROUP) + o_code % GROUP
    b_exact = tl.load(p_exact + o_code, mask=m_code, other=0.0)
    b_score = tl.zeros_like(b_exact)
    for i_d in range(0, D, STEP):
        for i_step in tl.static_range(STEP):
            m_d = i_d + i_step < D
            b_z = tl.load(p_vector + i_step, mask=m_row & m_d, other=0.0).to(tl.float32).to(tl.float64)
            b_code = tl.load(p_code + i_step * GROUP, mask=m_code & m_d, other=0.0).to(tl.float64)
            b_score += b_z[:, None] * b_code
        p_vector += STEP
        p_code += STEP * GROUP
    if NORMALIZE:
        b_score = b_score * b_exact
    else:
        b_score = b_score - b_exact
    b_score = tl.where(m_code, b_score, float("-inf"))
    b_best = tl.max(b_score, axis=1)
    m_best = m_code & (b_score == b_best[:, None])
    return b_best, tl.min(tl.where(m_best, o_code, 0x7FFFFFFF), axis=1)


@triton.jit(do_not_specialize=["n", "k", "splits"])
def settle_codes_kernel(
    p_z,  # [N, D]
    p_members,  # [groups, D, GROUP] fp32
    p_exact,  # [K] fp64
    p_scores,  # [splits, 3, N] fp32
    p_groups,  # [splits, 2, N] int32
    p_index,  # [N] int64
    n,
    k,
    splits,
    MARGIN: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    CODES: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
):
    i_first = tl.program_id(0).to(tl.int64) * ROWS
    o_row = i_first + tl.arange(0, ROWS)
    m_row = o_row < n
    b_first = tl.full([ROWS], _NOTHING, tl.float32)
    b_second = b_first
    b_third = b_first
    b_first_group = tl.zeros([ROWS], tl.int32)
    b_second_group = b_first_group
    for i_split in range(0, splits, SPLITS):
        o_split = i_split + tl.arange(0, SPLITS)
        m_top = m_row[:, None] & (o_split < splits)[None, :]
        p_score = p_scores + (o_split.to(tl.int64) * n * 3)[None, :] + o_row[:, None]
        p_group = p_groups + (o_split.to(tl.int64) * n * 2)[None, :] + o_row[:, None]
        b_x = tl.load(p_score, mask=m_top, other=_NOTHING)
        b_x_second = tl.load(p_score + n, mask=m_top, other=_NOTHING)
        b_x_third = tl.load(p_score + n + n, mask=m_top, other=_NOTHING)
        b_x_group = tl.load(p_group, mask=m_top, other=0)
        b_x_second_group = tl.load(p_group + n, mask=m_top, other=0)
        b_x, b_x_group, b_x_second, b_x_second_group, b_x_third = _across(
            b_x, b_x_group, b_x_second, b_x_second_group, b_x_third, SPLITS
        )
        b_first, b_first_group, b_second, b_second_group, b_third = _merge(
            b_first, b_first_group, b_second, b_second_group, b_third,
            b_x, b_x_group, b_x_second, b_x_second_group, b_x_third,
        )  # fmt: skip

    # A group whose score lies further below the first than twice the scan's error holds no better code.
    o_member = tl.arange(0, GROUP)[None, :]
    o_code = b_first_group[:, None] * GROUP + o_member
    m_code = m_row[:, None] & (o_code < k)
    b_best, b_index = _best_code(p_z, p_members, p_exact, o_row, m_row, o_code, m_code, D, GROUP, NORMALIZE, STEP)
    m_two = m_row & (b_second > b_first - MARGIN)
    if tl.max(m_two.to(tl.int32), axis=0) > 0:
        o_code = b_second_group[:, None] * GROUP + o_member
        m_code = m_two[:, None] & (o_code < k)
        b_other, b_other_index = _best_code(
            p_z, p_members, p_exact, o_row, m_row, o_code, m_code, D, GROUP, NORMALIZE, STEP
        )
        m_other = (b_other > b_best) | ((b_other == b_best) & (b_other_index < b_index))
        b_index = tl.where(m_other, b_other_index, b_index)
        m_all = m_two & (b_third > b_first - MARGIN)
        if tl.max(m_all.to(tl.int32), axis=0) > 0:
            for i_row in range(ROWS):
                m_this = m_all & (tl.arange(0, ROWS) == i_row)
                if tl.max(m_this.to(tl.int32), axis=0) > 0:
                    o_one = i_first + i_row + tl.zeros([1], tl.int64)
                    b_best_one = tl.full([1], float("-inf"), tl.float64)
                    b_lowest = tl.zeros([1], tl.int64) + 0x7FFFFFFF
                    for i_code in range(0, k, CODES):
                        o_step = (i_code + tl.arange(0, CODES))[None, :]
                        b_step, b_step_index = _best_code(
                            p_z, p_members, p_exact, o_one, o_one < n, o_step, o_step < k, D, GROUP, NORMALIZE, STEP
                        )
                        # The codes come in ascending order, so an equal score does not replace an earlier one.
                        m_step = b_step > b_best_one
                        b_lowest = tl.where(m_step, b_step_index, b_lowest)
                        b_best_one = tl.where(m_step, b_step, b_best_one)
                    b_index = tl.where(m_this, b_lowest, b_index)
    # A NaN is equal to no maximum, so a vector with NaN arrives here without a code.
    tl.store(p_index + o_row, tl.minimum(b_index, k - 1), mask=m_row)
