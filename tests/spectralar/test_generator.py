"""The generator: cached decoding, causality, what differs in training, and VAR's initialisation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralar.config import GeneratorConfig, generator_preset
from spectralar.generator import SpectralGenerator
from spectralar.generator.model import Block

Make = Callable[..., SpectralGenerator]
KINDS = [(group, token_input) for group in (1, 4) for token_input in ("table", "code")]


def random_tokens(batch: int) -> Tensor:
    return torch.randint(32, (batch, 8), generator=torch.Generator().manual_seed(6))


def cached_logits(model: SpectralGenerator, classes: Tensor, tokens: Tensor) -> Tensor:
    state, group = model.start(classes), model.config.group
    state.keys.fill_(float("nan"))
    state.values.fill_(float("nan"))
    pieces = [model.step(state, None)]
    for start in range(0, 8 - group, group):
        pieces.append(model.step(state, tokens[:, start : start + group]))
    assert state.step == model.config.steps
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("group, token_input", KINDS)
def test_cached_logits_equal_those_of_the_whole_sequence(make_generator: Make, group: int, token_input: str) -> None:
    model = make_generator(group=group, token_input=token_input).double()
    classes, tokens = torch.tensor([0, 2, 3, 0]), random_tokens(4)
    whole = model(classes, tokens)
    assert whole.shape == (4, 8, 32) and whole.dtype == torch.float64
    assert whole.std() > 0.1, "logits that differ, so that the comparison means something"
    assert (cached_logits(model, classes, tokens) - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("group, token_input", KINDS)
def test_in_fp32_the_cache_errs_no_more_than_the_whole_sequence(
    make_generator: Make, group: int, token_input: str
) -> None:
    model = make_generator(group=group, token_input=token_input)
    classes, tokens = torch.tensor([1, 3]), random_tokens(2)
    cached, whole = cached_logits(model, classes, tokens), model(classes, tokens)
    exact = model.double()(classes, tokens)
    assert cached.dtype == whole.dtype == torch.float32
    rounding = torch.finfo(torch.float32).eps * (1 + exact.abs().max())
    assert (cached - exact).abs().max() <= 2 * (whole - exact).abs().max() + rounding


@pytest.mark.parametrize("group, token_input", [(1, "code"), (4, "table")])
def test_bf16_weights_and_autocast_work_and_give_fp32_logits(
    make_generator: Make, group: int, token_input: str
) -> None:
    model = make_generator(group=group, token_input=token_input)
    classes, tokens = torch.tensor([1, 3]), random_tokens(2)
    with torch.autocast("cpu", torch.bfloat16):
        results = [model(classes, tokens), cached_logits(model, classes, tokens)]
    model.bfloat16()
    results += [model(classes, tokens), cached_logits(model, classes, tokens)]
    exact = model.double()(classes, tokens)
    for result in results:
        assert result.dtype == torch.float32
        assert (result - exact).square().mean().sqrt() < 0.1 * exact.std()


@pytest.mark.parametrize("group, token_input", KINDS)
def test_logits_depend_on_earlier_groups_only(make_generator: Make, group: int, token_input: str) -> None:
    """Changing token j changes exactly the logits of the groups after j's group."""
    model = make_generator(group=group, token_input=token_input)
    classes, tokens = torch.tensor([1]), random_tokens(1)
    before = model(classes, tokens)
    for j in (0, 3, 4, 7):
        changed = tokens.clone()
        changed[0, j] = (changed[0, j] + 5) % 32
        differs = (model(classes, changed) != before)[0].any(-1).tolist()
        assert differs == [t // group > j // group for t in range(8)]


def test_every_position_depends_on_the_class(generator: SpectralGenerator) -> None:
    tokens = random_tokens(1)
    logits = [generator(torch.tensor([c]), tokens)[0] for c in range(4)]
    for c in range(1, 4):
        assert (logits[c] != logits[0]).any(-1).all()


def test_the_last_group_is_not_read(make_generator: Make) -> None:
    model = make_generator(group=4)
    tokens = random_tokens(1)
    changed = tokens.clone()
    changed[:, 4:] = 0
    assert torch.equal(model(torch.tensor([0]), tokens), model(torch.tensor([0]), changed))


def test_classes_are_dropped_in_training_only(make_generator: Make) -> None:
    model = make_generator(class_drop=0.3, drop_path=0.0)
    classes, tokens = torch.zeros(200, dtype=torch.int64), random_tokens(1).expand(200, -1)
    labelled, free = model(torch.tensor([0, 3]), tokens[:2])
    assert (model(classes, tokens) - labelled).abs().max() < 1e-4
    model.train()
    logits = model(classes, tokens)
    dropped = (logits - free).abs().amax((1, 2)) < 1e-4
    kept = (logits - labelled).abs().amax((1, 2)) < 1e-4
    assert (dropped ^ kept).all()
    # 200 draws at 0.3: five standard deviations are 32.
    assert 60 - 32 <= int(dropped.sum()) <= 60 + 32
    assert classes.eq(0).all(), "the caller's labels stay as they are"


def test_without_class_drop_and_stochastic_depth_training_equals_evaluation(make_generator: Make) -> None:
    model = make_generator(class_drop=0.0, drop_path=0.0)
    classes, tokens = torch.tensor([0, 1]), random_tokens(2)
    expected = model(classes, tokens)
    assert torch.equal(model.train()(classes, tokens), expected)


def test_stochastic_depth_in_training_only(make_generator: Make) -> None:
    model = make_generator(depth=3, drop_path=0.6, class_drop=0.0)
    assert torch.equal(model._stochastic_depth(5), torch.ones(3, 2, 5))
    model.train()
    factors = model._stochastic_depth(4000)
    for block, rate in enumerate((0.0, 0.3, 0.6)):
        values = factors[block].unique()
        expected = [1.0] if rate == 0 else [0.0, 1 / (1 - rate)]
        assert values.tolist() == pytest.approx(expected)
        # The mean of a factor is 1; its deviation over 8000 draws is sqrt(rate / (1 - rate) / 8000).
        assert abs(factors[block].mean() - 1) <= 5 * math.sqrt(rate / (1 - rate) / 8000) + 1e-6
    assert not torch.equal(factors[2, 0], factors[2, 1]), "both branches of a block draw for themselves"
    classes, tokens = torch.zeros(6, dtype=torch.int64), random_tokens(1).expand(6, -1)
    logits = model(classes, tokens)
    assert len({row.sum().item() for row in logits}) > 1, "every sample draws for itself"


def test_a_dropped_branch_leaves_its_input(make_generator: Make) -> None:
    block = make_generator().blocks[0]
    assert isinstance(block, Block)
    x, condition = torch.randn(2, 8, 128), torch.randn(2, 128)
    out = block(x, condition, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    assert torch.equal(out[0], x[0]) and not torch.equal(out[1], x[1])


@pytest.mark.parametrize("group, token_input", KINDS)
def test_the_first_loss_is_that_of_a_uniform_guess(group: int, token_input: Any) -> None:
    config = GeneratorConfig(
        depth=3, tokens=8, codebook_size=512, classes=4, group=group, token_input=token_input, code_dim=6
    )
    model = SpectralGenerator(config, torch.randn(512, 6))
    tokens = torch.randint(512, (16, 8))
    loss = torch.nn.functional.cross_entropy(model(torch.zeros(16).long(), tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(math.log(512), abs=0.02)


def test_var_s_initialisation() -> None:
    """Standard deviations after VAR's rule; the sample deviation of n values is within 5 / sqrt(2 n) of the true."""
    config = generator_preset("d4", classes=100, codebook_size=256, gate_init=1e-3)
    model = SpectralGenerator(config)
    width, std = 256, math.sqrt(1 / (3 * 256))
    expected = {
        "class_table.weight": std,
        "token_table.weight": std,
        "positions": std,
        "start_positions": std,
        "head.weight": 0.02 * std,
        "head_adaln.weight": 0.5 * std,
    }
    for i in range(4):
        expected[f"blocks.{i}.attention.qkv.weight"] = std
        expected[f"blocks.{i}.attention.proj.weight"] = std / math.sqrt(8)
        expected[f"blocks.{i}.fc1.weight"] = std
        expected[f"blocks.{i}.fc2.weight"] = std / math.sqrt(8)
    parameters = dict(model.named_parameters())
    for i in range(4):
        adaln = parameters.pop(f"blocks.{i}.adaln.weight")
        gates, modulation = adaln[: 2 * width], adaln[2 * width :]
        for part, value in ((gates, 1e-3 * std), (modulation, 0.5 * std)):
            assert part.std().item() == pytest.approx(value, rel=5 / math.sqrt(2 * part.numel()))
        scale = parameters.pop(f"blocks.{i}.attention.log_scale")
        assert torch.equal(scale, torch.full((4,), math.log(4.0)))
    for name, value in expected.items():
        weight = parameters.pop(name)
        assert weight.std().item() == pytest.approx(value, rel=5 / math.sqrt(2 * weight.numel())), name
        assert abs(weight.mean().item()) <= 5 * value / math.sqrt(weight.numel()), name
    assert all("bias" in name and not parameter.any() for name, parameter in parameters.items())


def test_code_vectors_enter_at_unit_length_and_stay_fixed(make_generator: Make) -> None:
    codebook = 7 * torch.randn(32, 6)
    config = GeneratorConfig(depth=1, tokens=8, codebook_size=32, classes=3, code_dim=6, token_input="code")
    model = SpectralGenerator(config, codebook)
    assert torch.allclose(model.codes, codebook / codebook.norm(dim=1, keepdim=True))
    assert "codes" in model.state_dict() and "codes" not in dict(model.named_parameters())
    assert not SpectralGenerator(config).codes.any()
    with pytest.raises(ValueError, match=re.escape("codebook must have shape [32, 6], not [32, 5]")):
        SpectralGenerator(config, codebook[:, :5])


@pytest.mark.parametrize("group, token_input", KINDS)
def test_gradients_reach_every_parameter(make_generator: Make, group: int, token_input: str) -> None:
    model = make_generator(group=group, token_input=token_input, drop_path=0.0).train()
    tokens = random_tokens(16)
    logits = model(torch.arange(16) % 3, tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_the_attention_scale_is_bounded(make_generator: Make) -> None:
    """Queries have length exp(min(theta, ln 100)), keys have length 1."""
    block = make_generator().blocks[0]
    assert isinstance(block, Block)
    attention = block.attention
    with torch.no_grad():
        attention.log_scale.copy_(torch.tensor([0.0, 9.0]))
    q, k, _ = attention.project(torch.randn(1, 3, 128))
    assert torch.allclose(q.norm(dim=-1), torch.tensor([1.0, 100.0]).expand(1, 3, 2), rtol=1e-5)
    assert torch.allclose(k.norm(dim=-1), torch.ones(1, 3, 2), rtol=1e-5)


def test_results_are_deterministic(generator: SpectralGenerator) -> None:
    classes, tokens = torch.tensor([0, 1]), random_tokens(2)
    assert torch.equal(generator(classes, tokens), generator(classes, tokens))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
@pytest.mark.parametrize("token_input", ["table", "code"])
def test_tokens_and_classes_of_any_integer_dtype(make_generator: Make, dtype: torch.dtype, token_input: str) -> None:
    model = make_generator(token_input=token_input)
    classes, tokens = torch.tensor([0, 3]), random_tokens(2)
    assert torch.equal(model(classes.to(dtype), tokens.to(dtype)), model(classes, tokens))
    model.step(model.start(classes.to(dtype)), None)


def test_an_empty_batch(generator: SpectralGenerator) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert generator(none, torch.zeros(0, 8, dtype=torch.int64)).shape == (0, 8, 32)
    assert generator.step(generator.start(none), None).shape == (0, 1, 32)


@pytest.mark.parametrize(
    "classes, tokens, message",
    [
        (torch.tensor([4]), random_tokens(1), "classes must be in 0..3, not 4..4"),
        (torch.tensor([-1]), random_tokens(1), "classes must be in 0..3, not -1..-1"),
        (torch.tensor([[1]]), random_tokens(1), "classes must be integers of shape [B], not torch.int64 [1, 1]"),
        (torch.tensor([1.0]), random_tokens(1), "classes must be integers of shape [B], not torch.float32 [1]"),
        (torch.tensor([1]), random_tokens(1) + 32, "tokens must be in 0..31, not "),
        (torch.tensor([1]), random_tokens(1) - 32, "tokens must be in 0..31, not "),
        (torch.tensor([1]), random_tokens(2), "tokens must be integers of shape [1, 8], not torch.int64 [2, 8]"),
        (torch.tensor([1]), random_tokens(1)[:, 1:], "tokens must be integers of shape [1, 8], not torch.int64 [1, 7]"),
        (torch.tensor([1]), random_tokens(1).float(), "tokens must be integers of shape [1, 8], not torch.float32"),
    ],
)
def test_errors(generator: SpectralGenerator, classes: Tensor, tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        generator(classes, tokens)
    if message.startswith("classes"):
        with pytest.raises(ValueError, match=re.escape(message)):
            generator.start(classes)


def test_errors_of_steps(make_generator: Make) -> None:
    model = make_generator(group=4)
    tokens = random_tokens(1)[:, :4]
    state = model.start(torch.tensor([0]))
    with pytest.raises(ValueError, match="previous must be None at the first step and the last group's tokens"):
        model.step(state, tokens)
    model.step(state, None)
    with pytest.raises(ValueError, match="previous must be None at the first step and the last group's tokens"):
        model.step(state, None)
    with pytest.raises(ValueError, match=re.escape("previous must have shape [1, 4], not [1, 3]")):
        model.step(state, tokens[:, :3])
    model.step(state, tokens)
    with pytest.raises(ValueError, match="all 2 steps are done"):
        model.step(state, tokens)
