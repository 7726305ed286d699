"""Compiles the kernels of many cases in parallel processes, before anything is measured; Triton keeps them on disk.

The persistent step takes some 20 s a variant, of which a case needs one and its split by operation six more.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.pool import Pool

import torch

from spectralar.bench.cases import first_line
from spectralar.bench.sampler import SamplingCase, random_generator, random_tokenizer
from spectralar.bench.sampler_split import compile_until
from spectralar.bench.timing import release
from spectralar.kernels.decode.config import MAX_ROWS
from spectralar.kernels.decode.reference import OPS
from spectralar.sampling.captured import CapturedPixels
from spectralar.sampling.graphs import Pool as Buffers

TOKENS, PIXELS = "tokens", "pixels"

# A process takes some 2 GB of a host's and of a GPU's memory, and two cores are left to what starts them.
_MOST_PROCESSES = 14


@dataclass(frozen=True)
class Job:
    """Kernels that one process compiles: of all steps (`TOKENS`), of the pictures (`PIXELS`), or up to an operation."""

    case: SamplingCase
    what: str

    @property
    def of_operation(self) -> bool:
        """Whether only the split by operation needs it."""
        return self.what in OPS

    def run(self, device: torch.device) -> None:
        """Calls what needs them once."""
        case = self.case
        if self.what == TOKENS:
            sampler, (classes, seeds, settings) = case.sampler(device, case.backend), case.inputs
            for greedy in (False, True):
                sampler.sample_tokens(classes, seeds, replace(settings, greedy=greedy))
        elif self.what == PIXELS:
            assert case.tokenizer_config is not None
            config = case.tokenizer_config
            tokens = torch.zeros(case.batch, config.tokens, dtype=torch.int64, device=device)
            CapturedPixels(random_tokenizer(config, device), Buffers(device))(tokens)
        else:
            compile_until(case, device, self.what)


def jobs_of(cases: Sequence[SamplingCase]) -> tuple[list[Job], list[Job]]:
    """What there is to compile: first, and once that is done; no kernel is then compiled twice."""
    now: dict[Job, None] = {}
    later: dict[Job, None] = {}
    for case in cases:
        # Conditions are functions, which cannot be sent to a process; they and the target change no kernel.
        bare = replace(case, target=None, condition=None, aim=None, brief=False)
        tokens = replace(bare, pixels="none")
        now[Job(tokens, TOKENS)] = None
        if bare.pixels != "none":
            now[Job(bare, PIXELS)] = None
        elif case.target is not None and 2 * case.batch * case.generator_config.group <= MAX_ROWS:
            # A stop after any operation has a kernel for the blocks before, and one for the last.
            now[Job(tokens, OPS[0])] = None
            later |= dict.fromkeys(Job(tokens, op) for op in OPS[1:])
    return list(now), list(later)


def compile_ahead(cases: Sequence[SamplingCase], device: torch.device, seconds: float) -> dict[Job, str]:
    """Compiles for at most `seconds`, and then ends the processes; gives what was not done, and why."""
    now, later = jobs_of(cases)
    deadline = time.monotonic() + seconds
    count = max(1, min(len(now), (os.cpu_count() or 1) - 2, _MOST_PROCESSES))
    # Leaving the block terminates the processes.
    with multiprocessing.get_context("spawn").Pool(count, torch.set_num_threads, (1,)) as pool:
        return {
            job: reason
            for jobs in (now, later)
            for job, reason in _outcomes(pool, jobs, device, deadline).items()
            if reason
        }


def _outcomes(pool: Pool, jobs: Sequence[Job], device: torch.device, deadline: float) -> dict[Job, str]:
    """Why jobs were not done; empty for those that were."""
    found = dict.fromkeys(jobs, "time was up")
    done = pool.imap_unordered(functools.partial(_run, device=str(device)), jobs)
    try:
        for _ in jobs:
            job, reason = done.next(max(0.0, deadline - time.monotonic()))
            found[job] = reason
    except multiprocessing.TimeoutError:
        pass
    return found


def _run(job: Job, device: str) -> tuple[Job, str]:
    try:
        job.run(torch.device(device))
    except Exception as failure:  # the measurement meets it again, and says so
        return job, first_line(failure)
    finally:
        # The memory is shared with the other processes.
        random_generator.cache_clear()
        random_tokenizer.cache_clear()
        release(torch.device(device))
    return job, ""
