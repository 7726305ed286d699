"""Starts the Triton kernels of the vector quantiser; the arguments have been checked and are contiguous."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import kernel, row_kernel
from .config import (
    CHUNK,
    PREPARED_ELEMENTS,
    PROGRAMS,
    SCAN,
    SETTLE,
    ScanConfig,
    SettleConfig,
    padded_width,
    rows_of_a_program,
)

# One vector that is not finite adds this to its code's count of vectors, which stays below.
_BAD = 2**40


class Prepared(NamedTuple):
    """A codebook, and vectors, as the search reads them. W is the padded width.

    codes: `[Kp, 2 W]` fp16, the scaled codewords in the order of the scan, each followed by what fp16 left of it.
    bias: `[Kp]` fp32, half the squared scaled lengths; empty when normalised.
    units: `[Kp, D]` fp32, the scaled codewords.
    exact: `[K]` fp64, inverse lengths, or half the squared lengths when not normalised.
    longest: `[]` fp64, the length of the longest codeword; a placeholder when normalised.
    vectors: `[N, 2 W]` fp16, the scaled vectors, each followed by what fp16 left of it.
    share: `[N]` fp32, the weight of the bias; empty when normalised.
    config: the launch that the order is made for.
    """

    codes: Tensor
    bias: Tensor
    units: Tensor
    exact: Tensor
    longest: Tensor
    vectors: Tensor
    share: Tensor
    config: ScanConfig


def prepare(codebook: Tensor, normalize: bool, z: Tensor | None = None, config: ScanConfig | None = None) -> Prepared:
    # [K, D], [N, D]
    codes, width = codebook.shape
    vectors = 0 if z is None else len(z)
    padded = padded_width(width)
    config = config or SCAN[padded]
    rows = triton.cdiv(codes, config.codes) * config.codes

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return codebook.new_empty(shape, dtype=dtype)

    exact = empty(codes, dtype=torch.float64)
    prepared = Prepared(
        codes=empty(rows, 2 * padded, dtype=torch.float16),
        bias=empty(0 if normalize else rows),
        units=empty(rows, width),
        exact=exact,
        longest=exact if normalize else torch.linalg.vector_norm(codebook, dim=1, dtype=torch.float64).amax(),
        vectors=empty(vectors, 2 * padded, dtype=torch.float16),
        share=empty(0 if normalize else vectors),
        config=config,
    )
    rows_a_program = min(PREPARED_ELEMENTS // padded, config.codes)
    blocks = rows // rows_a_program
    kernel.prepare_codes_kernel[(blocks + triton.cdiv(vectors, rows_a_program),)](
        codebook, codebook if z is None else z, prepared.longest, prepared.codes, prepared.bias, prepared.units,
        exact, prepared.vectors, prepared.share, codes, vectors, blocks,
        D=width, WIDTH=padded, GROUP=config.group, NORMALIZE=normalize, ROWS=rows_a_program,
        EARLY=_starts_early(codebook.device),
    )  # fmt: skip
    return prepared


def scan(prepared: Prepared, normalize: bool) -> tuple[Tensor, Tensor]:
    """The three largest group scores of each vector and split of the codes, and the groups of the first two.

    Scores are cosines when normalised, else `(z.c - |c|^2 / 2) / (E max(|z|, E))` with E the longest codeword's length.
    Cosines below zero are right about their sign alone.
    """
    # -> [splits, 3, N] fp32, [splits, 2, N] int32
    config, vectors, early = prepared.config, len(prepared.vectors), _starts_early(prepared.codes.device)
    tiles = len(prepared.codes) // config.codes
    blocks = triton.cdiv(vectors, config.rows)
    splits = min(tiles, max(1, PROGRAMS // blocks))
    scores = prepared.exact.new_empty((splits, 3, vectors), dtype=torch.float32)
    groups = prepared.exact.new_empty((splits, 2, vectors), dtype=torch.int32)
    kernel.scan_codes_kernel[(blocks, splits)](
        prepared.vectors, prepared.share, prepared.codes, prepared.bias, scores, groups,
        vectors, triton.cdiv(len(prepared.exact), config.group), tiles, splits,
        WIDTH=prepared.codes.shape[1] // 2, GROUP=config.group, CODES=config.codes, CHUNK=CHUNK, NORMALIZE=normalize,
        ROWS=config.rows, EARLY=early, num_warps=config.warps, num_stages=config.stages, **_launch(early),
    )  # fmt: skip
    return scores, groups


def scan_error(width: int) -> float:
    """The largest error of a scan's score; README.md derives it."""
    return (60 * padded_width(width) / 16 + 12 + CHUNK) * 2.0**-23


def quick_error(width: int, group: int) -> float:
    """The largest error of a score of `settle` in fp32; README.md derives it."""
    return (10 + group + width / 2) * 2.0**-23


def nearest_code(
    z: Tensor,
    codebook: Tensor,
    normalize: bool,
    prepared: Prepared | None = None,
    config: ScanConfig | None = None,
    settle: SettleConfig | None = None,
) -> Tensor:
    """`prepared` holds these vectors too."""
    # [N, D], [K, D] -> [N]
    vectors, width = z.shape
    index = z.new_empty(vectors, dtype=torch.int64)
    if vectors == 0:
        return index
    if prepared is None:
        prepared = prepare(codebook, normalize, z, config)
    settle = settle or SETTLE
    scores, groups = scan(prepared, normalize)
    group, padded, early = prepared.config.group, padded_width(width), _starts_early(z.device)
    quick = quick_error(width, group)
    kernel.settle_codes_kernel[(triton.cdiv(vectors, settle.rows),)](
        z, codebook, prepared.longest, prepared.vectors, prepared.share, prepared.units, prepared.exact,
        scores, groups, index, vectors, len(codebook), len(scores),
        MARGIN=scan_error(width) + quick, CLOSE=2 * quick, D=width, WIDTH=padded, GROUP=group, NORMALIZE=normalize,
        ROWS=settle.rows, STEP=min(padded, settle.elements // (settle.rows * group)), CODES=settle.codes,
        SPLITS=settle.splits, EARLY=early, num_warps=settle.warps, **_launch(early),
    )  # fmt: skip
    return index


@lru_cache
def _starts_early(device: torch.device) -> bool:
    """Whether a kernel may start before the one that it waits for has ended: on a Hopper or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _launch(early: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if early else {}


def quantize(
    index: Tensor, codebook: Tensor, normalize: bool, prepared: Prepared | None = None, z: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    # [N], [K, D], [N, D] -> the codewords [N, D]; squared distances to z [N], empty without z
    (codes, width), vectors = codebook.shape, len(index)
    quantized = codebook.new_empty((vectors, width), dtype=torch.float32)
    distance = codebook.new_empty(0 if z is None else vectors, dtype=torch.float32)
    if vectors:
        if prepared is None:
            prepared = prepare(codebook, normalize)
        row_kernel.quantize_fwd_kernel[_row_grid(vectors, width)](
            index, codebook, prepared.exact, codebook if z is None else z, quantized, distance, vectors, codes,
            NORMALIZE=normalize, DISTANCE=z is not None, **_row_shape(width),
        )  # fmt: skip
    return quantized, distance


def vectors_backward(
    grad_quantized: Tensor | None,
    weight: Tensor | None,
    z: Tensor,
    codebook: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
) -> Tensor:
    # [N, D], [], [N, D], [K, D], [N], [N] -> [N, D]
    vectors, width = z.shape
    grad = torch.empty_like(z)
    if vectors:
        row_kernel.vectors_bwd_kernel[_row_grid(vectors, width)](
            z if grad_quantized is None else grad_quantized, z if weight is None else weight,
            z if token_mask is None else token_mask, index, z, codebook, grad, vectors,
            NORMALIZE=normalize, STRAIGHT=grad_quantized is not None, COMMIT=weight is not None,
            MASK=token_mask is not None, **_row_shape(width),
        )  # fmt: skip
    return grad


def codebook_backward(
    rows: Tensor,
    weight: Tensor,
    codebook: Tensor,
    index: Tensor,
    token_mask: Tensor | None,
    normalize: bool,
    pull: bool,
) -> Tensor:
    """The gradient of a codebook: over each code's rows, the sum of `weight * (codeword - unit row)`, or of the rows.

    Args:
        rows: `[N, D]`; the vectors with `pull`, else gradients of codewords.
        weight: `[]` fp64.
        codebook: `[K, D]`.
        index: `[N]` int64.
        token_mask: `[N]` bool or None, the rows that count.
        normalize: the codewords are normalised, and with `pull` the rows too.
        pull: whether rows are vectors.
    """
    (codes, width), vectors = codebook.shape, len(rows)
    # Fixed point: with all |x| < 2^exponent, no sum of the rows leaves 63 bits. Integers add up the same in any order.
    spare = 62 - max(1, vectors).bit_length()
    if pull and normalize:
        scale = torch.full((), 2.0 ** (spare - 1), dtype=torch.float64, device=rows.device)
    else:
        sizes = rows.abs().nan_to_num(nan=0.0, posinf=0.0)
        exponent = torch.frexp(sizes.amax().double()).exponent if vectors else rows.new_zeros((), dtype=torch.int32)
        scale = torch.exp2((spare - exponent).double())
    total = torch.zeros((codes, width), dtype=torch.int64, device=rows.device)
    count = torch.zeros(codes, dtype=torch.int64, device=rows.device)
    if vectors:
        row_kernel.sum_by_code_kernel[_row_grid(vectors, width)](
            rows, rows if token_mask is None else token_mask, index, scale, total, count, vectors, codes,
            NORMALIZE=pull and normalize, MASK=token_mask is not None, BAD=_BAD, **_row_shape(width),
        )  # fmt: skip
    grad = torch.empty_like(codebook)
    row_kernel.codebook_bwd_kernel[_row_grid(codes, width)](
        total, count, scale, weight, codebook, grad, codes,
        NORMALIZE=normalize, PULL=pull, BAD=_BAD, **_row_shape(width),
    )  # fmt: skip
    return grad


def _row_grid(rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(rows, rows_of_a_program(width)),)


def _row_shape(width: int) -> dict[str, int]:
    return {"D": width, "ROWS": rows_of_a_program(width), "WIDTH": padded_width(width)}
