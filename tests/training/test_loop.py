"""The loop: events when they are due, a log that can be read, and a stop at the first bad loss."""

from __future__ import annotations

import errno
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spectralar.generator import SpectralGenerator
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training import checkpoint
from spectralar.training.checkpoint import CheckpointError, checkpoints, load_checkpoint
from spectralar.training.data import TokenLoader
from spectralar.training.journal import read_log
from spectralar.training.loop import LoopConfig, NonFiniteLossError, Trainer
from tests.training.harness import (
    KINDS,
    OPTIMIZER,
    Bench,
    Crash,
    Kind,
    assert_same,
    at,
    crash,
    hooked,
    strict_lines,
)


def poison_loss(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**losses, "loss": losses["loss"] * float("nan")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("log_every", "noticed"), [(1, 7), (12, 8)])
def test_a_bad_loss_stops_the_run_and_names_its_step(
    bench: Bench, tmp_path: Path, kind: Kind, log_every: int, noticed: int
) -> None:
    calls = []

    def hook(call: int, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(call)
        return poison_loss(losses) if call == 7 else losses

    trainer = bench.trainer(kind, tmp_path, hook=hook, log_every=log_every, checkpoint_every=2)
    with pytest.raises(NonFiniteLossError, match=r"non-finite at step 7; the last good checkpoint is .*step-00000006"):
        trainer.run()
    assert len(calls) == noticed
    saved = load_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert saved.step == 6
    assert saved.average is not None
    assert all(t.isfinite().all() for weights in (saved.model, saved.average) for t in weights.values())
    strict_lines(tmp_path)
    assert not (tmp_path / "final").exists()
    bench.trainer(kind, tmp_path).run(resume=True)


def test_a_bad_gradient_of_a_finite_loss_counts_too(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer("generator", tmp_path)
    zero = trainer.model.get_parameter("positions")

    def bad_gradient(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**losses, "loss": losses["loss"] + (zero.sum() * 0).sqrt()}

    trainer.task.loss = hooked(trainer.task.loss, at(3, bad_gradient))  # type: ignore[method-assign, assignment]
    with pytest.raises(NonFiniteLossError, match=r"at step 3; the last good checkpoint is none\. Try a lower"):
        trainer.run()


def test_an_interrupt_after_a_bad_loss_saves_nothing(bench: Bench, tmp_path: Path) -> None:
    def hook(call: int, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        if call == 3:
            signal.raise_signal(signal.SIGINT)
        return poison_loss(losses) if call == 2 else losses

    with pytest.raises(NonFiniteLossError, match="at step 2"):
        bench.trainer("generator", tmp_path, hook=hook, log_every=12).run()
    assert checkpoints(tmp_path / "checkpoints") == []


def test_the_log_is_json_and_is_cut_back_on_resuming(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        bench.trainer("tokenizer", tmp_path, hook=at(9, crash)).run()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # the line that a crash cut short
    trainer = bench.trainer("tokenizer", tmp_path)
    trainer.run(resume=True)
    records = strict_lines(tmp_path)
    assert [r["step"] for r in records] == list(range(1, 13))
    names = {"step", "loss", "pixel", "codebook", "commitment", "codes_used", "gradient_norm", "lr"}
    assert all(r.keys() == names | {"images_per_second", "loader_wait"} for r in records)
    assert [r["lr"] for r in records] == [OPTIMIZER.lr_at(step, 12) for step in range(12)]


def test_the_log_holds_means_over_its_interval(bench: Bench, tmp_path: Path) -> None:
    def fixed(call: int, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": losses["loss"], "number": torch.tensor(float(call))}

    optimizer = replace(OPTIMIZER, accumulation=2)
    bench.trainer("generator", tmp_path, steps=5, optimizer=optimizer, hook=fixed, log_every=3).run()
    records = read_log(tmp_path)
    assert [(r["step"], r["number"]) for r in records] == [(3, 3.5), (5, 8.5)]


def test_accumulation_is_the_mean_over_its_batches(bench: Bench, tmp_path: Path) -> None:
    """Two batches of one step give the mean of their gradients: compared in the norm that the log shows."""
    bench.generator = replace(bench.generator, class_drop=0.0, drop_path=0.0)
    optimizer = replace(OPTIMIZER, accumulation=2, clip=1e9)
    trainer = bench.trainer("generator", tmp_path, steps=1, optimizer=optimizer)
    model = trainer.model
    loader = TokenLoader(bench.store, 5, seed=5)
    batches = [next(loader), next(loader)]
    gradients = []
    for batch in batches:
        model.zero_grad()
        trainer.task.loss(batch)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
    expected = ((gradients[0] + gradients[1]) / 2).double().norm().item()
    trainer.run()
    assert read_log(tmp_path)[0]["gradient_norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_events_come_when_due_and_training_mode_returns(bench: Bench, tmp_path: Path, ema: float) -> None:
    trainer = bench.trainer(
        "generator",
        tmp_path,
        steps=7,
        optimizer=replace(OPTIMIZER, ema=ema),
        validate_every=2,
        picture_every=3,
        checkpoint_every=4,
        log_every=5,
    )
    seen: list[tuple[str, int]] = []

    def validate(model: nn.Module) -> dict[str, Any]:
        assert model is trainer.trained and not any(m.training for m in model.modules())
        seen.append(("validate", trainer.step))
        return {"val_loss": 1.5, "note": "a [note]"}

    def picture(model: nn.Module) -> Image.Image:
        assert model is trainer.trained and not model.training
        seen.append(("picture", trainer.step))
        return Image.new("RGB", (2, 2))

    def training(_: int, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        assert all(m.training for m in trainer.model.modules())
        return losses

    trainer.task.validate, trainer.task.picture = validate, picture  # type: ignore[method-assign]
    trainer.task.loss = hooked(trainer.task.loss, training)  # type: ignore[method-assign, assignment]
    trainer.run()
    assert (trainer.average is None) == (ema == 0)
    assert seen == [
        ("validate", 2),
        ("picture", 3),
        ("validate", 4),
        ("validate", 6),
        ("picture", 6),
        ("validate", 7),
        ("picture", 7),
    ]
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-00000004", "step-00000007"]
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [f"step-{n:08d}.png" for n in (3, 6, 7)]
    assert [r["step"] for r in read_log(tmp_path) if "val_loss" in r] == [2, 4, 6, 7]
    assert [r["step"] for r in read_log(tmp_path) if "lr" in r] == [5, 7]
    assert "step 4: a [note]" in bench.printed()


def test_the_final_model_is_the_average(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer("generator", tmp_path, steps=4)
    final = SpectralGenerator.from_pretrained(trainer.run())
    assert trainer.average is not None
    for name, weight in final.state_dict().items():
        assert torch.equal(weight, trainer.average.model.state_dict()[name]), name
    assert not torch.equal(final.positions, trainer.model.get_parameter("positions"))
    assert json.loads((tmp_path / "config.json").read_text()) == trainer.config


def test_the_best_model_is_kept_also_over_an_interruption(bench: Bench, tmp_path: Path) -> None:
    """Losses 3, 1, 2, 1 at steps 2, 4, 6, 8: the first of the lowest wins, and a resumed run knows it."""
    averages = {}

    def scored(trainer: Trainer) -> Trainer:
        def validate(model: nn.Module) -> dict[str, Any]:
            averages[trainer.step] = {name: t.clone() for name, t in model.state_dict().items()}
            return {"val_loss": {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}[trainer.step]}

        trainer.task.validate = validate  # type: ignore[method-assign]
        return trainer

    events: dict[str, Any] = {"steps": 8, "validate_every": 2, "checkpoint_every": 2}
    with pytest.raises(Crash):
        scored(bench.trainer("generator", tmp_path, hook=at(5, crash), **events)).run()
    scored(bench.trainer("generator", tmp_path, **events)).run(resume=True)
    best = SpectralGenerator.from_pretrained(tmp_path / "best").state_dict()
    assert_same(dict(best), averages[4], "best")
    assert not torch.equal(best["positions"], averages[8]["positions"])


def test_keep_and_zero_intervals(bench: Bench, tmp_path: Path) -> None:
    bench.trainer("generator", tmp_path / "one", steps=6, checkpoint_every=1, keep=3).run()
    assert [p.name[-1] for p in checkpoints(tmp_path / "one" / "checkpoints")] == ["4", "5", "6"]
    bench.trainer("generator", tmp_path / "two", steps=6, checkpoint_every=0).run()
    assert [p.name[-1] for p in checkpoints(tmp_path / "two" / "checkpoints")] == ["6"]


def test_a_full_disk_stops_the_run_with_the_last_good_checkpoint(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        trainer._writer.wait()  # the checkpoint of step 4
        monkeypatch.setattr(checkpoint, "save_file", full)
        return losses

    def hook(call: int, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        if call == 7 and trainer._writer._pending is not None:
            trainer._writer._pending.exception()  # that of step 6 has failed by now
        return fill(losses) if call == 5 else losses

    trainer = bench.trainer("generator", tmp_path, hook=hook, checkpoint_every=2)
    with pytest.raises(CheckpointError, match=r"step 6 under .*No space left.*last complete one is .*step-00000004"):
        trainer.run()
    assert trainer.step == 7, "told as soon as it is known"
    monkeypatch.undo()
    bench.trainer("generator", tmp_path, checkpoint_every=2).run(resume=True)


def test_a_full_disk_is_told_before_the_next_checkpoint(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)

    def wait(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        assert trainer._writer._pending is not None
        trainer._writer._pending.exception()
        return losses

    trainer = bench.trainer("generator", tmp_path, steps=40, hook=at(4, wait), checkpoint_every=2)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 2 .*No space left"):
        trainer.run()
    assert trainer.step in (3, 4)


def test_a_model_or_log_that_cannot_be_written_is_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = bench.trainer("generator", tmp_path / "a", steps=4, checkpoint_every=2)
    monkeypatch.setattr(type(trainer.task.model), "save_pretrained", full)
    with pytest.raises(
        CheckpointError, match=r"could not write .*final: .*No space left.*complete.* is .*step-00000004"
    ):
        trainer.run()
    monkeypatch.undo()
    (tmp_path / "b" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(OSError, match=r"b/log\.jsonl"):
        bench.trainer("generator", tmp_path / "b", steps=4).run()


def test_a_bad_step_is_found_before_its_model_is_validated(bench: Bench, tmp_path: Path) -> None:
    def poison(losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**losses, "loss": losses["loss"] * float("nan")}

    trainer = bench.trainer("tokenizer", tmp_path, steps=9, hook=at(3, poison), log_every=9, validate_every=4)
    with pytest.raises(NonFiniteLossError, match="at step 3"):
        trainer.run()
    assert trainer.step == 4 and read_log(tmp_path) == []


def test_bf16_trains_weights_that_stay_fp32(bench: Bench, tmp_path: Path) -> None:
    final = SpectralTokenizer.from_pretrained(bench.trainer("tokenizer", tmp_path, steps=2, precision="bf16").run())
    assert {t.dtype for t in final.state_dict().values() if t.is_floating_point()} == {torch.float32}
    bench.trainer("tokenizer", tmp_path / "fp32", steps=2, precision="fp32").run()
    first, second = (read_log(out)[0]["loss"] for out in (tmp_path, tmp_path / "fp32"))
    assert first != second and first == pytest.approx(second, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps, log_every and keep must be at least 1"),
        ({"log_every": 0}, "steps, log_every and keep must be at least 1"),
        ({"keep": 0}, "steps, log_every and keep must be at least 1"),
        ({"validate_every": -1}, "validate_every, picture_every and checkpoint_every must not be negative"),
        ({"picture_every": -1}, "validate_every, picture_every and checkpoint_every must not be negative"),
        ({"checkpoint_every": -1}, "validate_every, picture_every and checkpoint_every must not be negative"),
        ({"device": "tpu"}, "device must be auto, cpu or cuda, not 'tpu'"),
        ({"precision": "fp16"}, "precision must be auto, bf16 or fp32, not 'fp16'"),
    ],
)
def test_wrong_loop_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**changes)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LoopConfig().resolved_device() == LoopConfig(device="cpu").resolved_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="device is cuda, but PyTorch sees no GPU; use auto or cpu"):
        LoopConfig(device="cuda").resolved_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LoopConfig().resolved_device() == LoopConfig(device="cuda").resolved_device() == torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_equals_the_plain_step(bench: Bench, tmp_path: Path, kind: Kind) -> None:
    """Eight fp32 steps with a schedule, averaging and random choices: three calls of warm-up, five replays."""
    runs = {}
    for name, capture in (("plain", False), ("again", False), ("captured", True)):
        trainer = bench.trainer(
            kind, tmp_path / name, steps=8, device="cuda", precision="fp32", capture=capture, checkpoint_every=8
        )
        trainer.run()
        runs[name] = (load_checkpoint(tmp_path / name / "checkpoints" / "step-00000008"), read_log(tmp_path / name))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max((a[n].double() - b[n].double()).abs().max().item() for n in a)

    plain, again, captured = (runs[name][0] for name in ("plain", "again", "captured"))
    assert plain.average is not None and again.average is not None and captured.average is not None
    rounding = 8 * torch.finfo(torch.float32).eps
    assert distance(plain.model, captured.model) <= 2 * distance(plain.model, again.model) + rounding
    assert distance(plain.average, captured.average) <= 2 * distance(plain.average, again.average) + rounding
    assert [r["lr"] for r in runs["plain"][1]] == [r["lr"] for r in runs["captured"][1]]
    for a, b in zip(runs["plain"][1], runs["captured"][1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
