"""Builds small trainers of both kinds, breaks them where a test says, and compares what they leave behind."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from spectralar.config import GeneratorConfig, TokenizerConfig, to_dict
from spectralar.generator import SpectralGenerator
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.checkpoint import load_checkpoint
from spectralar.training.data import Crop, ImageLoader, LoaderConfig, ShardSet, TokenLoader, TokenStore
from spectralar.training.generator import GeneratorTask
from spectralar.training.journal import read_log
from spectralar.training.loop import LoopConfig, Trainer
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask

Kind = Literal["tokenizer", "generator"]
Hook = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]
KINDS: tuple[Kind, ...] = ("tokenizer", "generator")
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup=3, ema=0.9)


class Bench:
    """Builds trainers of both kinds over the same small data; `console` is what the last one printed."""

    def __init__(self, shards: Path, store: TokenStore, tokenizer: TokenizerConfig, generator: GeneratorConfig) -> None:
        self.shards, self.store = shards, store
        self.tokenizer, self.generator = tokenizer, generator
        self.console = Console(file=io.StringIO(), width=500)

    def trainer(
        self,
        kind: Kind,
        out: Path,
        *,
        steps: int = 12,
        optimizer: OptimizerConfig = OPTIMIZER,
        hook: Hook | None = None,
        task: dict[str, Any] | None = None,
        **loop: Any,
    ) -> Trainer:
        """`hook(call, losses)` may change what the task's loss gives; calls count from 1."""
        settings = LoopConfig(
            **{
                "out": str(out),
                "steps": steps,
                "device": "cpu",
                "log_every": 1,
                "validate_every": 0,
                "picture_every": 0,
                "checkpoint_every": 5,
                **loop,
            }
        )
        torch.manual_seed(settings.seed)
        self.console = Console(file=io.StringIO(), width=500)
        made: Any
        loader: Any
        if kind == "tokenizer":
            crop = Crop(self.tokenizer.image_size, "random", resize=18)
            loader = ImageLoader(LoaderConfig(str(self.shards / "train"), batch=3, crop=crop, seed=5))
            made = TokenizerTask(SpectralTokenizer(self.tokenizer), TokenizerLossConfig(), **(task or {}))
        else:
            loader = TokenLoader(self.store, 5, seed=5, device=settings.resolved_device())
            made = GeneratorTask(SpectralGenerator(self.generator), **(task or {}))
        if hook is not None:
            made.loss = hooked(made.loss, hook)
        config = {"model": to_dict(made.model.config), "optimizer": to_dict(optimizer), "loop": to_dict(settings)}
        return Trainer(made, loader, optimizer, settings, config, console=self.console)

    def printed(self) -> str:
        assert isinstance(self.console.file, io.StringIO)
        return self.console.file.getvalue()


def hooked(loss: Callable[[Any], dict[str, Tensor]], hook: Hook) -> Callable[[Any], dict[str, Tensor]]:
    calls = 0

    def wrapped(batch: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return hook(calls, loss(batch))

    return wrapped


def at(call: int, action: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Hook:
    return lambda number, losses: action(losses) if number == call else losses


def damaged_copy(folder: Path, out: Path, samples: list[int]) -> Path:
    """A copy of a set of shards in which the first bytes of some images are overwritten."""
    shutil.copytree(folder, out)
    shards = ShardSet.open(out)
    for sample in samples:
        with shards.paths[shards._shards[sample]].open("r+b") as file:
            file.seek(shards._offsets[sample])
            file.write(bytes(30))
    return out


class Crash(RuntimeError):
    pass


def crash(_: dict[str, Tensor]) -> dict[str, Tensor]:
    raise Crash


def assert_same(a: Any, b: Any, where: str) -> None:
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(one: Path, two: Path, last: str = "step-00000012") -> None:
    """Last checkpoints and logs equal bit for bit; only the speed may differ."""
    a, b = (load_checkpoint(out / "checkpoints" / last) for out in (one, two))
    for name in ("step", "data", "model", "average", "optimizer", "random"):
        assert_same(getattr(a, name), getattr(b, name), name)
    logs = [
        [{k: v for k, v in r.items() if k not in ("images_per_second", "loader_wait")} for r in read_log(out)]
        for out in (one, two)
    ]
    assert_same(logs[0], logs[1], "log")


def strict_lines(out: Path) -> list[dict[str, Any]]:
    """Every line of the log as strict JSON, which knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]
