"""Whole runs as functions: shards to tokenizer to tokens to generator, and everything that is refused beforehand."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from spectralar.config import GeneratorConfig, TokenizerConfig, from_dict, to_dict
from spectralar.generator import SpectralGenerator
from spectralar.sampling import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Crop, LoaderConfig, TokenStore, TokenWriter, evaluation_batches
from spectralar.training.journal import read_log
from spectralar.training.loop import LoopConfig
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.presets import GENERATOR_RUNS, TOKENIZER_RUNS
from spectralar.training.runs import (
    GeneratorRun,
    TokenizerRun,
    fitted,
    train_generator,
    train_tokenizer,
    validation_images,
    weights_digest,
)
from spectralar.training.tokenizing import tokenize

OPTIMIZER = OptimizerConfig(lr=1e-3, warmup=2)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def loop(out: Path, steps: int) -> LoopConfig:
    return LoopConfig(out=str(out), steps=steps, device="cpu", log_every=2, validate_every=0, picture_every=0)


@pytest.fixture
def tokenizer_run(photo_shards: Path, tokenizer_config: TokenizerConfig, tmp_path: Path) -> TokenizerRun:
    return TokenizerRun(
        model=tokenizer_config,
        data=LoaderConfig(str(photo_shards / "train"), batch=4, crop=Crop(16, "random", resize=18)),
        optimizer=OPTIMIZER,
        loop=loop(tmp_path / "tokenizer", 4),
        validation=str(photo_shards / "val"),
        pictured=2,
    )


@pytest.fixture
def saved(tokenizer: SpectralTokenizer, tmp_path: Path) -> Path:
    return tokenizer.save_pretrained(tmp_path / "saved")


@pytest.fixture
def store(tokenizer: SpectralTokenizer, photo_shards: Path, tmp_path: Path) -> TokenStore:
    data = LoaderConfig(str(photo_shards / "train"), batch=5, crop=Crop(16, "random", resize=18))
    return tokenize(tokenizer, data, tmp_path / "store", crops=2, console=quiet())


@pytest.fixture
def generator_run(store: TokenStore, saved: Path, generator_config: GeneratorConfig, tmp_path: Path) -> GeneratorRun:
    return GeneratorRun(
        model=replace(generator_config, tokens=64, codebook_size=4096, classes=1000, class_names=()),
        tokens=str(store.path),
        batch=4,
        optimizer=OPTIMIZER,
        loop=loop(tmp_path / "generator", 4),
        tokenizer=str(saved),
        pictured=(1, 0),
        sampling=SamplingSettings(guidance=2.0, top_k=8),
    )


def test_tokenizer_then_tokens_then_generator(
    tokenizer_run: TokenizerRun, generator_config: GeneratorConfig, photo_shards: Path, tmp_path: Path
) -> None:
    final = train_tokenizer(tokenizer_run, console=quiet())
    assert final == tmp_path / "tokenizer" / "final"
    records = read_log(tmp_path / "tokenizer")
    assert [r["step"] for r in records] == [2, 4, 4] and records[-1]["val_images"] == 10
    assert (tmp_path / "tokenizer" / "pictures" / "step-00000004.png").exists()

    tokenizer = SpectralTokenizer.from_pretrained(final)
    stores = {}
    for name in ("train", "val"):
        data = replace(tokenizer_run.data, path=str(photo_shards / name))
        stores[name] = tokenize(tokenizer, data, tmp_path / name, crops=3 if name == "train" else 1, console=quiet())
    run = GeneratorRun(
        model=generator_config,
        tokens=str(tmp_path / "train"),
        batch=8,
        optimizer=OPTIMIZER,
        loop=loop(tmp_path / "generator", 4),
        validation=str(tmp_path / "val"),
        tokenizer=str(final),
        pictured=(0, 1),
        sampling=SamplingSettings(),
    )
    generator = SpectralGenerator.from_pretrained(train_generator(run, console=quiet()))
    assert generator.config == fitted(generator_config, stores["train"])
    last = read_log(tmp_path / "generator")[-1]
    assert last["step"] == 4 and len(last["val_loss_by_position"]) == 4
    assert (tmp_path / "generator" / "best" / "model.safetensors").exists()
    assert (tmp_path / "generator" / "pictures" / "step-00000004.png").exists()


def test_the_seed_decides_the_run(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    digests = []
    for i, seed in enumerate((3, 3, 4)):
        torch.manual_seed(i)
        run = replace(tokenizer_run, loop=replace(loop(tmp_path / str(i), 2), seed=seed), validation="")
        digests.append(weights_digest(SpectralTokenizer.from_pretrained(train_tokenizer(run, console=quiet()))))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [0]), (3, [0, 4, 8]), (7, [0, 2, 4, 6, 8]), (10, range(10)), (99, range(10))]
)
def test_validation_images_are_spread_over_the_set(photo_shards: Path, limit: int, expected: list[int]) -> None:
    """Of ten images: every stride-th, never more than the limit."""
    (everything,) = evaluation_batches(photo_shards / "val", batch=10, size=16)
    batches = list(validation_images(str(photo_shards / "val"), 16, limit, batch=4))
    assert torch.equal(torch.cat([b.images for b in batches]), everything.images[list(expected)])
    assert torch.equal(torch.cat([b.labels for b in batches]), everything.labels[list(expected)])
    assert len(expected) <= limit and max(len(b.images) for b in batches) <= 4


def test_fitted_takes_only_what_the_store_says(token_store: TokenStore, generator_config: GeneratorConfig) -> None:
    other = replace(generator_config, tokens=8, group=2, codebook_size=99, classes=5, class_names=())
    assert fitted(other, token_store) == replace(generator_config, group=2)
    with pytest.raises(ValueError, match="group must divide tokens 4, not 8"):
        fitted(replace(other, group=8), token_store)


def test_weights_digest_sees_every_weight(tokenizer: SpectralTokenizer) -> None:
    before = weights_digest(tokenizer)
    assert before == weights_digest(tokenizer)
    with torch.no_grad():
        tokenizer.codebook[3, 2] += 1e-6
    assert weights_digest(tokenizer) != before


def test_a_tokenizer_run_refuses(tokenizer_run: TokenizerRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.crop\.size must be model\.image_size 16, not 12"):
        replace(tokenizer_run, data=replace(tokenizer_run.data, crop=Crop(12)))
    with pytest.raises(ValueError, match="validation_images must be at least 1, not 0"):
        replace(tokenizer_run, validation_images=0)
    with pytest.raises(
        ValueError, match=r"data\.path must name a folder of shards \(make one with `spectralar shards`\)"
    ):
        train_tokenizer(replace(tokenizer_run, data=replace(tokenizer_run.data, path="")))
    with pytest.raises(ValueError, match="nowhere"):
        train_tokenizer(replace(tokenizer_run, data=replace(tokenizer_run.data, path=str(tmp_path / "nowhere"))))
    with pytest.raises(ValueError, match="nowhere"):
        train_tokenizer(replace(tokenizer_run, validation=str(tmp_path / "nowhere")), console=quiet())
    with pytest.raises(ValueError, match="16 samples, less than one global batch of 17"):
        train_tokenizer(replace(tokenizer_run, data=replace(tokenizer_run.data, batch=17)))
    assert not (tmp_path / "tokenizer").exists()


def other_store(path: Path, codebook_size: int = 16, digest: str = "") -> str:
    with TokenWriter(
        path, tokens=4, codebook_size=codebook_size, class_names=("dusk", "noon"), tokenizer_digest=digest
    ) as writer:
        writer.append(torch.zeros(4, 4, dtype=torch.int64), torch.arange(4) % 2)
    return str(path)


CASES: dict[str, tuple[Callable[[GeneratorRun, Path], GeneratorRun], str]] = {
    "no tokens": (lambda run, _: replace(run, tokens=""), "tokens must name a token store .make one with `spectralar"),
    "tokens nowhere": (lambda run, tmp: replace(run, tokens=str(tmp / "nowhere")), "nowhere is no token store"),
    "codes without tokenizer": (
        lambda run, _: replace(run, model=replace(run.model, token_input="code", code_dim=4), tokenizer=""),
        'tokenizer must name a saved tokenizer, which gives token_input="code" its codes',
    ),
    "other code_dim": (
        lambda run, _: replace(run, model=replace(run.model, token_input="code", code_dim=5)),
        r"codebook must have shape \[16, 5\], not \[16, 4\]",
    ),
    "validation nowhere": (lambda run, tmp: replace(run, validation=str(tmp / "nowhere")), "nowhere is no token store"),
    "validation of other codes": (
        lambda run, tmp: replace(run, validation=other_store(tmp / "other", 32)),
        "validation .*other has other tokens, codes or classes than .*store",
    ),
    "validation of another tokenizer": (
        lambda run, tmp: replace(run, validation=other_store(tmp / "other", digest="abc"), tokenizer=""),
        "the tokens of .*other come from another tokenizer than .*store",
    ),
    "tokens of another tokenizer": (
        lambda run, tmp: replace(run, tokens=other_store(tmp / "other", digest="abc")),
        "the tokens of .*other come from another tokenizer than .*saved",
    ),
    "batch too large": (lambda run, _: replace(run, batch=17), "16 samples, less than one global batch of 17"),
    "pictured": (lambda run, _: replace(run, pictured=(0, 7)), "pictured samples cannot be drawn: classes must be in"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_generator_run_refuses_before_any_work(generator_run: GeneratorRun, tmp_path: Path, case: str) -> None:
    change, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        train_generator(change(generator_run, tmp_path), console=quiet())
    assert not (tmp_path / "generator").exists()


def test_codes_come_from_the_tokenizer(generator_run: GeneratorRun, tokenizer: SpectralTokenizer) -> None:
    run = replace(generator_run, model=replace(generator_run.model, token_input="code", code_dim=4))
    generator = SpectralGenerator.from_pretrained(train_generator(run, console=quiet()))
    expected = torch.nn.functional.normalize(tokenizer.codebook.detach(), dim=-1)
    assert torch.equal(generator.codes, expected)


def test_a_store_of_no_known_tokenizer_trains(generator_run: GeneratorRun, token_store: TokenStore) -> None:
    train_generator(
        replace(generator_run, tokens=str(token_store.path), validation=str(token_store.path)), console=quiet()
    )


@pytest.mark.parametrize("name", TOKENIZER_RUNS)
def test_tokenizer_presets_survive_a_file(name: str) -> None:
    run = TOKENIZER_RUNS[name]
    assert from_dict(TokenizerRun, to_dict(run)) == run
    assert run.optimizer.warmup < run.loop.steps


@pytest.mark.parametrize("name", GENERATOR_RUNS)
def test_generator_presets_survive_a_file(name: str) -> None:
    run = GENERATOR_RUNS[name]
    assert from_dict(GeneratorRun, to_dict(run)) == run
    assert run.optimizer.warmup < run.loop.steps


@pytest.mark.parametrize("name", ["emoji", "demo-cpu", "demo-gpu"])
def test_presets_of_both_stages_fit(name: str) -> None:
    """A generator preset can draw from the tokens of the tokenizer preset of its name."""
    tokenizer, generator = TOKENIZER_RUNS[name].model, GENERATOR_RUNS[name]
    assert generator.sampling.top_k <= tokenizer.codebook_size
    assert tokenizer.tokens % generator.model.group == 0
    assert generator.model.token_input == "table" or generator.model.code_dim == tokenizer.code_dim
