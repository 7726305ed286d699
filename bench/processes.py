"""Processes of their own for a part of a benchmark: where they find the package, and what they report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import spectralar


def child_environment() -> dict[str, str]:
    """This process's environment, in which a child finds the package from anywhere, installed or not."""
    root = str(Path(spectralar.__file__).parent.parent)
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path}


def last_report(printed: str) -> dict[str, Any] | None:
    """The last JSON object among the lines that a child printed, others of which are anybody's; None without one."""
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None
