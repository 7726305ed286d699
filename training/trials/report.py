"""`python -m spectralar.training.trials.report results.jsonl ...`: the results of trials as one Markdown table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SILENT = 0.01
"""Drop cost in dB below which a token counts as silent."""


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a row for every result of `run_trial`; a failed trial shows its error."""
    columns = "trial", "Q1 dB", "Q2 dB", "Q3", "Q4", "train dB", "n=8", "n=32", "silent", "steps", "s", "M weights"
    rows = [columns, ("---",) * len(columns)]
    for r in results:
        if "error" in r:
            rows.append((r["trial"], r["error"], *[""] * (len(columns) - 2)))
            continue
        report = r["report"]
        psnr = dict(zip(report["lengths"], report["psnr"], strict=True))
        silent = sum(cost < SILENT for cost in report["drop_cost"])
        at = [f"{psnr[n]:.2f}" if n in psnr else "" for n in (8, 32)]
        quality = f"{r['Q1']:.2f}", f"{r['Q2']:.2f}", str(r["Q3"]), f"{r['Q4']:.0f}", f"{r['train_psnr']:.2f}"
        spent = f"{r['steps']}", f"{r['seconds']:.0f}", f"{r['parameters'] / 1e6:.1f}"
        rows.append((r["trial"], *quality, *at, str(silent), *spent))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table([json.loads(line) for name in sys.argv[1:] for line in Path(name).read_text().splitlines()]))
