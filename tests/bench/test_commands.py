"""`spectralar bench kernels` from end to end on a CPU, with right and with wrong kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from spectralar.bench import commands, plots
from spectralar.bench.commands import bench_kernels_command
from spectralar.bench.frame import WrongResultError
from spectralar.kernels import vq

from .conftest import DoubleCase, last_line, lines_of

pytestmark = pytest.mark.usefixtures("short_ceilings")


def test_table_lines_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.jsonl"
    bench_kernels_command(("dct2", "N=174080"), seconds=5, out=out, device="cpu", commit="feedbee")
    printed = capsys.readouterr().out
    first, *_, last = printed.strip().splitlines()
    assert "commit feedbee" in first
    assert "measured ceilings: copy" in printed and "no GPU" in printed and "cdist + argmin" in printed
    summary = json.loads(last)
    lines = lines_of(out)
    assert summary["bench"] == "kernels" and summary["cases"] == len(lines) == 2
    assert summary["wrong"] == summary["left_out"] == [] and summary["met"] == {} and summary["out"] == str(out)
    assert list(summary["median_ms"]) == [line["case"] for line in lines]
    assert all(line["target"] is None and line["met"] is None and line["ratio"] > 0 for line in lines)


def test_wrong_result_gets_no_ratio_and_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = vq.nearest_code
    monkeypatch.setattr(vq, "nearest_code", lambda z, codebook, **options: right(z, codebook, **options).flip(0))
    out = tmp_path / "kernels.jsonl"
    with pytest.raises(WrongResultError, match="wrong results: nearest_code"):
        bench_kernels_command(("P4", "dct2"), seconds=5, out=out, device="cpu")
    printed = capsys.readouterr().out
    assert "wrong: error" in printed and "cdist" not in printed
    summary = last_line(printed)
    assert len(summary["wrong"]) == 1 and list(summary["median_ms"]) == [lines_of(out)[-1]["case"]]
    assert [line["ratio"] is None for line in lines_of(out)] == [True, False]


def test_what_does_not_fit_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bench_kernels_command(("P3",), seconds=1e-9, device="cpu")
    summary = last_line(capsys.readouterr().out)
    assert summary["cases"] == 0 and len(summary["left_out"]) == 2


def test_quick_takes_the_targets_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "CASES", (DoubleCase(), DoubleCase(target="P9")))
    bench_kernels_command(quick=True, seconds=2, device="cpu")
    printed = capsys.readouterr().out
    assert last_line(printed)["cases"] == 1
    # A reason is text and no markup.
    assert "ZeroDivisionError: by [design]" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"cases": ("P99",)}, "got 'P99'"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_kernels_command(**({"device": "cpu"} | arguments))


def test_picture_is_drawn_from_the_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    double = plots.Sweep("double", "off", (1, 2, 4), lambda value: DoubleCase(off=float(value == 2)), ("sum", "absent"))
    monkeypatch.setattr(plots, "SWEEPS", (double,))
    monkeypatch.setattr(commands, "SWEEPS", (double, plots.Sweep("b", "off", (1,), lambda _: DoubleCase(), ("copy",))))
    monkeypatch.setattr(commands, "CASES", (DoubleCase(),))
    picture, out = tmp_path / "pictures" / "roofline.svg", tmp_path / "lines.jsonl"
    with pytest.raises(WrongResultError):
        bench_kernels_command(seconds=2, out=out, plot=picture, device="cpu")
    assert picture.read_text(encoding="utf-8").startswith("<?xml")
    assert len(lines_of(out)) == 1 + 3 + 1
