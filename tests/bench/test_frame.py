"""A run of cases: what fits into its time, and what is left when it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from spectralar.bench import frame
from spectralar.bench.cases import Measurement
from spectralar.bench.frame import Run, WrongResultError

from .conftest import DoubleCase, last_line, lines_of, measurement


@dataclass(frozen=True, kw_only=True)
class Light(DoubleCase):
    weight = 0.25


@dataclass
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, short_ceilings: None) -> Clock:
    found = Clock()
    monkeypatch.setattr(frame, "time", found)
    return found


def run_of(seconds: float, out: Path | None = None) -> Run:
    return Run("double", "cpu", seconds, out, "feedbee")


def taking(clock: Clock, seconds: list[float], shares: list[float]) -> Callable[[DoubleCase, float], Measurement]:
    def measure(case: DoubleCase, share: float) -> Measurement:
        shares.append(share)
        clock.now += seconds[len(shares) - 1]
        return measurement(case, 1e-3)

    return measure


def cases(*offs: float) -> list[DoubleCase]:
    return [DoubleCase(off=off) for off in offs]


def test_every_case_has_a_share_of_what_is_left(clock: Clock) -> None:
    run, shares = run_of(90), []
    done = run.measure([*cases(0, 1), Light()], taking(clock, [50, 20, 5], shares), lambda m: None)
    assert len(done) == 3 and shares == pytest.approx([90 / 2.25, 40 / 1.25, 20.0])
    assert run.left == 15 and not run.early


def test_what_cannot_be_done_in_time_is_left_out(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(50)
    done = run.measure([*cases(0, 1, 2), Light()], taking(clock, [20, 22, 5], []), lambda m: None)
    # Eight seconds are less than half of what any case took, but nobody knows of the light one.
    assert [type(m.case) for m in done] == [DoubleCase, DoubleCase, Light]
    run.close(len(done), {"more": 1}, plot=None)
    printed = capsys.readouterr().out
    assert "left out after 50 s: double" in printed
    assert last_line(printed) == {
        "bench": "double", "cases": 3, "wrong": [], "failed": [], "left_out": ["double"], "more": 1, "out": None,
        "plot": None,
    }  # fmt: skip


def test_a_run_that_is_stopped_keeps_what_it_measured(clock: Clock, tmp_path: Path) -> None:
    def stopped(m: Measurement) -> None:
        if m.case == DoubleCase(off=1):
            raise KeyboardInterrupt

    out = tmp_path / "new" / "double.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_of(90, out).measure(cases(0, 1, 2), taking(clock, [1, 1, 1], []), stopped)
    assert len(lines_of(out)) == 2 and lines_of(out)[0]["commit"] == "feedbee"


def test_a_case_that_fails_does_not_stop_the_others(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    def scarce(case: DoubleCase, share: float) -> Measurement:
        if case.off == 1:
            raise RuntimeError("2 MiB are free [sic]")
        return measurement(case, 1e-3)

    run = run_of(90)
    assert len(run.measure(cases(0, 1, 2), scarce, lambda m: None)) == 2
    with pytest.raises(WrongResultError, match="wrong results: none; failed: double"):
        run.close(2, {})
    printed = capsys.readouterr().out
    assert "failed: 2 MiB are free [sic]" in printed and last_line(printed)["failed"] == ["double"]
