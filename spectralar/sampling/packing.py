"""From a generator to what decoding reads: blocks stacked, token rows projected, what depends on the class computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.config import GeneratorConfig
from spectralar.generator import SpectralGenerator
from spectralar.generator.model import Block
from spectralar.kernels.decode import DecodeState, DecodeWeights, quantize
from spectralar.kernels.decode.config import MAX_ROWS
from spectralar.kernels.decode.state import mailbox_words

WeightFormat = Literal["same", "fp8"]
"""In what sampling keeps the weights of its products: the generator's dtype, or fp8 with a scale for every channel."""


@torch.no_grad()
def pack(generator: SpectralGenerator, weights: WeightFormat = "same") -> DecodeWeights:
    """A copy of the weights in the order in which decoding reads them, in the generator's dtype and on its device.

    With "fp8" weights, matrices are in fp8, and there is never a copy of all of them in the generator's dtype.
    """
    blocks = _blocks(generator)
    wide = torch.promote_types(generator.positions.dtype, torch.float32)

    def stacked(*tensors: Tensor) -> Tensor:
        return torch.stack(tensors).contiguous()

    def bias(block: Block) -> Tensor:
        attention = block.attention
        return torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])

    found: dict[str, Tensor] = {}
    for name, layers in matrices(generator).items():
        if weights == "same":
            found[name] = stacked(*layers)
        else:
            found[name], found[f"{name}_scale"] = quantize(layers)
    # The head has no layers.
    found |= {name: tensor[0] for name, tensor in found.items() if name.startswith("head")}
    every = torch.arange(generator.config.codebook_size, device=generator.device)
    return DecodeWeights(
        tokens=generator.embed(every).contiguous(),
        positions=generator.positions.clone(),
        starts=generator.start_positions.clone(),
        qkv_bias=stacked(*(bias(b) for b in blocks)),
        query_scale=stacked(*(b.attention.query_scale().to(wide) for b in blocks)),
        proj_bias=stacked(*(b.attention.proj.bias for b in blocks)),
        fc1_bias=stacked(*(b.fc1.bias for b in blocks)),
        fc2_bias=stacked(*(b.fc2.bias for b in blocks)),
        head_bias=generator.head.bias.clone(),
        **found,
    )


def matrices(generator: SpectralGenerator) -> dict[str, list[Tensor]]:
    """The generator's own weights of products, `decode.MATRICES`, layer by layer, `[O, K]` each."""
    blocks = _blocks(generator)
    return {
        "qkv": [block.attention.qkv.weight for block in blocks],
        "proj": [block.attention.proj.weight for block in blocks],
        "fc1": [block.fc1.weight for block in blocks],
        "fc2": [block.fc2.weight for block in blocks],
        "head": [generator.head.weight],
    }


def _blocks(generator: SpectralGenerator) -> list[Block]:
    return [block for block in generator.blocks if isinstance(block, Block)]


@dataclass(frozen=True)
class ClassTables:
    """What decoding needs to know of every class, "no class" last: C = classes + 1 rows, computed once for all.

    A table is read where a product with the AdaLN weights would be computed: for every generation, and for a different
    number of rows each time, whose rounding could differ.

    Attributes:
        start: `[C, W]`, class rows.
        modulations: `[L, C, 6, W]`, of the blocks.
        head_modulation: `[C, 2, W]`.
    """

    start: Tensor
    modulations: Tensor
    head_modulation: Tensor


@torch.no_grad()
def class_tables(generator: SpectralGenerator) -> ClassTables:
    """The tables of all classes, in the generator's dtype and on its device."""
    condition = generator.class_table.weight.detach()
    # Filled block by block: all tables and their copy together would be the peak of what sampling needs.
    modulations = condition.new_empty(len(generator.blocks), len(condition), 6, generator.config.width)
    for table, block in zip(modulations, generator.blocks, strict=True):
        assert isinstance(block, Block)
        table.copy_(block.modulation(condition))
    return ClassTables(
        start=condition.clone(),
        modulations=modulations,
        head_modulation=generator.head_adaln(F.silu(condition)).unflatten(-1, (2, -1)),
    )


def begin(tables: ClassTables, state: DecodeState, classes: Tensor) -> None:
    """Writes what depends on the class alone, for rows of these classes `[R]`, and moves to the first position."""
    torch.index_select(tables.start, 0, classes, out=state.start)
    torch.index_select(tables.modulations, 1, classes, out=state.modulations)
    torch.index_select(tables.head_modulation, 0, classes, out=state.head_modulation)
    state.first.zero_()


_ROUNDING = 2**24
"""What the allocator may round up for a batch, and what a kernel may need for itself."""


class Memory(NamedTuple):
    """Bytes that sampling needs beside the models.

    Attributes:
        weights: for all batches together.
        batch: for each batch that runs.
        widened: for all batches of many rows together: the copy of fp8 weights that fused kernels read there.
    """

    weights: int
    batch: int
    widened: int


def memory_needed(
    config: GeneratorConfig,
    images: int,
    guided: bool,
    dtype: torch.dtype = torch.bfloat16,
    weights: WeightFormat = "same",
) -> Memory:
    """Bytes of packed weights and class tables, of the buffers of a batch, and of widened fp8 weights, at most.

    Args:
        config: of the generator.
        images: images that are drawn together, as many as the batch is filled up to.
        guided: with guidance, which doubles the rows.
        dtype: of the generator.
        weights: see `Sampler`.
    """
    width, depth, codes, group = config.width, config.depth, config.codebook_size, config.group
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)
    rows = images * (2 if guided else 1)
    of_a_class = (6 * depth + 3) * width
    matrix_values, channels = 12 * width**2 * depth + codes * width, 9 * width * depth + codes
    tables = (codes + config.tokens + group) * width + (config.classes + 1) * of_a_class
    packed = (channels + tables) * size + depth * config.heads * wide
    packed += matrix_values * size if weights == "same" else matrix_values + 4 * channels
    cache = 2 * depth * config.tokens * width
    activations = 8 * group * width
    between_blocks = group * (width + codes)
    # The plain twin of the attention copies the keys and values of a block, once or twice each.
    copies = 3 * config.tokens * width
    buffers = rows * ((of_a_class + cache + activations) * size + (between_blocks + copies) * wide)
    # The plain twin of a product with fp8 weights copies them; 4 W or K rows are the most.
    twin = 0 if weights == "same" else max(4 * width, codes) * width * wide
    widened = matrix_values * size if weights == "fp8" and rows * group > MAX_ROWS else 0
    mailboxes = 2 * 4 * mailbox_words(depth, width, rows * group, dtype)
    numbers = 8 * (images * (config.tokens + 1) + rows + config.steps + 2)
    return Memory(packed, buffers + twin + mailboxes + numbers + _ROUNDING, widened)
