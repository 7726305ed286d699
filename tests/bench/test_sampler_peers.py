"""The peers of the sampler compute what they say: the same tokens, or all scales of a model like VAR."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.bench.peers.sampler import SIDES, CompiledStep, Scales, plain_block, scale_decoder, scale_tokens
from spectralar.bench.sampler import SamplingCase, draws, random_generator
from spectralar.generator.model import Block
from spectralar.kernels.norm import modulated_layer_norm
from spectralar.sampling import SamplingSettings

from .conftest import CPU

CASE = SamplingCase(batch=2, tiny=True)
GREEDY = SamplingSettings(guidance=3.0, greedy=True)


@pytest.mark.parametrize("preset", ["d16", "d16-p4"])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_step_of_one_layer_s_views_draws_the_same_tokens(preset: str, greedy: bool) -> None:
    case = replace(CASE, preset=preset)
    classes, seeds, settings = case.inputs
    settings = replace(settings, greedy=greedy)
    sampler = case.sampler(CPU, "graph")
    step = CompiledStep(sampler.generator, 2, plain_block)
    expected = draws(sampler)(classes, seeds, settings).tokens
    assert torch.equal(step(classes, seeds, settings).tokens, expected)
    # Nothing of the first generation is left.
    other = replace(settings, guidance=1.5)
    assert torch.equal(
        step(classes[::-1], seeds[::-1], other).tokens, draws(sampler)(classes[::-1], seeds[::-1], other).tokens
    )


def test_one_compiled_block_serves_all_layers() -> None:
    compiled = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    torch.compiler.reset()
    case = replace(CASE)
    classes, seeds, settings = case.inputs
    sampler = case.sampler(CPU, "graph")
    step = CompiledStep(sampler.generator, 2, torch.compile(plain_block, dynamic=False, backend=count, fullgraph=True))
    assert torch.equal(step(classes, seeds, settings).tokens, draws(sampler)(classes, seeds, settings).tokens)
    assert compiled == 1


def test_scales_draw_what_one_uncached_pass_says() -> None:
    sides = (1, 2, 3)
    config = replace(CASE.generator_config, tokens=scale_tokens(sides))
    generator = random_generator(config, CPU).double()
    try:
        scales = Scales(generator, 2, sides)
        tokens = scales([1, 4], [0, 1], GREEDY).tokens
        canvas = scales.codebook.new_zeros(2, 32, 3, 3)
        contents = []
        start = 0
        for i, side in enumerate(sides):
            canvas = scales.added(canvas, tokens[:, start : start + side * side], i)
            start += side * side
            if i + 1 < len(sides):
                contents.append(scales.inputs(canvas, sides[i + 1]))
        later = torch.cat(contents, dim=1)
        logits = [full_pass(generator, torch.tensor(rows), later, sides) for rows in ([1, 4], [10, 10])]
        guidance = torch.cat([torch.full((side * side,), s) for side, s in zip(sides, (1.0, 2.0, 3.0), strict=True)])
        mixed = logits[1] + guidance[:, None] * (logits[0] - logits[1])
        assert torch.equal(mixed.argmax(-1), tokens)
        assert len(tokens.unique()) > 5
    finally:
        random_generator.cache_clear()


def full_pass(generator: torch.nn.Module, classes: Tensor, later: Tensor, sides: tuple[int, ...]) -> Tensor:
    """Logits of all scales at once, each seeing itself and those before it."""
    condition = generator.class_table(classes)  # type: ignore[operator]
    x = torch.cat([condition[:, None] + generator.start_positions, later], dim=1) + generator.positions
    keep = torch.ones(2, len(classes))
    for block in generator.blocks:  # type: ignore[union-attr]
        assert isinstance(block, Block)
        block.attention.group_sizes = tuple(side * side for side in sides)
        x = block(x, condition, keep)
    scale, shift = generator.head_adaln(F.silu(condition)).unflatten(-1, (2, -1)).unbind(1)  # type: ignore[operator]
    return generator.head(modulated_layer_norm(x, scale, shift))  # type: ignore[operator]


def test_scales_have_var_s_shapes_and_make_pictures() -> None:
    assert len(SIDES) == 10 and scale_tokens(SIDES) == 680
    config = replace(CASE.generator_config, tokens=scale_tokens((1, 2)))
    scales = Scales(random_generator(config, CPU), 2, (1, 2), scale_decoder(32, CPU, torch.bfloat16))
    first, again = (scales([1, 2], [0, 1], replace(GREEDY, greedy=False)) for _ in range(2))
    assert first.images is not None and first.images.shape == (2, 3, 32, 32) and first.images.dtype == torch.uint8
    assert again.images is not None and torch.equal(first.images, again.images)
    assert first.tokens.shape == (2, 5) and not torch.equal(first.tokens[0], first.tokens[1])
