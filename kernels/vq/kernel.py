"""Triton kernels of the search for the nearest code; `launch.py` starts them.

Sizes are not specialised: one compiled kernel serves them all, where Triton would make others for multiples of 16 and
for a size of 1.

The search runs in three steps. `prepare` writes every codeword and every vector as a sum of two fp16 parts. `scan`
scores all codes on the tensor cores and keeps, for each vector, the two groups of neighbouring codes with the largest
scores and the third largest score. `settle` scores the codes of the first group in fp32 and decides. Where another
score lies within the error of these two, it scores the codes in question in fp64. README.md derives the errors.

On a Hopper each kernel may start while the one before still runs (EARLY). All its programs wait for that one's end
before they read anything, so that its own end means the end of both.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A shorter vector is divided by this instead of its length, as in torch.nn.functional.normalize.
_LEAST_LENGTH = tl.constexpr(1e-12)
# Below every score, which is at least -1.5, and finite: its lowest bits can hold a number too.
_NOTHING = tl.constexpr(-4.0)
# Components of a step in fp64: with 32 codes a thread of a warp holds 16 products.
_EXACT_STEP = tl.constexpr(16)


@triton.jit
def _store_halves(p_halves, o_row, b_unit, WIDTH: tl.constexpr):
    # [ROWS, WIDTH] -> rows of 2 * WIDTH: the nearest fp16 numbers, and what they left.
    b_high = b_unit.to(tl.float16)
    p_half = p_halves + o_row[:, None] * (2 * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(p_half, b_high)
    tl.store(p_half + WIDTH, (b_unit - b_high.to(tl.float32)).to(tl.float16))


@triton.jit
def _prepare_codes(
    i_block, p_codebook, p_longest, p_codes, p_bias, p_units, p_exact, k,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_code = i_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_d = o_d[None, :] < D
    if NORMALIZE:
        # Past the end lie zeros, and a score of zero decides nothing.
        m_load = m_d & (o_code < k)[:, None]
    else:
        # Past the end the last codeword stands in: within its own group it changes no maximum, and the scan leaves out
        # the groups that lie past the end as a whole.
        m_load = m_d
    p_code = p_codebook + tl.minimum(o_code, k - 1)[:, None] * D + o_d[None, :]
    b_code = tl.load(p_code, mask=m_load, other=0.0).to(tl.float32).to(tl.float64)  # [ROWS, WIDTH]
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
    tl.store(p_units + o_code[:, None] * D + o_d[None, :], b_unit, mask=m_d)
    _store_halves(p_codes, o_row, b_unit, WIDTH)


@triton.jit
def _prepare_vectors(
    i_block, p_z, p_longest, p_vectors, p_share, n,
    D: tl.constexpr, WIDTH: tl.constexpr, NORMALIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Past the end the last vector is written again.
    o_row = tl.minimum(i_block.to(tl.int64) * ROWS + tl.arange(0, ROWS), n - 1)
    o_d = tl.arange(0, WIDTH)
    p_row = p_z + o_row[:, None] * D + o_d[None, :]
    b_z = tl.load(p_row, mask=o_d[None, :] < D, other=0.0).to(tl.float32).to(tl.float64)  # [ROWS, WIDTH]
    b_length = tl.sqrt(tl.sum(b_z * b_z, axis=1))
    if not NORMALIZE:
        # z.c - |c|^2 / 2 over |longest| max(|z|, |longest|): no term exceeds one.
        b_longest = tl.load(p_longest)
        b_length = tl.maximum(b_length, b_longest)
    b_inverse = 1 / tl.maximum(b_length, 1e-300)
    if not NORMALIZE:
        tl.store(p_share + o_row, (b_longest * b_inverse).to(tl.float32))
    _store_halves(p_vectors, o_row, (b_z * b_inverse[:, None]).to(tl.float32), WIDTH)


@triton.jit(do_not_specialize=["k", "n", "blocks"])
def prepare_codes_kernel(
    p_codebook,  # [K, D]
    p_z,  # [N, D]
    p_longest,  # [] fp64, the length of the longest codeword; only read without NORMALIZE
    p_codes,  # [tiles * CODES, 2 * WIDTH] fp16
    p_bias,  # [tiles * CODES] fp32, only written without NORMALIZE
    p_units,  # [tiles * CODES, D] fp32
    p_exact,  # [K] fp64: the inverse length, or half the squared length without NORMALIZE
    p_vectors,  # [N, 2 * WIDTH] fp16
    p_share,  # [N] fp32, only written without NORMALIZE
    k,
    n,
    blocks,  # programs that prepare codes; the others prepare vectors
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    i_block = tl.program_id(0)
    if i_block < blocks:
        _prepare_codes(
            i_block, p_codebook, p_longest, p_codes, p_bias, p_units, p_exact, k, D, WIDTH, GROUP, NORMALIZE, ROWS
        )
    else:
        _prepare_vectors(i_block - blocks, p_z, p_longest, p_vectors, p_share, n, D, WIDTH, NORMALIZE, ROWS)


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
    p_vectors,  # [N, 2 * WIDTH] fp16
    p_share,  # [N] fp32
    p_codes,  # [tiles * CODES, 2 * WIDTH] fp16
    p_bias,  # [tiles * CODES] fp32
    p_scores,  # [splits, 3, N] fp32, the three largest group scores of each vector
    p_groups,  # [splits, 2, N] int32, the groups of the first two
    n,
    groups,
    tiles,
    splits,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    CHUNK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # The programs of one split run side by side and share its codes in the L2 cache.
    i_split = tl.program_id(1)
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    o_column = tl.arange(0, CODES)
    SLOTS: tl.constexpr = CODES // GROUP
    o_slot = tl.arange(0, SLOTS)

    # Operands straight from memory stay in shared memory, where the tensor cores read them.
    o_vector = tl.minimum(o_row, n - 1)
    p_vector = p_vectors + o_vector[:, None] * (2 * WIDTH) + o_d[None, :]
    b_z_high = tl.load(p_vector)
    b_z_low = tl.load(p_vector + WIDTH)
    if not NORMALIZE:
        b_share = tl.load(p_share + o_vector)

    b_first = tl.full([ROWS, SLOTS], _NOTHING, tl.float32)
    b_second = b_first
    b_third = b_first
    b_first_group = tl.zeros([ROWS, SLOTS], tl.int32)
    b_second_group = b_first_group

    i_first = i_split * tiles // splits
    i_last = (i_split + 1) * tiles // splits
    o_first = i_first.to(tl.int64) * CODES
    p_codes += o_first * (2 * WIDTH)
    p_bias += o_first
    o_tile = o_column[None, :] * (2 * WIDTH) + o_d[:, None]  # [WIDTH, CODES]
    for i_chunk in range(i_first, i_last, CHUNK):
        # Positive floats are in the order of their bits, and integers are compared three at a time. Scores below zero
        # come out of order, so `settle` trusts none if the largest is not well above zero.
        b_top = tl.full([ROWS, SLOTS], _NOTHING, tl.float32)
        if NORMALIZE:
            b_top = b_top.to(tl.int32, bitcast=True)
        b_next = b_top
        b_last = b_top
        for i_tile in range(tl.minimum(CHUNK, i_last - i_chunk)):
            b_high = tl.load(p_codes + o_tile)
            b_low = tl.load(p_codes + WIDTH + o_tile)
            b_score = tl.dot(b_z_high, b_low)
            b_score = tl.dot(b_z_low, b_high, b_score)
            b_score = tl.dot(b_z_high, b_high, b_score)
            if NORMALIZE:
                b_score = b_score.to(tl.int32, bitcast=True)
            else:
                b_score -= b_share[:, None] * tl.load(p_bias + o_column)[None, :]
            p_codes += CODES * 2 * WIDTH
            p_bias += CODES

            # The columns of one thread are a group, so that no value changes threads here.
            b_parts = tl.reshape(b_score, [ROWS, SLOTS // 4, GROUP // 2, 4, 2])
            b_x = tl.reshape(tl.max(tl.max(b_parts, axis=2), axis=3), [ROWS, SLOTS])
            # The lowest bits of a maximum give way to the number of its tile, so that the three largest are kept with
            # minima and maxima alone.
            if NORMALIZE:
                b_x = (b_x & -CHUNK) | i_tile
            else:
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
            b_top.to(tl.float32, bitcast=True), b_top_group, b_next.to(tl.float32, bitcast=True), b_next_group,
            b_last.to(tl.float32, bitcast=True),
        )  # fmt: skip

    b_first, b_first_group, b_second, b_second_group, b_third = _across(
        b_first, b_first_group, b_second, b_second_group, b_third, SLOTS
    )
    m_row = o_row < n
    p_score = p_scores + i_split.to(tl.int64) * 3 * n + o_row
    tl.store(p_score, b_first, mask=m_row)
    tl.store(p_score + n, b_second, mask=m_row)
    tl.store(p_score + n + n, b_third, mask=m_row)
    p_group = p_groups + i_split.to(tl.int64) * 2 * n + o_row
    tl.store(p_group, b_first_group, mask=m_row)
    tl.store(p_group + n, b_second_group, mask=m_row)


@triton.jit
def _quick_scores(
    p_vectors, p_share, p_longest, p_units, p_exact, o_row, o_group, k,
    D: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, NORMALIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The scores `[ROWS, GROUP]` of the codes of each row's group in fp32, on the scale of the scan."""
    # The table reaches to the end of a tile, so that a group is read without a mask, four components at a time.
    o_code = o_group.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    o_d = tl.arange(0, STEP)
    p_vector = p_vectors + o_row[:, None, None] * (2 * WIDTH) + o_d[None, None, :]
    p_unit = p_units + o_code[:, :, None] * D + o_d[None, None, :]
    b_sum = tl.zeros([o_row.shape[0], GROUP, STEP], tl.float32)
    for i_d in range(0, WIDTH, STEP):
        # Vectors are padded with zeros.
        b_z = tl.load(p_vector + i_d).to(tl.float32) + tl.load(p_vector + (WIDTH + i_d)).to(tl.float32)
        b_sum += b_z * tl.load(p_unit + i_d, mask=o_d[None, None, :] + i_d < D, other=0.0)
    b_score = tl.sum(b_sum, axis=2)
    if not NORMALIZE:
        m_code = o_code < k
        b_inverse = 1 / tl.maximum(tl.load(p_longest), 1e-300)
        b_exact = tl.load(p_exact + o_code, mask=m_code, other=0.0)
        b_score -= tl.load(p_share + o_row)[:, None] * (b_exact * b_inverse * b_inverse).to(tl.float32)
        b_score = tl.where(m_code, b_score, _NOTHING)
    return b_score


@triton.jit
def _best_code(
    p_z,
    p_codebook,
    p_exact,
    i_row,
    o_code,  # [C]
    m_code,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """The largest exact score of a row over these codes, and the lowest code that has it.

    A product of two fp32 numbers is exact in fp64, and every sum here has the same order for every row and code: equal
    codewords have equal scores.
    """
    o_d = tl.arange(0, _EXACT_STEP)[None, :]
    b_exact = tl.load(p_exact + o_code, mask=m_code, other=0.0)
    b_sum = tl.zeros([o_code.shape[0], _EXACT_STEP], tl.float64)
    for i_d in range(0, WIDTH, _EXACT_STEP):
        m_d = o_d + i_d < D
        b_z = tl.load(p_z + i_row * D + i_d + o_d, mask=m_d, other=0.0).to(tl.float32).to(tl.float64)
        p_code = p_codebook + o_code.to(tl.int64)[:, None] * D + i_d + o_d
        b_code = tl.load(p_code, mask=m_code[:, None] & m_d, other=0.0).to(tl.float32).to(tl.float64)
        b_sum += b_z * b_code
    b_score = tl.sum(b_sum, axis=1)
    if NORMALIZE:
        b_score = b_score * b_exact
    else:
        b_score = b_score - b_exact
    b_score = tl.where(m_code, b_score, float("-inf"))
    b_best = tl.max(b_score, axis=0)
    m_best = m_code & (b_score == b_best)
    return b_best, tl.min(tl.where(m_best, o_code, 0x7FFFFFFF), axis=0)


@triton.jit(do_not_specialize=["n", "k", "splits"])
def settle_codes_kernel(
    p_z,  # [N, D]
    p_codebook,  # [K, D]
    p_longest,  # [] fp64
    p_vectors,  # [N, 2 * WIDTH] fp16
    p_share,  # [N] fp32
    p_units,  # [tiles * CODES, D] fp32
    p_exact,  # [K] fp64
    p_scores,  # [splits, 3, N] fp32
    p_groups,  # [splits, 2, N] int32
    p_index,  # [N] int64
    n,
    k,
    splits,
    MARGIN: tl.constexpr,
    CLOSE: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    CODES: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    i_first = tl.program_id(0).to(tl.int64) * ROWS
    o_place = tl.arange(0, ROWS)
    # Past the end the last row is done again, so that its loads need no mask.
    o_row = tl.minimum(i_first + o_place, n - 1)
    b_first = tl.full([ROWS], _NOTHING, tl.float32)
    b_second = b_first
    b_third = b_first
    b_first_group = tl.zeros([ROWS], tl.int32)
    b_second_group = b_first_group
    for i_split in range(0, splits, SPLITS):
        for i_step in tl.static_range(SPLITS):
            o_split = i_split + i_step
            m_split = o_row < tl.where(o_split < splits, n, 0)
            p_score = p_scores + o_split.to(tl.int64) * n * 3 + o_row
            p_group = p_groups + o_split.to(tl.int64) * n * 2 + o_row
            b_first, b_first_group, b_second, b_second_group, b_third = _merge(
                b_first, b_first_group, b_second, b_second_group, b_third,
                tl.load(p_score, mask=m_split, other=_NOTHING), tl.load(p_group, mask=m_split, other=0),
                tl.load(p_score + n, mask=m_split, other=_NOTHING), tl.load(p_group + n, mask=m_split, other=0),
                tl.load(p_score + n + n, mask=m_split, other=_NOTHING),
            )  # fmt: skip

    b_score = _quick_scores(
        p_vectors, p_share, p_longest, p_units, p_exact, o_row, b_first_group, k, D, WIDTH, GROUP, NORMALIZE, STEP
    )
    # The lowest bits of a score give way to the number of its code in the group, so that no two are equal.
    b_bits = (b_score.to(tl.int32, bitcast=True) & -GROUP) | tl.arange(0, GROUP)[None, :]
    b_score = b_bits.to(tl.float32, bitcast=True)
    b_best = tl.max(b_score, axis=1)
    b_other = tl.max(tl.where(b_score == b_best[:, None], _NOTHING, b_score), axis=1)
    b_index = b_first_group * GROUP + (b_best.to(tl.int32, bitcast=True) & (GROUP - 1))
    # What these scores do not decide is decided in fp64: among the codes of both groups, or among all if the third or
    # any other may hold a better one.
    b_least = b_best - MARGIN
    m_all = b_third >= b_least
    if NORMALIZE:
        m_all |= b_least <= 0
    m_doubt = m_all | (b_second >= b_least) | (b_best - b_other <= CLOSE)
    # A vector with NaN is in no doubt and may have found a code past the end.
    tl.store(p_index + o_row, tl.minimum(b_index, k - 1).to(tl.int64), mask=m_doubt == 0)

    # Such vectors are few, so each is done alone: together they would take registers from all the others.
    m_doubt &= i_first + o_place < n
    if tl.max(m_doubt.to(tl.int32), axis=0) > 0:
        o_step = tl.arange(0, CODES)
        for i_row in range(ROWS):
            m_this = m_doubt & (o_place == i_row)
            if tl.max(m_this.to(tl.int32), axis=0) > 0:
                i_first_group = tl.sum(tl.where(m_this, b_first_group, 0), axis=0)
                i_second_group = tl.sum(tl.where(m_this, b_second_group, 0), axis=0)
                is_all = tl.max((m_this & m_all).to(tl.int32), axis=0) > 0
                o_two = tl.where(o_step < GROUP, i_first_group, i_second_group - 1) * GROUP + o_step
                o_two = tl.where(o_step < 2 * GROUP, o_two, k)
                b_highest = tl.full([], float("-inf"), tl.float64)
                i_best = tl.full([], 0x7FFFFFFF, tl.int32)
                for i_code in range(0, tl.where(is_all, k, 1), CODES):
                    o_code = tl.where(is_all, i_code + o_step, o_two)
                    b_step, i_step_best = _best_code(
                        p_z, p_codebook, p_exact, i_first + i_row, o_code, o_code < k, D, WIDTH, NORMALIZE
                    )
                    # The codes come in ascending order, so an equal score does not replace an earlier one.
                    i_best = tl.where(b_step > b_highest, i_step_best, i_best)
                    b_highest = tl.maximum(b_highest, b_step)
                tl.store(p_index + i_first + i_row, tl.minimum(i_best, k - 1).to(tl.int64))
