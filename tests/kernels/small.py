"""Small cases of every kernel, one run each, for the tools that watch a GPU's memory:

compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.kernels.small
compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.kernels.small dct vq

Run it once without them first: compiled kernels are kept on disk, and under a tool compilation takes minutes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Literal

import torch

from spectralar.kernels import attention, dct, draw, norm, vq
from spectralar.kernels.decode import decode_step, implementation, quantized
from spectralar.kernels.decode.config import StepConfig
from spectralar.kernels.decode.launch import launch
from tests.kernels.test_decode_kernel import random_state, random_weights

# Without a GPU the references run, so that this file can be tested.
GPU = "cuda" if torch.cuda.is_available() else "cpu"


def small_dct() -> None:
    cutoffs = [1, 7, 16, 20, 33]
    for size, dtype in itertools.product([(33, 40), (64, 64)], [torch.uint8, torch.float32, torch.bfloat16]):
        pixels = torch.rand(5, 3, *size, device=GPU)
        images = (pixels * 255).to(dtype) if dtype == torch.uint8 else pixels.to(dtype)
        for out in (torch.float32, torch.bfloat16):
            dct.spectral_targets(images, cutoffs, out_dtype=out)
        dct.spectral_mse(pixels.clone().requires_grad_(), images, cutoffs).backward()  # type: ignore[no-untyped-call]
    dct.spectral_targets(torch.rand(3, 3, 256, 256, device=GPU), [3, 60, 256])


def small_vq() -> None:
    for (vectors, width, codes), dtype, normalize in itertools.product(
        [(77, 12, 300), (513, 16, 4096), (5, 64, 16), (40, 256, 33)], [torch.float32, torch.bfloat16], [True, False]
    ):
        z, codebook = (torch.randn(n, width, device=GPU, dtype=dtype) for n in (vectors, codes))
        vq.assign_codes(z, codebook, normalize=normalize)
        out = vq.vector_quantize(z.requires_grad_(), codebook.requires_grad_(), normalize=normalize)
        total = out.quantized.float().sum() + out.commitment_loss + out.codebook_loss
        total.backward()  # type: ignore[no-untyped-call]


def small_norm() -> None:
    def maps(channels: int, side: int) -> torch.Tensor:
        x = torch.randn(2, channels, side, side, device=GPU, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last)

    x, (weight, bias) = maps(32, 9), torch.randn(2, 32, device=GPU, dtype=torch.bfloat16)
    norm.group_norm_silu(x, weight, bias, groups=8)
    norm.join_group_norm_silu(x, weight, bias, groups=8, residual=x, offset=bias)
    norm.join_group_norm_silu(maps(128, 5), weight, bias, groups=8, offset=bias, interleave=True)
    kernel = torch.randn(3, 32, 3, 3, device=GPU, dtype=torch.bfloat16)
    norm.group_norm_silu_to_pixels(x, weight, bias, kernel, bias[:3], groups=8)


def small_draw() -> None:
    seeds, tokens = torch.arange(3, device=GPU), torch.zeros(3, 8, dtype=torch.int64, device=GPU)
    first, given = (torch.tensor(n, device=GPU) for n in (4, 0))
    for codes in (50, 4096):
        logits = torch.randn(6, 2, codes, device=GPU)
        for top_k, top_p, greedy in (
            (0, 0.0, False),
            (7, 0.0, False),
            (40, 0.9, False),
            (0, 0.9, False),
            (0, 0.0, True),
        ):
            draw.draw_tokens(
                logits[:3, 0],
                seeds,
                2,
                unconditional=logits[3:, 0],
                guidance=2.0,
                top_k=top_k,
                top_p=top_p,
                greedy=greedy,
            )
            scales = torch.full((4,), 2.0, device=GPU)
            draw.draw_group(tokens, logits, seeds, first, scales, given, top_k=top_k, top_p=top_p, greedy=greedy)


def small_attention() -> None:
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=GPU, dtype=torch.bfloat16, requires_grad=True)

    backend: Literal["triton"] | None = "triton" if GPU == "cuda" else None
    prefixes = torch.tensor([3, 27], device=GPU)
    for mask in attention.MASKS:
        for role in attention.ROLES:
            out = attention.packed_spectral_attention(leaf(2, 77, 3, 3, 64), 50, prefixes, mask, role, backend=backend)
            out.float().square().sum().backward()  # type: ignore[no-untyped-call]
    for length in (40, 81):
        q, k, v = (leaf(2, length, 3, 64) for _ in range(3))
        out = attention.group_causal_attention(q, k, v, [1, 4, 10, length - 15], 0.1, backend=backend)
        out.float().sum().backward()  # type: ignore[no-untyped-call]


def small_decode() -> None:
    # On Hopper few rows take the kernel with the ring; the other one, which has no fp8, is started beside it.
    formats = (False, True) if GPU == "cpu" or torch.cuda.get_device_capability() >= (8, 9) else (False,)
    for (width, rows), fp8 in itertools.product(((128, 2), (192, 8), (128, 20), (128, 64)), formats):
        weights = random_weights(width, torch.bfloat16)
        weights = quantized(weights) if fp8 else weights
        state = random_state(weights, rows // 2, rows, 0)
        for step in (0, 1):
            state.first.fill_(step * weights.group)
            state.tokens.zero_()
            decode_step(weights, state)
            if GPU == "cuda" and implementation(weights, rows) == "persistent" and not fp8:
                launch(weights, state, config=StepConfig(ring=False))


ROOMS: dict[str, Callable[[], None]] = {
    "dct": small_dct,
    "vq": small_vq,
    "norm": small_norm,
    "draw": small_draw,
    "attention": small_attention,
    "decode": small_decode,
}


if __name__ == "__main__":
    for room in sys.argv[1:] or ROOMS:
        ROOMS[room]()
        print(room)
    if GPU == "cuda":
        torch.cuda.synchronize()
