"""The pytest-benchmark suite, in one small run of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_suite_runs_and_its_statistics_are_ours(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    saved = tmp_path / "saved.json"
    command = [sys.executable, "-m", "pytest", "bench/suites", "--benchmark-only", f"--benchmark-json={saved}"]
    # pytest-benchmark measures nothing where it takes itself for a worker of xdist.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-k", "dct2 and (spectralar or fp32)", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-3000:]
    found = {run["params"]["variant"]: run for run in json.loads(saved.read_text())["benchmarks"]}
    assert found.keys() >= {"spectralar", "two matmuls fp32"}
    for run in found.values():
        assert run["stats"]["rounds"] == 30 and 1e-7 < run["stats"]["median"] < 1
        assert run["extra_info"]["timed_by"] == "clock" and run["extra_info"]["bytes"] > 0
