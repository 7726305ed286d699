"""Lines of results: the keys that the project has agreed on, values that JSON knows, and the commit."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from spectralar.bench.cases import within_microseconds
from spectralar.bench.record import Provenance, append, git_commit, line_of, provenance

from .conftest import CPU, DoubleCase, measurement, rival

KEYS = (
    "target case gpu torch triton commit date median p20 p80 unit ceiling fraction peer peer_median ratio error met"
).split()
ORIGIN = Provenance("NVIDIA H200", "2.11.0", "3.6.0", "0123abc", "2026-01-31")


def test_line_has_the_agreed_keys_in_milliseconds() -> None:
    case = DoubleCase(target="P3", condition=within_microseconds(25))
    line = line_of(measurement(case, 20e-6, rival("sum", 50e-6), rival("slow", 90e-6), floor=5e-6), ORIGIN)
    assert list(line) == KEYS
    assert line == {
        "target": "P3",
        "case": "double",
        "gpu": "NVIDIA H200",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "0123abc",
        "date": "2026-01-31",
        "median": 0.02,
        "p20": 0.018,
        "p80": 0.024,
        "unit": "ms",
        "ceiling": 0.005,
        "fraction": 0.25,
        "peer": "sum",
        "peer_median": 0.05,
        "ratio": 2.5,
        "error": 0.0,
        "met": True,
    }


@pytest.mark.parametrize("error", [1.0, math.nan, math.inf])
def test_line_of_a_wrong_result_has_neither_time_nor_ratio(error: float) -> None:
    wrong = replace(
        measurement(DoubleCase(target="P3", condition=within_microseconds(25)), 1.0), error=error, ours=None
    )
    line = line_of(wrong, ORIGIN)
    assert list(line) == KEYS
    assert line["met"] is False and line["error"] == (1.0 if error == 1.0 else None)
    assert all(line[key] is None for key in ("median", "p20", "p80", "fraction", "peer", "peer_median", "ratio"))
    assert "NaN" not in json.dumps(line) and "Infinity" not in json.dumps(line)


def test_keys_are_those_of_the_results_that_are_there() -> None:
    results = Path(__file__).parents[2] / "bench" / "results"
    for path in results.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert list(json.loads(line)) == KEYS, path


def test_lines_are_added_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    append([{"a": 1}], path)
    append([{"a": 2}, {"a": 3}], path)
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_commit_says_when_the_tree_differs(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    assert git_commit(tmp_path) == "unknown"
    git("init", "--quiet")
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("code.py", "bench/results/kernels.jsonl"):
        (tmp_path / name).write_text("1\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "--short=7", "HEAD")
    assert git_commit(tmp_path / "bench") == commit
    # Results are what a run writes; they do not change what was run.
    (tmp_path / "bench/results/kernels.jsonl").write_text("2\n")
    assert git_commit(tmp_path / "bench") == commit
    (tmp_path / "code.py").write_text("2\n")
    assert git_commit(tmp_path / "bench") == f"{commit}-dirty"


def test_given_commit_is_recorded_as_it_is() -> None:
    origin = provenance(CPU, "feedbee")
    assert origin.commit == "feedbee" and origin.gpu.startswith("none (")
