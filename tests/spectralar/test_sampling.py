"""Sampling: guidance schedules, reproducibility per image, prefixes and truncation, errors before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.images import to_uint8
from spectralar.pipeline import SpectralAR
from spectralar.sampling import Sampler, SamplingSettings
from spectralar.tokenizer import SpectralTokenizer

Make = Callable[..., Any]
CLASSES, SEEDS = [0, 2, 2, 3], [11, 5, 2**62, -4]
GUIDED = SamplingSettings(guidance=2.5, top_k=20, top_p=0.95, temperature=1.3)
SETTINGS = [SamplingSettings(), GUIDED, SamplingSettings(guidance=3.0, guidance_schedule="cosine")]


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("steps", [2, 3, 16, 64])
def test_ramp_is_var_s_rule(guidance: float, steps: int) -> None:
    """(1 + t) conditional - t unconditional with t = c i / (S - 1) and c = g - 1."""
    conditional, unconditional = 1.7, -0.6
    scales = SamplingSettings(guidance=guidance).guidance_scales(steps)
    assert len(scales) == steps
    for i, scale in enumerate(scales):
        t = (guidance - 1) * i / (steps - 1)
        ours = unconditional + scale * (conditional - unconditional)
        assert ours == pytest.approx((1 + t) * conditional - t * unconditional, abs=1e-12)


def test_values_of_the_schedules() -> None:
    def scales(schedule: Any, steps: int) -> list[float]:
        return SamplingSettings(guidance=3.0, guidance_schedule=schedule).guidance_scales(steps)

    assert scales("ramp", 5) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert scales("constant", 5) == [3.0] * 5
    assert scales("cosine", 5) == pytest.approx([1.0, 2 - math.sqrt(0.5), 2.0, 2 + math.sqrt(0.5), 3.0])
    for schedule in ("ramp", "constant", "cosine"):
        assert scales(schedule, 1) == pytest.approx([3.0]), "a single step has the whole guidance"
        assert SamplingSettings(guidance_schedule=schedule).guidance_scales(4) == [1.0] * 4


@pytest.mark.parametrize(
    "values, message",
    [
        ({"guidance": -0.5}, "guidance must be a number of at least 0, not -0.5"),
        ({"guidance": math.inf}, "guidance must be a number of at least 0, not inf"),
        ({"guidance": math.nan}, "guidance must be a number of at least 0, not nan"),
        ({"guidance_schedule": "linear"}, "guidance_schedule must be ramp, constant or cosine, not 'linear'"),
        ({"top_k": -1}, "top_k must not be negative, not -1"),
        ({"top_p": 1.5}, "top_p must be in [0, 1], not 1.5"),
        ({"top_p": -0.1}, "top_p must be in [0, 1], not -0.1"),
        ({"top_p": math.nan}, "top_p must be in [0, 1], not nan"),
        ({"temperature": 0.0}, "temperature must be a positive number, not 0.0"),
        ({"temperature": -1.0}, "temperature must be a positive number, not -1.0"),
        ({"temperature": math.inf}, "temperature must be a positive number, not inf"),
    ],
)
def test_errors_of_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingSettings(**values)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("settings", SETTINGS)
def test_an_image_depends_on_its_class_and_seed_only(
    make_generator: Make, settings: SamplingSettings, group: int
) -> None:
    """Alone, in a batch, and in a batch of another order."""
    sampler = Sampler(make_generator(group=group))
    together = sampler.sample_tokens(CLASSES, SEEDS, settings)
    assert together.shape == (4, 8) and together.dtype == torch.int64
    assert len({tuple(row) for row in together.tolist()}) == 4, "different images"
    for i, (c, s) in enumerate(zip(CLASSES, SEEDS, strict=True)):
        assert torch.equal(sampler.sample_tokens([c], [s], settings)[0], together[i])
    order = [3, 0, 2, 1]
    permuted = sampler.sample_tokens([CLASSES[i] for i in order], [SEEDS[i] for i in order], settings)
    assert torch.equal(permuted, together[order])
    assert torch.equal(sampler.sample_tokens(torch.tensor(CLASSES), torch.tensor(SEEDS), settings), together)


@pytest.mark.parametrize("group", [1, 4])
def test_tokens_are_those_of_the_plain_loop(make_generator: Make, group: int) -> None:
    """The sampler against the definition: at each position the whole sequence so far through `forward`, no cache."""
    from spectralar.kernels.draw import draw_tokens

    model = make_generator(group=group)
    tokens, classes, seeds = torch.zeros(2, 8, dtype=torch.int64), torch.tensor([0, 1]), torch.tensor([3, 4])
    free = torch.full_like(classes, 3)
    for t in range(8):
        conditional, unconditional = model(classes, tokens)[:, t], model(free, tokens)[:, t]
        scale = 1 + 1.5 * (t // group) / (model.config.steps - 1)
        mixed = unconditional + scale * (conditional - unconditional)
        tokens[:, t] = draw_tokens(mixed.detach(), seeds, t, temperature=1.3, top_k=20, top_p=0.95)
    assert torch.equal(Sampler(model).sample_tokens([0, 1], [3, 4], GUIDED), tokens)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("given", [0, 3, 8])
def test_a_prefix_is_kept_and_what_follows_depends_on_it(make_generator: Make, group: int, given: int) -> None:
    sampler = Sampler(make_generator(group=group))
    full = sampler.sample_tokens([0, 1], [7, 8], GUIDED)
    assert torch.equal(sampler.sample_tokens([0, 1], [7, 8], GUIDED, prefix=full[:, :given]), full)
    other = (full[:, :given] + 9) % 32
    forced = sampler.sample_tokens([0, 1], [7, 8], GUIDED, prefix=other)
    assert torch.equal(forced[:, :given], other)
    if group == 1 and given == 3:
        assert not torch.equal(forced[:, given:], full[:, given:])


@pytest.mark.parametrize("group", [1, 4])
def test_a_truncated_run_is_the_start_of_the_full_run(make_generator: Make, group: int) -> None:
    sampler = Sampler(make_generator(group=group))
    full = sampler.sample_tokens(CLASSES, SEEDS, GUIDED)
    for length in (1, 4, 7):
        assert torch.equal(sampler.sample_tokens(CLASSES, SEEDS, GUIDED, length=length), full[:, :length])


def test_truncation_stops_the_work(make_generator: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_generator(group=4)
    spy = Mock(wraps=model.step)
    monkeypatch.setattr(model, "step", spy)
    Sampler(model).sample_tokens([0], [1], length=4)
    assert spy.call_count == 1


def test_greedy_ignores_seeds(generator: SpectralGenerator) -> None:
    sampler, greedy = Sampler(generator), SamplingSettings(greedy=True)
    a, b = sampler.sample_tokens([1, 1], [0, 99], greedy)
    assert torch.equal(a, b)
    logits = generator(torch.tensor([1]), a[None])
    assert torch.equal(logits.argmax(-1)[0], a)
    assert torch.equal(sampler.sample_tokens([1], [5], SamplingSettings(top_k=1))[0], a)


def test_settings_matter(generator: SpectralGenerator) -> None:
    sampler = Sampler(generator)
    batch = list(range(6))
    runs = [
        sampler.sample_tokens([i % 3 for i in batch], batch, settings)
        for settings in (None, *SETTINGS[1:], SamplingSettings(temperature=3.0), SamplingSettings(top_k=2))
    ]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert not torch.equal(a, b)


def test_guidance_of_one_is_no_guidance(generator: SpectralGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, and no unconditional rows are computed."""
    spy = Mock(wraps=generator.start)
    monkeypatch.setattr(generator, "start", spy)
    sampler = Sampler(generator)
    plain = sampler.sample_tokens(CLASSES, SEEDS)
    settings = SamplingSettings(guidance=1.0, guidance_schedule="constant")
    assert torch.equal(sampler.sample_tokens(CLASSES, SEEDS, settings), plain)
    sampler.sample_tokens(CLASSES, SEEDS, GUIDED, length=1)
    assert [len(call.args[0]) for call in spy.call_args_list] == [4, 4, 8]


def test_no_class_is_a_class_of_its_own_that_guidance_leaves_alone(generator: SpectralGenerator) -> None:
    sampler = Sampler(generator)
    free = sampler.sample_tokens([3] * 4, list(range(4)))
    constant = SamplingSettings(guidance=4.0, guidance_schedule="constant")
    assert torch.equal(sampler.sample_tokens([3] * 4, list(range(4)), constant), free)
    assert not torch.equal(sampler.sample_tokens([0] * 4, list(range(4))), free)
    zero = SamplingSettings(guidance=0.0, guidance_schedule="constant")
    assert torch.equal(sampler.sample_tokens([0] * 4, list(range(4)), zero), free), "scale 0 is unconditional"


@pytest.mark.parametrize("group", [1, 4, 8])
def test_a_stream_yields_every_step_and_its_pictures(make_generator: Make, make_tokenizer: Make, group: int) -> None:
    sampler = Sampler(make_generator(group=group), make_tokenizer())
    steps = list(sampler.stream([0, 1], [4, 5], GUIDED))
    assert [step.tokens.shape for step in steps] == [(2, group * (i + 1)) for i in range(8 // group)]
    last = steps[-1].tokens
    for step in steps:
        assert torch.equal(step.tokens, last[:, : step.tokens.shape[1]])
        pictures = step.images()
        assert pictures.shape == (2, 3, 32, 32) and pictures.dtype == torch.uint8
        assert sampler.tokenizer is not None
        assert torch.equal(pictures, to_uint8(sampler.tokenizer.decode(step.tokens)))
    if group == 8:
        assert torch.equal(sampler.sample_tokens([0, 1], [4, 5], GUIDED), last)
        assert torch.equal(sampler.generate([0, 1], [4, 5], GUIDED), steps[-1].images())


def test_a_truncated_stream_cuts_the_last_group(make_generator: Make) -> None:
    steps = Sampler(make_generator(group=4)).stream([0], [1], length=6)
    assert [step.tokens.shape[1] for step in steps] == [4, 6]


def test_generate_of_a_truncated_run_decodes_the_prefix(model: SpectralAR) -> None:
    tokens = model.sample_tokens([1], [2], length=3)
    assert torch.equal(model.generate([1], [2], length=3), to_uint8(model.tokenizer.decode(tokens)))


def test_an_empty_batch(model: SpectralAR) -> None:
    for settings in SETTINGS[:2]:
        assert model.sample_tokens([], [], settings, length=2).shape == (0, 2)
        assert model.generate([], [], settings, length=2).shape == (0, 3, 32, 32)


def test_models_are_put_into_evaluation_mode_and_left_without_gradients(
    generator: SpectralGenerator, tokenizer: SpectralTokenizer
) -> None:
    sampler = Sampler(generator.train(), tokenizer.train())
    assert not generator.training and not tokenizer.training
    images = sampler.generate([0], [0])
    assert not images.requires_grad
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_a_sampler_leaves_the_global_random_state_alone(generator: SpectralGenerator) -> None:
    before = torch.get_rng_state()
    Sampler(generator).sample_tokens([0], [0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (([0, 1], [0]), ValueError, "seeds must be as many as classes (2), not 1"),
        (([4], [0]), ValueError, "classes must be in 0..2, or 3 for no class, not 4..4"),
        (([-1, 0], [0, 0]), ValueError, "classes must be in 0..2, or 3 for no class, not -1..0"),
        ((0, [0]), TypeError, "classes must be a list of 64-bit integers, not 0"),
        (([0.5], [0]), TypeError, "classes must be a list of 64-bit integers, not [0.5]"),
        (([[0]], [0]), TypeError, "classes must be a list of 64-bit integers, not [[0]]"),
        (([True], [0]), TypeError, "classes must be a list of 64-bit integers, not [True]"),
        ((["cat"], [0]), TypeError, "classes must be a list of 64-bit integers, not ['cat']"),
        (([0], [1.5]), TypeError, "seeds must be a list of 64-bit integers, not [1.5]"),
        (([0], [2**63]), TypeError, "seeds must be a list of 64-bit integers, not [9223372036854775808]"),
        (([0], [None]), TypeError, "seeds must be a list of 64-bit integers, not [None]"),
    ],
)
def test_errors_of_classes_and_seeds(
    model: SpectralAR, arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    for call in (model.stream, model.sample_tokens, model.generate):
        with pytest.raises(error, match=re.escape(message)):
            call(*arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"length": 0}, "length must be 1..8, not 0"),
        ({"length": 9}, "length must be 1..8, not 9"),
        ({"settings": SamplingSettings(top_k=33)}, "top_k must be at most the codebook size 32, not 33"),
        ({"prefix": torch.zeros(1, 9).long()}, "prefix must be integers of shape [1, m] with m in 0..8"),
        ({"prefix": torch.zeros(1, 4).long(), "length": 3}, "prefix must be integers of shape [1, m] with m in 0..3"),
        ({"prefix": torch.zeros(2, 4).long()}, "prefix must be integers of shape [1, m] with m in 0..8, not torch.int"),
        (
            {"prefix": torch.zeros(4).long()},
            "prefix must be integers of shape [1, m] with m in 0..8, not torch.int64 [",
        ),
        ({"prefix": torch.zeros(1, 4)}, "prefix must be integers of shape [1, m] with m in 0..8, not torch.float32"),
        ({"prefix": torch.tensor([[0, 32]])}, "prefix tokens must be in 0..31, not 0..32"),
        ({"prefix": torch.tensor([[-2, 1]])}, "prefix tokens must be in 0..31, not -2..1"),
    ],
)
def test_errors_of_options(model: SpectralAR, options: dict[str, Any], message: str) -> None:
    """`stream` raises when it is called, not when it is first read."""
    with pytest.raises(ValueError, match=re.escape(message)):
        model.stream([0], [0], **options)


def test_errors_of_the_sampler(make_generator: Make, make_tokenizer: Make) -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, reference, graph, fused, not 'eager'"):
        Sampler(make_generator(), backend="eager")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="generator and tokenizer disagree on tokens: 8 and 4"):
        Sampler(make_generator(), make_tokenizer(tokens=4))
    with pytest.raises(ValueError, match="generator and tokenizer disagree on codebook_size: 32 and 16"):
        Sampler(make_generator(), make_tokenizer(codebook_size=16))
    step = next(iter(Sampler(make_generator()).stream([0], [0])))
    sampler = Sampler(make_generator())
    for pictured in (step.images, lambda: sampler.pictures(step.tokens), lambda: sampler.generate([0], [0])):
        with pytest.raises(ValueError, match="this sampler has no tokenizer"):
            pictured()


def test_tokens_at_rest_are_a_good_prefix(generator: SpectralGenerator) -> None:
    sampler = Sampler(generator)
    full: Tensor = sampler.sample_tokens([0], [1])
    assert torch.equal(sampler.sample_tokens([0], [1], prefix=full[:, :4].to(torch.uint16)), full)
