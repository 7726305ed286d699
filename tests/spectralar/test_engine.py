"""The request queue: batching, bounds, failures, shutting down, and results that do not depend on company."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
import torch
from torch import Tensor

from spectralar.generator import SpectralGenerator
from spectralar.pipeline import SpectralAR
from spectralar.sampling import Drawn, Engine, EngineClosed, EngineFull, Sampler, SamplingSettings
from spectralar.sampling.engine import _percentile
from spectralar.sampling.sampler import Request

GUIDED = SamplingSettings(guidance=2.5, top_k=20)
PATIENCE = 20.0
"""Seconds after which a test fails instead of hanging."""


class Gate:
    """Stands for `Sampler.draw`: notes every batch, and draws it once it may."""

    def __init__(self, sampler: Sampler) -> None:
        self.open, self.entered = threading.Event(), threading.Semaphore(0)
        self.batches: list[Request] = []
        self.error: BaseException | None = None
        self._draw = sampler.draw

    def __call__(self, request: Request) -> Tensor:
        self.batches.append(request)
        self.entered.release()
        assert self.open.wait(PATIENCE)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return self._draw(request)

    def wait(self) -> None:
        """Until a generation is going on."""
        assert self.entered.acquire(timeout=PATIENCE)

    @property
    def seeds(self) -> list[list[int]]:
        return [batch.seeds.tolist() for batch in self.batches]


@pytest.fixture
def sampler(generator: SpectralGenerator) -> Sampler:
    return Sampler(generator)


@pytest.fixture
def gate(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(sampler)
    monkeypatch.setattr(sampler, "draw", gate)
    yield gate
    gate.open.set()


def tokens_of(future: Future[Drawn]) -> Tensor:
    return future.result(PATIENCE).tokens


def test_results_are_those_of_the_sampler(model: SpectralAR) -> None:
    with Engine(model) as engine:
        futures = [engine.submit([i % 3, 1], [i, 2**40 + i], GUIDED) for i in range(5)]
        short = engine.submit([2], [9], length=3)
        empty = engine.submit([], [])
        for i, future in enumerate(futures):
            drawn = future.result(PATIENCE)
            expected = model.sample_tokens([i % 3, 1], [i, 2**40 + i], GUIDED)
            assert torch.equal(drawn.tokens, expected)
            assert drawn.images is not None
            assert (drawn.images.int() - model.pictures(expected).int()).abs().max() <= 1
            assert not drawn.images.is_inference() and drawn.images.device.type == "cpu"
        assert torch.equal(tokens_of(short), model.sample_tokens([2], [9], length=3))
        assert empty.result(PATIENCE).tokens.shape == (0, 8)


def test_no_pictures_without_a_tokenizer(sampler: Sampler) -> None:
    with Engine(sampler) as engine:
        assert engine.submit([0], [0]).result(PATIENCE).images is None


def test_concurrent_requests_are_batched_at_the_next_boundary(sampler: Sampler, gate: Gate) -> None:
    with Engine(sampler, max_batch=4) as engine:
        first = engine.submit([0], [0], GUIDED)
        gate.wait()
        futures = [
            engine.submit([0, 1], [1, 2], GUIDED),
            engine.submit([0], [3]),  # other settings
            engine.submit([0], [4], GUIDED, length=5),  # another length
            engine.submit([0], [5], GUIDED),
            engine.submit([0, 1], [6, 7], GUIDED),  # does not fit any more
            engine.submit([0], [8], GUIDED),  # this does
            engine.submit([0], [9]),
        ]
        assert engine.stats().waiting == 9
        gate.open.set()
        for future in (first, *futures):
            future.result(PATIENCE)
        assert gate.seeds == [[0], [1, 2, 5, 8], [3, 9], [4], [6, 7]]
        assert [batch.settings.guidance for batch in gate.batches] == [2.5, 2.5, 1.0, 2.5, 2.5]
        assert [batch.length for batch in gate.batches] == [8, 8, 8, 5, 8]
        # Whom a request is drawn with does not matter.
        assert torch.equal(tokens_of(futures[3]), sampler.sample_tokens([0], [5], GUIDED))
        assert torch.equal(tokens_of(futures[6]), sampler.sample_tokens([0], [9]))
        assert engine.stats().waiting == 0


def test_a_request_larger_than_a_batch_is_drawn_alone(sampler: Sampler, gate: Gate) -> None:
    with Engine(sampler, max_batch=2) as engine:
        engine.submit([0], [0])
        gate.wait()
        large, small = engine.submit([0] * 3, range(1, 4)), engine.submit([0], [4])
        gate.open.set()
        assert tokens_of(large).shape == (3, 8) and tokens_of(small).shape == (1, 8)
        assert gate.seeds == [[0], [1, 2, 3], [4]]


def test_many_threads(model: SpectralAR) -> None:
    expected = {s: model.sample_tokens([s % 3], [s], GUIDED if s % 2 else None) for s in range(24)}
    wrong: list[int] = []

    def ask(engine: Engine, seeds: range) -> None:
        for s in seeds:
            drawn = engine.submit([s % 3], [s], GUIDED if s % 2 else None, timeout=None).result(PATIENCE)
            if not torch.equal(drawn.tokens, expected[s]):
                wrong.append(s)

    with Engine(model, max_batch=3, max_waiting=4) as engine:
        threads = [threading.Thread(target=ask, args=(engine, range(i, 24, 6))) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in threads)
        stats = engine.stats()
    assert not wrong and (stats.requests, stats.images, stats.failed, stats.waiting) == (24, 24, 0, 0)


def test_the_queue_is_bounded(sampler: Sampler, gate: Gate) -> None:
    with Engine(sampler, max_waiting=3) as engine:
        running = engine.submit([0] * 3, range(3))
        gate.wait()
        waiting = [engine.submit([0, 0], [0, 1]), engine.submit([], [])]
        message = "3 images are waiting, and the queue holds 3"
        with pytest.raises(EngineFull, match=message):
            engine.submit([0], [0])
        began = time.perf_counter()
        with pytest.raises(EngineFull, match=message):
            engine.submit([0], [0], timeout=0.05)
        assert time.perf_counter() - began >= 0.05
        with pytest.raises(ValueError, match="classes must be at most 3 in one request, not 4"):
            engine.submit([0] * 4, range(4))
        threading.Timer(0.05, gate.open.set).start()
        patient = engine.submit([0], [0], timeout=PATIENCE)
        for future in (running, *waiting, patient):
            future.result(PATIENCE)


def test_bad_requests_fail_where_they_are_made(sampler: Sampler) -> None:
    with Engine(sampler) as engine:
        for arguments, options, message in (
            (([0], [0, 1]), {}, "seeds must be as many"),
            (([4], [0]), {}, "classes must be in"),
            (([0], [0]), {"length": 9}, "length must be 1..8"),
            (([0], [0], SamplingSettings(top_k=33)), {}, "top_k must be at most"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.submit(*arguments, **options)  # type: ignore[arg-type]
        assert engine.stats().requests == 0
    for name in ("max_batch", "max_waiting"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
            Engine(sampler, **{name: 0})


@pytest.mark.parametrize("error", [RuntimeError("out of order"), SystemExit(1)])
def test_a_failure_fails_its_batch_only(sampler: Sampler, gate: Gate, error: BaseException) -> None:
    with Engine(sampler) as engine:
        gate.error = error
        bad = engine.submit([0], [0])
        gate.wait()
        good = engine.submit([0], [1])
        gate.open.set()
        with pytest.raises(type(error)):
            bad.result(PATIENCE)
        assert torch.equal(tokens_of(good), sampler.sample_tokens([0], [1]))
        stats = engine.stats()
        assert (stats.requests, stats.failed) == (1, 1)


def test_pixels_that_fail(model: SpectralAR, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tokens: Tensor) -> Tensor:
        raise ValueError("no pixels today")

    monkeypatch.setattr(model, "pictures", fail)
    with Engine(model) as engine, pytest.raises(ValueError, match="no pixels today"):
        engine.submit([0], [0]).result(PATIENCE)


def test_closing_fails_what_is_left(sampler: Sampler, gate: Gate) -> None:
    engine = Engine(sampler, max_batch=1, max_waiting=1)
    running = engine.submit([0], [0])
    gate.wait()
    waiting = engine.submit([0], [1])
    blocked: list[Exception] = []

    def ask() -> None:
        try:
            engine.submit([0], [2], timeout=None)
        except EngineClosed as error:
            blocked.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    engine.close(timeout=0.05)  # the generation still goes on
    for future in (running, waiting):
        with pytest.raises(EngineClosed, match="the engine was closed before the request was done"):
            future.result(0)
    thread.join(PATIENCE)
    assert len(blocked) == 1
    with pytest.raises(EngineClosed, match="the engine is closed"):
        engine.submit([0], [0])
    gate.open.set()
    engine.close(timeout=PATIENCE)
    assert not engine._worker.is_alive() and len(gate.batches) == 1
    assert engine.stats().requests == 0


def test_cancelled_requests_are_not_drawn(sampler: Sampler, gate: Gate) -> None:
    with Engine(sampler) as engine:
        running = engine.submit([0], [0])
        gate.wait()
        others = [engine.submit([0], [s]) for s in (1, 2)]
        assert not running.cancel() and others[0].cancel()
        gate.open.set()
        tokens_of(others[1])
        with pytest.raises(CancelledError):
            others[0].result(PATIENCE)
        assert gate.seeds == [[0], [2]]
        # Nothing but cancelled requests: the engine goes on waiting.
        gate.open.clear()
        engine.submit([0], [3])
        gate.wait()
        gate.wait()
        assert engine.submit([0], [4]).cancel()
        gate.open.set()
        assert tokens_of(engine.submit([0], [5])).shape == (1, 8)
        assert gate.seeds[2:] == [[3], [5]]


def test_cancelled_before_closing(sampler: Sampler, gate: Gate) -> None:
    engine = Engine(sampler)
    engine.submit([0], [0])
    gate.wait()
    waiting = engine.submit([0], [1])
    assert waiting.cancel()
    gate.open.set()
    engine.close(PATIENCE)
    assert waiting.cancelled()


def test_callbacks_may_use_the_engine(sampler: Sampler) -> None:
    again: list[Future[Drawn]] = []
    done = threading.Event()

    def more(future: Future[Drawn]) -> None:
        again.append(engine.submit([0], [1]))
        engine.stats()
        done.set()

    with Engine(sampler) as engine:
        engine.submit([0], [0]).add_done_callback(more)
        assert done.wait(PATIENCE)
        assert torch.equal(tokens_of(again[0]), sampler.sample_tokens([0], [1]))
        closing = engine.submit([0], [2])
        closing.add_done_callback(lambda future: engine.close())
        tokens_of(closing)
        engine._worker.join(PATIENCE)
        assert not engine._worker.is_alive()


def test_statistics(sampler: Sampler, gate: Gate) -> None:
    with Engine(sampler) as engine:
        empty = engine.stats()
        assert (empty.requests, empty.images, empty.images_per_second) == (0, 0, 0.0) and math.isnan(empty.p50)
        began = time.perf_counter()
        future = engine.submit([0, 1], [0, 1])
        gate.wait()
        time.sleep(0.05)
        gate.open.set()
        future.result(PATIENCE)
        longest = time.perf_counter() - began
        stats = engine.stats()
        assert (stats.requests, stats.images, stats.failed) == (1, 2, 0)
        assert 0.05 <= stats.p50 == stats.p95 == stats.p99 <= longest
        assert stats.images_per_second == pytest.approx(2 / stats.p50)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50.0), (0.95, 95.0), (0.99, 99.0), (0.991, 100.0)]
)  # fmt: skip
def test_percentiles(share: float, expected: float) -> None:
    assert _percentile([float(i) for i in range(1, 101)], share) == expected
    assert _percentile([7.0], share) == 7.0


def test_warm(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def warm(*arguments: Any) -> float:
        calls.append(arguments)
        return 1.5

    monkeypatch.setattr(sampler, "warm", warm)
    with Engine(sampler, max_batch=5) as engine:
        assert engine.warm() == engine.warm([3], GUIDED) == 1.5
    assert calls == [([1, 2, 4, 5], None), ([3], GUIDED)]


def test_recorded_backends(model: SpectralAR) -> None:
    sampler = Sampler(model.generator, model.tokenizer, backend="graph")
    with Engine(sampler, max_batch=4) as engine:
        futures = [engine.submit([s % 4], [s], GUIDED) for s in range(9)]
        for s, future in enumerate(futures):
            assert torch.equal(tokens_of(future), model.sample_tokens([s % 4], [s], GUIDED))
