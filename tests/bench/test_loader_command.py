"""`spectralar bench loader` from end to end on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spectralar.bench import commands, loader, loader_measure
from spectralar.bench.commands import bench_loader_command
from spectralar.bench.frame import WrongResultError
from spectralar.bench.loader import Verdict
from spectralar.bench.loader_measure import Bench
from spectralar.training.data import Crop, ImageLoader, LoaderConfig
from spectralar.training.data.dali import dali_installed
from tests.bench.test_loader import shards

from .conftest import last_line, lines_of

__all__ = ["shards"]  # a fixture

pytestmark = pytest.mark.usefixtures("short_ceilings", "one_thread")


@pytest.fixture(autouse=True)
def few_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "Bench", lambda device, _: Bench(device, 0.02))
    monkeypatch.setattr(loader_measure, "_UNSEEN", 0.02)


def test_table_lines_and_json(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "loader.jsonl"
    bench_loader_command(str(shards), workers=1, seconds=600, out=out, device="cpu", commit="feedbee")
    printed = capsys.readouterr().out
    assert "commit feedbee" in printed and "no GPU" in printed
    # The ceiling stands before any measurement.
    assert 0 < printed.index("measured ceilings") < printed.index("bare DALI") < printed.index("against Pillow")
    summary, lines = last_line(printed), lines_of(out)
    assert summary["bench"] == "loader" and summary["cases"] == len(lines) == (3 if dali_installed() else 2)
    assert summary["wrong"] == summary["failed"] == summary["left_out"] == [] and summary["met"] == {}
    (step,) = (line for line in lines if line["case"].startswith("step"))
    assert list(summary["wait_ms"].values()) == [pytest.approx(step["median"] - step["ceiling"], abs=2e-2)]
    for line in lines:
        assert line["target"] is line["met"] is None and line["unit"] == "ms" and line["error"] <= 1
        if line is step:
            assert line["peer"] is None
            continue
        rate = summary["images_per_second"][line["case"]]
        assert rate == pytest.approx(8 / (1e-3 * line["median"]), rel=1e-2)
        assert line["peer"] == "webdataset + Pillow, WebLoader" and line["ratio"] > 0
        if dali_installed():
            assert line["fraction"] == pytest.approx(line["ceiling"] / line["median"], rel=1e-2)
            assert summary["of_bare_dali"][line["case"]] == pytest.approx(line["fraction"], rel=1e-2)
        else:
            assert line["fraction"] is line["ceiling"] is None and "without bare DALI: NVIDIA DALI is not" in printed


def test_wrong_pictures_get_no_time_and_fail_the_command(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = loader.judge

    def harsh(*arguments: Any) -> Verdict:
        return replace(judged(*arguments), pixel=54.0)

    monkeypatch.setattr(loader, "judge", harsh)
    monkeypatch.setattr(loader_measure, "dali_installed", lambda: False)  # what is bare takes seconds to start
    out = tmp_path / "loader.jsonl"
    with pytest.raises(WrongResultError, match="wrong results: loader by pillow"):
        bench_loader_command(str(shards), workers=0, cases=("loader by pillow",), seconds=600, out=out, device="cpu")
    printed = capsys.readouterr().out
    assert "at most 54 of 255" in printed and "it gets no time" in printed and "webdataset" not in printed
    summary, (line,) = last_line(printed), lines_of(out)
    assert summary["wrong"] == [line["case"]] and summary["images_per_second"] == {}
    assert line["median"] is line["ratio"] is line["peer"] is None and line["error"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"step_ms": -1.0}, "step_ms must be positive, got -1"),
        ({"workers": -1}, "workers must"),
        ({"batch": 0}, "batch must be positive"),
        ({"size": 0}, "size must be positive"),
        ({"shards": "/nowhere"}, "path /nowhere is no folder"),
        ({"cases": ("P99",)}, "cases must be targets or parts of names, got 'P99'"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_bad_arguments(shards: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_loader_command(**({"shards": str(shards), "device": "cpu"} | arguments))


def test_fewer_samples_than_a_batch_are_refused_before_anything_is_measured(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "bare", lambda *_: pytest.fail("measured"))
    config = LoaderConfig(str(shards), 25, Crop(8))
    with pytest.raises(ValueError, match="24 samples") as refused:
        ImageLoader(config)
    monkeypatch.setattr(loader.LoaderCase, "config", config)
    with pytest.raises(ValueError, match=str(refused.value)):
        bench_loader_command(str(shards), device="cpu")
