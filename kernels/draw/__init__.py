"""The sampling head: guidance, top-k and top-p, and draws that depend on a seed per image and on nothing else.

`draw_tokens` and `draw_group` run a Triton kernel on a GPU, one launch for the whole head; fp64 logits, other devices
and the other functions run the plain PyTorch reference.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

from . import ops, reference

__all__ = ["draw_group", "draw_tokens", "filter_logits", "gumbel_noise", "mix_guidance", "philox_uniform"]

_LARGEST_FP32 = torch.finfo(torch.float32).max


def philox_uniform(seeds: Tensor, offsets: Tensor) -> Tensor:
    """Four uniform numbers, a pure function of (seed, offset): Philox-4x32-10, equal to Triton's `tl.rand4x`.

    The seed is the 64-bit key and the offset the low 64 bits of the counter; each of the four words of the result
    becomes a float by the rule of Triton. Values lie on a grid of 2^-31 near 0 and of 2^-24 near 1; both 0 and the
    largest, 1 - 2^-24, do occur.

    Args:
        seeds: integer tensor; negative values are read as their 64-bit pattern.
        offsets: integer tensor, broadcast against `seeds`.

    Returns:
        float32 in [0, 1), of the broadcast shape and `[4]`: the words in their order.

    Raises:
        TypeError: an argument is not an integer tensor.
        ValueError: the shapes do not broadcast, or the devices differ.
    """
    _check_integers("seeds", seeds)
    _check_integers("offsets", offsets)
    if seeds.device != offsets.device:
        raise ValueError(f"offsets must be on the device of seeds, {seeds.device}, got {offsets.device}")
    try:
        torch.broadcast_shapes(seeds.shape, offsets.shape)
    except RuntimeError:
        raise ValueError(
            f"offsets must broadcast against seeds of shape {list(seeds.shape)}, got {list(offsets.shape)}"
        ) from None
    return reference.philox_uniform(seeds, offsets)


def gumbel_noise(seeds: Tensor, position: int, codes: int) -> Tensor:
    """Standard Gumbel noise `-log(-log(u))` for every code, its own number of Philox.

        u = philox_uniform(seed, position * ceil(codes / 4) + code // 4)[code % 4]

    `u = 0` is replaced by 2^-32. The noise reaches from -3.10 to 16.64, in steps where it is largest: a code whose
    probability is below about 1e-7 of the best is drawn with a frequency that is not its probability.

    Args:
        seeds: `[B]` integers, one per image.
        position: index of the token that is drawn, not negative.
        codes: K, the codebook size, at least 1.

    Returns:
        `[B, K]` float32.

    Raises:
        TypeError: `seeds` is not an integer tensor.
        ValueError: `seeds` is not one-dimensional, `position` is negative or `codes` less than 1.
    """
    _check_seeds(seeds)
    _check_position(position)
    if codes < 1:
        raise ValueError(f"codes must be at least 1, got {codes}")
    return reference.gumbel_noise(seeds, position, codes)


def mix_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: `unconditional + scale * (conditional - unconditional)`.

    Scale 0 is unconditional, 1 conditional, more pushes further towards the class.

    Args:
        conditional: logits of any shape, floating and finite.
        unconditional: logits of the same shape, dtype and device.
        scale: a finite number.

    Returns:
        Mixed logits in the same dtype, computed in fp32 (fp64 for fp64) and rounded once; for scale 1 the tensor
        `conditional` itself.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes differ.
        ValueError: shapes or devices differ, or `scale` is not finite.
    """
    _check_floating("conditional", conditional)
    _check_pair("conditional", conditional, "unconditional", unconditional)
    _check_finite("scale", scale)
    return reference.mix_guidance(conditional, unconditional, scale)


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Keep the `top_k` best codes, then of these the fewest best that hold the probability `top_p` (VAR's order).

    Codes that equal the k-th best all stay. Then a code stays while the probability of the codes before it, from the
    best down and over what top-k left, is less than `top_p`; equal logits come in order of their index. The best code
    always stays.

    Args:
        logits: `[..., K]` floating; each row finite or -inf with at least one finite. Checked only in CPU memory.
        top_k: 0 to K; 0 keeps all.
        top_p: 0 to 1; 0 and 1 keep all.

    Returns:
        A new tensor, as `logits` with -inf for the codes that were dropped.

    Raises:
        TypeError: `logits` is not a floating tensor.
        ValueError: no codes, a row with NaN, +inf or nothing but -inf, or `top_k` or `top_p` out of range.
    """
    _check_logits(logits)
    _check_filters(top_k, top_p, logits.shape[-1])
    return reference.filter_logits(logits, top_k=top_k, top_p=top_p)


def draw_tokens(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    *,
    unconditional: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    greedy: bool = False,
) -> Tensor:
    """Draw one code per image from `softmax(filter_logits(mix_guidance(logits) / temperature))`.

    The draw is `argmax(filtered logits + gumbel_noise(seeds, position, K))`, which has exactly that distribution. It
    depends on the image's logits, seed and position, never on the rest of the batch. Equal scores go to the lowest
    index. On a GPU top-p counts each probability in steps of 2^-50 of the best code's, or 2^-46 for 65,536 codes.

    Args:
        logits: `[B, K]` floating; each row finite or -inf with at least one finite. Checked only in CPU memory, since
            a look at the values would stall another device; there a bad row gives some code. Computed in fp32, or
            fp64 for fp64. Rows may lie apart, as in a half of a `[2B, K]` tensor.
        seeds: `[B]` integers, one per image.
        position: index of the token that is drawn, not negative: a number, or a tensor `[]` of int64 on the device of
            `logits`, whose value a captured CUDA graph reads anew at each replay and which is checked only in CPU
            memory.
        unconditional: `[B, K]` as `logits`, finite; these are then the conditional ones, and both are mixed as by
            `mix_guidance(logits, unconditional, guidance)`. Not read at guidance 1.
        guidance: finite; other than 1 only with `unconditional`.
        temperature: finite and positive, also in fp32; less than 1 sharpens.
        top_k: see `filter_logits`; applied to the tempered logits.
        top_p: likewise.
        greedy: True takes the most likely code and ignores seeds, temperature and filters.

    Returns:
        `[B]` int64.

    Raises:
        TypeError: `logits` or `unconditional` is not floating, `seeds` or `position` are not integers, or dtypes
            differ.
        ValueError: shapes or devices do not agree, a bad row of logits, or an option out of range.
    """
    _check_logits(logits)
    _check_seeds(seeds)
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape [B, K], got {list(logits.shape)}")
    if len(seeds) != len(logits):
        raise ValueError(f"seeds must have shape [{len(logits)}], one per row of logits, got {list(seeds.shape)}")
    if seeds.device != logits.device:
        raise ValueError(f"seeds must be on the device of logits, {logits.device}, got {seeds.device}")
    _check_position(position, logits.device)
    if unconditional is not None:
        _check_pair("logits", logits, "unconditional", unconditional)
    _check_finite("guidance", guidance)
    if unconditional is None and guidance != 1:
        raise ValueError(f"guidance must be 1 without unconditional logits, got {guidance}")
    _check_temperature(temperature)
    _check_filters(top_k, top_p, logits.shape[-1])
    number, tensor = (0, position) if isinstance(position, Tensor) else (position, None)
    other = None if guidance == 1 else unconditional
    return ops.draw_tokens(
        logits, other, seeds, number, tensor, float(guidance), float(temperature), top_k, float(top_p), greedy
    )


def draw_group(
    tokens: Tensor,
    logits: Tensor,
    seeds: Tensor,
    first: Tensor,
    scales: Tensor,
    given: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    greedy: bool = False,
) -> None:
    """Draw a whole group of tokens and write them into `tokens`: for the loop of a generation, inside a CUDA graph.

        tokens[:, p] = draw_tokens(logits[:B, j], seeds, p, unconditional=logits[B:, j], guidance=scales[first // G])

    at all p = first + j of the group that are not less than `given`; what is there already stays as it is. What the
    step of the generation decides lies on the device, and a replay reads it anew.

    Args:
        tokens: `[B, N]` int64 with unit stride along N, changed in place.
        logits: `[B, G, K]` contiguous as those of `draw_tokens`; with guidance `[2 B, G, K]`, the second half
            unconditional.
        seeds: `[B]` int64.
        first: `[]` int64, the position of the group's first token, 0 to N - G.
        scales: `[steps]` floating, the guidance of every step; read with guidance only, where 1 means the conditional
            logits themselves.
        given: `[]` int64, the number of tokens that are given instead of drawn.
        temperature: as in `draw_tokens`; so are the rest.
        top_k: see `draw_tokens`.
        top_p: see `draw_tokens`.
        greedy: see `draw_tokens`.

    Raises:
        TypeError: `logits` or `scales` is not floating, or one of the others is not an integer tensor.
        ValueError: shapes, dtypes or devices do not agree, or an option is out of range. Values of tensors are looked
            at in CPU memory only.
    """
    _check_logits(logits)
    for name, tensor in (("tokens", tokens), ("seeds", seeds), ("first", first), ("given", given)):
        _check_integers(name, tensor)
        if tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {tensor.dtype}")
    _check_floating("scales", scales)
    if tokens.ndim != 2 or (tokens.shape[1] > 1 and tokens.stride(1) != 1):
        raise ValueError(f"tokens must have shape [B, N] with unit stride along N, got {list(tokens.shape)}")
    batch, length = tokens.shape
    if logits.ndim != 3 or len(logits) not in (batch, 2 * batch) or not logits.is_contiguous():
        raise ValueError(
            f"logits must be contiguous of shape [{batch}, G, K] or [{2 * batch}, G, K], got {list(logits.shape)}"
        )
    if not 1 <= logits.shape[1] <= length:
        raise ValueError(f"logits must be those of 1 to {length} tokens, got {logits.shape[1]}")
    for name, tensor, shape in (("seeds", seeds, [batch]), ("first", first, []), ("given", given, [])):
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")
    if scales.ndim != 1 or len(scales) * logits.shape[1] < length:
        steps = -(-length // logits.shape[1])
        raise ValueError(f"scales must have shape [steps] with at least {steps} steps, got {list(scales.shape)}")
    for name, tensor in (("tokens", tokens), ("seeds", seeds), ("first", first), ("scales", scales), ("given", given)):
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on the device of logits, {logits.device}, got {tensor.device}")
    last = length - logits.shape[1]
    if first.device.type == "cpu" and not 0 <= first <= last:
        raise ValueError(f"first must lie from 0 to {last}, got {int(first)}")
    _check_temperature(temperature)
    _check_filters(top_k, top_p, logits.shape[-1])
    ops.draw_group(tokens, logits, seeds, first, scales, given, float(temperature), top_k, float(top_p), greedy)


def _check_integers(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {getattr(x, 'dtype', type(x))}")


def _check_floating(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x))}")


def _check_seeds(seeds: Tensor) -> None:
    _check_integers("seeds", seeds)
    if seeds.ndim != 1:
        raise ValueError(f"seeds must have shape [B], got {list(seeds.shape)}")


def _check_pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    _check_floating(other_name, other)
    if other.dtype != x.dtype:
        raise TypeError(f"{other_name} must be {x.dtype} as {name}, got {other.dtype}")
    if other.shape != x.shape:
        raise ValueError(f"{other_name} must have shape {list(x.shape)} as {name}, got {list(other.shape)}")
    if other.device != x.device:
        raise ValueError(f"{other_name} must be on {x.device} as {name}, got {other.device}")


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")


def _check_temperature(temperature: float) -> None:
    if not 0 < _as_fp32(temperature) < math.inf:
        raise ValueError(f"temperature must be finite and positive, got {temperature}; greedy=True is its limit at 0")


def _as_fp32(number: float) -> float:
    """What the number becomes beside fp32 tensors; infinity where it is too large."""
    return struct.unpack("<f", struct.pack("<f", number))[0] if abs(number) <= _LARGEST_FP32 else math.inf


def _check_position(position: int | Tensor, device: torch.device | None = None) -> None:
    if isinstance(position, Tensor):
        _check_integers("position", position)
        if position.ndim != 0 or position.dtype != torch.int64:
            raise ValueError(f"position must be a tensor [] of int64, got {list(position.shape)} of {position.dtype}")
        if position.device != device:
            raise ValueError(f"position must be on the device of logits, {device}, got {position.device}")
        if position.device.type != "cpu":
            return
    if position < 0:
        raise ValueError(f"position must not be negative, got {int(position)}")


def _check_logits(logits: Tensor) -> None:
    _check_floating("logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., K] with K at least 1, got {list(logits.shape)}")
    # A row's maximum is NaN, +inf or -inf exactly where the row holds NaN, holds +inf, or holds nothing to draw.
    if logits.device.type == "cpu" and logits.numel():
        best = logits.detach().amax(dim=-1)
        if not best.isfinite().all():
            raise ValueError(
                "logits must be finite or -inf with at least one finite in each row, "
                f"got a row with maximum {best[~best.isfinite()][0].item()}"
            )


def _check_filters(top_k: int, top_p: float, codes: int) -> None:
    if not 0 <= top_k <= codes:
        raise ValueError(f"top_k must lie from 0 to the number of codes, {codes}, got {top_k}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p must lie from 0 to 1, got {top_p}")
