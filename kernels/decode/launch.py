"""Starts the persistent decoding step. No argument is checked here."""

from __future__ import annotations

import functools

import torch
import triton

from .config import MAX_ROWS, RING_WARPS, STEP, StepConfig
from .fp8 import FP8
from .reference import OPS
from .ring_plan import TAKEN, slots_of
from .state import DecodeState, DecodeWeights
from .step_kernel import decode_step_kernel

# Gluon, which the kernel with the ring is written in, is an experimental part of Triton: it compiles with 3.6 (the one
# of PyTorch 2.11) and with 3.9. With an older Triton `step_kernel.py` takes all.
_GLUON = tuple(int(number) for number in triton.__version__.split(".")[:2]) >= (3, 6)
if _GLUON:
    from .ring_kernel import decode_ring_kernel


def fits(weights: DecodeWeights, rows: int) -> bool:
    """Whether the persistent step takes weights of these sizes and this number of rows; with scales only fp8, by the
    ring."""
    size = weights.width // weights.heads
    return (
        1 <= rows * weights.group <= MAX_ROWS
        and weights.width % 64 == 0
        and 16 <= size == triton.next_power_of_2(size)
        and (weights.qkv_scale is None or (weights.qkv.dtype == FP8 and _has_ring(weights)))
    )


def rings(weights: DecodeWeights, programs: int) -> bool:
    """Whether the kernel with the ring takes weights of these sizes, with that number of programs, on a Hopper GPU."""
    return (
        weights.dtype in (torch.bfloat16, torch.float16)
        and weights.width == 64 * weights.heads
        and weights.length <= 64
        and weights.width <= 2 * 8 * programs  # fc2's columns of a program are two tiles
        and slots_of(weights.width, weights.qkv.dtype.itemsize) >= TAKEN
    )


def _has_ring(weights: DecodeWeights) -> bool:
    device = weights.qkv.device
    return _GLUON and _hopper(device) and rings(weights, _multiprocessors(device))


def launch(
    weights: DecodeWeights,
    state: DecodeState,
    until: tuple[int, str] | None = None,
    config: StepConfig = STEP,
    programs: int | None = None,
) -> None:
    """One step; the same as `reference.decode_step`. `programs` is for the interpreter, which has no barriers."""
    if until is None:
        parts = [(True, 0, weights.depth, 0, len(OPS), True)]
    else:
        layer, last = until[0], OPS.index(until[1]) + 1
        parts = [(True, 0, layer, 0, len(OPS), False), (False, layer, layer + 1, 0, last, False)]
    ring = config.ring and programs is None and _has_ring(weights)
    for embed, begin, end, first_op, last_op, head in parts:
        if ring:
            _start_ring(weights, state, embed, begin, end, last_op, head)
            continue
        if programs is None:
            _start(weights, state, config, embed, begin, end, first_op, last_op, head, True)
            continue
        if embed:
            _start(weights, state, config, True, 0, 0, 0, 0, False, False, programs)
        for layer in range(begin, end):
            for op in range(first_op, last_op):
                _start(weights, state, config, False, layer, layer + 1, op, op + 1, False, False, programs)
        if head:
            _start(weights, state, config, False, end, end, 0, 0, True, False, programs)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _bulk_prefetch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _tensors(w: DecodeWeights, s: DecodeState) -> tuple[torch.Tensor, ...]:
    """What both kernels begin their arguments with."""
    return (
        s.first, s.tokens, s.start, s.modulations, s.head_modulation, s.keys, s.values, s.x, s.qkv, s.attended,
        s.hidden, s.logits, w.tokens, w.positions, w.starts, w.qkv, w.qkv_bias, w.query_scale, w.proj, w.proj_bias,
        w.fc1, w.fc1_bias, w.fc2, w.fc2_bias, w.head, w.head_bias,
    )  # fmt: skip


def _start_ring(
    weights: DecodeWeights,
    state: DecodeState,
    embed: bool,
    begin: int,
    end: int,
    last_op: int,
    head: bool,
    trace: torch.Tensor | None = None,
) -> None:
    """Into `trace`, int64 `[programs, blocks + 1, 5, 2]`, each program writes in nanoseconds when an operation's inputs
    came and when its results left, the head's behind all blocks: for finding out what it waits for."""
    w, s = weights, state
    batch, group, _ = s.x.shape
    programs = _multiprocessors(w.qkv.device)
    decode_ring_kernel[(programs,)](
        *_tensors(w, s), w.qkv_scale, w.proj_scale, w.fc1_scale, w.fc2_scale, w.head_scale, s.mailboxes, s.turn,
        s.turn if trace is None else trace, begin, end,
        IMAGES=max(1, len(s.tokens)), BATCH=batch, GROUP=group, LENGTH=w.length, HEADS=w.heads, CODES=w.codes,
        WORDS=s.mailboxes.shape[1], PROGRAMS=programs, EMBED=embed, LAST_OP=last_op, HEAD=head,
        TRACE=trace is not None,
        num_warps=RING_WARPS, enable_fp_fusion=True, launch_cooperative_grid=True,
    )  # fmt: skip


def _start(
    weights: DecodeWeights,
    state: DecodeState,
    config: StepConfig,
    embed: bool,
    begin: int,
    end: int,
    first_op: int,
    last_op: int,
    head: bool,
    sync: bool,
    programs: int | None = None,
) -> None:
    w, s = weights, state
    batch, group, width = s.x.shape
    programs = programs or _multiprocessors(w.qkv.device)
    prefetch = config.prefetch if sync and _bulk_prefetch(w.qkv.device) else 0
    decode_step_kernel[(programs,)](
        *_tensors(w, s), s.mailboxes, s.turn, begin, end,
        IMAGES=max(1, len(s.tokens)), BATCH=batch, GROUP=group, LENGTH=w.length,
        PADDED=triton.next_power_of_2(w.length), HEADS=w.heads, D=width // w.heads, CODES=w.codes,
        WORDS=s.mailboxes.shape[1], AHEAD=config.ahead, PREFETCH=prefetch,
        WARPS=config.warps, PROGRAMS=programs, EMBED=embed, FIRST_OP=first_op, LAST_OP=last_op, HEAD=head, SYNC=sync,
        num_warps=config.warps, enable_fp_fusion=True,
        launch_cooperative_grid=sync,
    )  # fmt: skip
