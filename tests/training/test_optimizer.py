"""AdamW's groups, the learning-rate schedules and the averaged weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from spectralar.config import GeneratorConfig, TokenInput, TokenizerConfig
from spectralar.generator import SpectralGenerator
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.generator import GeneratorTask
from spectralar.training.optimizer import AveragedModel, OptimizerConfig, build_optimizer, set_lr
from spectralar.training.tokenizer import TokenizerTask


def decayed_names(model: nn.Module, undecayed: tuple[str, ...]) -> set[str]:
    """Names of the decayed parameters, after checking that the groups hold every parameter once."""
    config = OptimizerConfig(weight_decay=0.25)
    first, second = build_optimizer(model, config, undecayed).param_groups
    assert (first["weight_decay"], second["weight_decay"]) == (0.25, 0.0)
    assert first["betas"] == second["betas"] == config.betas
    names = {id(p): name for name, p in model.named_parameters()}
    grouped = [names[id(p)] for group in (first, second) for p in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    return {names[id(p)] for p in first["params"]}


def test_tokenizer_decays_exactly_the_matrices_of_blocks_and_heads(tokenizer_config: TokenizerConfig) -> None:
    block = ("qkv", "proj", "fc1", "fc2")
    expected = {f"{side}.vit.blocks.0.{name}.weight" for side in ("encoder", "decoder") for name in block}
    expected |= {"encoder.to_latent.weight", "decoder.head.to_patch.weight", "decoder.head.smooth.weight"}
    assert decayed_names(SpectralTokenizer(tokenizer_config), TokenizerTask.undecayed) == expected


@pytest.mark.parametrize("token_input", ["table", "code"])
def test_generator_decays_exactly_matrices_and_tables(
    generator_config: GeneratorConfig, token_input: TokenInput
) -> None:
    config = replace(generator_config, token_input=token_input, code_dim=4)
    block = ("attention.qkv", "attention.proj", "fc1", "fc2", "adaln")
    expected = {f"blocks.{i}.{name}.weight" for i in range(2) for name in block}
    expected |= {"class_table.weight", "head_adaln.weight", "head.weight"}
    expected |= {"token_table.weight" if token_input == "table" else "from_code.weight"}
    assert decayed_names(SpectralGenerator(config), GeneratorTask.undecayed) == expected


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = build_optimizer(model, OptimizerConfig(), ()).param_groups
    assert [len(g["params"]) for g in groups] == [1, 1]


def test_decay_acts_on_the_decayed_group_only() -> None:
    model = nn.Linear(3, 3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5), ())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight, before["weight"] * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)
    assert torch.equal(model.bias, before["bias"])


def test_set_lr_keeps_tensors_in_place() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    held = torch.tensor(1.0)
    optimizer.param_groups[0]["lr"] = held
    set_lr(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == optimizer.param_groups[1]["lr"] == 0.25


def test_codes_have_a_rate_of_their_own(tokenizer_config: TokenizerConfig) -> None:
    model = SpectralTokenizer(tokenizer_config)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, code_rate=0.25), TokenizerTask.undecayed)
    decayed, plain, codes = optimizer.param_groups
    assert codes["params"] == [model.codebook] and codes["weight_decay"] == 0
    assert len(decayed["params"]) + len(plain["params"]) + 1 == len(list(model.parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.125]
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.025]
    with pytest.raises(ValueError, match="code_rate must be positive, not 0"):
        OptimizerConfig(code_rate=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("code_rate", [1.0, 0.25])
def test_learning_rates_on_a_gpu_are_tensors_of_their_own(tokenizer_config: TokenizerConfig, code_rate: float) -> None:
    model = SpectralTokenizer(tokenizer_config).cuda()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.5, code_rate=code_rate), TokenizerTask.undecayed)
    rates = [group["lr"] for group in optimizer.param_groups]
    set_lr(optimizer, 0.1)
    assert [rate.item() for rate in rates] == pytest.approx([0.1, 0.1, 0.1 * code_rate][: len(rates)])
    assert len({rate.data_ptr() for rate in rates}) == len(rates) == (2 if code_rate == 1 else 3)


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    config = OptimizerConfig(lr=0.8, warmup=4)
    assert [config.lr_at(step, 100) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8], rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_decay_starts_at_the_peak_and_ends_at_final(schedule: str, warmup: int) -> None:
    config = OptimizerConfig(lr=2.0, warmup=warmup, schedule=schedule, final=0.1)  # type: ignore[arg-type]
    rates = [config.lr_at(step, 20) for step in range(20)]
    assert rates[warmup] == 2.0
    assert rates[-1] == pytest.approx(0.2, rel=1e-12)
    falls = [a - b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False)]
    assert min(falls) > 0
    if schedule == "linear":
        assert max(falls) == pytest.approx(min(falls), rel=1e-9)


def test_cosine_is_half_way_in_the_middle() -> None:
    config = OptimizerConfig(lr=1.0, warmup=0, final=0.0)
    assert config.lr_at(50, 101) == pytest.approx(0.5, rel=1e-12)
    assert config.lr_at(25, 101) == pytest.approx((1 + math.cos(math.pi / 4)) / 2, rel=1e-12)


def test_hold_keeps_the_peak_for_its_share() -> None:
    config = OptimizerConfig(lr=1.0, warmup=0, schedule="linear", hold=0.5, final=0.0)
    rates = [config.lr_at(step, 11) for step in range(11)]
    assert rates[:6] == [1.0] * 6
    assert rates[6:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-12)


def test_constant_stays_and_steps_beyond_the_end_stay_at_final() -> None:
    constant = OptimizerConfig(lr=3.0, warmup=2, schedule="constant")
    assert {constant.lr_at(step, 10) for step in range(2, 10)} == {3.0}
    assert OptimizerConfig(lr=1.0, warmup=0, final=0.1).lr_at(99, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_of_one_step_and_one_shorter_than_its_warmup(schedule: str) -> None:
    config = OptimizerConfig(lr=1.0, warmup=0, schedule=schedule)  # type: ignore[arg-type]
    assert config.lr_at(0, 1) == 1.0
    assert replace(config, warmup=10).lr_at(1, 2) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be positive, not 0.0"),
        ({"lr": float("nan")}, "lr must be positive, not nan"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, not -1.0"),
        ({"warmup": -1}, "warmup must not be negative, not -1"),
        ({"schedule": "step"}, "schedule must be cosine, linear or constant, not step"),
        ({"hold": 1.0}, r"hold must be in \[0, 1\), not 1.0"),
        ({"final": 1.5}, r"final must be in \[0, 1\], not 1.5"),
        ({"clip": 0.0}, "clip must be positive, not 0.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), not 1.0"),
        ({"accumulation": 0}, "accumulation must be at least 1, not 0"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)  # type: ignore[arg-type]


def test_average_equals_its_closed_form() -> None:
    """In fp64 the average is the sum of all weights seen, each times its rate and the later decays."""
    model = nn.Linear(2, 3).double()
    start = model.weight.detach().clone()
    average = AveragedModel(model, 0.4)
    decays = [min(0.4, (1 + s) / (10 + s)) for s in range(12)]
    assert decays[0] == 0.1 and decays[-1] == 0.4
    seen = []
    for step in range(12):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3, 2, dtype=torch.float64))
        seen.append(model.weight.detach().clone())
        average.update(model, torch.tensor(average.rate_at(step), dtype=torch.float64))
    expected = math.prod(decays) * start
    for step, weight in enumerate(seen):
        expected = expected + (1 - decays[step]) * math.prod(decays[step + 1 :]) * weight
    assert (average.model.state_dict()["weight"] - expected).abs().max() < 64 * torch.finfo(torch.float64).eps


def test_average_copies_buffers_and_shares_nothing_with_the_model() -> None:
    model = nn.BatchNorm1d(3)
    average = AveragedModel(model, 0.9)
    averaged = average.model.state_dict()  # views of the average, which follow it
    model(torch.randn(5, 3))
    before = averaged["weight"].clone()
    assert not torch.equal(averaged["running_mean"], model.state_dict()["running_mean"])
    average.update(model, torch.tensor(0.5))
    assert torch.equal(averaged["running_mean"], model.state_dict()["running_mean"])
    assert averaged["num_batches_tracked"] == 1
    assert torch.equal(averaged["weight"], before)
    assert not average.model.training and not any(p.requires_grad for p in average.model.parameters())
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(averaged["weight"], before)
