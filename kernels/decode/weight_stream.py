"""The weights of all blocks as one stream of tiles, of which a program has the next ones on their way to its registers.

A warp has 32 of every 32 x warps inputs. Of these a tile holds eight lines of weights, and a thread eight side by side
in one line. Program p has the columns 8 (p + i programs) to 8 (p + i programs) + 7 of a product: its eights.
"""

# Triton's tuples grow by addition only, and its arguments are pointers and constants without types.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

# One thread asks for a stretch of memory, to be dropped from the L2 cache first.
_PREFETCH = tl.constexpr("""{
.reg .pred first;
.reg .u32 thread;
.reg .b64 policy;
mov.u32 thread, %tid.x;
mov.u32 $0, 0;
setp.eq.u32 first, thread, 0;
createpolicy.fractional.L2::evict_first.b64 policy, 1.0;
@first cp.async.bulk.prefetch.L2.global.L2::cache_hint [$1], $2, policy;
}""")


@triton.constexpr_function
def stream_of(products: tuple, warps: int, programs: int) -> tuple:
    """The tiles of products in the order of their use. A product is a number, its inputs and its columns; a tile is the
    product and the numbers of an eight of columns and a slice of inputs."""
    return tuple(
        (*product, i_eight, i_slice)
        for product in products
        for i_slice in range(-(-product[1] // (32 * warps)))
        for i_eight in range(-(-product[2] // (8 * programs)))
    )


@triton.constexpr_function
def block_products(width: int, first_op: int, last_op: int) -> tuple:
    """The products of a block among operations of `reference.OPS`."""
    products = {0: (width, 3 * width), 2: (width, width), 3: (width, 4 * width), 4: (4 * width, width)}
    chosen = [product for op, product in products.items() if first_op <= op < last_op]
    return tuple((list(products.values()).index(product), *product) for product in chosen)


@triton.constexpr_function
def start_of(stream: tuple, product: int, later: int = 0) -> int:
    """The position of the first tile of a product, or of the one some products later."""
    order = list(dict.fromkeys(tile[0] for tile in stream))
    place = order.index(product) + later
    return place // len(order) * len(stream) + [tile[0] for tile in stream].index(order[place % len(order)])


@triton.constexpr_function
def tile_of(stream: tuple, position: int, field: int) -> int:
    return stream[position % len(stream)][field]


@triton.jit
def tile_ahead(
    weights, o_line, i_program, i_layer, i_end, POSITION: tl.constexpr, STREAM: tl.constexpr, WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The tile at a position of the stream that begins with block `i_layer`."""
    PRODUCT: tl.constexpr = tile_of(STREAM, POSITION, 0)
    K: tl.constexpr = tile_of(STREAM, POSITION, 1)
    COLUMNS: tl.constexpr = tile_of(STREAM, POSITION, 2)
    I_EIGHT: tl.constexpr = tile_of(STREAM, POSITION, 3)
    I_SLICE: tl.constexpr = tile_of(STREAM, POSITION, 4)
    SLICE: tl.constexpr = 32 * WARPS
    i_block = i_layer + POSITION // len(STREAM)
    # Sixteen-bit numbers wait two by two: one by one they would be sorted where they arrive, and waited for.
    PER: tl.constexpr = 32 // weights[PRODUCT].dtype.element_ty.primitive_bitwidth
    o_column = i_program * 8 + (o_line & 7)
    o_k = (o_line >> 3) * (32 // PER) + tl.arange(0, 32 // PER)[None, :]
    m_tile = tl.full([8 * WARPS, 32 // PER], True, tl.int1)
    if POSITION >= len(STREAM):
        m_tile = m_tile & (o_k < tl.where(i_block < i_end, (K - I_SLICE * SLICE) // PER, 0))
    elif (I_SLICE + 1) * SLICE > K:
        m_tile = m_tile & (o_k < (K - I_SLICE * SLICE) // PER)
    if (I_EIGHT + 1) * PROGRAMS * 8 > COLUMNS:
        m_tile = m_tile & (o_column < COLUMNS - I_EIGHT * PROGRAMS * 8)
    p_block = weights[PRODUCT] + i_block * (K * COLUMNS)
    if PER == 2:
        p_block = p_block.to(tl.pointer_type(tl.int32))
    # A number that the compiler adds to the address as the load does.
    OFFSET: tl.constexpr = (I_EIGHT * PROGRAMS * 8 * K + I_SLICE * SLICE) // PER
    p_tile = p_block + (o_column * (K // PER) + o_k)
    return tl.load(p_tile + OFFSET, mask=m_tile, other=0, eviction_policy="evict_first")


@triton.jit
def prefetch(weights, i_program, i_layer, i_end, POSITION: tl.constexpr, STREAM: tl.constexpr, PROGRAMS: tl.constexpr):
    """Asks for all of this program's weights of the product whose first tile is at a position."""
    PRODUCT: tl.constexpr = tile_of(STREAM, POSITION, 0)
    K: tl.constexpr = tile_of(STREAM, POSITION, 1)
    COLUMNS: tl.constexpr = tile_of(STREAM, POSITION, 2)
    BYTES: tl.constexpr = 8 * K * (weights[PRODUCT].dtype.element_ty.primitive_bitwidth // 8)
    i_block = i_layer + POSITION // len(STREAM)
    for i in tl.static_range((COLUMNS + 8 * PROGRAMS - 1) // (8 * PROGRAMS)):
        i_column = (i * PROGRAMS + i_program) * 8
        if (i_column < COLUMNS) & (i_block < i_end):
            p_columns = weights[PRODUCT] + i_block * (K * COLUMNS) + i_column * K
            tl.inline_asm_elementwise(_PREFETCH, "=r,l,r", [p_columns, BYTES], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def first_tiles(
    weights, o_line, i_program, i_layer, i_end, AHEAD: tl.constexpr, STREAM: tl.constexpr, WARPS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The first tiles of a stream."""
    ring = ()
    for i in tl.static_range(min(AHEAD, len(STREAM))):
        ring = ring + (tile_ahead(weights, o_line, i_program, i_layer, i_end, i, STREAM, WARPS, PROGRAMS),)
    return ring
