"""What this device can do at most: copy, read and matrix-product rates, measured and printed before anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from spectralar.bench.timing import Call, prepare, take_turns

# Several times any cache, and the size of the tensors that are measured; an eighth of what is free, if that is less.
_GPU_BYTES = 256 * 2**20
_CPU_BYTES = 64 * 2**20
_GPU_SIDE = 8192
_CPU_SIDE = 384
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device.

    Attributes:
        copy: bytes per second, read and written together, of a device-to-device copy.
        read: bytes per second of a sum over fp32 values.
        gemm: floating point operations per second of a large square matrix product, by arithmetic: bf16, fp16 and
            tf32 (plain fp32 on a CPU).
    """

    copy: float
    read: float
    gemm: dict[str, float]

    def floor(self, moved: int, flops: int, arithmetic: str) -> tuple[float, str]:
        """The least seconds for a work of so many bytes and operations, and the rate that sets it."""
        by_bytes, by_flops = moved / self.copy, flops / self.gemm[arithmetic]
        return (by_bytes, "copy") if by_bytes >= by_flops else (by_flops, f"{arithmetic} GEMM")


def measure_ceilings(device: torch.device, seconds: float = 2.0) -> Ceilings:
    """Measures the rates in about `seconds`."""
    size, side = _CPU_BYTES, _CPU_SIDE
    if device.type == "cuda":
        size, side = min(_GPU_BYTES, torch.cuda.mem_get_info(device)[0] // 32 * 4), _GPU_SIDE
    share = seconds / (2 + len(_DTYPES))
    copied, read = _memory_seconds(size, device, share)
    return Ceilings(
        copy=2 * size / copied,
        read=size / read,
        gemm={name: 2 * side**3 / _gemm_seconds(side, dtype, device, share) for name, dtype in _DTYPES.items()},
    )


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 in cuBLAS for a while."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _memory_seconds(size: int, device: torch.device, seconds: float) -> tuple[float, float]:
    source = torch.ones(size // 4, device=device)
    destination = torch.empty_like(source)
    return (
        _median(lambda: destination.copy_(source), device, seconds),
        _median(lambda: source.sum(), device, seconds),
    )


def _gemm_seconds(side: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    # Random operands: a GPU draws less power on zeros or ones, and clocks higher.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with tf32(True):
        return _median(lambda: torch.mm(a, b, out=out), device, seconds)


def _median(call: Call, device: torch.device, seconds: float) -> float:
    return take_turns({"": prepare(call, [()], device)}, seconds, most=200)[""].median
