"""When a step is recorded and replayed; and on two GPUs that a recorded step trains as an ordinary one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralar.config import GeneratorConfig, TokenizerConfig, from_dict, to_dict
from spectralar.training import capture
from spectralar.training.capture import CapturedStep, forget_recordings
from spectralar.training.checkpoint import load_checkpoint
from spectralar.training.data import Crop, LoaderConfig, TokenStore
from spectralar.training.journal import read_log
from spectralar.training.loop import LoopConfig
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.runs import GeneratorRun, TokenizerRun, train_generator, train_tokenizer
from tests.training.jobs import Job


class Graph:
    """Stands for a CUDA graph; holds what happened to it."""

    made: list[Graph]

    def __init__(self) -> None:
        self.events: list[str] = []
        Graph.made.append(self)

    def replay(self) -> None:
        self.events.append("replay")

    def reset(self) -> None:
        self.events.append("reset")


def test_a_step_is_recorded_after_the_warm_up_and_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    Graph.made = []
    recording = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: nullcontext(recording.append(graph)))
    monkeypatch.setattr(capture, "side_stream", nullcontext)
    calls = 0

    def work(_: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        return {"calls": torch.tensor(calls)}

    step = CapturedStep(work, warmup=4)
    assert [int(step([])["calls"]) for _ in range(7)] == [1, 2, 3, 4, 5, 5, 5]
    (first,) = Graph.made
    assert recording == [first] and first.events == ["replay"] * 3
    forget_recordings()
    assert first.events[3:] == ["reset"], "NCCL waits for the end of every graph"
    assert [int(step([])["calls"]) for _ in range(6)] == [6, 7, 8, 9, 10, 10]
    assert recording == Graph.made and Graph.made[1].events == ["replay"] * 2
    del step
    forget_recordings()
    assert Graph.made[1].events == ["replay"] * 2, "what is no longer used is not held"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_two_gpus_train_alike_recorded_or_not_and_with_a_model_each_or_one_for_both(
    kind: str,
    tokenizer_config: TokenizerConfig,
    generator_config: GeneratorConfig,
    photo_shards: Path,
    token_store: TokenStore,
    tmp_path: Path,
) -> None:
    """Twenty fp32 steps of two accumulated batches, with random choices, and statistics joined over the ranks."""
    optimizer = OptimizerConfig(lr=1e-3, warmup=3, ema=0.9, accumulation=2)
    loop = LoopConfig(
        steps=20,
        device="cuda",
        precision="fp32",
        log_every=1,
        validate_every=0,
        picture_every=0,
        checkpoint_every=20,
    )
    run: TokenizerRun | GeneratorRun
    if kind == "tokenizer":
        data = LoaderConfig(str(photo_shards / "train"), 4, Crop(16, "random", resize=18), backend="pillow")
        model = replace(tokenizer_config, latent_norm="batch")
        run = TokenizerRun(model, data, optimizer=optimizer, loop=loop)
    else:
        run = GeneratorRun(generator_config, str(token_store.path), batch=4, optimizer=optimizer, loop=loop)
    weights, losses = [], []
    for name, recorded, ranks_per_copy in (("plain", False, 1), ("captured", True, 1), ("sharded", True, 0)):
        out = tmp_path / name
        order = to_dict(replace(run, loop=replace(loop, out=str(out), capture=recorded, ranks_per_copy=ranks_per_copy)))
        Job(tmp_path / f"{name}.printed", 2, train, kind, order).succeed(180)
        weights.append(load_checkpoint(out / "checkpoints" / "step-00000020").model)
        losses.append([record["loss"] for record in read_log(out) if "lr" in record])
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    # A sharded model's gradients are summed in another order, and a rounding can turn a latent to another code.
    assert losses[2] == pytest.approx(losses[0], rel=1e-3)
    # All together: AdamW makes whole steps of a gradient that is only rounding, such as that of a bias before a norm.
    plain, *others = (torch.cat([state[name].flatten().double() for name in weights[0]]) for state in weights)
    for other in others:
        assert (other - plain).norm() < 1e-3 * plain.norm()


def train(kind: str, run: dict[str, Any]) -> None:
    if kind == "tokenizer":
        train_tokenizer(from_dict(TokenizerRun, run))
    else:
        train_generator(from_dict(GeneratorRun, run))
