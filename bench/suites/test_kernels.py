"""The kernels' cases under pytest-benchmark, for its comparison of saved runs:

    pytest bench/suites --benchmark-only --benchmark-autosave
    pytest bench/suites --benchmark-only --benchmark-compare --benchmark-compare-fail=median:5%

`spectralar bench kernels` lets variants take turns and knows the ceilings; here each variant has its own test.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from spectralar.bench.cases import Case, Missing, Workload
from spectralar.bench.commands import CASES
from spectralar.bench.timing import Call, prepare, rotating_sets
from spectralar.devices import auto_device

DEVICE = auto_device("auto")
OURS = "spectralar"
ROUNDS = 30


class DeviceClock:
    """A clock that moves on by what was measured, so that pytest-benchmark's statistics are of the device's time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


CLOCK = DeviceClock()


def variants() -> list[Any]:
    cases = [case if DEVICE.type == "cuda" else case.small() for case in CASES]
    return [
        pytest.param(case, name, id=f"{case.name} | {name}")
        for case in cases
        for name in (OURS, *(peer.name for peer in case.peers(DEVICE)))
    ]


@functools.lru_cache(maxsize=1)
def workload_of(case: Case) -> Workload:
    return case.workload(DEVICE)


def set_up(case: Case, name: str) -> tuple[Call, float, bool]:
    """A peer's call, the error that it may have, and whether a CUDA graph can hold it."""
    peer = next(peer for peer in case.peers(DEVICE) if peer.name == name)
    if peer.compiled and DEVICE.type != "cuda":
        pytest.skip("compiled peers are measured on a GPU")
    call = peer.setup()
    if isinstance(call, Missing):
        raise pytest.skip.Exception(call.reason)
    return call, math.inf if peer.role == "bound" else case.peer_budget, peer.capture


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "variant"), variants())
def test_kernel(case: Case, variant: str, benchmark: Any) -> None:
    work = workload_of(case)
    call, budget, capture = (work.ours, case.budget, True) if variant == OURS else set_up(case, variant)
    error = work.error(call(*work.inputs))
    if variant != OURS and not error <= budget:
        pytest.skip(f"not precise enough to be a peer: error {error:.3g}, allowed {budget:.3g}")
    assert error <= budget
    sampler = prepare(call, rotating_sets(work.inputs, DEVICE), DEVICE, capture=capture)
    benchmark.group = case.name
    benchmark.extra_info.update(error=error, bytes=case.bytes(), flops=case.flops(), timed_by=sampler.how)
    benchmark.pedantic(lambda: CLOCK.advance(sampler.sample()), rounds=ROUNDS)
    torch.compiler.reset()
