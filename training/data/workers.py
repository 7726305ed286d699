"""Processes that prepare batches on request, and what they are asked for."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from spectralar.training.data.epochs import EpochOrder
from spectralar.training.data.unreadable import Reasons

Request = tuple[int, np.ndarray]
"""Epoch and sample indices of one batch."""

T = TypeVar("T")


class Batch(NamedTuple):
    """Images uint8 `[B, 3, S, S]` and class labels int64 `[B]`."""

    images: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy overlaps other work where the memory is pinned."""
        return Batch(self.images.to(device, non_blocking=True), self.labels.to(device, non_blocking=True))


class Answer(NamedTuple):
    """A batch, and the samples that it would have held if they could be read, with the reasons."""

    batch: Batch
    unreadable: Reasons


class Requests(Sampler[Request]):
    """Endless requests, from batch number `start`."""

    def __init__(self, order: EpochOrder) -> None:
        self.order, self.start = order, 0

    def __iter__(self) -> Iterator[Request]:
        return map(self.order.indices, itertools.count(self.start))


def processors() -> int:
    """This rank's share of the processors that the job may use, at least 1."""
    all_ = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, all_ // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def answers(
    dataset: Dataset[T], requests: Sampler[Request] | list[Request], workers: int, *, persistent: bool, pinned: bool
) -> DataLoader[T]:
    """The answers of `dataset[request]` to all requests in their order, each a whole batch, by `workers` processes.

    One message per batch goes between processes, and nothing is collated.

    Args:
        dataset: answers a request.
        requests: what to ask.
        workers: number of processes; 0 answers in this one.
        persistent: the processes outlive an iteration.
        pinned: tensors arrive in pinned memory where CUDA is available.
    """
    return (_EndedAtExit if pinned else DataLoader)(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pinned and torch.cuda.is_available(),
        persistent_workers=persistent and workers > 0,
        worker_init_fn=partial(_begin, os.getpid()),
        prefetch_factor=2 if workers > 0 else None,
        # Without a generator of its own, every start of an iteration would draw from torch's global one.
        generator=torch.Generator(),
    )


class _EndedAtExit(DataLoader[T]):
    """Ends processes that persist when the interpreter does.

    torch before 2.13 does not tell those of pinned batches, and waits five seconds for each. Where batches are not
    pinned, a thread may still take them then; torch ends the processes without waiting.
    """

    def __iter__(self) -> Any:
        fresh = self._iterator is None
        stream = super().__iter__()
        if fresh and self.persistent_workers:
            atexit.register(_call, weakref.WeakMethod(stream._shutdown_workers))  # type: ignore[attr-defined]
        return stream


def _call(method: weakref.WeakMethod[Any]) -> None:
    if (found := method()) is not None:
        found()


def _begin(parent: int, _: int) -> None:
    """What a worker does first."""
    # Ctrl-C goes to a whole process group, and the SIGTERM of a cluster to every process of a job: the training
    # process alone answers, after its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setpgid(0, 0)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    # A progress bar's take a lock, which another thread may have held at the fork: a warning would wait for ever.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process when its parent asks for it or is no more.

    torch ends a worker whose parent was killed, too, but lets it send first what nobody will take.
    """
    while os.getppid() == parent:
        if hasattr(signal, "sigtimedwait"):
            asked = signal.sigtimedwait([signal.SIGTERM], 1)
            if asked is not None and asked.si_pid == parent:
                os._exit(0)
        else:
            time.sleep(1)
    os._exit(1)


def _as_is(batch: Any) -> Any:
    return batch
