"""Every kernel and every row of its launch tables compiles for the A100 and the H100, and fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.compiling import TARGETS

ROOT = Path(__file__).resolve().parents[2]
SPILLED = 256
"""Bytes of local memory that a thread may use: what a loss adds to a full kernel, never an array."""


@pytest.mark.parametrize("room", ["attention", "dct", "decode", "decode_batch", "draw", "norm", "vq"])
def test_kernels_compile_and_fit(room: str) -> None:
    # In a process of its own: here the interpreter has taken the kernels over.
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", room],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["capability"] for kernel in found} == set(TARGETS)
    for kernel in found:
        assert kernel["shared"] <= TARGETS[kernel["capability"]], kernel
        assert kernel["spilled"] <= SPILLED, kernel
        # Each instruction of the kernel with the ring is on the way from one operation to the next; d30 is the widest.
        if kernel["kernel"] == "decode_ring_kernel":
            assert kernel["spilled"] <= (64 if "HEADS=30" in kernel["constants"].split() else 0), kernel
