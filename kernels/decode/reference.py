"""One cached decoding step of VAR's transformer in plain PyTorch, operation by operation.

`OPS` names the operations in their order; each reads and writes the buffers of a `DecodeState` and nothing else. No
argument is checked here. The position is read on the device, so that a recorded step can be replayed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.kernels.norm.reference import modulated_layer_norm

from .state import DecodeState, DecodeWeights

OPS = ("qkv", "attend", "proj", "fc1", "fc2")
"""The operations of a block; before the first comes `embed`, after the last `head`."""


def decode_step(weights: DecodeWeights, state: DecodeState, until: tuple[int, str] | None = None) -> None:
    embed(weights, state)
    for layer in range(weights.depth):
        for op in OPS:
            _BLOCK[op](weights, state, layer)
            if until == (layer, op):
                return
    head(weights, state)


def embed(weights: DecodeWeights, state: DecodeState) -> None:
    rows, group, _ = state.x.shape
    places = state.first + torch.arange(group, device=state.first.device)
    before = state.tokens[:, (places - group).clamp_min(0)]  # [B, G]
    # What is not drawn yet may hold anything; the first group does not use it.
    before = torch.where(state.first == 0, 0, before)
    later = weights.tokens[before].repeat(rows // max(1, len(before)), 1, 1) if rows else state.x
    content = torch.where(state.first == 0, state.start[:, None].to(state.x) + weights.starts, later)
    state.x.copy_(content.to(state.x) + weights.positions[places])


def qkv(weights: DecodeWeights, state: DecodeState, layer: int) -> None:
    _, _, scale, _, shift, _ = state.modulations[layer].unbind(1)
    normed = modulated_layer_norm(state.x, scale, shift).to(weights.dtype)
    state.qkv.copy_(_linear(normed, weights.qkv[layer], weights.qkv_bias[layer], weights.scale("qkv", layer)))


def attend(weights: DecodeWeights, state: DecodeState, layer: int) -> None:
    rows, group, _ = state.qkv.shape
    dtype = state.x.dtype
    q, k, v = state.qkv.view(rows, group, 3, weights.heads, -1).permute(2, 0, 3, 1, 4)  # [R, H, G, D] each
    places = state.first + torch.arange(group, device=state.first.device)
    unit = F.normalize(k.to(dtype), dim=-1, eps=1e-12).to(k.dtype)
    state.keys[layer].index_copy_(2, places, unit)
    state.values[layer].index_copy_(2, places, v)
    factor = weights.query_scale[layer][:, None, None]
    q = (F.normalize(q.to(dtype), dim=-1, eps=1e-12) * factor).to(q.dtype)
    seen = torch.arange(weights.length, device=state.first.device) < state.first + group
    # A cache that is not written yet may hold anything.
    scores = (q.to(dtype) @ state.keys[layer].to(dtype).mT).masked_fill(~seen, -torch.inf)
    values = state.values[layer].to(dtype).masked_fill(~seen[:, None], 0)
    state.attended.copy_((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))


def proj(weights: DecodeWeights, state: DecodeState, layer: int) -> None:
    gate = state.modulations[layer][:, None, 0]
    scale = weights.scale("proj", layer)
    state.x.add_(gate * _linear(state.attended, weights.proj[layer], weights.proj_bias[layer], scale).to(state.x))


def fc1(weights: DecodeWeights, state: DecodeState, layer: int) -> None:
    _, _, _, scale, _, shift = state.modulations[layer].unbind(1)
    normed = modulated_layer_norm(state.x, scale, shift).to(weights.dtype)
    hidden = _linear(normed, weights.fc1[layer], weights.fc1_bias[layer], weights.scale("fc1", layer))
    state.hidden.copy_(F.gelu(hidden, approximate="tanh"))


def fc2(weights: DecodeWeights, state: DecodeState, layer: int) -> None:
    gate = state.modulations[layer][:, None, 1]
    scale = weights.scale("fc2", layer)
    state.x.add_(gate * _linear(state.hidden, weights.fc2[layer], weights.fc2_bias[layer], scale).to(state.x))


def head(weights: DecodeWeights, state: DecodeState) -> None:
    scale, shift = state.head_modulation.unbind(1)
    normed = modulated_layer_norm(state.x, scale, shift).to(weights.dtype)
    state.logits.copy_(_linear(normed, weights.head, weights.head_bias, weights.head_scale))


def _linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    """`x weight^T + bias` in the dtype of x; with fp8 weights the sum times `scale`."""
    if scale is None:
        return F.linear(x, weight, bias)
    # The sum before its scale may be beyond fp16.
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.linear(x.to(wide), weight.to(wide)) * scale + bias).to(x.dtype)


_BLOCK = {"qkv": qkv, "attend": attend, "proj": proj, "fc1": fc1, "fc2": fc2}
