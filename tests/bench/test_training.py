"""Cases of training: what they cost, what targets ask, and that the judge lets rounding pass and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spectralar.bench.ceilings import Ceilings
from spectralar.bench.peers.training import our_name
from spectralar.bench.training import CASES, Settings, TrainingCase
from spectralar.bench.training_measure import TrainingMeasurement, measure_training, split_by_stage
from spectralar.bench.training_ranks import measure_scaling, scaling_cases
from spectralar.bench.training_truth import Judge, gradients_of
from spectralar.kernels.attention import reference
from spectralar.kernels.vq import VectorQuantized, vector_quantize
from spectralar.tokenizer import SpectralTokenizer
from spectralar.tokenizer.vit import Block
from spectralar.training.loop import Trainer

from .conftest import CPU, rival, timing

TOKENIZER, GENERATOR = TrainingCase().small(), TrainingCase(kind="generator", size="d16").small()
BOTH = pytest.mark.parametrize("case", [TOKENIZER, GENERATOR], ids=["tokenizer", "generator"])
Mistake = Callable[[Trainer], None]
RATES = Ceilings(copy=1e13, read=1e13, gemm={"bf16": 1e11})


@pytest.fixture
def judge(case: TrainingCase) -> Judge:
    return Judge(functools.partial(case.plain, CPU), case.inputs(CPU))


@BOTH
def test_operations_are_three_times_those_of_the_products(case: TrainingCase) -> None:
    """PyTorch counts attention's full square, both products of it, in the backward pass too."""
    case = replace(case, batch=32)  # the pixel head convolves its weights, whatever the batch
    trainer = case.trainer(Settings(precision="fp32"), CPU)
    first, second = case.inputs(CPU)
    with FlopCounterMode(display=False) as counted:
        trainer.task.loss((first, second))
    # Latents, codes, margins of the pixel head's patches and the sub-images are a few hundredths in tiny models.
    assert 3 * counted.get_total_flops() == pytest.approx(case.flops(), rel=0.15)
    assert case.bytes() == 28 * sum(p.numel() for p in trainer.model.parameters())


def test_no_code_hangs_on_rounding() -> None:
    """Every position has two codes of its own, one for dark and one for bright pictures, in bf16 as in fp32."""
    images, _ = TOKENIZER.inputs(CPU)
    model = TOKENIZER.model(CPU).requires_grad_(False)
    assert isinstance(model, SpectralTokenizer)
    tokens = model.encode(images)
    dark, bright = tokens.chunk(2)
    assert all(torch.equal(kind, kind[:1].expand_as(kind)) for kind in (dark, bright))
    assert len(tokens.unique()) == 2 * model.config.tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), tokens)


def test_targets_come_first_and_names_differ() -> None:
    assert [case.target for case in CASES[:3]] == ["P10", "P11", None]
    assert len({case.name for case in CASES}) == len(CASES)
    assert CASES[0].name == "tokenizer training step base/base, 256 px, 64 tokens, bf16, B=256"
    # 24 blocks of width 768 over 321 positions for each of 256 images, forward and twice that back.
    assert CASES[0].flops() == pytest.approx(3 * 256 * 24 * 4.86e9, rel=0.01)
    assert [case.small() for case in CASES[2:5]] == [TOKENIZER] * 3 and CASES[-1].small() == GENERATOR


def test_conditions() -> None:
    case = CASES[0]

    def met(median: float, floor: float = 1.0, ceiling: str = "bf16 GEMM") -> bool | None:
        return TrainingMeasurement(case, 0.5, timing(median), (), floor, ceiling).met

    assert met(2.0) and not met(2.1) and not met(2.0, ceiling="copy")
    first, second, *sharded = scaling_cases(2)
    assert (first.kind, second.kind, first.target) == ("tokenizer", "generator", "P13")
    assert [(case.kind, case.ranks_per_copy, case.target) for case in sharded] == [
        ("tokenizer", 0, None),
        ("generator", 0, None),
    ]
    one = rival("one GPU, one after the other", 1.9)
    found = TrainingMeasurement(first, 0.5, timing(1.0), (one,), 0.95, "one GPU")
    assert found.met and not replace(found, ours=timing(1.01)).met and not replace(found, rivals=()).met


@BOTH
def test_plain_pytorch_is_the_same_model(case: TrainingCase, judge: Judge) -> None:
    """In fp32 ours and the plain one differ by rounding alone: losses of three steps, every gradient."""
    trainer = case.trainer(Settings(precision="fp32"), CPU)
    verdict = judge(trainer.advance, gradients_of(trainer.model))
    assert verdict.gradient < 1e-4 and verdict.loss < 1e-5
    plain = case.plain(CPU)
    assert {our_name(n) for n, _ in plain.model.named_parameters()} == {n for n, _ in trainer.model.named_parameters()}


@BOTH
def test_rounding_passes(case: TrainingCase, judge: Judge) -> None:
    for settings in case.variants(CPU):
        trainer = case.trainer(settings, CPU)
        verdict = judge(trainer.advance, gradients_of(trainer.model))
        assert 0 < verdict.gradient and verdict.error <= case.budget, settings.name
    plain = case.plain(CPU, recomputed=True)
    assert judge(plain, plain.gradients).error <= 1


def no_mask(side: str) -> Mistake:
    def change(trainer: Trainer) -> None:
        for block in trainer.model.get_submodule(side).modules():
            if isinstance(block, Block):
                block.mask = "none"

    return change


def one_more_token(trainer: Trainer) -> None:
    decoder, tokens = trainer.model.get_submodule("decoder"), trainer.model.config.tokens
    right = decoder.forward
    decoder.forward = lambda codes, lengths: right(codes, (lengths + 1).clamp(max=tokens))


def quantized_by(change: Callable[[SpectralTokenizer, Tensor, VectorQuantized], VectorQuantized]) -> Mistake:
    def mistake(trainer: Trainer) -> None:
        model = trainer.model
        assert isinstance(model, SpectralTokenizer)
        right = model.quantize
        model.quantize = lambda latents: change(model, latents, right(latents))  # type: ignore[method-assign]

    return mistake


def straight_through(share: float) -> Mistake:
    """The encoder gets only a share of the decoder's gradient."""

    def scaled(_: SpectralTokenizer, latents: Tensor, q: VectorQuantized) -> VectorQuantized:
        return q._replace(quantized=share * q.quantized + (1 - share) * q.quantized.detach())

    return quantized_by(scaled)


def codes_of_the_first(_: SpectralTokenizer, latents: Tensor, q: VectorQuantized) -> VectorQuantized:
    return q._replace(quantized=q.quantized + (q.quantized[:1] - q.quantized).detach())


def searched_in_part(model: SpectralTokenizer, latents: Tensor, _: VectorQuantized) -> VectorQuantized:
    half = model.codebook[: model.config.codebook_size // 2]
    return vector_quantize(latents, half, commitment=model.config.commitment)


def no_update(trainer: Trainer) -> None:
    trainer.optimizer.step = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        pytest.param(TOKENIZER, no_mask("encoder"), id="no mask of the encoder"),
        pytest.param(TOKENIZER, no_mask("decoder"), id="no mask of the decoder"),
        pytest.param(TOKENIZER, one_more_token, id="a token more than the prefix"),
        pytest.param(TOKENIZER, straight_through(0), id="no straight-through gradient"),
        pytest.param(TOKENIZER, straight_through(0.5), id="half the straight-through gradient"),
        pytest.param(TOKENIZER, quantized_by(codes_of_the_first), id="another picture's codes"),
        pytest.param(TOKENIZER, quantized_by(searched_in_part), id="half of the codebook searched"),
        pytest.param(TOKENIZER, no_update, id="no update of the tokenizer"),
        pytest.param(GENERATOR, no_update, id="no update of the generator"),
    ],
)
def test_mistakes_do_not(case: TrainingCase, judge: Judge, mistake: Mistake) -> None:
    trainer = case.trainer(Settings(), CPU)
    mistake(trainer)
    assert judge(trainer.advance, gradients_of(trainer.model)).error > case.budget


def test_one_wrong_block_of_the_generator_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(functools.partial(GENERATOR.plain, CPU), GENERATOR.inputs(CPU))
    trainer = GENERATOR.trainer(Settings(), CPU)
    block = trainer.model.get_submodule("blocks.1.attention")
    monkeypatch.setattr(block, "group_sizes", (2,) * 4)  # every position sees one more
    assert judge(trainer.advance, gradients_of(trainer.model)).error > GENERATOR.budget
    assert reference.group_causal_mask((2, 2), CPU).sum() == 12


def test_gradients_of_other_parameters_are_refused() -> None:
    judge = Judge(functools.partial(GENERATOR.plain, CPU), GENERATOR.inputs(CPU))
    trainer = GENERATOR.trainer(Settings(), CPU)
    trainer.model.get_parameter("positions").requires_grad_(False)
    with pytest.raises(RuntimeError, match="gradients of other parameters: positions"):
        judge(trainer.advance, gradients_of(trainer.model))


def test_the_workload_is_the_first_variant(case: TrainingCase = TOKENIZER) -> None:
    work = case.workload(CPU)
    assert work.error(work.ours(*work.inputs)) <= case.budget


def test_stages_of_a_step_add_up_and_leave_the_trainer_as_it_was() -> None:
    trainer = TOKENIZER.trainer(Settings(), CPU)
    inputs, stage = TOKENIZER.inputs(CPU), trainer.stage
    parts = {part.name: part.seconds for part in split_by_stage(trainer, inputs, CPU)}
    assert parts.keys() == {"targets and error", "forward", "backward", "clip", "optimizer", "average"}
    assert all(seconds > 0 for seconds in parts.values())
    assert trainer.stage is stage and "pixel_loss" not in vars(trainer.model)


@BOTH
def test_a_case_is_measured_whole(case: TrainingCase) -> None:
    m = measure_training(case, CPU, RATES, 0.0)
    assert m.right and m.ours is not None and m.ours.samples == 7
    assert [v.settings.name for v in m.variants] == ["eager", "checkpointing"]
    assert m.best is m.variants[0] and m.stages_of == "eager" and m.kernels
    assert [r.name for r in m.rivals] == ["plain PyTorch, eager"] and m.best_peer is m.rivals[0]
    assert not {"forward", "backward"} & {part.name for part in m.kernels}


def test_a_variant_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = TrainingCase.trainer

    def scarce(case: TrainingCase, settings: Settings, *rest: Any) -> Trainer:
        if not settings.checkpointing:
            raise torch.OutOfMemoryError("out of [memory]\nand more")
        return usual(case, settings, *rest)

    monkeypatch.setattr(TrainingCase, "trainer", scarce)
    m = measure_training(GENERATOR, CPU, RATES, 0.0)
    assert m.variants[0].reason == "OutOfMemoryError: out of [memory]"
    assert m.variants[1].timing is not None and m.ours is None and m.rivals == ()
    monkeypatch.setattr(GENERATOR.__class__, "variants", lambda *_: (Settings(),))
    with pytest.raises(RuntimeError, match=r"out of \[memory\]"):
        measure_training(GENERATOR, CPU, RATES, 0.0)


def test_ranks_that_fail_say_why() -> None:
    case = replace(scaling_cases(2)[1].small(), size="d17")
    with pytest.raises(RuntimeError, match=r"2 ranks failed: ValueError: generator preset must be .* not 'd17'"):
        measure_scaling(case, CPU, 0.0)
