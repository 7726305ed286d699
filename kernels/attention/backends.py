"""Which implementation computes attention: what is installed, what each supports, what is chosen and why.

Implementations beside our own take two calls for the spectral mask, one for each kind of row, so that no call needs a
dense mask unless prefixes differ between samples.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import runs_kernels

Backend = Literal["triton", "sdpa", "flash2", "flash4", "reference"]
Case = Literal["plain", "prefixes", "groups"]
"""`plain` needs nothing but full and bottom-right causal calls; the others need a mask for each sample or group."""

BACKENDS: tuple[str, ...] = get_args(Backend)

# FlashAttention 2 and 4 share the import name flash_attn, and either may lie beside remains of the other: only the
# installed distribution tells.
_DISTRIBUTIONS = {"flash2": "flash-attn", "flash4": "flash-attn-4"}
_MODULES = {"flash2": "flash_attn", "flash4": "flash_attn.cute"}

# What is faster than sdpa where it works, by major compute capability and phase, as far as it has been measured and
# tested: on an H100 ours takes about half the time of two calls of sdpa (README.md).
_FASTEST: dict[tuple[int, str], Backend] = {(9, "inference"): "triton", (9, "training"): "triton"}

_log = logging.getLogger(__name__)
_told: set[str] = set()

Attend = Callable[[Tensor, Tensor, Tensor, bool, float], Tensor]
"""`attend(q, k, v, causal, scale)` over `[B, T, H, D]`; causal is aligned at the bottom right."""


@lru_cache
def version(backend: str) -> str | None:
    """The installed version of a FlashAttention, or None."""
    try:
        return importlib.metadata.version(_DISTRIBUTIONS[backend])
    except importlib.metadata.PackageNotFoundError:
        return None


def obstacle(backend: str, q: Tensor, case: Case, training: bool) -> str | None:
    """Why a backend can't compute this, or None if it can."""
    if backend in ("sdpa", "reference"):
        return None
    if q.device.type != "cuda":
        return f"needs a CUDA device, not {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, not {q.dtype}"
    width = q.shape[-1]
    if backend == "triton":
        return None if runs_kernels(q.device, q.dtype, width) else f"takes heads of up to 128, not {width}"
    if version(backend) is None:
        return f"{_DISTRIBUTIONS[backend]} is not installed"
    if width > 256 or width % 8:
        return f"takes heads of up to 256 in steps of 8, not {width}"
    if case != "plain":
        return f"has no mask for {case}"
    if backend == "flash4" and training and _capability(q.device) < 9:
        return "has no backward for compute capability 8"
    return None


def choose(forced: Backend | None, q: Tensor, case: Case, training: bool) -> Backend:
    """The backend for a call, told once by the logger.

    Raises:
        ValueError: a forced backend that is unknown, not installed, or can't compute this.
    """
    if forced is not None:
        if forced not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {forced!r}")
        why = obstacle(forced, q, case, training)
        if why is not None:
            raise ValueError(f"backend {forced!r} {why}")
        return forced
    if q.device.type != "cuda":
        return "sdpa"
    phase = "training" if training else "inference"
    capability = _capability(q.device)
    place = f"{phase} on compute capability {capability}"
    chosen, reason = _FASTEST.get((capability, phase)), f"nothing else is tested for {place}"
    if chosen is not None:
        why = obstacle(chosen, q, case, training)
        chosen, reason = (chosen, f"fastest for {place}") if why is None else (None, f"{chosen} {why}")
    if not torch.compiler.is_compiling():
        _tell(f"attention backend: {chosen or 'sdpa'} ({reason})")
    return chosen or "sdpa"


def attention_of(backend: str) -> Attend:
    """The call of a backend that is not our own."""
    return sdpa if backend == "sdpa" else _flash(backend)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, visible: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention; `visible` broadcasts to `[B, H, T, S]`."""
    rows, keys = q.shape[1], k.shape[1]
    if causal and rows != keys:
        # PyTorch aligns at the top left.
        visible = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        causal = False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


@lru_cache
def _flash(backend: str) -> Attend:
    function = importlib.import_module(_MODULES[backend]).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        out = function(q, k, v, softmax_scale=scale, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _capability(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).major)


def _tell(line: str) -> None:
    if line not in _told:
        _told.add(line)
        _log.info(line)
