"""SIGKILL at random moments: every resume finds a complete checkpoint, and the end is that of a run never killed.

A few kills with every run of the tests; SPECTRALAR_KILLS=200 asks for that many, SPECTRALAR_SOAK=20000 for a run of so
many steps whose memory must not grow.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralar.config import GeneratorConfig, from_dict, to_dict
from spectralar.training.checkpoint import checkpoints, load_checkpoint
from spectralar.training.data import TokenStore
from spectralar.training.journal import LOG_FILE
from spectralar.training.loop import LoopConfig
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.runs import GeneratorRun, train_generator
from tests.training.harness import Bench, assert_same_run
from tests.training.jobs import Job, wait_for

STEPS = 60
KILLS = int(os.environ.get("SPECTRALAR_KILLS", "5"))
SOAK = int(os.environ.get("SPECTRALAR_SOAK", "0"))


def train(run: dict[str, Any]) -> None:
    train_generator(from_dict(GeneratorRun, run), resume=True)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_that_is_killed_ends_as_if_it_never_was(
    token_store: TokenStore, generator_config: GeneratorConfig, tmp_path: Path, world: int
) -> None:
    """Random class drop and depth, validation and best model, a checkpoint every second step and only one kept."""
    run = GeneratorRun(
        model=generator_config,
        tokens=str(token_store.path),
        validation=str(token_store.path),
        batch=4,
        optimizer=OptimizerConfig(lr=1e-3, warmup=3, ema=0.9),
        loop=LoopConfig(
            device="cpu",
            steps=STEPS,
            log_every=1,
            validate_every=3,
            picture_every=0,
            checkpoint_every=2,
            keep=1,
        ),
    )

    def start(out: Path) -> Job:
        return Job(
            out.with_suffix(".printed"), world, train, to_dict(replace(run, loop=replace(run.loop, out=str(out))))
        )

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    start(straight).succeed()
    moments = random.Random(world)
    kills = 0
    while kills < KILLS:
        log = killed / LOG_FILE
        known = log.read_bytes().count(b"\n") if log.exists() else 0
        job = start(killed)
        # A little behind where the last one got, so that the run moves on, or anywhere before.
        ahead = moments.randint(-3, 2 * STEPS // KILLS if KILLS < STEPS else 3)
        wait_for(log, max(0, min(known + ahead, STEPS)))
        time.sleep(moments.uniform(0, 0.03))
        victims = moments.choice([[0], [1], [0, 1]] if world == 2 else [[0]])
        for rank in victims:
            job.processes[rank].kill()
        for process in job.processes:
            process.terminate()  # as torchrun does when it sees that one is dead
        codes = job.wait(20)
        kills += -signal.SIGKILL in codes
        if 0 in codes:
            break  # it was done
        for rank, code in enumerate(codes):
            expected = (-signal.SIGKILL,) if rank in victims else (1, -signal.SIGTERM)
            assert code in expected, (codes, job.texts())
        for directory in checkpoints(killed / "checkpoints"):
            load_checkpoint(directory)
    start(killed).succeed()
    assert kills >= KILLS // 2
    assert_same_run(straight, killed, f"step-{STEPS:08d}")
    for name in ("final", "best"):
        one, two = (sorted((out / name).iterdir()) for out in (straight, killed))
        assert [p.name for p in one] == [p.name for p in two] == ["config.json", "model.safetensors"]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert [p.name for p in (killed / "checkpoints").iterdir()] == [f"step-{STEPS:08d}"]


@pytest.mark.skipif(not SOAK, reason="SPECTRALAR_SOAK names the number of steps")
def test_memory_stays_flat(bench: Bench, tmp_path: Path) -> None:
    """Resident memory in the last four fifths of a run with records, validation and checkpoints all the time."""
    sizes: list[int] = []

    def measure(call: int, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if call % (SOAK // 10) == 0:
            gc.collect()
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return losses

    bench.trainer("tokenizer", tmp_path, steps=SOAK, hook=measure, checkpoint_every=20, validate_every=50).run()
    assert len(sizes) == 10
    assert max(sizes[2:]) - sizes[1] < 8 * 2**20, [size / 2**20 for size in sizes]
