"""The sampling head as PyTorch operators: the Triton kernels on a GPU, the reference elsewhere and for fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernel, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def runs_kernels(logits: Tensor) -> bool:
    """Whether the Triton kernel takes these logits: on a GPU, of 16 or 32 bits."""
    return logits.is_cuda and logits.dtype in _DTYPES


@torch.library.custom_op("spectralar::draw_tokens", mutates_args=())
def draw_tokens(
    logits: Tensor,
    unconditional: Tensor | None,
    seeds: Tensor,
    position: int,
    position_on_device: Tensor | None,
    guidance: float,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
) -> Tensor:
    """`position_on_device`, where given, is the position."""
    place = position if position_on_device is None else position_on_device
    if not runs_kernels(logits):
        mixed = logits if unconditional is None else reference.mix_guidance(logits, unconditional, guidance)
        return reference.draw_tokens(
            mixed, seeds, place, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy
        )
    other = None if unconditional is None else _unit_stride(unconditional)
    with torch.cuda.device_of(logits):
        return kernel.launch(
            _unit_stride(logits), other, seeds.contiguous(), place, guidance, temperature, top_k, top_p, greedy
        )


@draw_tokens.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@torch.library.custom_op("spectralar::draw_group", mutates_args=("tokens",))
def draw_group(
    tokens: Tensor,
    logits: Tensor,
    seeds: Tensor,
    first: Tensor,
    scales: Tensor,
    given: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
) -> None:
    if not runs_kernels(logits):
        reference.draw_group(
            tokens, logits, seeds, first, scales, given,
            temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy,
        )  # fmt: skip
        return
    with torch.cuda.device_of(logits):
        kernel.launch_group(
            tokens, logits, seeds.contiguous(), first, scales.contiguous(), given, temperature, top_k, top_p, greedy
        )


@draw_group.register_fake
def _(*_: Any) -> None:
    return None


def _unit_stride(rows: Tensor) -> Tensor:
    """Rows may lie anywhere, as those of half a batch; the codes of one side by side."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()
