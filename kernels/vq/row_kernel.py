"""Triton kernels of the vector quantiser that pass once over rows: codewords, distances, gradients.

Sizes are not specialised, as in `kernel.py`.
"""

# A Triton kernel's arguments are pointers and constants without types.
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

# A shorter vector is divided by this instead of its length, as in torch.nn.functional.normalize.
_LEAST_LENGTH = tl.constexpr(1e-12)


@triton.jit
def _lengths(b_x):
    """Euclidean lengths of rows `[R, W]` in fp64, at least 1e-12."""
    return tl.maximum(tl.sqrt(tl.sum(b_x * b_x, axis=1)), _LEAST_LENGTH)


@triton.jit
def _through_length(b_grad, b_unit, b_length):
    # The gradient before a vector's division by its length: what is tangent to the sphere passes, over the length; a
    # vector that was divided by 1e-12 lets all pass.
    b_along = tl.where(b_length > _LEAST_LENGTH, tl.sum(b_unit * b_grad, axis=1), 0.0)
    return (b_grad - b_unit * b_along[:, None]) / b_length[:, None]


@triton.jit(do_not_specialize=["n", "k"])
def quantize_fwd_kernel(
    p_index,  # [N] int64
    p_codebook,  # [K, D]
    p_exact,  # [K] fp64, the inverse lengths; only read with NORMALIZE
    p_z,  # [N, D]; only read with DISTANCE
    p_quantized,  # [N, D] fp32
    p_distance,  # [N] fp32; only written with DISTANCE
    n,
    k,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    DISTANCE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_row = o_row < n
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    m_code = (o_code >= 0) & (o_code < k)
    m_out = m_row[:, None] & (o_d[None, :] < D)
    o_out = o_row[:, None] * D + o_d[None, :]
    p_code = p_codebook + o_code[:, None] * D + o_d[None, :]
    b_code = tl.load(p_code, mask=m_out & m_code[:, None], other=float("nan")).to(tl.float32)
    if NORMALIZE:
        # Element by element, with the inverse length from memory: no sum whose order could differ between two kernels,
        # so that a code has the same vector wherever it is looked up.
        b_inverse = tl.load(p_exact + o_code, mask=m_row & m_code, other=0.0)
        b_code = (b_code.to(tl.float64) * b_inverse[:, None]).to(tl.float32)
    tl.store(p_quantized + o_out, b_code, mask=m_out)
    if DISTANCE:
        b_z = tl.load(p_z + o_out, mask=m_out, other=0.0).to(tl.float32)
        if NORMALIZE:
            b_wide = b_z.to(tl.float64)
            b_z = (b_wide * (1 / _lengths(b_wide))[:, None]).to(tl.float32)
        b_error = tl.where(m_out, b_code.to(tl.float64) - b_z.to(tl.float64), 0.0)
        tl.store(p_distance + o_row, tl.sum(b_error * b_error, axis=1).to(tl.float32), mask=m_row)


@triton.jit(do_not_specialize=["n"])
def vectors_bwd_kernel(
    p_grad,  # [N, D] fp32, the gradient of the quantised vectors; only read with STRAIGHT
    p_weight,  # [] fp64, the factor of (vector - codeword) in the commitment loss's gradient; only read with COMMIT
    p_mask,  # [N] bool; only read with MASK
    p_index,  # [N] int64
    p_z,  # [N, D]
    p_codebook,  # [K, D]
    p_grad_z,  # [N, D]
    n,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    STRAIGHT: tl.constexpr,
    COMMIT: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_row = o_row < n
    m_in = m_row[:, None] & (o_d[None, :] < D)
    o_in = o_row[:, None] * D + o_d[None, :]
    b_z = tl.load(p_z + o_in, mask=m_in, other=0.0).to(tl.float32).to(tl.float64)
    b_length = _lengths(b_z)
    b_unit = b_z / b_length[:, None] if NORMALIZE else b_z
    b_grad = tl.zeros([ROWS, WIDTH], tl.float64)
    if STRAIGHT:
        b_grad += tl.load(p_grad + o_in, mask=m_in, other=0.0).to(tl.float64)
    if COMMIT:
        o_code = tl.load(p_index + o_row, mask=m_row, other=0)
        b_code = tl.load(p_codebook + o_code[:, None] * D + o_d[None, :], mask=m_in, other=0.0)
        b_code = b_code.to(tl.float32).to(tl.float64)
        if NORMALIZE:
            b_code = b_code / _lengths(b_code)[:, None]
        m_loss = m_in
        if MASK:
            m_loss = m_in & (tl.load(p_mask + o_row, mask=m_row, other=0) != 0)[:, None]
        b_grad += tl.where(m_loss, tl.load(p_weight) * (b_unit - b_code), 0.0)
    if NORMALIZE:
        b_grad = _through_length(b_grad, b_unit, b_length)
    tl.store(p_grad_z + o_in, b_grad.to(tl.float32), mask=m_in)


@triton.jit(do_not_specialize=["n", "k"])
def sum_by_code_kernel(
    p_rows,  # [N, D]
    p_mask,  # [N] bool; only read with MASK
    p_index,  # [N] int64
    p_scale,  # [] fp64, a power of two
    p_sum,  # [K, D] int64, zero before
    p_count,  # [K] int64, zero before
    n,
    k,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASK: tl.constexpr,
    BAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_row = o_row < n
    if MASK:
        m_row = m_row & (tl.load(p_mask + o_row, mask=m_row, other=0) != 0)
    o_code = tl.load(p_index + o_row, mask=m_row, other=0)
    m_row = m_row & (o_code >= 0) & (o_code < k)
    m_in = m_row[:, None] & (o_d[None, :] < D)
    b_x = tl.load(p_rows + o_row[:, None] * D + o_d[None, :], mask=m_in, other=0.0).to(tl.float32).to(tl.float64)
    if NORMALIZE:
        b_x = b_x / _lengths(b_x)[:, None]
    # Integers add up to the same sum in any order. What is not finite has no integer: it is counted apart.
    m_finite = tl.abs(b_x) < float("inf")
    b_fixed = (tl.where(m_finite, b_x, 0.0) * tl.load(p_scale)).to(tl.int64)
    tl.atomic_add(p_sum + o_code[:, None] * D + o_d[None, :], b_fixed, mask=m_in, sem="relaxed")
    b_bad = tl.max(tl.where(m_finite, 0, 1), axis=1).to(tl.int64)
    tl.atomic_add(p_count + o_code, 1 + b_bad * BAD, mask=m_row, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def codebook_bwd_kernel(
    p_sum,  # [K, D] int64
    p_count,  # [K] int64
    p_scale,  # [] fp64
    p_weight,  # [] fp64
    p_codebook,  # [K, D]
    p_grad,  # [K, D]
    k,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PULL: tl.constexpr,
    BAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """weight * sum over a code's vectors of (codeword - vector), with PULL, or of the vectors, through the length."""
    o_code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_code = o_code < k
    m_in = m_code[:, None] & (o_d[None, :] < D)
    o_in = o_code[:, None] * D + o_d[None, :]
    b_count = tl.load(p_count + o_code, mask=m_code, other=0)
    b_grad = tl.load(p_sum + o_in, mask=m_in, other=0).to(tl.float64) / tl.load(p_scale)
    b_code = tl.load(p_codebook + o_in, mask=m_in, other=0.0).to(tl.float32).to(tl.float64)
    b_length = _lengths(b_code)
    b_unit = b_code / b_length[:, None] if NORMALIZE else b_code
    if PULL:
        b_grad = (b_count % BAD).to(tl.float64)[:, None] * b_unit - b_grad
    b_grad = b_grad * tl.load(p_weight)
    if NORMALIZE:
        b_grad = _through_length(b_grad, b_unit, b_length)
    # A code that nobody chose keeps a zero gradient even where the codeword or the weight is not finite.
    b_grad = tl.where((b_count == 0)[:, None], 0.0, tl.where((b_count >= BAD)[:, None], float("nan"), b_grad))
    tl.store(p_grad + o_in, b_grad.to(tl.float32), mask=m_in)
