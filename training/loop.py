"""The training loop of both stages: step-based, resumable to the same bits on a CPU, stopped by the first bad loss.

On several ranks each runs this loop over its share of every batch; the first of them writes and prints.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from spectralar.devices import Precision, auto_device, in_bf16
from spectralar.training.blocks import prepare_blocks
from spectralar.training.capture import WARMUP, WARMUP_OF_RANKS, CapturedStep, Step
from spectralar.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    host_copy,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    restore_random_states,
)
from spectralar.training.distributed import ALONE, Ranks, copies, divided_like, parallelize, shard, whole
from spectralar.training.journal import Journal, Silence, read_log
from spectralar.training.lock import RunLock
from spectralar.training.memory import check_memory, explained_memory, state_bytes
from spectralar.training.meter import Meter
from spectralar.training.optimizer import AveragedModel, OptimizerConfig, build_optimizer, set_lr
from spectralar.training.stop import StopSignals
from spectralar.weights.pretrained import Pretrained, load_strict

_NEVER = 2**62  # a step that does not come
# What may change when a run is resumed.
_CHANGEABLE = ("loop.", "data.max_unreadable ", "data.workers ", "data.path ")  # a set has a digest of its own
CHECKPOINTS, FINAL, BEST, PICTURES, CONFIG = "checkpoints", "final", "best", "pictures", "config.json"


@dataclass(frozen=True)
class LoopConfig:
    """How long a run lasts and what it writes when.

    Attributes:
        out: directory of the run.
        steps: optimizer steps.
        seed: of the initial weights and of every random choice in training.
        device: `auto` is the GPU when there is one.
        precision: `bf16` is autocast, with products in TF32 where it leaves fp32; `fp32` is plain; `auto` is bf16 on
            a GPU.
        capture: on GPUs, record the step once and replay it as one CUDA graph; where several ranks divide one copy of
            the model between them, steps stay as they are.
        compile: run the transformer blocks and the ends of the tokenizer's stacks under torch.compile; takes a minute
            at the first step.
        checkpointing: keep only the inputs of transformer blocks for the backward pass, which computes them once more:
            a third more work, and a fraction of the memory.
        ranks_per_copy: of several ranks, how many hold one copy of weights, gradients, moments and average between
            them: 1 is a copy each (DDP), 0 one copy for all (FSDP2), a divisor of the ranks hybrid sharding.
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
    precision: Precision = "auto"
    capture: bool = True
    compile: bool = False
    checkpointing: bool = False
    ranks_per_copy: int = 1
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
        if self.ranks_per_copy < 0:
            raise ValueError(f"ranks_per_copy must not be negative, not {self.ranks_per_copy}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device must be auto, cpu or cuda, not {self.device!r}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision must be auto, bf16 or fp32, not {self.precision!r}")

    def resolved_device(self) -> torch.device:
        """The device that `device` means here; ValueError for a GPU that is not there."""
        return auto_device(self.device)


class Loader(Protocol):
    """This rank's batches without end, with a position that can be saved.

    Positions name `batch` (samples of a rank) and `world` (ranks). On another number of ranks the loader is given the
    first rank's position with its own values of these two, whose product is the same. Positions may hold `unreadable`,
    a list of (sample, reason), which is counted in the log.
    """

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
        """Figures of the averaged model for the log, the same on all ranks; `note` among them is shown."""

    def picture(self, model: nn.Module) -> Image.Image | None:
        """A picture of what the averaged model does; asked for on the first rank only."""


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient became infinite or NaN."""


class Trainer:
    """Trains a task.

    Args:
        task: the model and its loss; the model is moved to the device. All ranks start from equal weights.
        loader: this rank's training batches, on any device.
        optimizer: see `OptimizerConfig`.
        loop: see `LoopConfig`.
        config: the whole run's configuration as nested dictionaries, stored in checkpoints and compared on resuming.
        ranks: the processes that train together.
        console: where to print; None is standard error.

    Raises:
        ValueError: the device has less memory than the model's state takes, or the ranks cannot be divided so.
    """

    def __init__(
        self,
        task: Task,
        loader: Loader,
        optimizer: OptimizerConfig,
        loop: LoopConfig,
        config: dict[str, Any],
        *,
        ranks: Ranks = ALONE,
        console: Console | None = None,
    ) -> None:
        self.task, self.loader, self.optim, self.loop, self.config = task, loader, optimizer, loop, config
        self.ranks, self.console = ranks, console
        self.device = loop.resolved_device()
        self.out = Path(loop.out)
        gpu = self.device.type == "cuda"
        bf16 = in_bf16(loop.precision, self.device)
        self._precision: Callable[[], Any] = (
            (lambda: torch.autocast(self.device.type, dtype=torch.bfloat16)) if bf16 else nullcontext
        )
        self._products: Callable[[], Any] = _tf32 if bf16 and gpu else nullcontext
        sharing = ranks.world // copies(ranks, loop.ranks_per_copy)
        captured = loop.capture and gpu and sharing == 1
        self._state_bytes = state_bytes(task.model, averaged=optimizer.ema > 0, ranks_per_copy=sharing)
        check_memory(self._state_bytes, self.device)
        self.model = task.model.to(self.device).train()
        self.average = AveragedModel(self.model, optimizer.ema) if optimizer.ema > 0 else None
        # A sharded model can only be called by all ranks at once, so this one is filled, evaluated and exported.
        self._complete = copy.deepcopy(self.model).cpu() if sharing > 1 else None
        prepare_blocks(self.model, compiled=loop.compile, checkpointing=loop.checkpointing)
        self._loss = parallelize(
            self.model,
            lambda batch: self.task.loss(batch),
            ranks,
            ranks_per_copy=loop.ranks_per_copy,
            half=bf16 and gpu,
            captured=captured,
        )
        if sharing > 1 and self.average is not None:
            shard(nn.Sequential(self.average.model), ranks, loop.ranks_per_copy)
        self.optimizer = build_optimizer(self.model, optimizer, task.undecayed)
        if ranks.world > 1:
            torch.manual_seed(ranks.seed(loop.seed))
        self.step = 0
        # Entered around forward, backward, clip, optimizer and average of a step that is not captured: names for the
        # profiler, and where a benchmark puts its clock.
        self.stage: Callable[[str], AbstractContextManager[Any]] = torch.profiler.record_function
        self._place = loader.state_dict()  # in the data, after the last whole step
        self._writer = CheckpointWriter(self.out / CHECKPOINTS, loop.keep)
        # Everything that changes from step to step lives on the device, so that no step waits for the host.
        self._average_rate = torch.zeros((), device=self.device)
        self._steps_done = torch.zeros((), dtype=torch.int64, device=self.device)
        self._first_bad = torch.full((), _NEVER, dtype=torch.int64, device=self.device)
        self._update: Step = self._plain_update
        if captured:
            self._update = CapturedStep(self._plain_update, warmup=WARMUP if ranks.world == 1 else WARMUP_OF_RANKS)

    @property
    def trained(self) -> nn.Module:
        """The averaged model, or the model itself without averaging."""
        return self.average.model if self.average is not None else self.model

    def run(self, *, resume: bool = False) -> Path:
        """Trains to the last step and writes the final model; returns its directory.

        Where validation gives a `val_loss`, the model of the lowest one is also written, to `best/`. SIGINT and SIGTERM
        end the run after the step at hand, with a checkpoint: as KeyboardInterrupt and as SystemExit(0).

        Args:
            resume: go on from the newest complete checkpoint, if there is one.

        Raises:
            CheckpointError: the directory holds another run's checkpoints, or holds some and `resume` is off; or a
                checkpoint could not be written.
            RunLockedError: another job writes to the directory.
            NonFiniteLossError: names the step; the last good checkpoint stays.
        """
        with ExitStack() as held:

            def claim() -> Path | None:
                self.out.mkdir(parents=True, exist_ok=True)
                held.enter_context(RunLock(self.out))
                newest = newest_checkpoint(self.out / CHECKPOINTS)
                if newest is not None and not resume:
                    raise CheckpointError(f"{newest} exists: resume that run, or choose another directory")
                return newest

            newest = self.ranks.by_first(claim)
            notes = [f"resumed from {newest}{self._restore(newest)}"] if newest is not None else []
            if self.loop.capture and self.device.type == "cuda" and self._complete is not None:
                notes.append("steps are not captured as CUDA graphs where ranks divide the model between them")
            journal: Journal = Silence()
            if self.ranks.first:
                (self.out / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
                journal = Journal(self.out, self.task.title, self.step, self.loop.steps, console=self.console)
            with journal, explained_memory(self._state_bytes, self.device), StopSignals() as stop:
                for note in notes:
                    journal.say(note)
                try:
                    self._train(journal, stop)
                finally:
                    self._writer.wait()
            with self._evaluated() as model:
                return self._export(FINAL, model)

    def _train(self, journal: Journal, stop: StopSignals) -> None:
        batches = iter(self.loader)
        losses = self.ranks.by_first(lambda: [r["val_loss"] for r in read_log(self.out) if "val_loss" in r])
        best = min(losses, default=math.inf)
        meter = Meter(self.ranks, self.device)
        while self.step < self.loop.steps:
            inputs = [t for _ in range(self.optim.accumulation) for t in meter.fetch(batches)]
            scalars = self.advance(inputs)
            self._place = self.loader.state_dict()
            self._writer.check()
            self._log(meter, journal)
            meter.add(scalars, sum(len(t) for t in inputs[::2]))
            last = self.step == self.loop.steps
            if self.step % self.loop.log_every == 0 or last:
                meter.close(self.step, self.optim.lr_at(self.step - 1, self.loop.steps), self._first_bad)
                if self.device.type != "cuda":  # a GPU has the next step to do meanwhile
                    self._log(meter, journal)
            validates, pictures, saves = (
                _due(self.step, every) or last
                for every in (self.loop.validate_every, self.loop.picture_every, self.loop.checkpoint_every)
            )
            pauses = validates or pictures or saves
            if pauses:
                self._log(meter, journal)
                self._check_finite(int(self._first_bad))
            with meter.excluded():
                if validates or pictures:
                    with self._evaluated() as model:
                        if validates:
                            best = self._validate(model, best, journal)
                        if pictures and self.ranks.first:
                            self._picture(model)
                    self.model.train()
            stopped = self.ranks.largest(stop.number)
            with meter.excluded():
                if stopped and not pauses:
                    self._log(meter, journal)
                    self._check_finite(int(self._first_bad))
                if saves or stopped:
                    self._save()
            if stopped:
                self._writer.wait()
                name = signal.Signals(stopped).name
                journal.say(f"{name}: the checkpoint of step {self.step} holds everything, resume to go on")
                raise KeyboardInterrupt if stopped == signal.SIGINT else SystemExit(0)

    def advance(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        """One optimizer step, which does not wait for the device.

        Args:
            inputs: `[first, second, first, second, ...]`, as many batches as are accumulated. A captured step wants
                the same shapes and dtypes every time.

        Returns:
            Means of the task's scalars over the batches, and the norm of the gradient before clipping; on the device,
            overwritten by the next captured step.
        """
        set_lr(self.optimizer, self.optim.lr_at(self.step, self.loop.steps))
        if self.average is not None:
            self._average_rate.fill_(self.average.rate_at(self.step))
        scalars = self._update(inputs)
        self.step += 1
        return scalars

    def _log(self, meter: Meter, journal: Journal) -> None:
        """Records what the meter has sent, if anything."""
        reading = meter.take()
        if reading is None:
            return
        self._check_finite(reading.first_bad)
        rates = {"images_per_second": reading.images_per_second, "loader_wait": reading.loader_wait}
        figures = {**reading.means, "lr": reading.lr, **rates}
        line = f"loss {reading.means['loss']:.4f}  {reading.images_per_second:,.0f} images/s"
        if reading.loader_wait >= 0.01:
            line += f"  {reading.loader_wait:.0%} waiting for the loader"
        if unreadable := self._unreadable():
            figures["unreadable"] = unreadable
            line += f"  {unreadable:,} unreadable"
        journal.record(reading.step, figures)
        journal.progress(reading.step, line)

    def _unreadable(self) -> int:
        """Samples that any rank could not read. All ranks must ask together."""
        if "unreadable" not in self._place:
            return 0
        return len(set().union(*self.ranks.gather([sample for sample, _ in self._place["unreadable"]])))

    @contextmanager
    def _evaluated(self) -> Iterator[nn.Module]:
        """The trained model in evaluation mode, for one rank alone to call. All ranks must ask for it together."""
        if self._complete is None:
            yield self.trained.eval()
            return
        states = self.trained.state_dict()
        for name, tensor in self._complete.to(self.device).state_dict().items():
            tensor.copy_(whole(states[name]))
        try:
            yield self._complete.eval()
        finally:
            self._complete.cpu()

    def _validate(self, model: nn.Module, best: float, journal: Journal) -> float:
        figures = self.task.validate(model)
        if figures:
            journal.record(self.step, figures)
        if figures.get("val_loss", math.inf) < best:
            best = figures["val_loss"]
            self._export(BEST, model)
        if "note" in figures:
            journal.say(f"step {self.step}: {figures['note']}")
        return best

    def _plain_update(self, inputs: list[Tensor]) -> dict[str, Tensor]:
        """One optimizer step on accumulated batches `[first, second, first, second, ...]`; returns mean scalars."""
        count = self.optim.accumulation
        means: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        with self._products():
            for i in range(count):
                batch = (self._here(inputs[2 * i]), self._here(inputs[2 * i + 1]))
                with self.stage("forward"), self._precision():
                    losses = self._loss(batch, i == count - 1)
                with self.stage("backward"):
                    (losses["loss"] / count).backward()
                for name, value in losses.items():
                    means[name] = means.get(name, 0) + value.detach() / count
        with self.stage("clip"):
            norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip))
        with self.stage("optimizer"):
            self.optimizer.step()
        if self.average is not None:
            with self.stage("average"):
                self.average.update(self.model, self._average_rate)
        self._steps_done += 1
        good = means["loss"].isfinite() & norm.isfinite()
        self._first_bad.copy_(torch.minimum(self._first_bad, self._steps_done.masked_fill(good, _NEVER)))
        return {**means, "gradient_norm": norm}

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _export(self, name: str, model: nn.Module) -> Path:
        """Writes the model file by file, each all or nothing, so that a kill leaves the new or the old one.

        Raises:
            CheckpointError: it could not be written.
        """
        assert isinstance(model, Pretrained)
        if self.ranks.first:
            draft = self.out / f".{name}"
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
            try:
                model.save_pretrained(draft)
                (self.out / name).mkdir(exist_ok=True)
                for file in draft.iterdir():
                    file.replace(self.out / name / file.name)
                draft.rmdir()
            except Exception as error:  # safetensors wraps a full disk in an error of its own
                self._writer.wait()
                kept = newest_checkpoint(self.out / CHECKPOINTS)
                raise CheckpointError(
                    f"could not write {self.out / name}: {error}. The last complete checkpoint is {kept or 'none'}."
                ) from error
        return self.out / name

    def _picture(self, model: nn.Module) -> None:
        picture = self.task.picture(model)
        if picture is not None:
            (self.out / PICTURES).mkdir(exist_ok=True)
            picture.save(self.out / PICTURES / f"step-{self.step:08d}.png")

    def _check_finite(self, first_bad: int) -> None:
        """Stops all ranks when one of them has had a bad step."""
        first = -self.ranks.largest(-first_bad)
        if first < _NEVER:
            self._writer.wait()
            kept = newest_checkpoint(self.out / CHECKPOINTS)
            raise NonFiniteLossError(
                f"the loss or its gradient became non-finite at step {first}; "
                f"the last good checkpoint is {kept or 'none'}. Try a lower learning rate or stronger clipping."
            )

    def _save(self) -> None:
        places = self.ranks.gather((self._place, random_states()))
        states = self.model.state_dict(), self.average and self.average.model.state_dict(), self.optimizer.state_dict()
        model, average, optimizer = (host_copy(state, keep=self.ranks.first) for state in states)
        if self.ranks.first:
            data, random = ([place[i] for place in places] for i in range(2))
            self._writer.save(Checkpoint(self.step, self.config, data, model, average, optimizer, random))

    def _restore(self, directory: Path) -> str:
        """Takes everything over from a checkpoint; returns what to tell of what could not be."""
        saved = load_checkpoint(directory)
        differences = [d for d in _differences(saved.config, self.config) if not d.startswith(_CHANGEABLE)]
        if differences:
            raise CheckpointError(f"{directory} belongs to another configuration: {'; '.join(differences)}")
        _load_weights(self.model, saved.model, what=str(directory))
        if self.average is not None and saved.average is not None:
            _load_weights(self.average.model, saved.average, what=str(directory))
        # The options are this run's: its learning rate may be a tensor, and a GPU's are not a CPU's.
        pairs = zip(self.optimizer.param_groups, saved.optimizer["param_groups"], strict=True)
        groups = [{**own, "params": theirs["params"]} for own, theirs in pairs]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: t if t.dim() == 0 else divided_like(t, parameters[i]) for name, t in state.items()}
            for i, state in saved.optimizer["state"].items()
        }
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step = saved.step
        self._steps_done.fill_(self.step)
        world, before = self.ranks.world, len(saved.data)
        if before == world:
            self.loader.load_state_dict(saved.data[self.ranks.rank])
            restore_random_states(saved.random[self.ranks.rank])
            self._place = self.loader.state_dict()
            return ""
        here, there = self._place, saved.data[0]
        if here["batch"] * world != there["batch"] * before:
            raise CheckpointError(
                f"{directory} was trained on batches of {before} x {there['batch']}, not of {world} x {here['batch']}"
            )
        there = {**there, "batch": here["batch"], "world": world}
        if "unreadable" in there:
            # The first rank goes on with what all of them have met.
            met = {sample: reason for place in saved.data for sample, reason in place["unreadable"]}
            there["unreadable"] = sorted(met.items()) if self.ranks.first else []
        self.loader.load_state_dict(there)
        self._place = self.loader.state_dict()
        torch.manual_seed(self.ranks.seed(self.loop.seed, self.step))
        return f", on {world} ranks after {before}: all goes on but the random states, which start anew"


@contextmanager
def _tf32() -> Iterator[None]:
    """Lets what autocast leaves in fp32, the pixel head, take its products in TF32 (10 bits, where bf16 has 7).

    The tensor cores are several times as fast as the others, which would be noticed in a step.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _load_weights(model: nn.Module, weights: dict[str, Tensor], *, what: str) -> None:
    own = model.state_dict()
    parts = {name: divided_like(t, own[name]) if name in own else t for name, t in weights.items()}
    load_strict(model, parts, what=what)


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
