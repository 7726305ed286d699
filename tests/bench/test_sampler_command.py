"""`spectralar bench sampler` from end to end on a CPU, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from spectralar.bench import commands, sampler_measure
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.commands import bench_sampler_command
from spectralar.bench.frame import WrongResultError
from spectralar.bench.record import Provenance, line_of
from spectralar.bench.report import print_case
from spectralar.bench.sampler import BF16, FP8, ONE_TOKEN, SCALES, TARGETS, SamplingCase
from spectralar.bench.sampler_measure import SamplingMeasurement, measure_sampling
from spectralar.bench.sampler_report import print_sampling, summary_of
from spectralar.bench.sampler_split import compile_until, split_by_operation
from spectralar.bench.sampler_truth import Drawn, Verdict
from spectralar.bench.split import short_name, split_by_kernel

from .conftest import CPU, last_line, lines_of, timing

RATES = Ceilings(copy=1e10, read=1e10, gemm={"bf16": 1e11})
RIGHT = Verdict(0.5, 0.0, 0.0, 0.0, 0.1)


pytestmark = pytest.mark.usefixtures("short_ceilings", "one_thread")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_measure, "_FEWEST", 3)
    monkeypatch.setattr(sampler_measure, "_MOST", 3)


def test_table_lines_picture_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    listed = commands.sampling_cases
    # A VQGAN takes seconds on a CPU: of the two batches one is enough.
    monkeypatch.setattr(
        commands, "sampling_cases", lambda *chosen: [c for c in listed(*chosen) if c.pixels != "vqgan" or c.batch == 1]
    )
    out, plot = tmp_path / "sampler.jsonl", tmp_path / "pictures" / "latency.svg"
    bench_sampler_command(
        presets=("d16-p4",), batches=(1, 64), seconds=60, out=out, plot=plot, device="cpu", commit="feedbee"
    )
    printed = capsys.readouterr().out
    assert "commit feedbee" in printed and "no GPU" in printed
    # Ceilings and the least time stand before any measurement.
    assert 0 < printed.index("measured ceilings") < printed.index("at least") < printed.index("draws unlike fp32's")
    summary, lines = last_line(printed), lines_of(out)
    assert summary["bench"] == "sampler" and summary["cases"] == len(lines) == 5
    assert summary["wrong"] == summary["failed"] == summary["left_out"] == [] and summary["met"] == {}
    assert list(summary["median_ms"]) == [line["case"] for line in lines]
    for line in lines:
        assert line["target"] is line["met"] is None and line["unit"] == "ms" and line["error"] <= 2
        assert line["peer"] == "plain PyTorch, steps in a graph" and line["ratio"] > 0
        assert line["fraction"] == pytest.approx(line["ceiling"] / line["median"], rel=1e-2)
    assert plot.read_text(encoding="utf-8").startswith("<?xml")
    again = tmp_path / "again.svg"
    bench_sampler_command(lines=out, plot=again)
    assert last_line(capsys.readouterr().out)["plot"] == str(again) and again.exists()


def test_cases_are_chosen_by_target_and_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    def left_out(*cases: str) -> list[str]:
        bench_sampler_command(cases, presets=("d16",), seconds=1e-9, device="cpu")
        found: list[str] = last_line(capsys.readouterr().out)["left_out"]
        return found

    assert left_out("P7", "P8") == [
        "class -> 32x32 pixels, vqgan head, d16, tiny, 8 steps, guided, B=1",
        "class -> tokens, d16, tiny, 8 steps, guided, B=2",
    ]
    assert len(left_out("direct")) == 2


def test_a_curve_is_measured_shortly_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "sampler.jsonl", tmp_path / "latency.png"
    bench_sampler_command(("B=1",), ("d16",), (1,), quick=True, seconds=60, out=out, plot=plot, device="cpu")
    lines = {line["case"][-3:]: line for line in lines_of(out) if "pixels" not in line["case"]}
    assert lines["B=1"]["peer"] is not None and lines["B=2"]["peer"] is None and lines["B=2"]["median"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def swap_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sampler_measure.draws

    def swapped(sampler: Any) -> Callable[..., Drawn]:
        def draw(*inputs: Any) -> Drawn:
            drawn = right(sampler)(*inputs)
            return drawn._replace(tokens=drawn.tokens.flip(1))

        return draw

    monkeypatch.setattr(sampler_measure, "draws", swapped)


def test_wrong_result_gets_no_time_and_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    swap_tokens(monkeypatch)
    monkeypatch.setattr(commands, "sampling_cases", lambda *_: [SamplingCase()])
    pytest.importorskip("matplotlib")
    out = tmp_path / "sampler.jsonl"
    with pytest.raises(WrongResultError, match="wrong results: class -> tokens"):
        bench_sampler_command(seconds=20, out=out, plot=tmp_path / "latency.svg", device="cpu")
    printed = capsys.readouterr().out
    assert "no picture" in printed and not (tmp_path / "latency.svg").exists()
    assert "it gets no time" in printed and "images/s " not in printed
    summary, lines = last_line(printed), lines_of(out)
    assert summary["wrong"] == [line["case"] for line in lines] and summary["median_ms"] == {}
    for line in lines:
        assert line["median"] is line["ratio"] is line["peer"] is None and line["error"] > 2


def test_a_case_that_cannot_run_does_not_stop_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = commands.measure_sampling

    def scarce(case: SamplingCase, *arguments: Any, **options: Any) -> Any:
        if case.batch == 2:
            raise torch.OutOfMemoryError("buffers for 2 images need 3 MiB, but 2 MiB are free [sic]")
        return measured(case, *arguments, **options)

    monkeypatch.setattr(commands, "measure_sampling", scarce)
    monkeypatch.setattr(commands, "sampling_cases", lambda *_: [SamplingCase(batch=2), SamplingCase()])
    with pytest.raises(WrongResultError, match="failed: class -> tokens"):
        bench_sampler_command(seconds=20, device="cpu")
    printed = capsys.readouterr().out
    assert "2 MiB are free [sic]" in printed
    summary = last_line(printed)
    assert summary["cases"] == 1 and len(summary["failed"]) == 1


def test_what_does_not_fit_is_named_and_quick_takes_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    bench_sampler_command(presets=("d16", "d20"), quick=True, seconds=1e-9, device="cpu")
    summary = last_line(capsys.readouterr().out)
    # Of P6, P8, P7 twice and P9 twice: in small sizes both of P7 are one.
    assert summary["cases"] == 0 and len(summary["left_out"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"presets": ("d17",)}, "not 'd17'"),
        ({"presets": ()}, "presets must be one or more"),
        ({"cases": ("P5",)}, "got 'P5'"),
        ({"lines": Path("lines.jsonl")}, "lines must come with plot"),
        ({"batches": (1, 5000)}, "not 5000"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_sampler_command(**({"device": "cpu"} | arguments))


@pytest.mark.parametrize("index", [0, 2, 6])
def test_a_target_is_measured_against_all_peers(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    target = TARGETS[index]
    case = replace(target.small(), target=target.target, condition=target.condition, aim=target.aim, backend="graph")
    m = measure_sampling(case, CPU, RATES, 60.0)
    assert m.right and m.ours is not None and m.backend == "graph" and m.ours.how == "clock"
    names = [r.name for r in m.rivals]
    # What ours is itself is no peer.
    assert "plain PyTorch, steps in a graph" not in names and "plain PyTorch, eager" in names
    other = ONE_TOKEN if target.target == "P14" else SCALES
    timed = {r.name: r for r in m.rivals if r.timing is not None}
    assert timed.keys() == {other, "plain PyTorch, eager"}
    assert timed["plain PyTorch, eager"].error is not None and timed[other].error is None
    # Our times are of all rounds, with whichever peer they were in turns.
    assert m.ours.samples == max(3, sum(r.timing.samples for r in timed.values() if r.timing))
    assert m.best_peer is timed["plain PyTorch, eager"]
    assert m.kernels and m.kernels == tuple(sorted(m.kernels, key=lambda part: -part.seconds))
    console = Console(width=150)
    print_case(case, RATES, console)
    print_sampling(m, RATES, console)
    printed = capsys.readouterr().out
    assert f"{target.target}: " in printed and "one generation by kernel" in printed
    shown = next(line for line in printed.splitlines() if other in line)
    assert " x " not in shown and ("other steps" in shown or "other model" in shown)


def test_without_time_one_peer_is_measured_and_the_rest_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for target, measured in ((TARGETS[0], 1), (TARGETS[2], 2)):
        case = replace(target.small(), target=target.target, condition=target.condition, backend="fused")
        m = measure_sampling(case, CPU, RATES, 0.0)
        timed = [rival for rival in m.rivals if rival.timing is not None]
        # Where the target is a ratio to another run, that is measured too.
        assert len(timed) == measured and m.best_peer is not None and m.best_peer.name.endswith("in a graph")
        assert all(rival.timing.samples == 1 for rival in timed if rival.timing)
        assert m.ours is not None and m.ours.samples == 3 and m.met is not None and not m.kernels
        print_sampling(m, RATES, Console(width=150))
        printed = capsys.readouterr().out
        assert "without plain PyTorch, eager: left out for lack of time" in printed
        assert "left out for lack of time: time by kernel, time by operation" in printed


def test_fp8_weights_are_measured_beside_bf16_with_what_they_change(capsys: pytest.CaptureFixture[str]) -> None:
    m = measure_sampling(FP8[1].small(), CPU, RATES, 60.0)
    assert m.right and m.ours is not None and m.backend == "graph" and m.best_peer is None
    assert [(r.name, r.error) for r in m.rivals if r.timing] == [(BF16, None)]
    assert m.weight_error is not None and 0 < m.weight_error.divergence and m.weight_error.positions == 2 * 8
    print_sampling(m, RATES, Console(width=150))
    printed = capsys.readouterr().out
    assert str(m.weight_error) in printed
    assert "other weights" in next(line for line in printed.splitlines() if BF16 in line)
    assert measure_sampling(SamplingCase().small(), CPU, RATES, 60.0).weight_error is None


def test_a_gpu_without_fp8_leaves_it_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SamplingCase, "runs_on", lambda case, device: case.weights == "same")
    bench_sampler_command(("tokens, d16",), ("d16",), (1, 64), seconds=1e-9, device="cpu")
    printed = capsys.readouterr().out
    assert "left out, as this GPU has no fp8: class -> tokens, d16, tiny, fp8 weights, 8 steps" in printed
    assert last_line(printed)["left_out"] and not any("fp8" in name for name in last_line(printed)["left_out"])


def test_both_cases_of_a_target_have_conditions_of_their_own() -> None:
    vqgan, direct = (case for case in TARGETS if case.target == "P9")

    def found(case: SamplingCase, rate: float) -> SamplingMeasurement:
        return SamplingMeasurement(case, 0.5, timing(256 / rate), (), 1e-3, "copy", "fused", RIGHT, RIGHT)

    pair = found(vqgan, 1300), found(direct, 3000)
    lines = [line_of(m, Provenance("NVIDIA H200", "2.11.0", "3.6.0", "0123abc", "2026-01-31")) for m in pair]
    assert [(line["target"], line["met"]) for line in lines] == [("P9", True), ("P9", False)]
    assert summary_of(pair)["met"] == {"P9": False}


def test_wrong_peers_get_no_ratio(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    case = replace(SamplingCase().small(), target="P6")
    peers = case.peers(CPU)
    ours = draw_of(case)

    def broken(classes: list[int], seeds: list[int], settings: Any) -> Drawn:
        return ours(classes, seeds, settings)._replace(tokens=torch.zeros(1, 8, dtype=torch.int64))

    def raising() -> Any:
        raise ZeroDivisionError("by [design]\nand more")

    changed = (replace(peers[0], setup=lambda: broken), replace(peers[-1], setup=raising, compiled=False))
    monkeypatch.setattr(SamplingCase, "peers", lambda *_: changed)
    m = measure_sampling(case, CPU, RATES, 60.0)
    assert m.best_peer is None and m.ratio(m.rivals[0]) is None
    assert m.rivals[1].reason == "ZeroDivisionError: by [design]"
    print_sampling(m, RATES, Console(width=150))
    printed = capsys.readouterr().out
    assert "wrong" in printed and "by [design]" in printed


def draw_of(case: SamplingCase) -> Callable[..., Drawn]:
    return sampler_measure.draws(case.sampler(CPU, "reference"))


def test_operations_of_a_step_add_up_to_it() -> None:
    case = SamplingCase(preset="d16-p4", batch=1, tiny=True)
    parts = split_by_operation(case, RATES, CPU)
    assert [part.name for part in parts] == ["embed, start", "qkv", "attend", "proj", "fc1", "fc2", "head"]
    assert [part.count for part in parts] == [1, 2, 2, 2, 2, 2, 1]
    compile_until(case, CPU, "proj")
    floors = sum(part.floor for part in parts if part.floor is not None)
    assert floors == pytest.approx(case.generator_config.decode_weight_bytes() / RATES.copy)


def test_kernels_of_a_call_are_named_and_counted() -> None:
    x = torch.ones(64, 64)
    parts = {part.name: part for part in split_by_kernel(lambda: (x @ x, x @ x, x.exp()), CPU)}
    assert parts["aten::mm"].count == 2 and parts["aten::exp"].count == 1
    assert all(part.seconds >= 0 for part in parts.values())


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("decode_step_kernel", "decode_step_kernel"),
        ("void at::native::f<at::g<int>, (bool)1>(int, float)", "at::native::f"),
        ("void at::native::(anonymous namespace)::cat<at::(anonymous namespace)::Four, 3>(int)", "at::native::cat"),
        ("(anonymous)", "(anonymous)"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short
