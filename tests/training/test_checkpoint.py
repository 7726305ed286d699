"""Checkpoints: everything comes back, nothing incomplete is ever seen, and damage is named."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralar.training import checkpoint as module
from spectralar.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    checkpoints,
    host_copy,
    load_checkpoint,
    newest_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)


def make(step: int, *, average: bool = True) -> Checkpoint:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    parameter.grad = torch.randn(3, 2)
    optimizer.step()
    weights = {"w": parameter.detach(), "count": torch.tensor(step), "turned": torch.randn(2, 3).T}
    return Checkpoint(
        step=step,
        config={"model": {"sizes": [1, 2], "name": "ü"}, "lr": 0.1},
        data=[{"step": 3 * step, "digest": "d"}, {"step": 3 * step, "digest": "e"}],
        model=weights,
        average={name: 2 * tensor for name, tensor in weights.items()} if average else None,
        optimizer=optimizer.state_dict(),
        random=[random_states(), {"cpu": torch.arange(5)}],
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("average", [True, False])
def test_everything_comes_back(tmp_path: Path, average: bool) -> None:
    saved = make(12, average=average)
    directory = save_checkpoint(tmp_path / "new" / "root", saved)
    assert directory.name == "step-00000012"
    loaded = load_checkpoint(directory)
    for name in ("step", "config", "data", "model", "average", "optimizer", "random"):
        assert same(getattr(loaded, name), getattr(saved, name)), name


def test_random_states_go_on_where_they_were() -> None:
    states = random_states()
    first = torch.rand(5)
    restore_random_states(states)
    assert torch.equal(torch.rand(5), first)


def test_newest_wins_and_keep_counts(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None and checkpoints(tmp_path / "nothing") == []
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, make(step), keep=3)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000009", "step-00000010", "step-00000100"]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None and load_checkpoint(newest).step == 100


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in (".partial-step-00000001", "step-1", "step-00000002.old", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000003").write_text("a file")
    assert checkpoints(tmp_path) == []


def test_the_same_step_again_leaves_the_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = save_checkpoint(tmp_path, make(4))
    before = {path.name: path.read_bytes() for path in first.iterdir()}

    def broken(*_: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(Path, "rename", broken)
    assert save_checkpoint(tmp_path, make(4)) == first
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before


class Killed(BaseException):
    """What no `except Exception` sees, as a kill."""


@pytest.mark.parametrize("files_flushed", range(6))
def test_killed_between_files_or_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_flushed: int
) -> None:
    """The files, their folder (5 flushes), then the rename: wherever it ends, only the earlier checkpoint is listed."""
    good = save_checkpoint(tmp_path, make(1))
    flushes: list[int] = []
    fsync = os.fsync

    def count(handle: int) -> None:
        if len(flushes) == files_flushed:
            raise Killed
        flushes.append(handle)
        fsync(handle)

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", count)
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, make(2))
    assert len(flushes) == min(files_flushed, 5)
    assert checkpoints(tmp_path) == [good] and load_checkpoint(good).step == 1
    again = save_checkpoint(tmp_path, make(2))
    assert checkpoints(tmp_path) == [good, again] and load_checkpoint(again).step == 2
    assert {path.name for path in tmp_path.iterdir()} == {good.name, again.name}


@pytest.mark.parametrize("writer", ["save_file", "torch.save", "rename"])
@pytest.mark.parametrize("earlier", [True, False])
def test_full_disk_names_the_last_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str, earlier: bool
) -> None:
    root = tmp_path / "checkpoints"
    good = save_checkpoint(root, make(1)) if earlier else None

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = {"save_file": (module, "save_file"), "torch.save": (torch, "save"), "rename": (Path, "rename")}[
        writer
    ]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(root, make(2), keep=1)
    text = str(caught.value)
    assert "step 2" in text and str(root) in text and "No space left" in text
    assert f"last complete one is {good or 'none'}" in text
    assert list(root.iterdir()) == ([good] if good else [])
    assert good is None or load_checkpoint(good).step == 1


def test_what_killed_runs_left_is_removed(tmp_path: Path) -> None:
    for name in (".partial-step-00000007", ".partial-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    saved = save_checkpoint(tmp_path, make(9))
    assert list(tmp_path.iterdir()) == [saved]


def test_killed_while_an_old_one_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it is not taken for a checkpoint."""
    save_checkpoint(tmp_path, make(1))

    def half(path: Path, **_: object) -> None:
        (path / "optimizer.pt").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, make(2), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]


def test_the_writer_writes_one_after_the_other_and_tells_of_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.wait()
    for step in (1, 2, 3):
        writer.save(make(step))
    writer.wait()
    assert [load_checkpoint(path).step for path in checkpoints(tmp_path)] == [2, 3]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        writer.save(make(4))
        with pytest.raises(CheckpointError, match=r"step 4 under .*No space left.*complete one is .*step-00000003"):
            writer.wait()
        writer.save(make(5))
        assert writer._pending is not None and writer._pending.exception() is not None
    # There is room again: what comes next is written all the same.
    with pytest.raises(CheckpointError, match="step 5 under"):
        writer.save(make(6))
    writer.wait()
    assert [load_checkpoint(path).step for path in checkpoints(tmp_path)] == [3, 6]
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        writer.save(make(7))
        assert writer._pending is not None and writer._pending.exception() is not None
        with pytest.raises(CheckpointError, match="step 7 under"):
            writer.check()
    writer.check()


def test_host_copies_do_not_follow_what_they_were_taken_from() -> None:
    weight = torch.zeros(2)
    tree = {"a": weight, "b": [{"c": weight, "d": 5}], "e": None}
    copied = host_copy(tree)
    weight += 1
    assert same(copied, {"a": torch.zeros(2), "b": [{"c": torch.zeros(2), "d": 5}], "e": None})
    assert host_copy(tree, keep=False) == {"a": None, "b": [{"c": None, "d": 5}], "e": None}


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not write the checkpoint of step 3"):
        save_checkpoint(tmp_path / "file" / "root", make(3))


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    directory = save_checkpoint(tmp_path, make(5))
    file = directory / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"could not read the checkpoint .*step-00000005") as caught:
        load_checkpoint(directory)
    assert name in str(caught.value)


@pytest.mark.parametrize("text", ["{}", "[]", '{"step": 1, "data": {}}'])
def test_a_state_without_its_fields(tmp_path: Path, text: str) -> None:
    directory = save_checkpoint(tmp_path, make(5))
    (directory / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="could not read the checkpoint"):
        load_checkpoint(directory)
