"""Sampling with fp8 weights: what is drawn, what is told beforehand, what is refused, and how errors are reported."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralar.cli import main
from spectralar.generator import SpectralGenerator
from spectralar.kernels.decode import DecodeState, DecodeWeights, reference, widened
from spectralar.kernels.decode.config import MAX_ROWS
from spectralar.kernels.decode.state import MATRICES
from spectralar.pipeline import SpectralAR
from spectralar.sampling import BackendName, Sampler, SamplingSettings, captured, memory_needed, weight_error
from spectralar.sampling.packing import class_tables, pack
from spectralar.sampling.rounding import round_to_fp8
from spectralar.sampling.sampler import choose_backend
from tests.spectralar.differing import differing
from tests.spectralar.test_captured import bytes_of

Make = Callable[..., Any]
CLASSES, SEEDS = [0, 2, 2, 3, 1], [11, 5, 2**62, -4, 0]
GUIDED = SamplingSettings(guidance=2.5, top_k=20, top_p=0.95, temperature=1.3)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", ["graph", "fused", "auto"])
@pytest.mark.parametrize("group", [1, 4])
def test_tokens_are_those_of_the_rounded_model(make_generator: Make, group: int, backend: BackendName) -> None:
    generator = make_generator(group=group).double()
    rounded = copy.deepcopy(generator)
    round_to_fp8(rounded)
    expected = Sampler(rounded, backend="reference").sample_tokens(CLASSES, SEEDS, GUIDED)
    sampler = Sampler(generator, backend=backend, weights="fp8")
    assert torch.equal(sampler.sample_tokens(CLASSES, SEEDS, GUIDED), expected)
    assert not torch.equal(Sampler(generator, backend="reference").sample_tokens(CLASSES, SEEDS, GUIDED), expected)
    assert torch.equal(list(sampler.stream(CLASSES, SEEDS, GUIDED))[-1].tokens, expected)


def test_changed_weights_are_noticed(generator: SpectralGenerator) -> None:
    sampler = Sampler(generator, weights="fp8")
    before = sampler.sample_tokens(CLASSES, SEEDS)
    with torch.no_grad():
        generator.blocks[0].fc1.weight.mul_(-3)  # type: ignore[union-attr, operator]
        generator.head.bias.add_(torch.randn_like(generator.head.bias))
    after = sampler.sample_tokens(CLASSES, SEEDS)
    assert not torch.equal(after, before)
    assert torch.equal(after, Sampler(generator, weights="fp8").sample_tokens(CLASSES, SEEDS))


# Many rows, which read a copy in the generator's dtype


@pytest.mark.parametrize("group", [1, 4])
def test_one_copy_for_many_rows(make_generator: Make, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator(group=group)
    seen: list[tuple[int, torch.dtype, int]] = []

    def step(weights: DecodeWeights, state: DecodeState) -> None:
        seen.append((len(state.x) * group, weights.qkv.dtype, weights.qkv.data_ptr()))
        reference.decode_step(weights, state)

    monkeypatch.setattr(captured.decode, "decode_step", step)
    monkeypatch.setitem(captured.STEPS, "fused", step)
    fused = Sampler(generator, backend="fused", weights="fp8")
    plain = Sampler(generator, backend="graph", weights="fp8")
    for images in (1, 2, 4, 5, 8, 9, 16, 1):
        for settings in (SamplingSettings(), GUIDED):
            arguments = [2] * images, range(images), settings
            assert torch.equal(fused.sample_tokens(*arguments), plain.sample_tokens(*arguments)), arguments
    assert {dtype for rows, dtype, _ in seen if rows <= MAX_ROWS} == {torch.float8_e4m3fn}
    assert {dtype for rows, dtype, _ in seen if rows > MAX_ROWS} == {torch.float32}
    assert len({place for *_, place in seen}) == 2
    seen.clear()
    same = Sampler(generator, backend="fused")
    for images in (1, 9):
        same.sample_tokens([2] * images, range(images))
    assert len({place for *_, place in seen}) == 1


@pytest.mark.parametrize("recorded", [True, False])
def test_changed_weights_reach_both_copies(generator: SpectralGenerator, recorded: bool) -> None:
    few, many = ([1], [7]), ([2] * 9, range(9))
    sampler = Sampler(generator, backend="fused", weights="fp8")
    before = sampler.sample_tokens(*few)
    if recorded:
        sampler.sample_tokens(*many)
    with torch.no_grad():
        generator.blocks[1].attention.proj.weight.mul_(-9)  # type: ignore[union-attr, operator]
        generator.head.weight.copy_(generator.head.weight.flip(0))
    new = Sampler(generator, backend="graph", weights="fp8")
    assert torch.equal(sampler.sample_tokens(*many), new.sample_tokens(*many))
    assert torch.equal(list(sampler.stream(*many))[-1].tokens, new.sample_tokens(*many))
    after = sampler.sample_tokens(*few)
    assert torch.equal(after, new.sample_tokens(*few)) and not torch.equal(after, before)


def test_too_little_memory_for_the_copy(make_generator: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator()
    few, many = ([0], [0]), ([0] * 9, range(9))
    needed = memory_needed(generator.config, 16, False, torch.float32, "fp8")
    assert memory_needed(generator.config, 8, False, torch.float32, "fp8").widened == 0
    assert memory_needed(generator.config, 8, True, torch.float32, "fp8").widened == needed.widened > 0
    sampler = Sampler(generator, backend="fused", weights="fp8")
    monkeypatch.setattr(captured, "free_memory", lambda device: sum(needed) - 1)
    with pytest.raises(torch.OutOfMemoryError, match="weights and buffers for 16 images"):
        sampler.sample_tokens(*many)
    # Plain PyTorch has no such copy.
    Sampler(generator, backend="graph", weights="fp8").sample_tokens(*many)
    sampler.sample_tokens(*few)
    monkeypatch.setattr(captured, "free_memory", lambda device: needed.widened + needed.batch - 1)
    with pytest.raises(torch.OutOfMemoryError, match="weights for many rows and buffers for 16 images"):
        sampler.sample_tokens(*many)
    sampler.sample_tokens(*few)
    monkeypatch.setattr(captured, "free_memory", lambda device: needed.widened + needed.batch)
    expected = sampler.sample_tokens(*many)
    # The copy is there now.
    monkeypatch.setattr(captured, "free_memory", lambda device: needed.batch)
    assert torch.equal(sampler.sample_tokens(*many), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("group", "images", "guided"), [(1, 1, False), (4, 8, True)])
def test_memory_needed_is_what_is_allocated(
    make_generator: Make, dtype: torch.dtype, group: int, images: int, guided: bool
) -> None:
    generator = make_generator(group=group).to(dtype)
    config = generator.config
    weights, tables = pack(generator, "fp8"), class_tables(generator)
    batch = captured._Batch(weights, tables, images, guided, captured.STEPS["graph"])
    needed, plain = (memory_needed(config, images, guided, dtype, kind) for kind in ("fp8", "same"))
    assert needed.weights == bytes_of(weights, tables)
    wide = widened(weights)
    copied = sum(getattr(wide, name).nbytes for name in MATRICES)
    assert needed.widened == (copied if images * (1 + guided) * group > MAX_ROWS else 0) and plain.widened == 0
    # The largest matrix, as the plain twin of its product has it.
    largest = max(4 * config.width, config.codebook_size) * config.width * max(4, dtype.itemsize)
    assert needed.batch - plain.batch == largest
    attention = images * (1 + guided) * 3 * config.tokens * config.width * max(4, dtype.itemsize)
    assert 0 <= needed.batch - attention - largest - bytes_of(batch, batch.state) <= 2**24


def test_less_memory_is_told(make_generator: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator()
    needed, plain = (sum(memory_needed(generator.config, 1, False, torch.float32, kind)) for kind in ("fp8", "same"))
    assert needed < plain
    monkeypatch.setattr(captured, "free_memory", lambda device: needed)
    assert Sampler(generator, weights="fp8").sample_tokens([0], [0]).shape == (1, 8)
    with pytest.raises(torch.OutOfMemoryError, match="weights and buffers for 1 images"):
        Sampler(generator, backend="graph").sample_tokens([0], [0])


# The choice


def test_what_is_refused(generator: SpectralGenerator) -> None:
    with pytest.raises(ValueError, match="weights must be one of same, fp8, not 'int8'"):
        Sampler(generator, weights="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights fp8 are for the backends graph, fused and auto, not reference"):
        Sampler(generator, backend="reference", weights="fp8")


def test_choice_on_a_cpu(generator: SpectralGenerator) -> None:
    sampler = Sampler(generator, weights="fp8")
    assert sampler.backend == "graph" and sampler.weights == "fp8"
    assert sampler.backend_reason == "the one for fp8 weights here, though nothing is recorded on cpu"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_choice_on_a_gpu(
    generator: SpectralGenerator, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(SpectralGenerator, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert choose_backend(generator, "graph", "fp8")[0] == "graph"
    assert choose_backend(generator, "auto")[0] == "fused"
    asked: list[BackendName] = ["auto", "fused"]
    for backend in asked:
        if capability >= (8, 9):
            assert choose_backend(generator, backend, "fp8")[0] == "fused"
            continue
        message = (
            "weights fp8 cannot be used by the fused kernels: fp8 weights need a GPU of compute capability 8.9 or "
            f"above (Ada, Hopper), and Some GPU has 8.{capability[1]}; use weights same, or backend graph"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            choose_backend(generator, backend, "fp8")


# The report


def test_errors_of_weights_and_of_distributions(generator: SpectralGenerator) -> None:
    tokens = Sampler(generator).sample_tokens(CLASSES, SEEDS)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    found = weight_error(generator, CLASSES, tokens)
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items()), "nothing changes"
    assert tuple(found.matrices) == MATRICES
    # Three bits of mantissa: a normal distribution's numbers are off by 2.6 % in the mean square.
    assert all(0.024 < error < 0.028 for error in found.matrices.values())
    rounded = copy.deepcopy(generator)
    round_to_fp8(rounded)
    with torch.no_grad():
        classes = torch.tensor(CLASSES)
        own, other = (torch.distributions.Categorical(logits=m(classes, tokens)) for m in (generator, rounded))
    divergence = torch.distributions.kl_divergence(own, other)
    assert found.positions == divergence.numel() == 40
    assert found.divergence == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert found.worst_divergence == pytest.approx(float(divergence.max()), rel=1e-3)
    assert found.entropy == pytest.approx(float(own.entropy().mean()), rel=1e-4)
    assert found.unlike == pytest.approx(float((own.probs - other.probs).clamp_min(0).sum(-1).mean()), rel=1e-3)
    assert found.unlike_best == pytest.approx(float((own.probs.argmax(-1) != other.probs.argmax(-1)).float().mean()))
    assert 0 < found.divergence < found.worst_divergence and 0 < found.unlike < 1
    # Rounded once more, nothing is left to round.
    again = weight_error(rounded, CLASSES, tokens)
    assert max(again.matrices.values()) < 1e-6 and again.worst_divergence < 1e-6 and again.unlike_best == 0


def test_many_sequences_in_parts(generator: SpectralGenerator) -> None:
    tokens = torch.randint(32, (35, 8))
    found = weight_error(generator.bfloat16(), [0] * 35, tokens)
    assert found.positions == 35 * 8
    first, last = (weight_error(generator, [0] * len(part), part) for part in (tokens[:20], tokens[20:]))
    assert found.divergence == pytest.approx((20 * first.divergence + 15 * last.divergence) / 35, rel=1e-3)
    assert found.worst_divergence == pytest.approx(max(first.worst_divergence, last.worst_divergence), rel=1e-2)
    with pytest.raises(ValueError, match="classes must be one or more"):
        weight_error(generator, [], tokens[:0])


def test_the_command_reports_them(model: SpectralAR, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = str(model.save_pretrained(tmp_path / "model"))
    loaded = SpectralAR.from_pretrained(saved, weights="fp8")
    assert (loaded.weights, loaded.backend) == ("fp8", "graph")
    arguments = ["sample", "--model", saved, "--columns", "1", "--device", "cpu", "--out", str(tmp_path / "out.png")]
    assert main([*arguments, "--weights", "fp8"]) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "backend graph (the one for fp8 weights" in shown
    assert "fp8 weights: off by qkv 2." in shown and "over 24 next tokens the distribution moves by KL" in shown
    assert main(arguments) == 0
    assert "fp8" not in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 8, 33])
def test_draws_on_a_gpu(make_generator: Make, dtype: torch.dtype, batch: int) -> None:
    """In few and many rows as the fp64 model with the same weights draws, but for near ties."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    generator = make_generator(depth=4, tokens=16, codebook_size=512).to("cuda", dtype)
    classes, seeds = [i % 4 for i in range(batch)], list(range(batch))
    exact = copy.deepcopy(generator).double()
    round_to_fp8(exact)
    unlike = {}
    for name, sampler in {
        "fused": Sampler(generator, weights="fp8"),
        "graph": Sampler(generator, backend="graph", weights="fp8"),
        "plain": Sampler(copy.deepcopy(exact).to(dtype), backend="reference"),
    }.items():
        tokens = sampler.sample_tokens(classes, seeds, SamplingSettings(guidance=2.5))
        assert torch.equal(sampler.sample_tokens(classes, seeds, SamplingSettings(guidance=2.5)), tokens), (
            "bitwise repeatable"
        )
        unlike[name] = differing(exact, tokens, classes, seeds, SamplingSettings(guidance=2.5)).count
    assert max(unlike["fused"], unlike["graph"]) <= 2 * unlike["plain"] + 10
