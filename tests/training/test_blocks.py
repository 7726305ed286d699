"""Compiled and recomputed blocks train as plain ones do, alone and on two ranks, and only in training."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig, from_dict, to_dict
from spectralar.generator import SpectralGenerator
from spectralar.generator.model import Block as GeneratorBlock
from spectralar.tokenizer import SpectralTokenizer
from spectralar.tokenizer.vit import Block as TokenizerBlock
from spectralar.tokenizer.vit import SpectralViT
from spectralar.training import blocks
from spectralar.training.blocks import prepare_blocks
from spectralar.training.checkpoint import checkpoints, load_checkpoint
from spectralar.training.data import TokenStore
from spectralar.training.generator import GeneratorTask
from spectralar.training.journal import read_log
from spectralar.training.loop import LoopConfig
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.runs import GeneratorRun, train_generator
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask
from tests.training.harness import KINDS, Bench, Kind, assert_same
from tests.training.jobs import Job


def trace_only() -> None:
    """Everything of torch.compile but code for the CPU, which takes a minute; graph breaks are errors all the same."""
    blocks._compiled.cache_clear()
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]


@pytest.fixture
def traced() -> Iterator[None]:
    usual = torch.compile
    trace_only()
    yield
    torch.compile = usual
    blocks._compiled.cache_clear()


def model_of(kind: Kind) -> SpectralTokenizer | SpectralGenerator:
    torch.manual_seed(0)
    if kind == "generator":
        return SpectralGenerator(GeneratorConfig(depth=2, tokens=4, codebook_size=16, classes=2))
    side = ViTConfig(32, 2, 2)
    return SpectralTokenizer(
        TokenizerConfig(image_size=16, patch_size=4, tokens=4, encoder=side, decoder=side, codebook_size=16, code_dim=4)
    )


def gradients(kind: Kind, model: Any) -> dict[str, Tensor]:
    """The loss and all gradients of a batch."""
    torch.manual_seed(1)
    task = TokenizerTask(model, TokenizerLossConfig()) if kind == "tokenizer" else GeneratorTask(model)
    images, tokens = torch.rand(3, 3, 16, 16), torch.randint(16, (3, 4))
    losses = task.loss((images if kind == "tokenizer" else tokens, torch.zeros(3, dtype=torch.int64)))
    losses["loss"].backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) > 20
    return {"loss": losses["loss"].detach(), **found}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("compiled", "checkpointing"), [(True, False), (False, True), (True, True)])
def test_gradients_are_those_of_plain_blocks(
    kind: Kind, compiled: bool, checkpointing: bool, traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = gradients(kind, model_of(kind))
    entered: list[type[nn.Module]] = []
    for part, method in (
        (TokenizerBlock, "forward"),
        (GeneratorBlock, "forward"),
        (SpectralViT, "enter"),
        (SpectralViT, "leave"),
    ):
        usual = getattr(part, method)

        def counted(self: nn.Module, *inputs: Any, usual: Any = usual) -> Tensor:
            if not torch.compiler.is_compiling():
                entered.append(type(self))
            output: Tensor = usual(self, *inputs)
            return output

        monkeypatch.setattr(part, method, counted)
    model = model_of(kind)
    names = list(model.state_dict())
    prepare_blocks(model, compiled=compiled, checkpointing=checkpointing)
    assert list(model.state_dict()) == names
    found = gradients(kind, model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    # Compiled code does not pass here, nor do blocks that nobody prepared; recomputed ones pass twice.
    of_blocks = [type(m) for m in model.modules() if isinstance(m, TokenizerBlock | GeneratorBlock)]
    of_ends = [type(m) for m in model.modules() if isinstance(m, SpectralViT)]
    assert Counter(entered) == Counter([] if compiled else 2 * (of_blocks + of_ends))


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_plain_and_copies_run_their_own_blocks(kind: Kind, traced: None) -> None:
    numbers = torch.arange(1, 8)
    images, tokens = torch.rand(7, 3, 16, 16), torch.zeros(7, 4, dtype=torch.int64)

    def run(model: Any, batch: int) -> Tensor:
        if kind == "generator":
            logits: Tensor = model(numbers[:batch] % 2, tokens[:batch])
            return logits
        pictures: Tensor = model(images[:batch], numbers[:batch].clamp(max=4)).images
        return pictures

    model = model_of(kind)
    prepare_blocks(model, compiled=True, checkpointing=False)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    fresh = model_of(kind).eval()
    assert torch.equal(run(model.eval(), 2), run(fresh, 2))
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(run(twin.eval(), 2), run(fresh, 2))
    assert not torch.equal(run(twin, 2), run(model, 2))
    torch._dynamo.reset()
    # In evaluation mode nothing is compiled: seven lengths of a batch would be seven graphs.
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in range(1, 8):
        run(model, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_checkpointing_is_the_same_to_the_bit(bench: Bench, tmp_path: Path, kind: Kind) -> None:
    for name, on in (("plain", False), ("checkpointing", True)):
        bench.trainer(kind, tmp_path / name, steps=4, checkpoint_every=4, checkpointing=on).run()
    plain, saving = (load_checkpoint(checkpoints(tmp_path / n / "checkpoints")[-1]) for n in ("plain", "checkpointing"))
    assert_same(plain.model, saving.model, "model")


@pytest.mark.parametrize("ranks_per_copy", [1, 0])
def test_two_ranks_with_both_train_as_one_without(
    ranks_per_copy: int, token_store: TokenStore, generator_config: GeneratorConfig, tmp_path: Path
) -> None:
    run = GeneratorRun(
        model=replace(generator_config, class_drop=0.0, drop_path=0.0),
        tokens=str(token_store.path),
        batch=4,
        optimizer=OptimizerConfig(lr=1e-3, warmup=3, ema=0.9, accumulation=2),
        loop=LoopConfig(out=str(tmp_path / "one"), steps=4, device="cpu", log_every=1, checkpoint_every=4),
    )
    train_generator(run)
    both = replace(run.loop, out=str(tmp_path / "two"), compile=True, checkpointing=True, ranks_per_copy=ranks_per_copy)
    Job(tmp_path / "printed", 2, train_traced, to_dict(replace(run, loop=both))).succeed()
    one, two = ([r["loss"] for r in read_log(tmp_path / name) if "loss" in r] for name in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-5)


def train_traced(run: dict[str, Any]) -> None:
    trace_only()
    train_generator(from_dict(GeneratorRun, run))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_and_captured_again_and_again(bench: Bench, tmp_path: Path, kind: Kind) -> None:
    """The second run in one process has hung once: capturing must not meet what is left of the first."""
    runs = []
    for i, (compile_, capture) in enumerate([(False, False), (True, True), (True, True)]):
        trainer = bench.trainer(
            kind, tmp_path / f"{i}", steps=8, device="cuda", precision="fp32", compile=compile_, capture=capture
        )
        trainer.run()
        runs.append([r["loss"] for r in read_log(tmp_path / f"{i}") if "loss" in r])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4) and runs[2] == pytest.approx(runs[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capture", [False, True])
def test_a_step_never_waits_for_the_device(bench: Bench, tmp_path: Path, kind: Kind, capture: bool) -> None:
    trainer = bench.trainer(kind, tmp_path, device="cuda", capture=capture, checkpointing=True)
    batches = iter(trainer.loader)
    # From pinned memory, as loaders give it.
    inputs = [t.pin_memory() if not t.is_cuda else t for t in next(batches)]
    for _ in range(5):  # kernels are compiled and the step is recorded, which does wait
        trainer.advance(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.advance(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
