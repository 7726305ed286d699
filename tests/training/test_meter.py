"""What the meter reads: means since the reading before, rates without pauses, and nothing twice."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from spectralar.training.distributed import ALONE
from spectralar.training.meter import Meter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    yield now


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


def test_means_and_rates_are_of_the_steps_since_the_last_reading(clock: list[float]) -> None:
    meter, never = Meter(ALONE, DEVICE), torch.tensor(2**62, device=DEVICE)
    assert meter.take() is None
    meter.add({"loss": scalar(1.0), "norm": scalar(8.0)}, 3)
    meter.add({"loss": scalar(2.0), "norm": scalar(4.0)}, 5)
    clock[0] += 4.0
    with meter.excluded():
        clock[0] += 2.0
    meter.close(2, 0.5, never)
    meter.add({"loss": scalar(7.0), "norm": scalar(7.0)}, 9)  # the next step begins before the reading is taken
    reading = meter.take()
    assert reading is not None
    assert reading.means == {"loss": 1.5, "norm": 6.0} and (reading.step, reading.lr) == (2, 0.5)
    assert reading.images_per_second == pytest.approx(8 / 4.0) and reading.first_bad == 2**62
    assert meter.take() is None
    clock[0] += 3.0
    meter.close(3, 0.25, torch.tensor(3, device=DEVICE))
    later = meter.take()
    assert later is not None and later.means == {"loss": 7.0, "norm": 7.0}
    assert later.images_per_second == pytest.approx(9 / 3.0) and later.first_bad == 3


def test_waiting_is_the_loader_s_time_on_an_idle_device(clock: list[float]) -> None:
    meter, never = Meter(ALONE, torch.device("cpu")), torch.tensor(2**62)

    def batches() -> Iterator[int]:
        for i in range(3):
            clock[0] += 2.0
            yield i

    loader = batches()
    for expected in range(2):
        assert meter.fetch(loader) == expected
        clock[0] += 3.0  # the step
        meter.add({"loss": scalar(1.0).cpu()}, 1)
    meter.close(2, 0.1, never)
    assert meter.fetch(loader) == 2  # of the next reading
    clock[0] += 8.0
    first = meter.take()
    assert first is not None and first.loader_wait == pytest.approx(4.0 / 20.0)
    clock[0] += 10.0
    meter.add({"loss": scalar(1.0).cpu()}, 1)
    meter.close(3, 0.1, never)
    later = meter.take()
    assert later is not None and later.loader_wait == pytest.approx(2.0 / 10.0)


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [True, False])
def test_a_busy_device_does_not_wait_for_a_late_loader(busy: bool) -> None:
    meter, never = Meter(ALONE, DEVICE), torch.tensor(2**62, device=DEVICE)
    square = torch.randn(8192, 8192, device=DEVICE)
    square @ square
    torch.cuda.synchronize()

    def loader() -> Iterator[int]:
        while True:
            time.sleep(0.05)
            yield 0

    batches = loader()
    meter._began = time.perf_counter()
    for _ in range(3):
        for _ in range(20 if busy else 0):  # some 0.4 s
            square @ square
        meter.fetch(batches)
        meter.add({"loss": scalar(1.0)}, 1)
    meter.close(3, 0.1, never)
    reading = meter.take()
    assert reading is not None
    assert reading.loader_wait < 0.05 if busy else reading.loader_wait > 0.9


@pytest.mark.gpu
def test_closing_does_not_wait_for_the_device() -> None:
    meter, never = Meter(ALONE, DEVICE), torch.tensor(2**62, device="cuda")
    meter.add({"loss": scalar(1.0)}, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        meter.close(1, 0.1, never)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    reading = meter.take()
    assert reading is not None and reading.means == {"loss": 1.0}
