"""Other ways to sample: callables `(classes, seeds, settings)` -> `Drawn`.

The blocks and the draw are those of `spectralar` in plain PyTorch and our kernel, AdaLN is computed once per generation
and every loop is recorded in CUDA graphs: better than what public samplers do, so that no ratio flatters us.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.bench.cases import Missing
from spectralar.bench.sampler_truth import Drawn
from spectralar.config import VQGANConfig
from spectralar.generator import SpectralGenerator
from spectralar.generator.model import Block
from spectralar.images import to_uint8
from spectralar.kernels.decode import DecodeState, DecodeWeights, reference
from spectralar.kernels.draw import draw_group
from spectralar.kernels.norm import modulated_layer_norm
from spectralar.pixels import VQGANDecoder
from spectralar.sampling import SamplingSettings
from spectralar.sampling.graphs import Recording
from spectralar.sampling.packing import begin, class_tables, pack

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sides of VAR's ten scales for 256 x 256 pixels: 680 tokens."""

Sampling = Callable[[Sequence[int], Sequence[int], SamplingSettings], Drawn]

_CODE_DIM = 32
_PIXEL_BATCH = 64


def setup_compiled_step(generator: SpectralGenerator, batch: int) -> Sampling | Missing:
    """The plain step with blocks under torch.compile, one block's code for all; the step in a CUDA graph."""
    if generator.device.type != "cuda":
        return Missing("torch.compile is measured on a GPU")
    return CompiledStep(generator, batch, torch.compile(plain_block, dynamic=False))


def scale_decoder(size: int, device: torch.device, dtype: torch.dtype) -> VQGANDecoder:
    """A decoder for `Scales`: MaskGIT's VQGAN for codes of VAR's width. VAR's own decoder is larger."""
    with device:
        return VQGANDecoder(VQGANConfig(image_size=size, code_dim=_CODE_DIM)).eval().requires_grad_(False).to(dtype)


def plain_block(weights: DecodeWeights, state: DecodeState) -> None:
    """All operations of the first block."""
    reference.qkv(weights, state, 0)
    reference.attend(weights, state, 0)
    reference.proj(weights, state, 0)
    reference.fc1(weights, state, 0)
    reference.fc2(weights, state, 0)


class CompiledStep:
    """Cached decoding of batches of one size, guided, with a given function for a block."""

    def __init__(
        self, generator: SpectralGenerator, batch: int, block: Callable[[DecodeWeights, DecodeState], None]
    ) -> None:
        self._config, self._block, device = generator.config, block, generator.device
        self._weights, self._tables = pack(generator), class_tables(generator)
        self._state = DecodeState.allocate(self._weights, batch, 2 * batch)
        self._layers = [_layer(self._weights, self._state, i) for i in range(self._weights.depth)]
        self._rows = torch.full((2 * batch,), self._config.classes, device=device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._scales = torch.ones(self._config.steps, device=device)
        self._given = torch.zeros((), dtype=torch.int64, device=device)
        self._recorded: dict[SamplingSettings, Recording] = {}

    @torch.inference_mode()
    def __call__(self, classes: Sequence[int], seeds: Sequence[int], settings: SamplingSettings) -> Drawn:
        state = self._state
        self._rows[: len(classes)] = torch.tensor(classes)
        self._seeds.copy_(torch.tensor(seeds))
        self._scales.copy_(torch.tensor(settings.guidance_scales(self._config.steps)))
        if settings not in self._recorded:
            state.tokens.zero_()
            begin(self._tables, state, self._rows)
            self._recorded[settings] = Recording(lambda: self._step(settings), self._rows.device)
        begin(self._tables, state, self._rows)
        for _ in range(self._config.steps):
            self._recorded[settings]()
        return Drawn(state.tokens.clone(), None, settings)

    def _step(self, settings: SamplingSettings) -> None:
        weights, state = self._weights, self._state
        reference.embed(weights, state)
        for layer in self._layers:
            self._block(*layer)
        reference.head(weights, state)
        _draw(state.tokens, state.logits, self._seeds, state.first, self._scales, self._given, settings)
        state.first.add_(self._config.group)


class Scales:
    """VAR's generation: each step draws the tokens of a whole scale, and a finer picture of codes is their sum.

    Random weights do for the time. Codes are added up at the finest size through one of four convolutions, and averaged
    down to the next scale's size as its input (Tian et al., "Visual Autoregressive Modeling", 2024, algorithms 1, 2).

    Args:
        generator: its blocks, head, positions, class rows; as many tokens as the scales have.
        batch: images of every generation.
        sides: of the scales, growing.
        decoder: codes `[B, G, G, 32]` to pixels, or None.
    """

    def __init__(
        self, generator: SpectralGenerator, batch: int, sides: Sequence[int], decoder: VQGANDecoder | None = None
    ) -> None:
        config, device, dtype = generator.config, generator.device, generator.positions.dtype
        self._generator, self._sides, self._decoder = generator, tuple(sides), decoder
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            self.codebook = F.normalize(torch.randn(config.codebook_size, _CODE_DIM), dim=-1).to(dtype)
            self.embed = nn.Linear(_CODE_DIM, config.width).requires_grad_(False).to(dtype)
            self.blend = nn.ModuleList(
                nn.Conv2d(_CODE_DIM, _CODE_DIM, 3, padding=1).requires_grad_(False).to(dtype) for _ in range(4)
            )
            cache = (config.depth, 2 * batch, config.tokens, config.heads, config.width // config.heads)
            self._keys, self._values = (torch.empty(cache, dtype=dtype) for _ in range(2))
            self._rows = torch.full((2 * batch,), config.classes)
            self._seeds = torch.zeros(batch, dtype=torch.int64)
            self._given = torch.zeros((), dtype=torch.int64)
            self._tokens = torch.zeros(batch, config.tokens, dtype=torch.int64)
        self._images: Tensor | None = None
        self._recorded: dict[SamplingSettings, Recording] = {}

    @torch.inference_mode()
    def __call__(self, classes: Sequence[int], seeds: Sequence[int], settings: SamplingSettings) -> Drawn:
        self._rows[: len(classes)] = torch.tensor(classes)
        self._seeds.copy_(torch.tensor(seeds))
        if settings not in self._recorded:
            self._recorded[settings] = Recording(lambda: self._run(settings), self._rows.device)
        self._recorded[settings]()
        return Drawn(self._tokens.clone(), None if self._images is None else self._images.clone(), settings)

    def inputs(self, canvas: Tensor, side: int) -> Tensor:
        """What a scale sees of the codes so far, `[B, C, S, S]` -> `[B, side^2, W]`."""
        small = F.interpolate(canvas, size=(side, side), mode="area")
        return self.embed(small.flatten(2).mT)

    def added(self, canvas: Tensor, tokens: Tensor, scale: int) -> Tensor:
        """The codes so far with those of one more scale."""
        side, finest, last = self._sides[scale], self._sides[-1], len(self._sides) - 1
        codes = F.embedding(tokens, self.codebook).mT.unflatten(2, (side, side))
        large = codes if side == finest else F.interpolate(codes, size=(finest, finest), mode="bicubic")
        blend = self.blend[min(3, 4 * scale // max(1, last))]
        return canvas + 0.5 * (large + blend(large))

    def _run(self, settings: SamplingSettings) -> None:
        generator, tokens = self._generator, self._tokens
        config, device, batch = generator.config, tokens.device, len(tokens)
        condition = generator.class_table(self._rows)  # [2 B, W]
        blocks = [block for block in generator.blocks if isinstance(block, Block)]
        modulations = [block.modulation(condition) for block in blocks]
        scale, shift = generator.head_adaln(F.silu(condition)).float().unflatten(-1, (2, -1))[:, :, None].unbind(1)
        canvas = self.codebook.new_zeros(batch, _CODE_DIM, self._sides[-1], self._sides[-1])
        content = condition[:, None] + generator.start_positions
        start = 0
        for i, (side, guidance) in enumerate(zip(self._sides, settings.guidance_scales(len(self._sides)), strict=True)):
            end = start + side * side
            x = content + generator.positions[start:end]
            for block, modulation, keys, values in zip(blocks, modulations, self._keys, self._values, strict=True):
                x = block.decode(x, modulation, keys, values, start)
            normed = modulated_layer_norm(x.float(), scale, shift).to(x.dtype)
            logits = generator.head(normed).float()  # [2 B, side^2, K]
            scales = torch.full((config.tokens,), guidance, device=device)
            first = torch.full((), start, dtype=torch.int64, device=device)
            _draw(tokens, logits, self._seeds, first, scales, self._given, settings)
            canvas = self.added(canvas, tokens[:, start:end], i)
            start = end
            if i + 1 < len(self._sides):
                content = self.inputs(canvas, self._sides[i + 1]).repeat(2, 1, 1)
        if self._decoder is not None:
            parts = canvas.permute(0, 2, 3, 1).split(_PIXEL_BATCH)
            self._images = torch.cat([to_uint8(self._decoder(part)) for part in parts])


def scale_tokens(sides: Sequence[int]) -> int:
    """Tokens of all scales together."""
    return sum(side * side for side in sides)


def _layer(weights: DecodeWeights, state: DecodeState, layer: int) -> tuple[DecodeWeights, DecodeState]:
    """Views of one layer, for a compiled function that knows no layers."""
    one = slice(layer, layer + 1)
    stacked = {name: getattr(weights, name)[one] for name in _STACKED}
    held = {name: getattr(state, name)[one] for name in ("modulations", "keys", "values")}
    return dataclasses.replace(weights, **stacked), dataclasses.replace(state, **held)


_STACKED = "qkv qkv_bias query_scale proj proj_bias fc1 fc1_bias fc2 fc2_bias".split()


def _draw(
    tokens: Tensor,
    logits: Tensor,
    seeds: Tensor,
    first: Tensor,
    scales: Tensor,
    given: Tensor,
    settings: SamplingSettings,
) -> None:
    draw_group(
        tokens, logits, seeds, first, scales, given,
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p, greedy=settings.greedy,
    )  # fmt: skip
