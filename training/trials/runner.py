"""Carries one trial out: finds its pace, trains for the budget, measures, and says it all in one dictionary."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from spectralar.config import to_dict
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Batch, ImageLoader
from spectralar.training.evaluation.reconstruction import evaluate_tokenizer
from spectralar.training.journal import read_log
from spectralar.training.loop import Trainer
from spectralar.training.runs import TokenizerRun, validation_images
from spectralar.training.trials.table import Trial, override

# Steps to compile and record, to empty the loader's queue, and to take the time of.
_START, _SETTLE, _TIMED = 20, 60, 120
_IMAGES = 512  # at most so many are measured, of the validation and of the training set


def run_trial(
    name: str,
    trial: Trial,
    base: TokenizerRun,
    out: Path,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains a trial and measures it.

    Args:
        name: of the trial.
        trial: what is changed.
        base: the run that it changes, with the paths of the data and of the validation set.
        out: the run's directory.
        steps: steps of the schedule; None is as many as `seconds` allow.
        seconds: training time, without validations, from the pace of some steps that are thrown away; None is any.
        console: where the training prints; None is standard error.

    Returns:
        For one line of JSON: `trial`, `prediction`, `gpu`, `torch`, `parameters`, `steps`, `seconds` (training and
        validations), `Q1` (dB from all tokens), `Q2` (dB gained by the second half of them), `Q3` (distinct codes at
        the worst position), `Q4` (perplexity of the codes), `train_psnr` (as Q1, on the training set), `report` (the
        `TokenizerReport` with PSNR at every eighth n), `history` (the validation records of the log), `run` (the
        whole configuration).

    Raises:
        ValueError: neither steps nor seconds; see `train_tokenizer` for the rest.
    """
    if steps is None and seconds is None:
        raise ValueError("steps or seconds must be given")
    run = override(base, trial.changes)
    loader = ImageLoader(run.data, device=run.loop.resolved_device())
    first = loader.state_dict()
    if seconds is not None:
        pace = _pace(trial, override(run, {"loop.out": str(out / "pace")}), loader)
        loader.load_state_dict(first)
        steps = min(steps or 10**9, max(1, int(seconds / pace)))
    assert steps is not None
    loop = replace(run.loop, out=str(out), steps=steps, picture_every=0, checkpoint_every=0)
    run = replace(run, loop=replace(loop, validate_every=math.ceil(steps / 4)))
    trainer = _trainer(trial, run, loader, console)
    began = time.perf_counter()
    trainer.run()
    spent = time.perf_counter() - began
    model = trainer.trained.eval()
    assert isinstance(model, SpectralTokenizer)
    total = run.model.tokens
    lengths = tuple(sorted({1, 2, 4, *range(8, total, 8), total // 2, total} & set(range(1, total + 1))))
    size = run.model.image_size
    report = evaluate_tokenizer(model, validation_images(run.validation, size, _IMAGES), lengths=lengths, costs=True)
    trained = evaluate_tokenizer(model, validation_images(run.data.path, size, _IMAGES), lengths=(total,))
    psnr = dict(zip(report.lengths, report.psnr, strict=True))
    return {
        "trial": name,
        "prediction": trial.prediction,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "seconds": spent,
        "Q1": psnr[total],
        "Q2": psnr[total] - psnr[total // 2],
        "Q3": min(report.distinct),
        "Q4": report.perplexity,
        "train_psnr": trained.psnr[-1],
        "report": asdict(report),
        "history": [record for record in read_log(out) if "val_psnr" in record],
        "run": to_dict(run),
    }


def _trainer(trial: Trial, run: TokenizerRun, loader: ImageLoader, console: Console | None) -> Trainer:
    torch.manual_seed(run.loop.seed)
    model = trial.build(run.model)

    def validation() -> Iterable[Batch]:
        return validation_images(run.validation, run.model.image_size, run.validation_images)

    return Trainer(trial.task(model, run, validation), loader, run.optimizer, run.loop, to_dict(run), console=console)


def _pace(trial: Trial, run: TokenizerRun, loader: ImageLoader) -> float:
    """Seconds of a step, loading included."""
    trainer = _trainer(trial, run, loader, None)
    gpu = trainer.device.type == "cuda"
    start, settle, timed = (_START, _SETTLE, _TIMED) if gpu else (1, 0, 2)
    batches = iter(loader)
    began = 0.0
    for i in range(start + settle + timed):
        if i == start + settle:
            _wait(gpu)
            began = time.perf_counter()
        trainer.advance(list(next(batches)))
    _wait(gpu)
    pace = (time.perf_counter() - began) / timed
    del trainer
    gc.collect()  # a trainer is part of cycles, and its recorded step holds memory on the GPU
    if gpu:
        torch.cuda.empty_cache()
    return pace


def _wait(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()
