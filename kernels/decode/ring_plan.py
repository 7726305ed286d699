"""Sizes of the ring kernel: how its products are divided, where things lie in shared memory, and when weights are asked
for. All of it is known when the kernel is compiled.

A unit of weights is eight columns of a product, of each W inputs; fc2, which has 4 W, takes four units for eight
columns, one for each quarter of its inputs. Program p has the eights of columns p, p + programs, ... of each product.
The units of all blocks and then of the head, in the order in which a program takes them, are its stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton

from .config import RING_WARPS as WARPS

SHARED_MEMORY = 227 * 1024
"""Of a program, in bytes."""

GAP = 32
"""Weights that would fit between two lines of a unit."""

TAKEN = 4
"""The most tiles of eight columns that a program multiplies at once."""

# What follows the ring: sums [warps, 4 tiles, 8 rows, 8 columns], sums of a norm [8 rows, warps, 2], attention's
# [warps, 64] and [warps, 2], in fp32, and a barrier for each unit.
_SUMS = WARPS * TAKEN * 64 * 4
_NORMS = 8 * WARPS * 2 * 4
_SHARES = WARPS * 64 * 4 + WARPS * 2 * 4
_SLOTS = 32  # at most: as many lanes ask
_BARRIERS = _SLOTS * 8
_ALLOCATED_IN = 1024


@dataclass(frozen=True)
class Product:
    """A product as one program has it.

    Attributes:
        columns: of its result, of all programs.
        quarters: parts of W inputs each.
        tiles: of eight columns; the last may have columns that are not there.
        first: its first unit among those of a block.
        units: how many; 0 where a step stops before it.
    """

    columns: int
    quarters: int
    tiles: int
    first: int
    units: int


@dataclass(frozen=True)
class Refill:
    """What a program asks for at one point of a block, always the same.

    Attributes:
        position: the first unit, counted in the stream from the block's first on.
        units: how many.
        behind: slots between the one that is taken next and the one of the first unit.
    """

    position: int
    units: int
    behind: int


@dataclass(frozen=True)
class Plan:
    """What is known of a step when its kernel is compiled.

    Attributes:
        width: channels W.
        size: bytes of a weight.
        rows: rows times tokens of a group.
        group: tokens of a group.
        programs: number of programs.
        slots: units in the ring.
        parts: slices of 256 inputs side by side in a tensor core's eight columns.
        slices: of 256 inputs in W; the last may have fewer.
        chunks: quarters of fc2's inputs whose weights a thread has at once.
        together: quarters of fc2's inputs that a thread has at once.
        products: qkv, proj, fc1, fc2 and the head.
        block: units of a block.
        filled: units that are asked for at the beginning.
        refills: for each operation of `reference.OPS` one for each time that it takes units, one for attention; last
            those of the head.
        head: whether the step ends with the head.
        trace: whether times are kept.
        sums, norms, shares, barriers, end: bytes from the ring's beginning.
    """

    width: int
    size: int
    rows: int
    group: int
    programs: int
    slots: int
    parts: int
    slices: int
    chunks: int
    together: int
    products: tuple[Product, ...]
    block: int
    filled: int
    refills: tuple[tuple[Refill, ...], ...]
    head: bool
    trace: bool
    sums: int
    norms: int
    shares: int
    barriers: int
    end: int


@triton.constexpr_function
def unit_bytes(width: int, size: int) -> int:
    """Of a unit in shared memory, with weights of `size` bytes."""
    return 8 * size * (width + GAP)


@triton.constexpr_function
def slots_of(width: int, size: int) -> int:
    """Units in the ring, with weights of `size` bytes."""
    besides = _SUMS + _NORMS + _SHARES + _BARRIERS + _ALLOCATED_IN
    return min(_SLOTS, (SHARED_MEMORY - besides) // unit_bytes(width, size))


@triton.constexpr_function
def _refills(takes: list[list[int]], head: list[int], slots: int) -> tuple[int, tuple[tuple[Refill, ...], ...]]:
    """The units asked for at the beginning, and `Plan.refills`, from the units that each operation takes, each time.

    Each operation asks for about as many, attention and proj, which are shorter, for half, so that no inputs are
    waited for behind many weights: as far as slots are free, and so that what is taken next has been asked for. Up to
    a quarter of the slots wait to be filled for that.
    """
    shares = [1, 0.5, 0.5, 1, 1][: len(takes)]
    block = sum(map(sum, takes))
    taken, wished, freed = [], [], 0
    for op in range(len(takes)):
        points = takes[op] or [0]
        for i in range(len(points)):
            freed += points[i]
            taken.append(freed)
            time = sum(shares[:op]) + shares[op] * (i + 1) / len(points)
            wished.append(round(block * time / sum(shares)))
    late = min(max(wish - free for wish, free in zip(wished, taken, strict=True)), slots // 4, slots - TAKEN)
    asked = []
    for i in range(len(taken)):
        following = taken[i + 1] if i + 1 < len(taken) else block + taken[0]
        asked.append(min(max(slots - late + wished[i], following), slots + taken[i]))
    filled = asked[-1] - block
    found, point, before = [], 0, filled
    for op in range(len(takes)):
        refills = []
        for _ in takes[op] or [0]:
            refills.append(Refill(before, asked[point] - before, before - taken[point]))
            before = asked[point]
            point += 1
        found.append(tuple(refills))
    position, refills = filled, []
    for units in head:
        refills.append(Refill(position, max(0, min(units, sum(head) - position)), filled - units))
        position += units
    return filled, (*found, tuple(refills))


@triton.constexpr_function
def plan_of(
    width: int, size: int, rows: int, group: int, codes: int, programs: int, last_op: int, head: bool, trace: bool
) -> Plan:
    """The plan of a step whose blocks end before operation `last_op` of `reference.OPS`; see `Plan`."""
    slices = (width + 255) // 256
    parts = 4 if rows <= 2 else 2 if rows <= 4 else 1
    products, takes, block = [], [], 0
    for op, columns, quarters in ((0, 3 * width, 1), (2, width, 1), (3, 4 * width, 1), (4, width, 4)):
        tiles = (columns + 8 * programs - 1) // (8 * programs)
        units = tiles * quarters if op < last_op else 0
        products.append(Product(columns, quarters, tiles, block, units))
        block += units
        takes.append([min(TAKEN, tiles - i) for i in range(0, tiles, TAKEN)])
    tiles = (codes + 8 * programs - 1) // (8 * programs)
    products.append(Product(codes, 1, tiles, 0, tiles))
    # fc2, as far as registers go.
    registers = products[3].tiles * slices
    chunks = 4 if registers <= 8 else 2 if registers <= 16 else 1
    together = 4 if slices <= 4 * parts + 1 else chunks
    takes[3] = [chunks * products[3].tiles] * (4 // chunks)
    takes.insert(1, [])
    head_takes = [min(TAKEN, tiles - i) for i in range(0, tiles, TAKEN)]
    slots = slots_of(width, size)
    filled, refills = _refills(takes[:last_op], head_takes, slots)
    sums = slots * unit_bytes(width, size)
    barriers = sums + _SUMS + _NORMS + _SHARES
    end = (barriers + _BARRIERS + _ALLOCATED_IN - 1) // _ALLOCATED_IN * _ALLOCATED_IN
    return Plan(
        width, size, rows, group, programs, slots, parts, slices, chunks, together, tuple(products), block, filled,
        refills, head, trace, sums, sums + _SUMS, sums + _SUMS + _NORMS, barriers, end,
    )  # fmt: skip
