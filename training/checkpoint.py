"""Checkpoints as directories that hold everything a run needs to go on, written all or nothing.

`checkpoints/step-00001000/` holds `model.safetensors`, `average.safetensors`, `optimizer.pt` (moments, and the random
states of every rank) and `state.json` (step, configuration, and every rank's position in the data). A checkpoint is
written under a hidden name, flushed to disk and renamed, so a directory of that form is always complete; the newest one
wins. Weights and moments are stored whole, however many ranks share them, so any number of ranks can go on from them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spectralar.training.distributed import whole
from spectralar.weights.pretrained import load_weights, read_json

_NAME = re.compile(r"step-(\d{8})")
_PARTIAL = ".partial-"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read, or that belongs to another run."""


@dataclass
class Checkpoint:
    """Everything that a run carries from one step to the next.

    Attributes:
        step: optimizer steps done.
        config: the run's configuration as nested dictionaries.
        data: position in the data, one for each rank.
        model: weights by name.
        average: averaged weights by name, or None.
        optimizer: state of the optimizer.
        random: random states by device name, one dictionary for each rank.
    """

    step: int
    config: dict[str, Any]
    data: list[dict[str, Any]]
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    random: list[dict[str, Tensor]]


def save_checkpoint(root: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Writes a checkpoint under `root` and then removes all but the newest `keep`.

    A run passes every step once, so a checkpoint of the same step that is already there stays as it is.

    Raises:
        CheckpointError: the disk is full or can't be written; earlier checkpoints are untouched.
    """
    final = root / f"step-{checkpoint.step:08d}"
    partial = root / f"{_PARTIAL}{final.name}"
    if final.is_dir():
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{_PARTIAL}*"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir()
        save_file(_contiguous(checkpoint.model), partial / "model.safetensors")
        if checkpoint.average is not None:
            save_file(_contiguous(checkpoint.average), partial / "average.safetensors")
        torch.save({"optimizer": checkpoint.optimizer, "random": checkpoint.random}, partial / "optimizer.pt")
        averaged = checkpoint.average is not None
        state = {"step": checkpoint.step, "averaged": averaged, "data": checkpoint.data, "config": checkpoint.config}
        (partial / "state.json").write_text(json.dumps(state, indent=2))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(final)
        _flush(root)
    except Exception as error:  # safetensors and torch wrap a full disk in errors of their own
        shutil.rmtree(partial, ignore_errors=True)
        kept = newest_checkpoint(root) if root.is_dir() else None
        raise CheckpointError(
            f"could not write the checkpoint of step {checkpoint.step} under {root}: {error}. "
            f"The last complete one is {kept or 'none'}."
        ) from error
    for old in checkpoints(root)[:-keep]:
        # Under its own name it must be complete, also if a kill comes in between.
        shutil.rmtree(old.rename(root / f"{_PARTIAL}{old.name}"))
    return final


class CheckpointWriter:
    """Writes checkpoints in a thread, one after the other, while training goes on.

    Args:
        root: see `save_checkpoint`.
        keep: see `save_checkpoint`.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Waits for the checkpoint before, then begins to write this one, whose tensors nothing may change any more.

        Raises:
            CheckpointError: the one before could not be written; this one will be, if it can.
        """
        try:
            self.wait()
        finally:
            self._pending = self._thread.submit(save_checkpoint, self.root, checkpoint, keep=self.keep)

    def check(self) -> None:
        """Looks whether the last one was written, without waiting for it.

        Raises:
            CheckpointError: it could not be.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            CheckpointError: it could not be.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def host_copy(tree: Any, *, keep: bool = True) -> Any:
    """Nested dictionaries and lists with every tensor copied, whole, to the CPU.

    Args:
        tree: as `state_dict` of a model or an optimizer gives it. Every rank must call this where tensors are sharded.
        keep: False only helps the other ranks and returns None for every tensor.
    """
    if isinstance(tree, Tensor):
        together = whole(tree.detach())
        return together.to("cpu", copy=True) if keep else None
    if isinstance(tree, dict):
        return {name: host_copy(value, keep=keep) for name, value in tree.items()}
    if isinstance(tree, list):
        return [host_copy(value, keep=keep) for value in tree]
    return tree


def load_checkpoint(directory: Path) -> Checkpoint:
    """Reads a checkpoint, on the CPU.

    Raises:
        CheckpointError: a missing or damaged file, named.
    """
    try:
        state = read_json(directory / "state.json")
        saved = _load_states(directory / "optimizer.pt")
        return Checkpoint(
            step=state["step"],
            config=state["config"],
            data=state["data"],
            model=load_weights(directory / "model.safetensors"),
            average=load_weights(directory / "average.safetensors") if state["averaged"] else None,
            optimizer=saved["optimizer"],
            random=saved["random"],
        )
    except Exception as error:
        raise CheckpointError(f"could not read the checkpoint {directory}: {error}") from error


def checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def newest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint under `root`, or None."""
    found = checkpoints(root)
    return found[-1] if found else None


def random_states() -> dict[str, Tensor]:
    """States of PyTorch's default generators, by device name."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Puts back what `random_states` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def _load_states(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut file can raise almost anything, without its name
        raise CheckpointError(f"{'damaged' if path.exists() else 'missing'} file: {path}: {error}") from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
