"""Triton kernels of the group normalisation with SiLU, and their launches. Maps are channels-last: [B, H W, C].

An image's map is cut into chunks of whole tiles, one for each program. The first kernel leaves mean and sum of squared
deviations of every group in every chunk; the second merges them, each program for itself, and normalises its chunk.
All sums have a fixed order that does not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import GATHER, NORM, PROJECT, STATISTICS, chunk_pixels

_ROUND = tl.constexpr(2.0**23)


@triton.jit
def _joined(
    p_x, p_residual, p_offset, i_image, o_pixel, m_pixel, height, width,
    C: tl.constexpr, RESIDUAL: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    """Pixels of the map, made from its parts: [len(o_pixel), C] in the dtype of the map."""
    o_c = tl.arange(0, C)[None, :]
    m_pixel = m_pixel[:, None]
    if INTERLEAVE:
        # Pixel (2 y + a, 2 x + b) is phase (a, b) at (y + a, x + b) of a map that is one wider both ways.
        o_y = o_pixel // width
        o_x = o_pixel % width
        o_row = (o_y // 2 + o_y % 2) * (width // 2 + 1) + o_x // 2 + o_x % 2
        o_row = o_row * 4 + o_y % 2 * 2 + o_x % 2
        p_image = p_x + i_image * ((height // 2 + 1) * (width // 2 + 1)) * (4 * C)
    else:
        o_row = o_pixel
        p_image = p_x + i_image * (height * width) * C
    b_x = tl.load(p_image + o_row[:, None] * C + o_c, mask=m_pixel, other=0.0).to(tl.float32)
    if OFFSET:
        b_x += tl.load(p_offset + o_c).to(tl.float32)
    if RESIDUAL:
        p_image = p_residual + i_image * (height * width) * C
        b_x += tl.load(p_image + o_pixel[:, None] * C + o_c, mask=m_pixel, other=0.0).to(tl.float32)
    return b_x.to(p_x.dtype.element_ty)


@triton.jit
def group_statistics_kernel(
    p_x,  # [B, H W, C], or [B, (H / 2 + 1) (W / 2 + 1), 4, C] with INTERLEAVE
    p_residual,  # [B, H W, C]; only read with RESIDUAL
    p_offset,  # [C]; only read with OFFSET
    p_joined,  # [B, H W, C]; only written with JOIN
    p_statistics,  # [B, chunks, 2, G] fp32: means, sums of squared deviations
    height, width, chunk,
    C: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr,
    JOIN: tl.constexpr, RESIDUAL: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVE: tl.constexpr,
):  # fmt: skip
    i_chunk = tl.program_id(0)
    i_image = tl.program_id(1).to(tl.int64)
    WIDE: tl.constexpr = C // G
    pixels = height * width
    first = i_chunk * chunk
    last = tl.minimum(first + chunk, pixels)
    o_c = tl.arange(0, C)[None, :]
    # Deviations from the chunk's first pixel: sums of squares then keep their digits however far the mean is from zero.
    o_first = first + tl.arange(0, 1)
    b_first = _joined(
        p_x, p_residual, p_offset, i_image, o_first, o_first < pixels, height, width, C, RESIDUAL, OFFSET, INTERLEAVE
    ).to(tl.float32)  # [1, C]
    b_sum = tl.zeros([TILE, C], dtype=tl.float32)
    b_square = tl.zeros([TILE, C], dtype=tl.float32)
    for i_pixel in range(first, last, TILE):
        o_pixel = i_pixel + tl.arange(0, TILE)
        m_pixel = o_pixel < last
        b_x = _joined(
            p_x, p_residual, p_offset, i_image, o_pixel, m_pixel, height, width, C, RESIDUAL, OFFSET, INTERLEAVE
        )
        if JOIN:
            p_out = p_joined + i_image * pixels * C
            tl.store(p_out + o_pixel[:, None] * C + o_c, b_x, mask=m_pixel[:, None])
        b_d = tl.where(m_pixel[:, None], b_x.to(tl.float32) - b_first, 0.0)
        b_sum += b_d
        b_square += b_d * b_d
    count = (last - first).to(tl.float32)
    b_mean = tl.sum(b_sum, axis=0) / count  # [C], of the deviations
    b_square = tl.sum(b_square, axis=0) - b_mean * b_mean * count
    b_mean = tl.reshape(b_mean + tl.reshape(b_first, [C]), [G, WIDE])
    b_all = tl.sum(b_mean, axis=1) / WIDE
    b_d = b_mean - b_all[:, None]
    b_square = tl.sum(tl.reshape(b_square, [G, WIDE]) + b_d * b_d * count, axis=1)
    p_own = p_statistics + (i_image * tl.num_programs(0) + i_chunk) * (2 * G) + tl.arange(0, G)
    tl.store(p_own, b_all)
    tl.store(p_own + G, tl.maximum(b_square, 0.0))


@triton.jit
def _scale_and_shift(
    p_statistics, p_weight, p_bias, i_image, pixels, chunk, eps,
    C: tl.constexpr, G: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """What every channel is multiplied by and what is added then: two times [C]."""
    WIDE: tl.constexpr = C // G
    chunks = tl.cdiv(pixels, chunk)
    o_chunk = tl.arange(0, CHUNKS)
    o_group = tl.arange(0, G)
    m_chunk = (o_chunk < chunks)[:, None]
    b_count = tl.maximum(tl.minimum(pixels - o_chunk * chunk, chunk), 0).to(tl.float32)[:, None] * WIDE
    p_image = p_statistics + i_image * chunks * (2 * G) + o_chunk[:, None] * (2 * G) + o_group[None, :]
    b_means = tl.load(p_image, mask=m_chunk, other=0.0)
    b_squares = tl.load(p_image + G, mask=m_chunk, other=0.0)
    total = pixels * 1.0 * WIDE
    b_mean = tl.sum(b_means * b_count, axis=0) / total
    b_d = b_means - b_mean[None, :]
    b_variance = tl.sum(b_squares + b_d * b_d * b_count, axis=0) / total
    o_c = o_group[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
    b_scale = tl.load(p_weight + o_c).to(tl.float32) / tl.sqrt(b_variance + eps)[:, None]
    b_shift = tl.load(p_bias + o_c).to(tl.float32) - b_mean[:, None] * b_scale
    return tl.reshape(b_scale, [C]), tl.reshape(b_shift, [C])


@triton.jit
def _normed(p_image, o_pixel, m_pixel, b_scale, b_shift, C: tl.constexpr):
    p_x = p_image + o_pixel[:, None] * C + tl.arange(0, C)[None, :]
    b_y = tl.load(p_x, mask=m_pixel[:, None], other=0.0).to(tl.float32) * b_scale[None, :] + b_shift[None, :]
    return b_y / (1 + tl.exp(-b_y))


@triton.jit
def group_norm_silu_kernel(
    p_x,  # [B, H W, C]
    p_statistics,  # [B, chunks, 2, G]
    p_weight,  # [C]
    p_bias,  # [C]
    p_y,  # [B, H W, C]
    pixels, chunk, eps,
    C: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    i_image = tl.program_id(1).to(tl.int64)
    b_scale, b_shift = _scale_and_shift(p_statistics, p_weight, p_bias, i_image, pixels, chunk, eps, C, G, CHUNKS)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, pixels)
    o_image = i_image * pixels * C
    for i_pixel in range(first, last, TILE):
        o_pixel = i_pixel + tl.arange(0, TILE)
        m_pixel = o_pixel < last
        b_y = _normed(p_x + o_image, o_pixel, m_pixel, b_scale, b_shift, C)
        p_out = p_y + o_image + o_pixel[:, None] * C + tl.arange(0, C)[None, :]
        tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_pixel[:, None])


@triton.jit
def project_kernel(
    p_x,  # [B, H W, C]
    p_statistics,  # [B, chunks, 2, G]
    p_weight,  # [C]
    p_bias,  # [C]
    p_conv,  # [3, 9, C], the nine taps of the convolution's kernel by rows
    p_taps,  # [B, 27, H W] fp32: what a pixel gives to its neighbours, by tap and colour
    pixels, chunk, eps,
    C: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    i_image = tl.program_id(1).to(tl.int64)
    b_scale, b_shift = _scale_and_shift(p_statistics, p_weight, p_bias, i_image, pixels, chunk, eps, C, G, CHUNKS)
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, pixels)
    o_tap = tl.arange(0, 32)
    m_tap = (o_tap < 27)[None, :]
    p_w = p_conv + (o_tap % 3 * 9 + o_tap // 3)[None, :] * C + tl.arange(0, C)[:, None]
    # fp16 has three bits more than bf16, and normalised values are far from its limits.
    b_w = tl.load(p_w, mask=m_tap, other=0.0).to(tl.float16)  # [C, 32]
    for i_pixel in range(first, last, TILE):
        o_pixel = i_pixel + tl.arange(0, TILE)
        m_pixel = o_pixel < last
        b_y = _normed(p_x + i_image * pixels * C, o_pixel, m_pixel, b_scale, b_shift, C)
        b_taps = tl.dot(b_y.to(tl.float16), b_w)
        p_out = p_taps + (i_image * 27 + o_tap[None, :]) * pixels + o_pixel[:, None]
        tl.store(p_out, b_taps, mask=m_pixel[:, None] & m_tap)


@triton.jit
def gather_kernel(
    p_taps,  # [B, 27, H W]
    p_bias,  # [3]
    p_pixels,  # [B, 3, H W] uint8
    height, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_colour = tl.program_id(1)
    i_image = tl.program_id(2).to(tl.int64)
    pixels = height * width
    o_pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_pixel = o_pixel < pixels
    o_y = o_pixel // width
    o_x = o_pixel % width
    b_sum = tl.zeros([BLOCK], dtype=tl.float32) + tl.load(p_bias + i_colour).to(tl.float32)
    for i_tap in tl.static_range(9):
        down = i_tap // 3 - 1
        right = i_tap % 3 - 1
        m_in = m_pixel & (o_y + down >= 0) & (o_y + down < height) & (o_x + right >= 0) & (o_x + right < width)
        p_tap = p_taps + (i_image * 27 + i_tap * 3 + i_colour) * pixels + o_pixel + down * width + right
        b_sum += tl.load(p_tap, mask=m_in, other=0.0)
    b_level = tl.minimum(tl.maximum(b_sum, 0.0), 1.0) * 255.0
    # Adding 2^23 leaves no bits below one: rounds to the nearest integer, ties to even, as torch.round does.
    b_level = (b_level + _ROUND) - _ROUND
    p_out = p_pixels + (i_image * 3 + i_colour) * pixels + o_pixel
    tl.store(p_out, b_level.to(tl.int32).to(tl.uint8), mask=m_pixel)


def _chunks(pixels: int, channels: int) -> tuple[int, int]:
    chunk = chunk_pixels(pixels, channels)
    return chunk, triton.cdiv(pixels, chunk)


def statistics(
    x: Tensor, residual: Tensor | None, offset: Tensor | None, interleave: bool, groups: int
) -> tuple[Tensor, Tensor]:
    """The joined map (x itself where there is nothing to join) and the statistics of its chunks."""
    batch, channels, height, width = x.shape
    if interleave:
        channels, height, width = channels // 4, 2 * height - 2, 2 * width - 2
    join = interleave or residual is not None or offset is not None
    joined = x
    if join:
        shape = (batch, channels, height, width)
        joined = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    chunk, chunks = _chunks(height * width, channels)
    found = torch.empty(batch, chunks, 2, groups, device=x.device)
    if batch:
        group_statistics_kernel[(chunks, batch)](
            x, x if residual is None else residual, x if offset is None else offset, joined, found,
            height, width, chunk,
            C=channels, G=groups, TILE=STATISTICS.elements // channels,
            JOIN=join, RESIDUAL=residual is not None, OFFSET=offset is not None, INTERLEAVE=interleave,
            num_warps=STATISTICS.warps,
        )  # fmt: skip
    return joined, found


def normalize(x: Tensor, found: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(group_norm(x)) with the statistics of its chunks."""
    batch, channels, height, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    chunk, chunks = _chunks(height * width, channels)
    if batch:
        group_norm_silu_kernel[(chunks, batch)](
            x, found, weight, bias, y, height * width, chunk, eps,
            C=channels, G=found.shape[-1], TILE=NORM.elements // channels, CHUNKS=triton.next_power_of_2(chunks),
            num_warps=NORM.warps,
        )  # fmt: skip
    return y


def to_pixels(
    x: Tensor, found: Tensor, weight: Tensor, bias: Tensor, eps: float, conv_weight: Tensor, conv_bias: Tensor
) -> Tensor:
    """Pixels of silu(group_norm(x)) under a 3x3 convolution with three outputs, its weights channels-last."""
    batch, channels, height, width = x.shape
    taps = torch.empty(batch, 27, height * width, device=x.device)
    pixels = torch.empty(batch, 3, height, width, dtype=torch.uint8, device=x.device)
    chunk, chunks = _chunks(height * width, channels)
    if batch:
        project_kernel[(chunks, batch)](
            x, found, weight, bias, conv_weight, taps, height * width, chunk, eps,
            C=channels, G=found.shape[-1], TILE=PROJECT.elements // channels, CHUNKS=triton.next_power_of_2(chunks),
            num_warps=PROJECT.warps,
        )  # fmt: skip
        blocks = triton.cdiv(height * width, GATHER.elements)
        gather_kernel[(blocks, 3, batch)](
            taps, conv_bias, pixels, height, width, BLOCK=GATHER.elements, num_warps=GATHER.warps
        )
    return pixels
