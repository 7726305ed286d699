"""One cached step of VAR's transformer: from the tokens of the last group to the logits of the next."""

from __future__ import annotations

import torch

from . import batch_kernel, launch, reference
from .fp8 import dequantize, quantize, quantized, widened
from .state import DecodeState, DecodeWeights

__all__ = [
    "DecodeState",
    "DecodeWeights",
    "decode_step",
    "dequantize",
    "implementation",
    "obstacle",
    "quantize",
    "quantized",
    "widened",
]


def obstacle(device: torch.device, dtype: torch.dtype, *, length: int, group: int, fp8: bool = False) -> str:
    """Why the kernels cannot run on a GPU, in words; empty where they can.

    Args:
        device: a CUDA device.
        dtype: of the weights, with fp8 matrices of the others.
        length: tokens of a sequence.
        group: tokens of a step.
        fp8: whether matrices are fp8.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"weights must be bfloat16, float16 or float32, not {dtype}"
    if length > 256:
        return f"tokens must be at most 256, not {length}"
    if group > 16:
        return f"group must be at most 16, not {group}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than the A100"
    if fp8 and capability < (8, 9):
        return (
            "fp8 weights need a GPU of compute capability 8.9 or above (Ada, Hopper), "
            f"and {torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )
    return ""


def implementation(weights: DecodeWeights, rows: int) -> str:
    """How `decode_step` computes a step of `rows` rows with these weights.

    Returns:
        "persistent", one kernel for the whole step, for fp16, bf16 and fp32 weights on a GPU, on Hopper with fp8
        matrices too (`launch.rings`), and at most `config.MAX_ROWS` rows times tokens of a group; "batch", a chain of
        kernels, for all else and `widened` matrices; "reference", plain PyTorch, on a CPU and in fp64.
    """
    if not weights.qkv.is_cuda or weights.dtype == torch.float64:
        return "reference"
    return "persistent" if launch.fits(weights, rows) else "batch"


def decode_step(weights: DecodeWeights, state: DecodeState, *, until: tuple[int, str] | None = None) -> None:
    """Writes the logits of the group at `state.first` (SpectralAR eq. 8 with a key/value cache).

    Nothing is read back to the host, so that a step can be recorded in a CUDA graph and replayed; `implementation` says
    what runs.

    Args:
        weights: see `DecodeWeights`.
        state: see `DecodeState`; every buffer of activations, and the group's keys and values, are written.
        until: (block, operation of `reference.OPS`) to stop after, for looking at its result.
    """
    match implementation(weights, len(state.x)):
        case "persistent":
            launch.launch(weights, state, until)
        case "batch":
            batch_kernel.launch_step(weights, state, until)
        case _:
            reference.decode_step(weights, state, until)
