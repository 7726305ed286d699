"""The training loop of both stages: step-based, resumable to the same bits on a CPU, stopped by the first bad loss."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from spectralar.devices import auto_device
from spectralar.training.capture import CapturedStep, Step
from spectralar.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)
from spectralar.training.journal import Journal, read_log
from spectralar.training.optimizer import AveragedModel, OptimizerConfig, build_optimizer, set_lr
from spectralar.weights.pretrained import Pretrained, load_strict

CHECKPOINTS, FINAL, BEST, PICTURES, CONFIG = "checkpoints", "final", "best", "pictures", "config.json"


@dataclass(frozen=True)
class LoopConfig:
    """How long a run lasts and what it writes when.

    Attributes:
        out: directory of the run.
        steps: optimizer steps.
        seed: of the initial weights and of every random choice in training.
        device: `auto` is the GPU when there is one.
        precision: `bf16` is autocast, `fp32` plain; `auto` is bf16 on a GPU.
        capture: on a GPU, record the step once and replay it as one CUDA graph.
        log_every: steps between records of the losses.
        validate_every: steps between validations; 0 only at the end.
        picture_every: steps between pictures; 0 only at the end.
        checkpoint_every: steps between checkpoints; 0 only at the end.
        keep: number of checkpoints kept.
    """

    out: str = "runs/run"
    steps: int = 100_000
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    capture: bool = True
    log_every: int = 50
    validate_every: int = 5_000
    picture_every: int = 5_000
    checkpoint_every: int = 5_000
    keep: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1 or self.log_every < 1 or self.keep < 1:
            raise ValueError(f"steps, log_every and keep must be at least 1: {self}")
        if min(self.validate_every, self.picture_every, self.checkpoint_every) < 0:
            raise ValueError(f"validate_every, picture_every and checkpoint_every must not be negative: {self}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, not {self.device!r}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"precision must be auto, bf16 or fp32, not {self.precision!r}")

    def resolved_device(self) -> torch.device:
        """The device that `device` means here; ValueError for a GPU that is not there."""
        return auto_device(self.device)


class Loader(Protocol):
    """Batches without end, with a position that can be saved."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """What the loop trains. `title` and `undecayed` (name parts without weight decay) describe it."""

    @property
    def title(self) -> str: ...
    @property
    def undecayed(self) -> tuple[str, ...]: ...
    @property
    def model(self) -> nn.Module: ...

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Scalars by name; `loss` is minimised, the others are logged."""

    def validate(self, model: nn.Module) -> dict[str, Any]:
        """Figures of the averaged model for the log; `note` among them is shown."""

    def picture(self, model: nn.Module) -> Image.Image | None:
        """A picture of what the averaged model does."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became infinite or NaN."""


class Trainer:
    """Trains a task.

    Args:
        task: the model and its loss; the model is moved to the device.
        loader: training batches, on any device.
        optimizer: see `OptimizerConfig`.
        loop: see `LoopConfig`.
        config: the whole run's configuration as nested dictionaries, stored in checkpoints and compared on resuming.
        console: where to print; None is standard error.
    """

    def __init__(
        self,
        task: Task,
        loader: Loader,
        optimizer: OptimizerConfig,
        loop: LoopConfig,
        config: dict[str, Any],
        *,
        console: Console | None = None,
    ) -> None:
        self.task, self.loader, self.optim, self.loop, self.config = task, loader, optimizer, loop, config
        self.console = console
        self.device = loop.resolved_device()
        self.out = Path(loop.out)
        self.model = task.model.to(self.device).train()
        self.optimizer = build_optimizer(self.model, optimizer, task.undecayed)
        self.average = AveragedModel(self.model, optimizer.ema) if optimizer.ema > 0 else None
        self.step = 0
        self._place = loader.state_dict()  # in the data, after the last whole step
        bf16 = loop.precision == "bf16" or (loop.precision == "auto" and self.device.type == "cuda")
        self._precision: Callable[[], Any] = (
            (lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)) if bf16 else nullcontext
        )
        # Everything that changes from step to step lives on the device, so that no step waits for the host.
        self._average_rate = torch.zeros((), device=self.device)
        self._steps_done = torch.zeros((), dtype=torch.int64, device=self.device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=self.device)
        self._update: Step = self._plain_update
        if loop.capture and self.device.type == "cuda":
            self._update = CapturedStep(self._plain_update)

    @property
    def trained(self) -> nn.Module:
        """The averaged model, or the model itself without averaging."""
        return self.average.model if self.average is not None else self.model

    def run(self, *, resume: bool = False) -> Path:
        """Trains to the last step and writes the final model; returns its directory.

        Where validation gives a `val_loss`, the model of the lowest one is also written, to `best/`.

        Args:
            resume: go on from the newest complete checkpoint, if there is one.

        Raises:
            CheckpointError: the directory holds another run's checkpoints, or holds some and `resume` is off; or a
                checkpoint could not be written.
            NonFiniteLossError: names the step; the last good checkpoint stays.
        """
        newest = newest_checkpoint(self.out / CHECKPOINTS)
        if newest is not None and not resume:
            raise CheckpointError(f"{newest} exists: resume that run, or choose another directory")
        if newest is not None:
            self._restore(newest)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        with Journal(self.out, self.task.title, self.step, self.loop.steps, console=self.console) as journal:
            if newest is not None:
                journal.say(f"resumed from {newest}")
            try:
                self._train(journal)
            except KeyboardInterrupt:
                self._check_finite()
                journal.say(f"interrupted: {self._save()} holds everything, resume to go on")
                raise
        return self._export(FINAL)

    def _train(self, journal: Journal) -> None:
        batches = iter(self.loader)
        best = min((r["val_loss"] for r in read_log(self.out) if "val_loss" in r), default=math.inf)
        sums: dict[str, Tensor] = {}
        counted, images, began = 0, 0, time.perf_counter()
        while self.step < self.loop.steps:
            lr = self.optim.lr_at(self.step, self.loop.steps)
            set_lr(self.optimizer, lr)
            if self.average is not None:
                self._average_rate.fill_(self.average.rate_at(self.step))
            inputs = [t for _ in range(self.optim.accumulation) for t in next(batches)]
            with _interrupts_wait():
                for name, value in self._update(inputs).items():
                    sums[name] = sums.get(name, 0) + value
                self.step += 1
                self._place = self.loader.state_dict()
                images += sum(len(t) for t in inputs[::2])
                counted += 1
                last = self.step == self.loop.steps
                if self.step % self.loop.log_every == 0 or last:
                    self._check_finite()
                    means = {name: float(value) / counted for name, value in sums.items()}
                    rate = images / (time.perf_counter() - began)
                    journal.record(self.step, {**means, "lr": lr, "images_per_second": rate})
                    journal.progress(self.step, f"loss {means['loss']:.4f}  {rate:,.0f} images/s")
                    sums, counted, images, began = {}, 0, 0, time.perf_counter()
            paused = time.perf_counter()
            self.trained.eval()
            if _due(self.step, self.loop.validate_every) or last:
                figures = self.task.validate(self.trained)
                if figures:
                    journal.record(self.step, figures)
                if figures.get("val_loss", math.inf) < best:
                    best = figures["val_loss"]
                    self._export(BEST)
                if "note" in figures:
                    journal.say(f"step {self.step}: {figures['note']}")
            if _due(self.step, self.loop.picture_every) or last:
                self._picture()
            if _due(self.step, self.loop.checkpoint_every) or last:
                self._check_finite()
                self._save()
            self.model.train()
            began += time.perf_counter() - paused

    def _plain_update(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        """One optimizer step on accumulated batches `[first, second, first, second, ...]`; returns mean scalars."""
        count = self.optim.accumulation
        means: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for i in range(count):
            batch = (inputs[2 * i].to(self.device), inputs[2 * i + 1].to(self.device))
            with self._precision():
                losses = self.task.loss(batch)
            (losses["loss"] / count).backward()
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach() / count
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, self._average_rate)
        self._steps_done += 1
        bad = ~(means["loss"].isfinite() & norm.isfinite()) & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, self._steps_done, self._first_bad))
        return {**means, "gradient_norm": norm}

    def _export(self, name: str) -> Path:
        assert isinstance(self.trained, Pretrained)
        return self.trained.save_pretrained(self.out / name)

    def _picture(self) -> None:
        picture = self.task.picture(self.trained)
        if picture is not None:
            (self.out / PICTURES).mkdir(exist_ok=True)
            picture.save(self.out / PICTURES / f"step-{self.step:08d}.png")

    def _check_finite(self) -> None:
        first = int(self._first_bad)
        if first >= 0:
            kept = newest_checkpoint(self.out / CHECKPOINTS)
            raise NonFiniteLossError(
                f"the loss or its gradient became non-finite at step {first}; "
                f"the last good checkpoint is {kept or 'none'}. Try a lower learning rate or stronger clipping."
            )

    def _save(self) -> Path:
        checkpoint = Checkpoint(
            step=self.step,
            config=self.config,
            data=self._place,
            model=self.model.state_dict(),
            average=self.average.model.state_dict() if self.average is not None else None,
            optimizer=self.optimizer.state_dict(),
            random=random_states(),
        )
        return save_checkpoint(self.out / CHECKPOINTS, checkpoint, keep=self.loop.keep)

    def _restore(self, directory: Path) -> None:
        checkpoint = load_checkpoint(directory)
        differences = [d for d in _differences(checkpoint.config, self.config) if not d.startswith("loop.")]
        if differences:
            raise CheckpointError(f"{directory} belongs to another configuration: {'; '.join(differences)}")
        load_strict(self.model, checkpoint.model, what=str(directory))
        if self.average is not None and checkpoint.average is not None:
            load_strict(self.average.model, checkpoint.average, what=str(directory))
        # The options are this run's: its learning rate may be a tensor, and a GPU's are not a CPU's.
        pairs = zip(self.optimizer.param_groups, checkpoint.optimizer["param_groups"], strict=True)
        groups = [{**own, "params": saved["params"]} for own, saved in pairs]
        self.optimizer.load_state_dict({**checkpoint.optimizer, "param_groups": groups})
        self.loader.load_state_dict(checkpoint.data)
        self._place = checkpoint.data
        restore_random_states(checkpoint.random)
        self.step = checkpoint.step
        self._steps_done.fill_(self.step)


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, so that what is saved afterwards is a whole step and its record."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if pending and callable(usual):
        usual(signal.SIGINT, None)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return found
