"""The timer: statistics, turns, rotation, and on a GPU graphs and events."""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from spectralar.bench.timing import Sampler, Timing, prepare, rotating_sets, summarize, take_turns

CPU = torch.device("cpu")


def sampler(log: list[str], name: str, seconds: float = 0.1) -> Sampler:
    def sample() -> float:
        log.append(name)
        return seconds

    return Sampler(sample, seconds, calls=4, how="clock", first_call=2.5)


def test_summary_is_the_median_and_its_spread() -> None:
    got = summarize([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], sampler([], "a"))
    # Linear between neighbours: positions 0.2 * 5, 0.5 * 5 and 0.8 * 5 of the sorted samples.
    assert got == Timing(3.5, 2.0, 5.0, samples=6, calls=4, how="clock", first_call=2.5)


def test_variants_take_turns_and_nobody_always_comes_first() -> None:
    log: list[str] = []
    timings = take_turns({name: sampler(log, name) for name in "abc"}, seconds=0.0, fewest=4)
    assert log == list("abcbcacababc")
    assert {name: t.samples for name, t in timings.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 7), (2.0, 10), (1e9, 60)])
def test_rounds_follow_the_time_within_bounds(seconds: float, rounds: int) -> None:
    log: list[str] = []
    take_turns({name: sampler(log, name) for name in "ab"}, seconds)
    assert len(log) == 2 * rounds


@pytest.mark.parametrize(("elements", "sets"), [(1, 1024), (25_000, 32), (2**20 - 1, 1), (2**22, 1)])
def test_ring_exceeds_three_times_the_cache(elements: int, sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    x = torch.zeros(elements)
    ring = rotating_sets((x, 7), torch.device("cuda"))
    assert len(ring) == sets
    assert sets == 1024 or len(ring) * 4 * elements >= 3 * 2**20 > (len(ring) - 1) * 4 * elements


def test_sets_are_copies_that_keep_what_matters() -> None:
    x, cutoffs = torch.randn(5, requires_grad=True), torch.arange(3)
    first, second = rotating_sets((x, cutoffs, "text"), CPU)
    assert first[0] is x
    assert second[0].data_ptr() != x.data_ptr()
    assert torch.equal(second[0], x) and second[0].requires_grad and second[0].is_leaf
    assert torch.equal(second[1], cutoffs) and second[2] == "text"


def test_calls_go_round_the_ring_on_the_clock() -> None:
    ring = [(torch.tensor(i),) for i in range(3)]
    seen: list[int] = []

    def call(x: Tensor) -> None:
        seen.append(int(x))
        torch.ones(20_000).cumsum(0)

    ready = prepare(call, ring, CPU)
    assert ready.how == "clock" and ready.first_call > 0 and ready.calls >= 1
    seen.clear()
    assert ready.sample() > 0
    assert seen == [i % 3 for i in range(ready.calls)]


class FakeGPU:
    """What the timer uses of CUDA, on a clock of its own: a call takes a set time, and nothing while it is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capturable: bool = True, seconds: float = 1e-4) -> None:
        self.clock, self.seconds, self.capturing, self.log = 0.0, seconds, False, list[int]()
        self.streams: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.clock

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.at - self.at)

        class Graph:
            calls = 0

            def replay(self) -> None:
                gpu.clock += self.calls * gpu.seconds

        @contextlib.contextmanager
        def capture(graph: Graph, capture_error_mode: str) -> Iterator[None]:
            gpu.log.clear()
            gpu.capturing = True
            try:
                yield
            finally:
                gpu.capturing = False
                if not capturable:
                    raise RuntimeError("the capture was invalidated")
            graph.calls = len(gpu.log)

        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "stream": lambda stream: contextlib.nullcontext(),
            "set_stream": lambda stream: gpu.streams.append("restored"),
            "synchronize": lambda device=None: None,
            "_sleep": lambda cycles: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        self.capturable = capturable

    def call(self, i: int) -> None:
        self.log.append(i)
        if self.capturing and not self.capturable:
            raise RuntimeError("not while capturing\nand a long explanation")
        if not self.capturing:
            self.clock += self.seconds


@pytest.mark.parametrize(
    ("sets", "seconds", "calls"),
    [
        (3, 1e-4, 20),  # a sample lasts at least 2 ms
        (100, 1e-4, 100),  # once around the ring
        (1000, 2**-13, 245),  # but not longer than 30 ms
        (1, 1.0, 1),
    ],
)
def test_graph_goes_once_round_the_ring_if_it_can(
    sets: int, seconds: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGPU(monkeypatch, seconds=seconds)
    ready = prepare(gpu.call, [(i,) for i in range(sets)], torch.device("cuda"))
    assert (ready.how, ready.calls) == ("graph", calls)
    assert gpu.log == [i % sets for i in range(calls)]
    assert ready.sample() == pytest.approx(seconds) and ready.seconds == pytest.approx(calls * seconds)


def test_failed_capture_is_timed_with_events_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch, capturable=False)
    ready = prepare(gpu.call, [(0,), (1,)], torch.device("cuda"))
    assert ready.how == "events (not while capturing)" and gpu.streams == ["restored"]
    assert ready.sample() == pytest.approx(1e-4)


def test_capture_is_not_tried_where_it_is_known_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    ready = prepare(gpu.call, [(0,)], torch.device("cuda"), capture=False)
    assert ready.how == "events (does not work in a CUDA graph)" and ready.calls == 20


def test_what_a_graph_reads_lives_as_long_as_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, table = FakeGPU(monkeypatch), torch.ones(3)
    alive = weakref.ref(table)
    ready = prepare(functools.partial(lambda table, i: gpu.call(i), table), [(0,)], torch.device("cuda"))
    del table
    gc.collect()
    assert ready.how == "graph" and alive() is not None
    del ready
    gc.collect()
    assert alive() is None


@pytest.mark.gpu
def test_graph_measures_a_copy_at_the_speed_of_memory() -> None:
    device = torch.device("cuda")
    source = torch.ones(2**26, device=device)
    ring = rotating_sets((source,), device)
    timings = take_turns({"copy": prepare(torch.clone, ring, device), "read": prepare(torch.sum, ring, device)}, 0.2)
    assert all(t.how == "graph" for t in timings.values())
    # 512 MB moved or 256 MB read, on any GPU between 0.2 and 20 TB/s.
    assert 25e-6 < timings["copy"].median < 2.5e-3
    assert timings["read"].median < timings["copy"].median


@pytest.mark.gpu
def test_call_that_looks_at_the_device_falls_back_to_events_and_says_so() -> None:
    device = torch.device("cuda")
    ready = prepare(lambda x: x.sum().item(), [(torch.ones(1000, device=device),)], device)
    assert ready.how.startswith("events (")
    assert ready.sample() > 0
    # The device is in order again.
    assert prepare(torch.sum, [(torch.ones(1000, device=device),)], device).how == "graph"
