"""Cases of the sampler: what they cost, what targets ask, and that a judge lets rounding pass and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spectralar.bench.cases import Rival
from spectralar.bench.sampler import (
    BATCHES,
    BF16,
    FP8,
    ONE_TOKEN,
    PRESETS,
    TARGETS,
    SamplingCase,
    draws,
    least_pixel_flops,
    random_generator,
    sampling_cases,
)
from spectralar.bench.sampler_measure import SamplingMeasurement
from spectralar.bench.sampler_truth import Drawn, Judge, Verdict
from spectralar.config import TokenizerConfig, VQGANConfig
from spectralar.pixels.fused import doubled_weight
from spectralar.sampling import SamplingSettings

from .conftest import CPU, rival, timing

TINY = SamplingCase(batch=2, tiny=True)
RIGHT = Verdict(0.5, 0.0, 0.0, 0.0, 0.1)


def measured(case: SamplingCase, median: float, *rivals: Rival) -> SamplingMeasurement:
    return SamplingMeasurement(case, 0.5, timing(median), rivals, 1e-3, "copy", "fused", RIGHT, RIGHT)


def test_a_step_s_weights_and_all_keys_are_the_bytes() -> None:
    case = SamplingCase(batch=64)
    weights = 2 * (12 * 1024**2 * 16 + 4096 * 1024)
    # Each of 64 positions is written once and read by all later ones, for 128 rows of 16 blocks of two of 1024 bf16.
    cached = 128 * 16 * 2 * 1024 * 2 * (64 + 63 * 64 // 2)
    assert case.bytes() == 64 * weights + cached
    assert SamplingCase(preset="d16-p4").bytes() < SamplingCase().bytes() / 3.9


def test_fp8_halves_the_weights_alone() -> None:
    own, fp8 = SamplingCase(batch=64), SamplingCase(batch=64, weights="fp8")
    assert own.bytes() - fp8.bytes() == 64 * (12 * 1024**2 * 16 + 4096 * 1024)
    assert fp8.weight_bytes == 205_520_896 and "64 x 206 MB of weights" in fp8.costs
    assert fp8.flops() == own.flops() and fp8.small().weights == "fp8"


@pytest.mark.parametrize(("capability", "runs"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_needs_a_gpu_that_has_it(capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert FP8[0].runs_on(gpu) is runs and FP8[0].runs_on(CPU) and SamplingCase().runs_on(gpu)


def test_pixels_add_their_operations() -> None:
    tokens, direct, vqgan = (SamplingCase(batch=8, pixels=head) for head in ("none", "direct", "vqgan"))
    assert direct.flops() - tokens.flops() == 8 * TokenizerConfig().decode_flops()
    assert 100e9 < (vqgan.flops() - direct.flops()) / 8 < VQGANConfig().flops()


def test_the_cheapest_pixels_are_those_of_small_convolutions() -> None:
    config = TokenizerConfig(pixel_head="vqgan")
    saved = 0
    for c in VQGANConfig().convolutions():
        if c.kernel == 1:
            saved += 2 * c.inputs * c.outputs * c.size**2
    for width, size in ((512, 16), (256, 32), (256, 64), (128, 128)):
        small, weight = torch.zeros(1, width, size, size, device="meta"), torch.zeros(width, width, 3, 3, device="meta")
        folded = torch.empty_like(doubled_weight(weight))
        with FlopCounterMode(display=False) as cheap:
            torch.nn.functional.conv2d(small, folded, padding=1)
        # The result of four phases is one larger on each side, and a border of it is dropped.
        least = cheap.get_total_flops() * size**2 // (size + 1) ** 2
        saved += 2 * 9 * width**2 * (2 * size) ** 2 - least
    assert least_pixel_flops(config) == pytest.approx(config.decode_flops() - saved, rel=1e-6)


def test_targets_come_first_and_names_differ() -> None:
    cases = sampling_cases(PRESETS, BATCHES, "auto")
    assert [case.target for case in cases[: len(TARGETS)]] == ["P6", "P8", "P14", "P7", "P7", "P9", "P9"]
    assert not any(case.target for case in cases[len(TARGETS) :])
    assert len({case.name for case in cases}) == len(cases) == 5 * 4 + 2 * 4 + 2
    # Weights in fp8 come before all that is no target, and what has no fp8 weights is not asked for them.
    fp8 = [case.name for case in cases if case.weights == "fp8"]
    assert (
        fp8
        == [case.name for case in cases[len(TARGETS) : len(TARGETS) + 2]]
        == [
            "class -> tokens, d16, fp8 weights, 64 steps, guided, B=1",
            "class -> tokens, d16, fp8 weights, 64 steps, guided, B=64",
        ]
    )
    assert all(case.weights == "same" for case in sampling_cases(PRESETS, BATCHES, "reference"))
    assert {case.preset for case in cases if case.pixels != "none"} == {"d16"}
    assert [case.name for case in sampling_cases(("d20",), (8,), "graph")] == [
        "class -> tokens, d20, 64 steps, guided, B=8",
        "class -> 256x256 pixels, vqgan head, d20, 64 steps, guided, B=8",
        "class -> 256x256 pixels, direct head, d20, 64 steps, guided, B=8",
    ]
    assert all(case.backend == "graph" for case in sampling_cases(PRESETS, (1,), "graph"))
    small = TARGETS[0].small()
    assert small.target is small.condition is small.aim is None and "tiny" in small.name


@pytest.mark.parametrize(
    ("presets", "batches", "message"),
    [(("d17",), (1,), "not 'd17'"), (("d16",), (0,), "1..1024, not 0"), (("d16",), (2000,), "1..1024, not 2000")],
)
def test_bad_presets_and_batches(presets: tuple[str, ...], batches: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling_cases(presets, batches, "auto")


@pytest.mark.parametrize(
    ("index", "met", "missed"),
    [
        (0, 20e-3, 20.1e-3),
        (1, 25e-3, 25.1e-3),
        (3, 25e-3, 25.1e-3),
        (4, 60e-3, 60.1e-3),
        (5, 0.213, 0.214),
        (6, 0.073, 0.074),
    ],
)
def test_targets_by_time_and_throughput(index: int, met: float, missed: float) -> None:
    assert measured(TARGETS[index], met).met is True
    assert measured(TARGETS[index], missed).met is False
    wrong = replace(measured(TARGETS[index], met), ours=None)
    assert wrong.met is False


def test_groups_are_compared_with_single_tokens_of_the_same_run() -> None:
    whole = rival(ONE_TOKEN, 1.0, role="bound")
    groups = TARGETS[2]
    assert groups.target == "P14"
    assert measured(groups, 0.35, whole).met is True
    assert measured(groups, 0.36, whole).met is False
    assert measured(groups, 0.1).met is False
    assert ONE_TOKEN in [peer.name for peer in replace(TINY, preset="d16-p4").peers(CPU)]


def test_logits_of_random_models_differ_and_depend_on_every_block() -> None:
    config = replace(TINY.generator_config, codebook_size=512)
    model = random_generator(config, CPU)
    classes, tokens = torch.tensor([1, 2]), torch.zeros(2, 8, dtype=torch.int64)
    with torch.inference_mode():
        logits = model(classes, tokens)
        assert 1.5 < logits.std() < 4
        assert (logits[0] - logits[1]).std() > 1
        for block in model.blocks:
            weight = block.get_parameter("attention.v_bias")
            held = weight.clone()
            weight.add_(1)
            assert (model(classes, tokens) - logits).std() > 0.1
            weight.copy_(held)


def judged(case: SamplingCase, change: Callable[[Drawn], Drawn] = lambda drawn: drawn, **settings: object) -> Verdict:
    sampler = case.sampler(CPU, "reference")
    classes, seeds, plain = case.inputs
    drawn = draws(sampler)(classes, seeds, replace(plain, **settings))
    return Judge(sampler.generator, sampler.tokenizer, classes, seeds)(change(drawn))


def swapped(drawn: Drawn) -> Drawn:
    return drawn._replace(tokens=drawn.tokens.flip(0))


def as_if(**settings: object) -> Callable[[Drawn], Drawn]:
    """Claims that other settings were used than were."""
    return lambda drawn: drawn._replace(settings=replace(drawn.settings, **settings))


@pytest.mark.parametrize("preset", ["d16", "d16-p4"])
def test_the_reference_is_right(preset: str) -> None:
    case = replace(TINY, preset=preset, batch=16)
    sampled, greedy = judged(case), judged(case, greedy=True)
    for verdict in (sampled, greedy):
        assert verdict.error <= 1 and verdict.unlike < 0.1 and 0 < verdict.logit_error < 1
    assert sampled.regret is None and greedy.regret is not None and greedy.regret < 0.5


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (swapped, {}),
        (swapped, {"greedy": True}),
        (as_if(guidance=1.5), {"guidance": 3.5}),
        (as_if(guidance=1.5), {"guidance": 3.5, "greedy": True}),
        (as_if(guidance_schedule="constant"), {}),
        (as_if(temperature=1.0), {"temperature": 1.5}),
        (as_if(top_k=2), {}),
    ],
)
def test_other_draws_are_wrong(change: Callable[[Drawn], Drawn], settings: dict[str, object]) -> None:
    assert judged(replace(TINY, batch=32), change, **settings).error > 2


@pytest.mark.parametrize("token", [-1, 64])
def test_tokens_that_are_no_codes_are_wrong(token: int) -> None:
    assert judged(TINY, lambda drawn: drawn._replace(tokens=torch.full_like(drawn.tokens, token))).error == torch.inf


def test_fp8_draws_are_judged_by_fp8_weights() -> None:
    case = replace(TINY, batch=64, weights="fp8")
    own = replace(case, weights="same")
    sampler, bf16 = case.sampler(CPU, "graph"), own.sampler(CPU, "graph")
    classes, seeds, settings = case.inputs
    greedy = replace(settings, greedy=True)
    for each in (settings, greedy):
        assert case.judge(sampler)(draws(sampler)(classes, seeds, each)).error <= 1
    # The other weights draw something else, as do these for a judge of the others; a tiny model draws it rarely.
    assert case.judge(sampler)(draws(bf16)(classes, seeds, settings)).error > 1
    assert own.judge(bf16)(draws(sampler)(classes, seeds, settings)).error > 1
    assert [peer.name for peer in case.peers(CPU)] == [BF16]


def test_a_later_image_is_judged_too() -> None:
    def broken(drawn: Drawn) -> Drawn:
        tokens = drawn.tokens.clone()
        tokens[64:] = 0
        return drawn._replace(tokens=tokens)

    case = replace(TINY, batch=96)
    assert judged(case, greedy=True).error <= 1
    assert judged(case, broken, greedy=True).error > 2


def test_pictures_are_judged() -> None:
    case = replace(TINY, pixels="direct")

    def shifted(levels: int) -> Callable[[Drawn], Drawn]:
        def change(drawn: Drawn) -> Drawn:
            assert drawn.images is not None
            return drawn._replace(images=(drawn.images.int() + levels).clamp(0, 255).to(torch.uint8))

        return change

    right = judged(case)
    assert right.error <= 1 and right.levels == right.plain_levels and right.levels is not None and right.levels < 1
    assert judged(case, shifted(3)).error > 2
    assert judged(case, lambda drawn: drawn._replace(images=_flipped(drawn.images))).error > 2


def _flipped(images: Tensor | None) -> Tensor:
    assert images is not None
    return images.flip(-1)


def test_the_workload_judges_its_own_call() -> None:
    work = TINY.workload(CPU)
    drawn = work.ours(*work.inputs)
    assert isinstance(drawn, Drawn) and isinstance(drawn.settings, SamplingSettings)
    assert work.error(drawn) <= TINY.budget < work.error(swapped(drawn))
