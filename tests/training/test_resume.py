"""Resuming: the same bits after any interruption, and no mixing of runs."""

from __future__ import annotations

import io
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from spectralar.config import TokenizerConfig
from spectralar.training.checkpoint import CheckpointError, checkpoints, load_checkpoint
from spectralar.training.data import Crop, LoaderConfig, ShardError
from spectralar.training.journal import read_log
from spectralar.training.lock import LOCK_FILE
from spectralar.training.loop import LoopConfig
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.runs import TokenizerRun, train_tokenizer
from tests.training.harness import (
    KINDS,
    OPTIMIZER,
    Bench,
    Crash,
    Kind,
    assert_same_run,
    at,
    crash,
    damaged_copy,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("accumulation", "ema"), [(1, 0.9), (2, 0.9), (2, 0.0)])
def test_resume_gives_the_same_bits(bench: Bench, tmp_path: Path, kind: Kind, accumulation: int, ema: float) -> None:
    optimizer = replace(OPTIMIZER, accumulation=accumulation, ema=ema)
    straight = bench.trainer(kind, tmp_path / "straight", optimizer=optimizer).run()
    # Falls in the last batch of step 8, three steps after the checkpoint.
    stopped = bench.trainer(kind, tmp_path / "resumed", optimizer=optimizer, hook=at(8 * accumulation, crash))
    with pytest.raises(Crash):
        stopped.run()
    assert [r["step"] for r in read_log(tmp_path / "resumed")] == list(range(1, 8))
    torch.manual_seed(123)  # a new process starts from another random state
    resumed = bench.trainer(kind, tmp_path / "resumed", optimizer=optimizer).run(resume=True)
    assert "resumed from" in bench.printed() and "step-00000005" in bench.printed()
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    assert (straight / "model.safetensors").read_bytes() == (resumed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_random_choices_are_part_of_the_run(bench: Bench, tmp_path: Path, kind: Kind) -> None:
    """The resume test could not fail on a lost random state if the losses did not depend on it."""
    first = []
    for seed in (1, 2):
        trainer = bench.trainer(kind, tmp_path / str(seed), steps=1)
        torch.manual_seed(seed)
        trainer.run()
        first.append(read_log(tmp_path / str(seed))[0]["loss"])
    assert first[0] != first[1]


@pytest.mark.parametrize("call", [13, 14])
def test_an_interrupt_is_held_back_to_the_end_of_the_step(bench: Bench, tmp_path: Path, call: int) -> None:
    """Ctrl-C in either batch of step 7: the checkpoint is of the whole step 7, and going on gives the same bits."""
    optimizer = replace(OPTIMIZER, accumulation=2)

    def interrupt(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGINT)
        return losses

    bench.trainer("tokenizer", tmp_path / "straight", optimizer=optimizer).run()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        bench.trainer("tokenizer", tmp_path / "stopped", optimizer=optimizer, hook=at(call, interrupt)).run()
    assert signal.getsignal(signal.SIGINT) is handler
    assert checkpoints(tmp_path / "stopped" / "checkpoints")[-1].name == "step-00000007"
    assert "SIGINT: the checkpoint of step 7 holds everything, resume to go on" in bench.printed()
    bench.trainer("tokenizer", tmp_path / "stopped", optimizer=optimizer).run(resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_sigterm_saves_and_exits_with_0(bench: Bench, tmp_path: Path) -> None:
    def terminate(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGTERM)
        return losses

    bench.trainer("generator", tmp_path / "straight").run()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        bench.trainer("generator", tmp_path / "stopped", hook=at(4, terminate)).run()
    assert stopped.value.code == 0 and signal.getsignal(signal.SIGTERM) is handler
    assert "SIGTERM: the checkpoint of step 4 holds everything" in bench.printed()
    bench.trainer("generator", tmp_path / "stopped").run(resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_second_interrupt_does_not_wait_for_the_step(bench: Bench, tmp_path: Path) -> None:
    def twice(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one came too late")

    trainer = bench.trainer("generator", tmp_path, hook=at(4, twice))
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.step == 3 and checkpoints(tmp_path / "checkpoints") == []


def test_an_interrupt_while_batches_are_fetched_loses_none(bench: Bench, tmp_path: Path) -> None:
    """It falls before the second of the two batches of step 3, which is trained on all the same."""
    optimizer = replace(OPTIMIZER, accumulation=2)
    bench.trainer("generator", tmp_path / "straight", optimizer=optimizer).run()
    stopped = bench.trainer("generator", tmp_path / "stopped", optimizer=optimizer)

    class Interrupting:
        def __init__(self, loader: Any) -> None:
            self.loader, self.count = loader, 0

        def __iter__(self) -> Interrupting:
            return self

        def __next__(self) -> Any:
            self.count += 1
            if self.count == 6:
                signal.raise_signal(signal.SIGINT)
            return next(self.loader)

        def state_dict(self) -> dict[str, Any]:
            return self.loader.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.loader.load_state_dict(state)

    stopped.loader = Interrupting(stopped.loader)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    assert load_checkpoint(tmp_path / "stopped" / "checkpoints" / "step-00000003").data[0]["step"] == 6
    bench.trainer("generator", tmp_path / "stopped", optimizer=optimizer).run(resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_run_outside_the_main_thread(bench: Bench, tmp_path: Path) -> None:
    """Only the main thread may handle signals; elsewhere a run works all the same."""
    trainer = bench.trainer("generator", tmp_path, steps=2)
    results: list[Path] = []
    thread = threading.Thread(target=lambda: results.append(trainer.run()))
    thread.start()
    thread.join()
    assert results == [tmp_path / "final"]


def test_resuming_a_finished_run_trains_no_further(bench: Bench, tmp_path: Path) -> None:
    final = bench.trainer("generator", tmp_path, steps=3).run()
    weights = (final / "model.safetensors").read_bytes()
    log = (tmp_path / "log.jsonl").read_text()
    bench.trainer("generator", tmp_path, steps=3, hook=at(1, crash)).run(resume=True)
    assert (final / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "log.jsonl").read_text() == log


def test_resume_without_checkpoints_starts_anew(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 40, "loss": 1.0}\n')
    bench.trainer("generator", tmp_path, steps=2).run(resume=True)
    assert [r["step"] for r in read_log(tmp_path)] == [1, 2]


def test_another_configuration_is_refused_by_name(bench: Bench, tmp_path: Path) -> None:
    bench.trainer("generator", tmp_path, steps=2).run()
    other = replace(OPTIMIZER, lr=0.5, betas=(0.9, 0.95))
    with pytest.raises(CheckpointError) as caught:
        bench.trainer("generator", tmp_path, optimizer=other).run(resume=True)
    text = str(caught.value)
    assert "step-00000002 belongs to another configuration" in text
    assert "optimizer.lr was 0.001, is 0.5" in text and "optimizer.betas was [0.9, 0.99], is [0.9, 0.95]" in text
    assert "loop" not in text.partition("configuration")[2]


def test_other_workers_and_a_copy_of_the_set_go_on(
    photo_shards: Path, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    shutil.copytree(photo_shards / "train", tmp_path / "copy")

    def run(name: str, folder: Path, workers: int, steps: int, *, resume: bool = False) -> None:
        data = LoaderConfig(str(folder), 4, Crop(16, "random", resize=18), seed=1, workers=workers)
        loop = LoopConfig(str(tmp_path / name), steps=steps, device="cpu", log_every=1, checkpoint_every=2)
        train_tokenizer(
            TokenizerRun(tokenizer_config, data, optimizer=OptimizerConfig(schedule="constant"), loop=loop),
            resume=resume,
        )

    run("straight", photo_shards / "train", 0, 4)
    run("moved", photo_shards / "train", 1, 2)
    run("moved", tmp_path / "copy", 0, 4, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "moved", "step-00000004")


def test_existing_checkpoints_without_resume_are_refused(bench: Bench, tmp_path: Path) -> None:
    bench.trainer("generator", tmp_path, steps=2).run()

    def files() -> list[tuple[Path, int]]:
        return sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.name != LOCK_FILE)

    before = files()
    with pytest.raises(CheckpointError, match=r"step-00000002 exists: resume that run, or choose another directory"):
        bench.trainer("generator", tmp_path).run()
    assert files() == before


def test_resume_keeps_the_options_of_this_machine(bench: Bench, tmp_path: Path) -> None:
    """A checkpoint of a GPU, whose optimizer is fused and capturable, goes on on a CPU."""
    bench.trainer("generator", tmp_path, steps=5).run()
    file = tmp_path / "checkpoints" / "step-00000005" / "optimizer.pt"
    states = torch.load(file, weights_only=True)
    for group in states["optimizer"]["param_groups"]:
        group.update(fused=True, capturable=True, lr=torch.tensor(7.0))
    torch.save(states, file)
    trainer = bench.trainer("generator", tmp_path, steps=6)
    trainer.run(resume=True)
    for group in trainer.optimizer.param_groups:
        assert not group["fused"] and not group["capturable"] and not isinstance(group["lr"], Tensor)
    assert trainer.step == 6


def test_a_checkpoint_without_its_average_is_refused(bench: Bench, tmp_path: Path) -> None:
    bench.trainer("generator", tmp_path, steps=2).run()
    (tmp_path / "checkpoints" / "step-00000002" / "average.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing file: .*average\.safetensors"):
        bench.trainer("generator", tmp_path).run(resume=True)


def test_unreadable_images_are_counted_and_their_limit_may_be_raised(
    photo_shards: Path, tokenizer_config: TokenizerConfig, tmp_path: Path
) -> None:
    """One run that allows two bad images of 16, and one that allows a single one until it has stopped."""
    folder = damaged_copy(photo_shards / "train", tmp_path / "damaged", [3, 9])

    def run(name: str, share: float, console: Console | None = None, *, resume: bool = False) -> None:
        data = LoaderConfig(str(folder), 4, Crop(16, "random", resize=18), seed=1, max_unreadable=share)
        loop = LoopConfig(str(tmp_path / name), steps=8, device="cpu", log_every=1, checkpoint_every=1, keep=9)
        train_tokenizer(TokenizerRun(tokenizer_config, data, loop=loop), resume=resume, console=console)

    console = Console(file=io.StringIO(), width=200)
    run("allowed", 2 / 16, console)
    counts = [record.get("unreadable", 0) for record in read_log(tmp_path / "allowed")]
    assert counts == sorted(counts) and 1 in counts and counts[-1] == 2
    assert isinstance(console.file, io.StringIO) and "  2 unreadable" in console.file.getvalue()
    with pytest.raises(ShardError, match=r"more than 1 of the 16 images, which max_unreadable allows"):
        run("raised", 1 / 16)
    assert [record["step"] for record in read_log(tmp_path / "raised")] == list(range(1, counts.index(2) + 1))
    run("raised", 2 / 16, resume=True)
    assert_same_run(tmp_path / "allowed", tmp_path / "raised", "step-00000008")
