"""Plain PyTorch definition of the sampling head.

No argument is checked here; the public functions in `__init__.py` do that. Logits are fp32, or fp64 for fp64 input.
Logarithms and probabilities are computed in fp64, so that no result depends on how a batch is cut into vector lanes:
the draw of an image is a function of its logits, seed and position alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Philox-4x32 as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
# The largest fp32 factor that keeps every 31-bit integer, itself rounded to fp32, below 1.
_UNIFORM_SCALE = 4.6566127342e-10
_SMALLEST_UNIFORM = 2.0**-32


def philox_uniform(seeds: Tensor, offsets: Tensor) -> Tensor:
    # [...], [...] -> [..., 4]
    seeds, offsets = torch.broadcast_tensors(seeds.long(), offsets.long())
    zero = torch.zeros_like(offsets)
    counter = (offsets & _MASK, (offsets >> 32) & _MASK, zero, zero)
    words = torch.stack(philox(counter, (seeds & _MASK, (seeds >> 32) & _MASK)), dim=-1)
    # Triton folds the sign bit away: a word and its complement give the same 31-bit integer.
    folded = torch.where(words >> 31 == 1, words ^ _MASK, words)
    return folded.to(torch.float32) * _UNIFORM_SCALE


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four counter words and two key words to four random words, all int64 in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def gumbel_noise(seeds: Tensor, position: int | Tensor, codes: int) -> Tensor:
    # [B] -> [B, K]; four codes in a row share an offset.
    offsets = -(-codes // 4)
    uniform = philox_uniform(seeds[:, None], position * offsets + torch.arange(offsets, device=seeds.device))
    uniform = uniform.flatten(1)[:, :codes].double().clamp_min(_SMALLEST_UNIFORM)
    return (-(-uniform.log()).log()).float()


def mix_guidance(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    if not isinstance(scale, Tensor) and scale == 1.0:
        return conditional
    cond, uncond = _upcast(conditional), _upcast(unconditional)
    mixed = (uncond + scale * (cond - uncond)).to(conditional.dtype)
    return torch.where(scale == 1.0, conditional, mixed) if isinstance(scale, Tensor) else mixed


def filter_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    # [..., K]
    dropped = float("-inf")
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, dropped)
    if 0 < top_p < 1:
        # Stable, so that among equal logits the lower code is the more likely to stay.
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.double().softmax(dim=-1)
        # Nothing is above the best, so that its mass is exactly zero and it always stays.
        kept_in_order = share.cumsum(dim=-1) - share < top_p
        kept = torch.zeros_like(kept_in_order).scatter_(-1, order, kept_in_order)
        logits = logits.masked_fill(~kept, dropped)
    return logits.clone()


def draw_tokens(
    logits: Tensor,
    seeds: Tensor,
    position: int | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 0.0,
    greedy: bool = False,
) -> Tensor:
    # [B, K], [B] -> [B]
    if greedy:
        return logits.argmax(dim=-1)
    logits = _upcast(logits)
    # With the best at zero, no temperature can overflow.
    tempered = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    filtered = filter_logits(tempered, top_k=top_k, top_p=top_p)
    return (filtered + gumbel_noise(seeds, position, logits.shape[-1])).argmax(dim=-1)


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
    # [B, N], [B or 2 B, G, K], [B], [], [steps], []
    batch, group = len(tokens), logits.shape[1]
    if len(logits) > batch:
        scale = scales.index_select(0, (first // group)[None])[0]
        logits = mix_guidance(logits[:batch], logits[batch:], scale)
    for j in range(group):
        place = (first + j)[None]
        drawn = draw_tokens(
            logits[:, j], seeds, place, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy
        )
        held = tokens.index_select(1, place)
        tokens.index_copy_(1, place, torch.where(place < given, held, drawn[:, None]))


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, from 16-bit halves of the factor: int64 would overflow."""
    upper, lower = word * (factor >> 16), word * (factor & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & _MASK
    return high, low
