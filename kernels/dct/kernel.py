"""Triton kernels for sub-images. Shapes, dtypes and values are the callers' business.

A sub-image is `P X P` with the projection `P = A_w^T A_w` onto the lowest w frequencies. Up to `config.LOW` it is made
in four thin products through the w x w coefficients (`low_rank_kernel`), above it in two products with `P` itself
(`projection_kernel`). Each kernel takes the pictures that are its own, by their cutoffs on the device: so nobody sorts
them, and the host never reads them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, reference, tables

PIXEL = torch.float16
"""The dtype in which the tensor cores take pixels: eleven bits, where a pixel has eight."""


@triton.jit
def _finish(
    b_y, p_out, p_prediction, b_sum, o_at, m_in, scale,
    CENTER: tl.constexpr, UNIT: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    # Stores a finished block, or compares it with a prediction and stores the gradient. Returns the sum of squares.
    b_y = (b_y + CENTER) * UNIT
    if COMPARE:
        b_p = tl.load(p_prediction + o_at, mask=m_in, other=0.0).to(tl.float32)
        b_d = tl.where(m_in, b_p - b_y, 0.0)
        b_sum += tl.sum(b_d * b_d)
        b_y = b_d * scale
    tl.store(p_out + o_at, b_y.to(p_out.dtype.element_ty), mask=m_in)
    return b_sum


@triton.jit
def _low_rank(
    p_images, p_high, p_wide, p_out, p_prediction, o_plane, w, scale,
    H: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, CENTER: tl.constexpr, UNIT: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = p_high.dtype.element_ty
    # The width goes in two halves, or a thread would hold too much of it.
    BOTH: tl.constexpr = W > HALF
    o_k = tl.arange(0, RANK)
    o_j = tl.arange(0, HALF)
    o_l = HALF + o_j
    m_j = (o_j < W)[None, :]
    m_l = (o_l < W)[None, :]
    m_high = (o_k < tl.minimum(w, H))[:, None]
    m_wide = (o_k < tl.minimum(w, W))[:, None]
    b_left = tl.load(p_wide + o_k[:, None] * W + o_j[None, :], mask=m_wide & m_j, other=0.0)  # [RANK, HALF]
    if BOTH:
        b_right = tl.load(p_wide + o_k[:, None] * W + o_l[None, :], mask=m_wide & m_l, other=0.0)
    b_d = tl.zeros([RANK, RANK], dtype=tl.float32)
    for i_row in tl.range(0, H, ROWS, num_stages=STAGES):
        o_i = i_row + tl.arange(0, ROWS)
        m_i = (o_i < H)[:, None]
        p_row = p_images + o_plane + o_i[:, None] * W
        b_x = tl.load(p_row + o_j[None, :], mask=m_i & m_j, other=0.0)
        b_t = tl.dot((b_x.to(tl.float32) - CENTER).to(DTYPE), tl.trans(b_left))
        if BOTH:
            b_x = tl.load(p_row + o_l[None, :], mask=m_i & m_l, other=0.0)
            b_t = tl.dot((b_x.to(tl.float32) - CENTER).to(DTYPE), tl.trans(b_right), b_t)
        b_high = tl.load(p_high + o_k[:, None] * H + o_i[None, :], mask=m_high & (o_i < H)[None, :], other=0.0)
        b_d = tl.dot(b_high, b_t.to(DTYPE), b_d)
    b_d = b_d.to(DTYPE)
    b_sum = 0.0
    for i_row in tl.range(0, H, ROWS, num_stages=1):
        o_i = i_row + tl.arange(0, ROWS)
        m_i = (o_i < H)[:, None]
        b_high = tl.load(p_high + o_k[:, None] * H + o_i[None, :], mask=m_high & (o_i < H)[None, :], other=0.0)
        b_u = tl.dot(tl.trans(b_high), b_d).to(DTYPE)
        o_row = o_plane + o_i[:, None] * W
        b_y = tl.dot(b_u, b_left)
        b_sum = _finish(b_y, p_out, p_prediction, b_sum, o_row + o_j[None, :], m_i & m_j, scale, CENTER, UNIT, COMPARE)
        if BOTH:
            b_y = tl.dot(b_u, b_right)
            b_sum = _finish(
                b_y, p_out, p_prediction, b_sum, o_row + o_l[None, :], m_i & m_l, scale, CENTER, UNIT, COMPARE
            )
    return b_sum


@triton.jit
def _copy(
    p_images, p_out, p_prediction, o_plane, scale,
    H: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, COMPARE: tl.constexpr,
):  # fmt: skip
    o_j = tl.arange(0, 2 * HALF)
    b_sum = 0.0
    for i_row in tl.range(0, H, ROWS // 2, num_stages=1):
        o_i = i_row + tl.arange(0, ROWS // 2)
        o_at = o_plane + o_i[:, None] * W + o_j[None, :]
        m_in = (o_i < H)[:, None] & (o_j < W)[None, :]
        b_y = tl.load(p_images + o_at, mask=m_in, other=0.0).to(tl.float32)
        if UNIT != 1.0:
            # Division by 255 to the last bit, without the hardware's slow one.
            b_q = b_y * UNIT
            b_y = tl.fma(tl.fma(-b_q, 255.0, b_y), UNIT, b_q)
        b_sum = _finish(b_y, p_out, p_prediction, b_sum, o_at, m_in, scale, 0.0, 1.0, COMPARE)
    return b_sum


@triton.jit
def low_rank_kernel(
    p_images, p_cutoffs, p_high, p_wide, p_out, p_prediction, p_sums, channels, sums, scale,
    H: tl.constexpr, W: tl.constexpr, HALF: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, CENTER: tl.constexpr, UNIT: tl.constexpr, COMPARE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # images [planes, H, W], cutoffs [B], high [H, H] and wide [W, W] the cosine matrices
    SIDE: tl.constexpr = max(H, W)
    i_plane = tl.program_id(0)
    w = tl.maximum(tl.load(p_cutoffs + i_plane // channels).to(tl.int32), 1)
    o_plane = i_plane.to(tl.int64) * (H * W)
    if (w <= LOW) | (w >= SIDE):
        if w >= SIDE:
            b_sum = _copy(p_images, p_out, p_prediction, o_plane, scale, H, W, HALF, ROWS, UNIT, COMPARE)
        elif w <= 16:
            b_sum = _low_rank(
                p_images, p_high, p_wide, p_out, p_prediction, o_plane, w, scale,
                H, W, HALF, 16, ROWS, STAGES, CENTER, UNIT, COMPARE,
            )  # fmt: skip
        elif w <= 32:
            b_sum = _low_rank(
                p_images, p_high, p_wide, p_out, p_prediction, o_plane, w, scale,
                H, W, HALF, 32, ROWS, STAGES, CENTER, UNIT, COMPARE,
            )  # fmt: skip
        else:
            b_sum = _low_rank(
                p_images, p_high, p_wide, p_out, p_prediction, o_plane, w, scale,
                H, W, HALF, LOW, ROWS, STAGES, CENTER, UNIT, COMPARE,
            )  # fmt: skip
        if COMPARE:
            tl.store(p_sums + i_plane.to(tl.int64) * sums, b_sum)
    if EARLY and i_plane == tl.num_programs(0) - 1:
        # This grid began before the other kernel was done; it must not end before, or what follows could read too soon.
        tl.extra.cuda.gdc_wait()


@triton.jit
def projection_kernel(
    p_images, p_cutoffs, p_left, p_right, p_out, p_prediction, p_sums, batch, channels, sums, scale,
    H: tl.constexpr, W: tl.constexpr, FIRST_H: tl.constexpr, FIRST_W: tl.constexpr, LOW: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPREAD: tl.constexpr, STAGES: tl.constexpr, CENTER: tl.constexpr, UNIT: tl.constexpr, COMPARE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    # images [batch * channels, H, W], cutoffs [batch], left [n, H, H] and right [n, W, W] the projections for the
    # cutoffs FIRST, FIRST + 1, ...
    DTYPE: tl.constexpr = p_left.dtype.element_ty
    BLOCKS: tl.constexpr = (H + ROWS - 1) // ROWS
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    o_h = tl.arange(0, BH)
    o_j = tl.arange(0, BW)
    m_j = (o_j < W)[None, :]
    for i_batch in range(0, batch, IMAGES):
        # Of all pieces of work on this kernel's pictures, program i takes those numbered i, i + programs, ...
        o_b = i_batch + tl.arange(0, IMAGES)
        b_w = tl.load(p_cutoffs + o_b, mask=o_b < batch, other=1).to(tl.int32)
        b_count = tl.cumsum(((b_w > LOW) & (b_w < max(H, W))).to(tl.int32), 0)
        # These pieces are bound by arithmetic, those of the other kernel by memory: they run side by side, on a share
        # of the processors that grows with the share of pictures.
        images = tl.max(b_count, 0)
        some = tl.cdiv(tl.num_programs(0) * SPREAD * images, 4 * tl.minimum(batch - i_batch, IMAGES))
        programs = tl.maximum(tl.minimum(some, tl.num_programs(0)), 1)
        pieces = tl.where(tl.program_id(0) < programs, images * channels * BLOCKS, 0)
        for i_piece in range(tl.program_id(0), pieces, programs):
            i_image = i_batch + tl.sum((b_count <= i_piece // BLOCKS // channels).to(tl.int32), 0)
            i_plane = i_image.to(tl.int64) * channels + (i_piece // BLOCKS) % channels
            i_block = i_piece % BLOCKS
            w = tl.load(p_cutoffs + i_image).to(tl.int32)
            o_plane = i_plane * (H * W)
            o_i = i_block * ROWS + tl.arange(0, ROWS)
            m_i = (o_i < H)[:, None]
            o_at = o_plane + o_i[:, None] * W + o_j[None, :]
            b_sum = 0.0
            p_l = p_left + (tl.minimum(w, H) - FIRST_H).to(tl.int64) * (H * H)
            p_r = p_right + (tl.minimum(w, W) - FIRST_W).to(tl.int64) * (W * W)
            b_l = tl.load(p_l + o_i[:, None] * H + o_h[None, :], mask=m_i & (o_h < H)[None, :], other=0.0)
            b_y = tl.zeros([ROWS, BW], dtype=tl.float32)
            for i_column in tl.range(0, W, COLUMNS, num_stages=STAGES):
                o_k = i_column + tl.arange(0, COLUMNS)
                m_x = (o_h < H)[:, None] & (o_k < W)[None, :]
                b_x = tl.load(p_images + o_plane + o_h[:, None] * W + o_k[None, :], mask=m_x, other=0.0)
                b_z = tl.dot(b_l, (b_x.to(tl.float32) - CENTER).to(DTYPE))  # [ROWS, COLUMNS]
                b_r = tl.load(p_r + o_k[:, None] * W + o_j[None, :], mask=(o_k < W)[:, None] & m_j, other=0.0)
                b_y = tl.dot(b_z.to(DTYPE), b_r, b_y)
            b_sum = _finish(b_y, p_out, p_prediction, b_sum, o_at, m_i & m_j, scale, CENTER, UNIT, COMPARE)
            if COMPARE:
                tl.store(p_sums + i_plane * sums + i_block, b_sum)


def sub_images(
    images: Tensor,
    cutoffs: Tensor,
    out_dtype: torch.dtype,
    *,
    low_rank: config.LowRankConfig | None = None,
    projection: config.ProjectionConfig | None = None,
) -> Tensor:
    """`[B, C, H, W]` contiguous, H and W at most `config.LARGEST`, cutoffs `[B]` on the same device."""
    out = torch.empty(images.shape, dtype=out_dtype, device=images.device)
    _filter(images, cutoffs, out, None, None, 1.0, *_rows(images, low_rank, projection))
    return out


def compare(
    prediction: Tensor,
    images: Tensor,
    cutoffs: Tensor,
    weights: Tensor | None = None,
    *,
    low_rank: config.LowRankConfig | None = None,
    projection: config.ProjectionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of `prediction` against the sub-images, fp32 scalar, and its gradient like `prediction`.

    With weights `[H, W]` the kernels leave the differences, and four matrix products in fp16 follow.
    """
    low_rank, projection = _rows(images, low_rank, projection)
    batch, channels, height, _ = images.shape
    count = max(1, images.numel())
    plain = weights is None
    gradient = torch.empty_like(prediction, dtype=prediction.dtype if plain else PIXEL)
    # A plane has one sum, or one for each of its pieces: the others stay zero.
    pieces = triton.cdiv(height, projection.rows)
    sums = torch.zeros(batch * channels, pieces, dtype=torch.float32, device=images.device)
    _filter(images, cutoffs, gradient, prediction, sums, 2 / count if plain else 1.0, low_rank, projection)
    if weights is not None:
        return _weighted(gradient, weights, count, prediction.dtype)
    return (sums.sum(dtype=torch.float64) / count).float(), gradient


def _weighted(difference: Tensor, weights: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean of the weighted squares of an fp16 difference's coefficients, and its gradient in `dtype`."""
    height, width = difference.shape[-2:]
    planes = difference.view(-1, height, width)
    high, wide = (reference.cached_matrix(n, PIXEL, planes.device) for n in (height, width))
    high = high.expand(len(planes), -1, -1)
    # At most one each, so that no coefficient grows; and the square root twice, as the norm in the middle is the loss.
    largest = weights.float().amax().clamp_min(torch.finfo(torch.float32).tiny)
    root = (weights.float() / largest).sqrt().to(PIXEL)
    with torch.autocast(planes.device.type, enabled=False):
        coefficients = torch.bmm(high, planes @ wide.mT).mul_(root)
        loss = torch.linalg.vector_norm(coefficients, dtype=torch.float32).square() * (largest / count)
        gradient = torch.bmm(high.mT, coefficients.mul_(root)) @ wide
    return loss, gradient.float().mul_(largest * (2 / count)).to(dtype).view(difference.shape)


def _rows(
    images: Tensor, low_rank: config.LowRankConfig | None, projection: config.ProjectionConfig | None
) -> tuple[config.LowRankConfig, config.ProjectionConfig]:
    """The given rows of the launch tables, or those for these images."""
    large, size = _device(images.device)[1], images.element_size()
    return (
        low_rank or (config.LOW_RANK if large else config.SMALL_LOW_RANK)[size],
        projection or (config.PROJECTION if large else config.SMALL_PROJECTION)[size],
    )


def _filter(
    images: Tensor,
    cutoffs: Tensor,
    out: Tensor,
    prediction: Tensor | None,
    sums: Tensor | None,
    scale: float,
    low_rank: config.LowRankConfig,
    projection: config.ProjectionConfig,
) -> None:
    batch, channels, height, width = images.shape
    if images.numel() == 0:
        return
    processors, hopper = _device(images.device)
    # Small pictures are all the low-rank kernel's.
    both = max(height, width) > config.LOW
    center, unit = (128.0, 1 / 255) if images.dtype == torch.uint8 else (0.5, 1.0)
    shared = {
        "H": height,
        "W": width,
        "LOW": config.LOW,
        "CENTER": center,
        "UNIT": unit,
        "COMPARE": prediction is not None,
        "EARLY": hopper and both,
    }
    pitch = 1 if sums is None else sums.shape[1]
    if both:
        first_h, first_w = min(config.LOW, height), min(config.LOW, width)
        pieces = batch * channels * triton.cdiv(height, projection.rows)
        projection_kernel[(min(pieces, processors),)](
            images, cutoffs,
            tables.projections(height, first_h, PIXEL, images.device),
            tables.projections(width, first_w, PIXEL, images.device),
            out, prediction, sums, batch, channels, pitch, scale,
            FIRST_H=first_h, FIRST_W=first_w, BH=_block(height), BW=_block(width),
            IMAGES=min(1024, triton.next_power_of_2(batch)), ROWS=projection.rows, COLUMNS=projection.columns,
            SPREAD=int(4 * projection.spread), STAGES=projection.stages, num_warps=projection.warps, **shared,
        )  # fmt: skip
    low_rank_kernel[(batch * channels,)](
        images, cutoffs,
        reference.cached_matrix(height, PIXEL, images.device), reference.cached_matrix(width, PIXEL, images.device),
        out, prediction, sums, channels, pitch, scale,
        HALF=_block(triton.cdiv(width, 2)), ROWS=low_rank.rows, STAGES=low_rank.stages,
        num_warps=low_rank.warps, **shared, **({"launch_pdl": True} if shared["EARLY"] else {}),
    )  # fmt: skip


@lru_cache
def _device(device: torch.device) -> tuple[int, bool]:
    """Number of multiprocessors, and whether it is a Hopper or later: more memory, and grids that may start early."""
    if device.type != "cuda":
        return 4, False  # the interpreter
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major >= 9


def _block(n: int) -> int:
    # A tensor-core product takes at least 16 in every direction.
    return max(16, triton.next_power_of_2(n))
