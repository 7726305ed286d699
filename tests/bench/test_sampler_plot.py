"""The picture of the latency, from lines alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spectralar.bench.cases import Measurement
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.record import Provenance, line_of
from spectralar.bench.sampler import BATCHES, CURVE, PRESETS, SamplingCase, case_named, sampling_cases, with_curve
from spectralar.bench.sampler_plot import Rates, draw_latency

from .conftest import rival, timing

RATES = Ceilings(copy=4.2e12, read=4e12, gemm={"bf16": 7e14})
ORIGIN = Provenance("NVIDIA H200", "2.11.0", "3.6.0", "0123abc", "2026-01-31")
CASES = [SamplingCase(batch=batch) for batch in CURVE]


def line(case: SamplingCase, median: float | None = 0.03, origin: Provenance = ORIGIN) -> dict[str, Any]:
    floor, ceiling = RATES.floor(case.bytes(), case.flops(), case.arithmetic)
    peers = (rival("plain PyTorch", 0.1),) if case.batch == 64 else ()
    return line_of(Measurement(case, 0.1, timing(median) if median else None, peers, floor, ceiling), origin)


def test_every_case_is_found_by_its_name() -> None:
    cases = [*sampling_cases(PRESETS, BATCHES, "auto"), *CASES, CASES[0].small()]
    for case in cases:
        assert case_named(case.name) == replace(case, target=None, condition=None, aim=None)
    for name in ("dct2 fp32", CASES[0].name.replace("d16", "d17"), CASES[0].name.replace("64 steps", "63 steps")):
        assert case_named(name) is None
    assert case_named(CASES[0].name.replace("tokens", "256x256 pixels, cubic head")) is None


def test_rates_are_those_of_the_floors() -> None:
    many = SamplingCase(batch=256, pixels="vqgan")
    assert Rates.of_lines([(case, line(case)) for case in CASES]) == Rates(pytest.approx(4.2e12, rel=1e-3), None)
    rates = Rates.of_lines([(case, line(case)) for case in (many, CASES[0])])
    assert rates.copy == pytest.approx(4.2e12, rel=1e-3) and rates.gemm == pytest.approx(7e14, rel=1e-3)
    assert Rates.of_lines([(many, line(many))]) == Rates(None, None)
    # A slow run of a case with few operations says nothing of the arithmetic.
    slow = line(CASES[0]) | {"ceiling": 10.0}
    assert Rates.of_lines([(CASES[0], slow), (CASES[1], line(CASES[1]))]).gemm is None


def drawn(lines: list[dict[str, Any]], path: Path, ceilings: Ceilings | None = RATES) -> str:
    assert draw_latency(lines, path, ceilings)
    return path.read_text(encoding="utf-8")


def test_measured_lines_and_floors_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    path = tmp_path / "pictures" / "latency.svg"
    lines = [line(case) for case in CASES]
    whole = drawn(lines, path)
    names = ("d16", "d16, best peer of the run", *(f"d16 at least: {w}" for w in FLOORS), "NVIDIA H200")
    assert all(f">{name}<" in whole or f">{name}, " in whole for name in names)
    # Without a case that is bound by arithmetic nobody knows its rate, but the rest is there.
    alone = drawn(lines, path, None)
    assert "at least: weights<" in alone and "arithmetic" not in alone
    assert "arithmetic" in drawn([*lines, line(SamplingCase(batch=256, pixels="vqgan"))], path, None)
    other = drawn([line(SamplingCase(preset="d20")), *lines], path)
    assert ">d20<" in other and "d16 at least: weights" in other


FLOORS = ("weights", "weights, keys and values", "arithmetic")


def test_a_case_is_drawn_as_it_was_measured_last_on_the_last_gpu(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first, second, path = line(CASES[0], 0.5), line(CASES[0]), tmp_path / "latency.svg"
    elsewhere = line(CASES[1], 0.9, replace(ORIGIN, gpu="NVIDIA H100"))

    def marks(*lines: dict[str, Any]) -> int:
        return drawn(list(lines), path).count("<use")

    alone = marks(second)
    assert marks(first, elsewhere, second) == marks(first, second) == alone < marks(second, line(CASES[1]))


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "latency.svg"
    pixels, wrong = line(SamplingCase(pixels="direct")), line(CASES[0], None)
    kernels = line(CASES[0]) | {"case": "dct2 fp32"}
    assert not draw_latency([pixels, wrong, kernels], path) and not path.exists()


def test_a_curve_has_the_batches_that_are_missing() -> None:
    cases = with_curve(sampling_cases(("d16", "d20"), (1, 64), "graph"), "d16", "graph")
    curve = [case for case in cases if case.brief]
    assert [case.batch for case in curve] == [2, 4, 8, 16, 32, 128, 256]
    assert all(case.backend == "graph" and case.target is None and case.weight < 1 for case in curve)
    at = cases.index(curve[0])
    # Behind the targets, and before other presets.
    assert not any(case.target for case in cases[at:]) and "d20" not in {case.preset for case in cases[:at]}
    assert [case.batch for case in with_curve([], "d16", "auto")] == list(CURVE)
