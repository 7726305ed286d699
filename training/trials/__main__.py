"""`python -m spectralar.training.trials`: runs trials one after the other and prints one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from spectralar.devices import many_queues
from spectralar.training.presets import TOKENIZER_RUNS
from spectralar.training.runs import TokenizerRun
from spectralar.training.trials.report import table
from spectralar.training.trials.runner import run_trial
from spectralar.training.trials.table import PLAIN, TRIALS, override


def trials(
    data: str,
    validation: str,
    only: tuple[str, ...] = (),
    steps: int | None = None,
    seconds: float | None = None,
    out: Path = Path("trials.jsonl"),
    runs: Path = Path("runs/trials"),
    preset: str = "emoji",
) -> None:
    """Train named trials within one budget each, and write what each gives as a line of JSON.

    Four at a time on a machine with four GPUs: start this four times, with CUDA_VISIBLE_DEVICES and other names.

    Args:
        data: shards, or one tar, of training images.
        validation: shards, or one tar, of validation images.
        only: names of trials; all unless given.
        steps: steps of every trial; with `seconds` at most so many.
        seconds: training time of every trial, without the time of finding its pace (some seconds) and of measuring.
        out: file to which a line is added for every trial.
        runs: directory in which every trial has its run.
        preset: what the trials change, once it is as plain as before them (`table.PLAIN`).
    """
    unknown = sorted(set(only) - set(TRIALS))
    if unknown:
        raise ValueError(f"only must name some of {', '.join(TRIALS)}, not {', '.join(unknown)}")
    base = override(TOKENIZER_RUNS[preset], PLAIN)
    base = replace(base, data=replace(base.data, path=data), validation=validation)
    results = run_trials(base, only or tuple(TRIALS), out, runs, steps=steps, seconds=seconds)
    print(table(results), flush=True)


def run_trials(
    base: TokenizerRun,
    names: Sequence[str],
    out: Path,
    runs: Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """What `run_trial` gives for every name; a trial that fails gives its error, and the next one runs."""
    results: list[dict[str, Any]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            result = run_trial(name, TRIALS[name], base, runs / name, steps=steps, seconds=seconds)
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            result = {"trial": name, "error": f"{type(error).__name__}: {first}"}
        with out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        results.append(result)
    return results


if __name__ == "__main__":
    many_queues()
    tyro.cli(trials)
