"""Compiling ahead: what there is to compile, and processes that do it."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from spectralar.bench import sampler_ahead
from spectralar.bench.sampler import TARGETS, SamplingCase, with_curve
from spectralar.bench.sampler_ahead import PIXELS, TOKENS, Job, compile_ahead, jobs_of
from spectralar.kernels.decode.reference import OPS

from .conftest import CPU

TINY = SamplingCase(tiny=True)


def test_no_kernel_is_compiled_twice() -> None:
    now, later = jobs_of(with_curve(TARGETS, "d16", "auto"))
    assert len(set(now)) == len(now) and len(set(later)) == len(later)
    steps = {(job.case.preset, job.case.batch) for job in now if job.what == TOKENS}
    assert steps == {("d16-p4", 1), *(("d16", batch) for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256))}
    pixels = [(job.case.pixels, job.case.batch) for job in now if job.what == PIXELS]
    assert pixels == [("vqgan", 1), ("vqgan", 256), ("direct", 256)]
    # Only a persistent step has a kernel for every operation at which it stops.
    stops = [(job.case.preset, job.what) for job in (*now, *later) if job.of_operation]
    assert sorted(stops) == sorted((preset, op) for preset in ("d16", "d16-p4") for op in OPS)
    assert pickle.loads(pickle.dumps(now)) == now


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("what", [TOKENS, PIXELS, OPS[0]])
def test_a_job_runs_what_is_measured(what: str) -> None:
    Job(replace(TINY, pixels="direct" if what == PIXELS else "none"), what).run(CPU)


def test_processes_say_what_they_could_not_do() -> None:
    # No preset of this name: the process that builds its model fails, and the others go on.
    cases = [TINY, SamplingCase(preset="d17", tiny=True), replace(TINY, batch=2, pixels="direct")]
    missed = compile_ahead(cases, CPU, 120)
    assert {job.case.preset: reason[:42] for job, reason in missed.items()} == {
        "d17": "ValueError: generator preset must be one o"
    }


def test_what_takes_too_long_is_named() -> None:
    missed = compile_ahead([TINY], CPU, 0.0)
    assert missed == {Job(TINY, TOKENS): "time was up"}


def test_memory_of_a_job_is_given_back() -> None:
    sampler_ahead._run(Job(TINY, TOKENS), str(torch.device("cpu")))
    assert sampler_ahead.random_generator.cache_info().currsize == 0
