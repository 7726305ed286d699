"""Checkpoints as directories that hold everything a run needs to go on, written all or nothing.

`checkpoints/step-00001000/` holds `model.safetensors`, `average.safetensors`, `optimizer.pt` (moments and random
states) and `state.json` (step, data position, configuration). A checkpoint is written under a hidden name, flushed to
disk and renamed, so a directory of that form is always complete; the newest one wins.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

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
        data: position in the data.
        model: weights by name.
        average: averaged weights by name, or None.
        optimizer: state of the optimizer.
        random: random states by device name.
    """

    step: int
    config: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Tensor]
    average: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    random: dict[str, Tensor]


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
        shutil.rmtree(partial, ignore_errors=True)
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
        shutil.rmtree(old)
    return final


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
