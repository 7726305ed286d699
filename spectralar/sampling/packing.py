"""From a generator to what decoding reads: blocks stacked, token rows projected, what depends on the class computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.generator.model import Block
from spectralar.kernels.decode import DecodeState, DecodeWeights


@torch.no_grad()
def pack(generator: SpectralGenerator) -> DecodeWeights:
    """A copy of the weights in the order in which decoding reads them, in the generator's dtype and on its device."""
    blocks = [block for block in generator.blocks if isinstance(block, Block)]
    wide = torch.promote_types(generator.positions.dtype, torch.float32)

    def stacked(*tensors: Tensor) -> Tensor:
        return torch.stack(tensors).contiguous()

    def bias(block: Block) -> Tensor:
        attention = block.attention
        return torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])

    every = torch.arange(generator.config.codebook_size, device=generator.device)
    return DecodeWeights(
        tokens=generator.embed(every).contiguous(),
        positions=generator.positions.clone(),
        starts=generator.start_positions.clone(),
        qkv=stacked(*(b.attention.qkv.weight for b in blocks)),
        qkv_bias=stacked(*(bias(b) for b in blocks)),
        query_scale=stacked(*(b.attention.query_scale().to(wide) for b in blocks)),
        proj=stacked(*(b.attention.proj.weight for b in blocks)),
        proj_bias=stacked(*(b.attention.proj.bias for b in blocks)),
        fc1=stacked(*(b.fc1.weight for b in blocks)),
        fc1_bias=stacked(*(b.fc1.bias for b in blocks)),
        fc2=stacked(*(b.fc2.weight for b in blocks)),
        fc2_bias=stacked(*(b.fc2.bias for b in blocks)),
        head=generator.head.weight.clone(),
        head_bias=generator.head.bias.clone(),
    )


@torch.no_grad()
def begin(generator: SpectralGenerator, state: DecodeState, classes: Tensor) -> None:
    """Writes what depends on the class alone, for rows of these classes `[R]`, and moves to the first position."""
    condition = generator.class_table(classes)
    state.start.copy_(condition)
    for layer, block in enumerate(generator.blocks):
        assert isinstance(block, Block)
        state.modulations[layer].copy_(block.modulation(condition))
    state.head_modulation.copy_(generator.head_adaln(F.silu(condition)).unflatten(-1, (2, -1)))
    state.first.zero_()
