"""`spectralar bench training` from end to end on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spectralar.bench import training_measure
from spectralar.bench.commands import bench_training_command
from spectralar.bench.frame import WrongResultError
from spectralar.bench.training import Settings, TrainingCase
from spectralar.bench.training_truth import Verdict

from .conftest import last_line, lines_of

pytestmark = pytest.mark.usefixtures("short_ceilings", "one_thread")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_measure, "_MOST", 7)


def test_table_lines_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "training.jsonl"
    bench_training_command(seconds=60, out=out, device="cpu", commit="feedbee")
    printed = capsys.readouterr().out
    assert "commit feedbee" in printed and "no GPU" in printed
    # Ceilings and the least time stand before any measurement.
    assert 0 < printed.index("measured ceilings") < printed.index("at least") < printed.index("is off fp32 by")
    assert "spectralar, checkpointing" in printed and "one step by stage, eager" in printed
    summary, lines = last_line(printed), lines_of(out)
    # In small sizes all cases of a kind are one.
    assert summary["bench"] == "training" and summary["cases"] == len(lines) == 2
    assert summary["wrong"] == summary["failed"] == summary["left_out"] == [] and summary["met"] == {}
    assert list(summary["median_ms"]) == [line["case"] for line in lines]
    for line in lines:
        assert line["target"] is line["met"] is None and line["unit"] == "ms" and line["error"] <= 2
        assert line["peer"] == "plain PyTorch, eager" and line["ratio"] > 0
        assert line["fraction"] == pytest.approx(line["ceiling"] / line["median"], rel=1e-2)


def test_wrong_result_gets_no_time_and_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = training_measure.Judge.__call__

    def harsh(judge: Any, step: Any, gradients: Any) -> Verdict:
        verdict = judged(judge, step, gradients)
        return Verdict(3 * max(verdict.plain_gradient, 0.01), verdict.plain_gradient, 0.0, 0.0, 0.0)

    monkeypatch.setattr(training_measure.Judge, "__call__", harsh)
    out = tmp_path / "training.jsonl"
    with pytest.raises(WrongResultError, match="wrong results: generator training step"):
        bench_training_command(("generator",), seconds=20, out=out, device="cpu")
    printed = capsys.readouterr().out
    assert "it gets no time" in printed and "ms  " not in printed
    summary, (line,) = last_line(printed), lines_of(out)
    assert summary["wrong"] == [line["case"]] and summary["median_ms"] == {}
    assert line["median"] is line["ratio"] is line["peer"] is None and line["error"] == pytest.approx(3, rel=1e-3)


def test_a_case_that_cannot_run_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = TrainingCase.trainer

    def scarce(case: TrainingCase, settings: Settings, *rest: Any) -> Any:
        if case.kind == "tokenizer":
            raise torch.OutOfMemoryError("2 MiB are free [sic]")
        return usual(case, settings, *rest)

    monkeypatch.setattr(TrainingCase, "trainer", scarce)
    with pytest.raises(WrongResultError, match="failed: tokenizer training step"):
        bench_training_command(seconds=20, device="cpu")
    printed = capsys.readouterr().out
    assert "2 MiB are free [sic]" in printed
    assert last_line(printed)["cases"] == 1 and len(last_line(printed)["failed"]) == 1


def test_what_does_not_fit_is_named_and_quick_takes_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    bench_training_command(quick=True, seconds=1e-9, device="cpu")
    summary = last_line(capsys.readouterr().out)
    assert summary["cases"] == 0 and len(summary["left_out"]) == 2


def test_ranks_are_compared_with_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "training.jsonl"
    bench_training_command(("generator",), ranks=2, seconds=60, out=out, device="cpu")
    printed = capsys.readouterr().out
    summary, lines = last_line(printed), lines_of(out)
    assert printed.count("x one GPU") == summary["cases"] == 2
    assert [line["case"][-6:] for line in lines] == [" (DDP)", "FSDP2)"]
    for line in lines:
        assert line["error"] < 0.5  # the mean of two equal gradients
        # Twice as many images in one step, against the mean rate of the two for themselves.
        first, second = summary["alone_ms"][line["case"]]
        assert line["ceiling"] == pytest.approx(max(first, second), rel=1e-3)
        mean = 2 / (1 / first + 1 / second)
        assert line["ratio"] == pytest.approx(2 * mean / line["median"], rel=1e-2) == summary["gain"][line["case"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"ranks": 0}, r"ranks must be 1\.\.8, not 0"),
        ({"ranks": 9}, r"ranks must be 1\.\.8, not 9"),
        ({"cases": ("d17",)}, "cases must be targets or parts of names, got 'd17'"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_training_command(**({"device": "cpu"} | arguments))
