"""Recorded backends against the reference; on a CPU the same code runs unrecorded."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralar.cli import main
from spectralar.config import generator_preset
from spectralar.generator import SpectralGenerator
from spectralar.images import to_uint8
from spectralar.kernels.decode import DecodeState
from spectralar.pipeline import SpectralAR
from spectralar.sampling import BUCKETS, BackendName, Sampler, SamplingSettings, captured, memory_needed
from spectralar.sampling import sampler as sampler_module
from spectralar.sampling.captured import CapturedBackend, CapturedPixels, bucket
from spectralar.sampling.graphs import Pool
from spectralar.sampling.packing import class_tables, pack
from spectralar.sampling.sampler import choose_backend
from spectralar.tokenizer import SpectralTokenizer
from tests.spectralar.differing import Differing, differing

Make = Callable[..., Any]
CPU = torch.device("cpu")
CLASSES, SEEDS = [0, 2, 2, 3, 1], [11, 5, 2**62, -4, 0]
GUIDED = SamplingSettings(guidance=2.5, top_k=20, top_p=0.95, temperature=1.3)
SETTINGS = [SamplingSettings(), GUIDED, SamplingSettings(guidance=0.0, greedy=True)]
CAPTURED: list[BackendName] = ["graph", "fused"]


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (captured, sampler_module):
        monkeypatch.setattr(module, "BUCKETS", (1, 2, 4))
    monkeypatch.setattr(captured, "PIXEL_BATCH", 4)


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Images and rows of every batch whose buffers are allocated."""
    found, allocate = [], DecodeState.allocate

    def spy(weights: Any, images: int, rows: int) -> DecodeState:
        found.append((images, rows))
        return allocate(weights, images, rows)

    monkeypatch.setattr(DecodeState, "allocate", staticmethod(spy))
    yield found


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backend", CAPTURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("changes", [{"group": 1}, {"group": 4}, {"group": 8, "token_input": "code"}])
def test_tokens_are_the_reference_s(
    make_generator: Make, changes: dict[str, Any], dtype: torch.dtype, backend: BackendName
) -> None:
    """Five images, filled up to eight, whose buffers hold NaN where nothing was written."""
    generator = make_generator(**changes).to(dtype)
    reference, sampler = Sampler(generator, backend="reference"), Sampler(generator, backend=backend)
    for settings in SETTINGS:
        expected = reference.sample_tokens(CLASSES, SEEDS, settings)
        assert torch.equal(sampler.sample_tokens(CLASSES, SEEDS, settings), expected)
        for given in (0, 3, 8):
            prefix = (expected[:, :given] + 9) % 32
            forced = reference.sample_tokens(CLASSES, SEEDS, settings, prefix=prefix)
            assert torch.equal(sampler.sample_tokens(CLASSES, SEEDS, settings, prefix=prefix), forced)
        for length in (1, 6):
            assert torch.equal(sampler.sample_tokens(CLASSES, SEEDS, settings, length=length), expected[:, :length])


def test_an_image_is_the_same_in_any_bucket(generator: SpectralGenerator) -> None:
    sampler = Sampler(generator, backend="graph")
    together = sampler.sample_tokens(CLASSES, SEEDS, GUIDED)
    assert len({tuple(row) for row in together.tolist()}) == 5
    # Larger batches before leave their classes and seeds in rows that are filled up.
    for rows in ([0], [3], [1, 2], [0, 1, 2], [4, 3, 2, 1, 0]):
        found = sampler.sample_tokens([CLASSES[i] for i in rows], [SEEDS[i] for i in rows], GUIDED)
        assert torch.equal(found, together[rows])


def test_buckets(make_generator: Make, allocated: list[tuple[int, int]]) -> None:
    assert [bucket(n) for n in (0, 1, 2, 3, 5, 64, 65, 97, 129, 1000, 1024)] == [
        1, 1, 2, 4, 8, 64, 96, 128, 192, 1024, 1024,
    ]  # fmt: skip
    assert list(BUCKETS) == sorted(set(BUCKETS))
    sampler = Sampler(make_generator(), backend="graph")
    for batch in (0, 1, 3, 4):
        assert sampler.sample_tokens([0] * batch, range(batch), length=1).shape == (batch, 1)
    sampler.sample_tokens([0] * 3, range(3), GUIDED, length=1)
    assert allocated == [(1, 1), (4, 4), (4, 8)], "buffers are kept, and only guidance has unconditional rows"


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("backend", ["reference", "graph"])
def test_lists_of_any_length(model: SpectralAR, backend: BackendName, allocated: list[tuple[int, int]]) -> None:
    sampler = Sampler(model.generator, model.tokenizer, backend=backend)
    classes, seeds = [i % 3 for i in range(10)], list(range(10))
    single = torch.cat([sampler.sample_tokens([c], [s]) for c, s in zip(classes, seeds, strict=True)])
    allocated.clear()
    assert torch.equal(sampler.sample_tokens(classes, seeds), single)
    if backend == "graph":
        assert allocated == [(4, 4), (2, 2)], "one batch after the other"
    allocated.clear()
    steps = list(sampler.stream(classes, seeds))
    assert [step.tokens.shape for step in steps] == [(10, n) for n in range(1, 9)]
    assert all(torch.equal(step.tokens, single[:, : step.tokens.shape[1]]) for step in steps)
    if backend == "graph":
        assert allocated == [(4, 4)], "two batches of four side by side, of which one has its buffers already"
    assert sampler.generate(classes, seeds, length=3).shape == (10, 3, 32, 32)


def test_streams_do_not_disturb_each_other(generator: SpectralGenerator, allocated: list[tuple[int, int]]) -> None:
    sampler = Sampler(generator, backend="graph")
    expected = [sampler.sample_tokens([0, 1], [s, s]) for s in (1, 2)]
    assert allocated == [(2, 2)]
    streams = [sampler.stream([0, 1], [s, s]) for s in (1, 2)]
    for n in range(1, 9):
        for stream, tokens in zip(streams, expected, strict=True):
            assert torch.equal(next(stream).tokens, tokens[:, :n])
    assert allocated == [(2, 2), (2, 2)]
    held = [step.tokens for step in sampler.stream([0, 1], [1, 1])]
    sampler.sample_tokens([0, 1], [2, 2])
    assert all(torch.equal(tokens, expected[0][:, : tokens.shape[1]]) for tokens in held), "what was given stays"
    # A stream that is left half way gives its buffers back, and one that is never read has none.
    for _ in range(3):
        next(sampler.stream([0, 1], [1, 1]))
        sampler.stream([0, 1], [1, 1])
    assert len(allocated) == 2


def test_threads_share_a_sampler(generator: SpectralGenerator) -> None:
    sampler = Sampler(generator, backend="graph")
    expected = [sampler.sample_tokens([0, 1], [s, s], GUIDED) for s in range(4)]
    found: dict[int, Tensor] = {}

    def draw(seed: int) -> None:
        found[seed] = sampler.sample_tokens([0, 1], [seed, seed], GUIDED)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[s], expected[s]) for s in range(4))


def test_differing_draws_are_measured(make_generator: Make) -> None:
    generator, settings = make_generator(), SamplingSettings(guidance=2.5)
    classes, seeds = [0, 1, 2, 3] * 8, list(range(32))
    exact = Sampler(generator.double(), backend="graph").sample_tokens(classes, seeds, settings)
    assert differing(generator, exact, classes, seeds, settings) == Differing(0, 0.0, 0.0, 0.0)
    wrong = exact.clone()
    wrong[3, -1] = (wrong[3, -1] + 1) % 32
    found = differing(generator, wrong, classes, seeds, settings)
    assert found.count == 1 and found.share == 1 / 256 and found.gap > 0 < found.gap_of_probability
    # In bf16 draws differ where they are nearly ties.
    generator.bfloat16()
    for backend in ("reference", "graph"):
        rounded = Sampler(generator, backend=backend).sample_tokens(classes, seeds, settings)
        found = differing(generator, rounded, classes, seeds, settings)
        print(backend, found)
        assert found.share < 0.1 and found.gap < 0.3


def change_in_place(generator: SpectralGenerator) -> None:
    with torch.no_grad():
        generator.blocks[0].fc1.weight.mul_(-1)  # type: ignore[union-attr, operator]


def change_of_a_class(generator: SpectralGenerator) -> None:
    with torch.no_grad():
        generator.class_table.weight[0].neg_()


def replaced_parameter(generator: SpectralGenerator) -> None:
    generator.head.weight = torch.nn.Parameter(generator.head.weight.detach().flip(0).clone())


def replaced_module(generator: SpectralGenerator) -> None:
    generator.head = torch.nn.Linear(generator.config.width, generator.config.codebook_size)


def new_data(generator: SpectralGenerator) -> None:
    generator.positions.data = generator.positions.data.flip(0).clone()


def loaded(generator: SpectralGenerator) -> None:
    generator.load_state_dict({name: value.roll(1, 0) for name, value in generator.state_dict().items()}, assign=True)


def other_dtype(generator: SpectralGenerator) -> None:
    generator.double()


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_of_a_class, replaced_parameter, replaced_module, new_data, loaded, other_dtype],
)
def test_changed_weights_are_noticed(generator: SpectralGenerator, change: Callable[[SpectralGenerator], None]) -> None:
    sampler = Sampler(generator, backend="graph")
    before = sampler.sample_tokens(CLASSES, SEEDS, GUIDED)
    change(generator)
    after = sampler.sample_tokens(CLASSES, SEEDS, GUIDED)
    assert torch.equal(after, Sampler(generator, backend="reference").sample_tokens(CLASSES, SEEDS, GUIDED))
    assert change is other_dtype or not torch.equal(after, before)


def test_unchanged_weights_are_packed_once(generator: SpectralGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(captured, "pack", lambda *given: calls.append(given) or pack(*given))
    sampler = Sampler(generator, backend="graph")
    for settings in SETTINGS:
        sampler.sample_tokens(CLASSES, SEEDS, settings)
    assert len(calls) == 1


def test_models_made_in_inference_mode(make_generator: Make) -> None:
    with torch.inference_mode():
        generator = make_generator()
    for backend in ("reference", "graph"):
        assert Sampler(generator, backend=backend).sample_tokens([0], [1]).shape == (1, 8)


def test_settings_in_turn(generator: SpectralGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More kinds of settings than a batch keeps recorded steps for."""
    monkeypatch.setattr(captured, "_KINDS", 2)
    reference, sampler = Sampler(generator, backend="reference"), Sampler(generator, backend="graph")
    several = [*SETTINGS, SamplingSettings(top_k=3), SamplingSettings(guidance=4.0, guidance_schedule="cosine")]
    for settings in (*several, *several):
        expected = reference.sample_tokens(CLASSES, SEEDS, settings)
        assert torch.equal(sampler.sample_tokens(CLASSES, SEEDS, settings), expected)


def test_all_steps_at_once_and_one_by_one(make_generator: Make) -> None:
    generator = make_generator(group=2)
    expected = Sampler(generator, backend="reference").sample_tokens([0, 1], [2, 3], GUIDED)
    arguments = torch.tensor([0, 1]), torch.tensor([2, 3]), GUIDED, torch.empty(2, 0, dtype=torch.int64)
    backend = CapturedBackend(generator, "graph", Pool(CPU))
    found = [tokens.clone() for tokens in backend.steps(*arguments)]
    assert [tokens.shape[1] for tokens in found] == [2, 4, 6, 8]
    assert torch.equal(found[-1], expected) and torch.equal(backend.draw(*arguments), expected)


# Pixels


@pytest.mark.parametrize("backend", CAPTURED)
def test_pictures(model: SpectralAR, monkeypatch: pytest.MonkeyPatch, backend: BackendName) -> None:
    sampler = Sampler(model.generator, model.tokenizer, backend=backend)
    for length in (8, 3):
        tokens = sampler.sample_tokens(CLASSES, SEEDS, length=length)
        found = sampler.generate(CLASSES, SEEDS, length=length)
        with torch.no_grad():
            expected = to_uint8(model.tokenizer.decode(tokens))
        assert found.dtype == torch.uint8 and found.shape == expected.shape
        # Sums of another batch size may be rounded differently.
        assert (found.int() - expected.int()).abs().max() <= 1
    monkeypatch.setattr(captured, "PIXEL_BATCH", 2)
    assert (sampler.generate(CLASSES, SEEDS, length=3).int() - expected.int()).abs().max() <= 1
    assert sampler.generate([], []).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("replace", [True, False])
def test_pictures_of_changed_weights(model: SpectralAR, replace: bool) -> None:
    sampler = Sampler(model.generator, model.tokenizer, backend="graph")
    before = sampler.generate([0], [0])
    with torch.no_grad():
        weight = model.tokenizer.decoder.from_code.weight
        if replace:
            model.tokenizer.decoder.from_code.weight = torch.nn.Parameter(-weight)
        else:
            weight.neg_()
    after = sampler.generate([0], [0])
    assert not torch.equal(after, before)
    expected = Sampler(model.generator, model.tokenizer, backend="reference").generate([0], [0])
    assert (after.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("in_place", [True, False])
def test_pictures_behind_proxy_codes(make_tokenizer: Callable[..., SpectralTokenizer], in_place: bool) -> None:
    """By the decoder made for sampling; in fp64, as an untrained decoder multiplies rounding errors."""
    tokenizer = make_tokenizer(pixel_head="vqgan", patch_size=16).double()
    pixels = CapturedPixels(tokenizer, Pool(tokenizer.device))
    tokens = torch.randint(32, (3, 5), generator=torch.Generator().manual_seed(4))
    seen = []
    for _ in range(2):
        with torch.no_grad():
            expected = to_uint8(tokenizer.decode(tokens))
        assert (pixels(tokens).int() - expected.int()).abs().max() <= 1
        seen.append(expected)
        with torch.no_grad():
            weight = tokenizer.decoder.head.vqgan.conv_in.weight
            if in_place:
                weight.neg_()
            else:
                tokenizer.decoder.head.vqgan.conv_in.weight = torch.nn.Parameter(-weight)
    assert not torch.equal(*seen)


# Memory


def bytes_of(*holders: Any) -> int:
    return sum(tensor.nbytes for holder in holders for tensor in vars(holder).values() if isinstance(tensor, Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("group", "images", "guided"), [(1, 1, False), (1, 4, True), (4, 8, True)])
def test_memory_needed_is_what_is_allocated(
    make_generator: Make, dtype: torch.dtype, group: int, images: int, guided: bool
) -> None:
    generator = make_generator(group=group).to(dtype)
    weights, tables = pack(generator), class_tables(generator)
    batch = captured._Batch(weights, tables, images, guided, captured.STEPS["graph"])
    needed = memory_needed(generator.config, images, guided, dtype)
    assert needed.weights == bytes_of(weights, tables)
    rows = images * (1 + guided)
    copies = rows * 3 * generator.config.tokens * generator.config.width * max(4, dtype.itemsize)
    assert 0 <= needed.batch - copies - bytes_of(batch, batch.state) <= 2**24


def test_a_thousand_guided_images_of_d16_fit_on_80_gb() -> None:
    needed = memory_needed(generator_preset("d16"), 1024, True)
    assert sum(needed) < 15e9
    cache = 2 * 2048 * 16 * 64 * 1024 * 2
    assert needed.batch > cache


def test_too_little_memory(make_generator: Make, monkeypatch: pytest.MonkeyPatch, allocated: list[Any]) -> None:
    generator = make_generator()
    needed = memory_needed(generator.config, 4, True, torch.float32)
    monkeypatch.setattr(captured, "free_memory", lambda device: sum(needed) - 1)
    sampler = Sampler(generator, backend="graph")
    message = r"weights and buffers for 4 images at once need [\d,]+ MiB, but [\d,]+ MiB are free on cpu"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        sampler.sample_tokens([0] * 3, range(3), GUIDED)
    assert not allocated
    # Without guidance there are half as many rows.
    sampler.sample_tokens([0] * 3, range(3))
    monkeypatch.setattr(captured, "free_memory", lambda device: needed.batch - 1)
    with pytest.raises(torch.OutOfMemoryError, match="buffers for 4 images at once need"):
        next(sampler.stream([0] * 4, range(4), GUIDED))
    monkeypatch.setattr(captured, "free_memory", lambda device: math.inf)
    assert sampler.sample_tokens([0] * 3, range(3), GUIDED).shape == (3, 8)


def test_a_pool_makes_room() -> None:
    pool, made = Pool(CPU, keep=2), []

    def make(name: str, room: int = 10) -> Callable[[], str]:
        def call() -> str:
            if len(pool._idle) >= room:
                raise torch.OutOfMemoryError("full")
            made.append(name)
            return name

        return call

    for name in "abab":
        with pool.take(name, make(name)) as held:
            assert held == name
    assert made == ["a", "b"], "idle ones are used again"
    with pool.take("a", make("a")), pool.take("a", make("a2")) as other:
        assert other == "a2", "never two at once"
    assert [held for _, held in pool._idle] == ["a2", "a"], "those used last stay"
    with pool.take("c", make("c", room=1)) as held:
        assert held == "c" and not pool._idle, "idle ones give way"
    with pytest.raises(torch.OutOfMemoryError, match="full"), pool.take("d", make("d", room=0)):
        pass
    assert not pool._idle, "what did not fit has emptied the pool"
    with pytest.raises(KeyError), pool.take("e", make("e")):
        raise KeyError
    assert [held for _, held in pool._idle] == ["e"], "a run that fails gives it back"


# The choice


@pytest.mark.parametrize("asked", ["auto", "reference", "graph", "fused"])
def test_choice_on_a_cpu(generator: SpectralGenerator, asked: BackendName) -> None:
    sampler = Sampler(generator, backend=asked)
    assert sampler.backend == ("reference" if asked == "auto" else asked)
    expected = "graphs and kernels need a GPU, and the generator is on cpu" if asked == "auto" else "asked for; nothing"
    assert sampler.backend_reason.startswith(expected)


@pytest.mark.parametrize(
    ("changes", "dtype", "capability", "obstacle"),
    [
        ({}, torch.bfloat16, (9, 0), ""),
        ({}, torch.float32, (8, 0), ""),
        ({}, torch.float64, (9, 0), "weights must be bfloat16, float16 or float32, not torch.float64"),
        ({"tokens": 257}, torch.bfloat16, (9, 0), "tokens must be at most 256, not 257"),
        ({"tokens": 64, "group": 32}, torch.bfloat16, (9, 0), "group must be at most 16, not 32"),
        ({}, torch.bfloat16, (7, 5), "Tesla T4 is older than the A100"),
    ],
)
def test_choice_on_a_gpu(
    make_generator: Make,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    dtype: torch.dtype,
    capability: tuple[int, int],
    obstacle: str,
) -> None:
    generator = make_generator(**changes).to(dtype)
    monkeypatch.setattr(SpectralGenerator, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    backend, reason = choose_backend(generator, "auto")
    assert backend == ("graph" if obstacle else "fused") and reason.endswith(obstacle or "the fastest on a GPU")
    assert choose_backend(generator, "graph") == ("graph", "asked for")
    if obstacle:
        with pytest.raises(ValueError, match=re.escape(f"backend fused cannot run this generator: {obstacle}")):
            choose_backend(generator, "fused")
    else:
        assert choose_backend(generator, "fused") == ("fused", "asked for")


def test_the_choice_is_logged_and_follows_the_generator(
    generator: SpectralGenerator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "spectralar")
    sampler = Sampler(generator)
    sampler.sample_tokens([0], [0], length=1)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("sampling backend reference: graphs and kernels")
    generator.double()
    sampler.sample_tokens([0], [0], length=1)
    assert len(caplog.messages) == 2


def test_warm(model: SpectralAR, allocated: list[tuple[int, int]]) -> None:
    sampler = Sampler(model.generator, model.tokenizer, backend="graph")
    assert sampler.warm([1, 3], GUIDED) > 0
    sampler.generate([0] * 4, range(4), GUIDED)
    assert allocated == [(1, 2), (4, 8)]


@pytest.mark.parametrize(
    ("asked", "shown"), [("auto", "backend reference (graphs and"), ("graph", "backend graph (asked for;")]
)
def test_the_command_says_which_backend_it_uses(
    model: SpectralAR, tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: str, shown: str
) -> None:
    saved = str(model.save_pretrained(tmp_path / "model"))
    arguments = ["sample", "--model", saved, "--columns", "1", "--device", "cpu", "--out", str(tmp_path / "out.png")]
    assert main([*arguments, "--backend", asked]) == 0
    assert shown in " ".join(capsys.readouterr().err.split())
