"""Cases of the loader: what is judged wrong, what rates are made of, and who is named when he cannot run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.bench import loader, loader_bare, loader_measure
from spectralar.bench.loader import LoaderCase, StepCase, first_by_pillow, judge, loader_cases
from spectralar.bench.loader_measure import Bench, LoaderMeasurement
from spectralar.bench.loader_timing import Busy, time_batches, timing_of
from spectralar.training.data import Batch, ImageLoader, ShardSet, write_shards
from spectralar.training.data.dali import dali_installed

from .conftest import CPU, timing

needs_dali = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 smooth JPEGs of two classes in two shards."""
    base = tmp_path_factory.mktemp("loader")
    random = np.random.default_rng(0)
    for i in range(24):
        folder = base / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        coarse.resize((90 + i, 70), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    write_shards(base / "pictures", base / "shards", samples_per_shard=12)
    return base / "shards"


@pytest.fixture
def case(shards: Path) -> LoaderCase:
    return LoaderCase(path=str(shards), backend="pillow", batch=6, size=32, workers=0)


def test_rates_are_medians_over_windows_of_whole_groups() -> None:
    # Four batches come at once, a second after the last four; one of the groups takes twice as long.
    marks = [0.0]
    for i in range(10):
        marks += [marks[-1] + (2.0 if i == 4 else 1.0)] * 4
    found = timing_of(marks, 4, 0.5)
    assert (found.median, found.p20, found.p80) == (0.25, 0.25, 0.25)
    assert (found.samples, found.calls, found.first_call) == (10, 4, 0.5)
    # Short ones are put together until a window takes 0.1 s, if at least three windows are left.
    fast = timing_of([0.01 * i for i in range(101)], 4, 0.0)
    assert (fast.samples, fast.calls) == (8, 12) and fast.median == pytest.approx(0.01)
    assert timing_of([0.001 * i for i in range(13)], 4, 0.0).samples == 3


def test_batches_of_the_warm_up_are_not_timed() -> None:
    waits = iter([0.2] * 2 + [0.002] * 1000)
    found, busy = time_batches(lambda: time.sleep(next(waits)), 0.02, warm=2)
    assert found.median < 0.02 and found.first_call >= 0.2
    assert busy is None or busy < 0.9


def test_processors_that_are_busy_count_and_an_ended_worker_makes_them_unknown() -> None:
    busy = Busy()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    found = busy.processors()
    assert found is not None and 0.1 < found < 1.5
    busy._workers = [2**30]
    assert busy.processors() is None


def test_small_cases_measure_no_target_and_names_differ(shards: Path) -> None:
    cases = loader_cases(str(shards), 256, 256, 8, None)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) and isinstance(cases[1], StepCase)
    assert names[1].startswith("step of 1.1 x a batch's time fed by")
    assert "step of 15 ms" in loader_cases(str(shards), 256, 256, 8, 15.0)[1].name
    for case in cases:
        small = case.small()
        assert (small.batch, small.size, small.workers, small.target, small.condition) == (8, 64, 2, None, None)
    with pytest.raises(ValueError, match="step_ms must be positive, got 0"):
        loader_cases(str(shards), 256, 256, 8, 0.0)


def test_cases_with_and_without_dali(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "dali_installed", lambda: True)
    dali, step, pillow = loader_cases(str(shards), 256, 256, 8, None)
    assert [c.backend for c in (dali, step, pillow)] == ["dali", "dali", "pillow"]
    assert [c.target for c in (dali, step, pillow)] == ["P12", None, None]
    other = loader_cases(str(shards), 256, 128, 8, None)[0]
    assert other.backend == "dali" and other.target is other.condition is None

    def met(median: float, floor: float) -> bool | None:
        return LoaderMeasurement(dali, 0.5, timing(median), (), floor, "bare DALI").met

    assert met(1.0, 0.9) and not met(1.0, 0.89) and not met(1.0, float("nan"))
    monkeypatch.setattr(loader, "dali_installed", lambda: False)
    assert [(c.backend, c.target) for c in loader_cases(str(shards), 256, 256, 8, None)] == [("pillow", None)] * 2


def test_pillow_is_right_to_the_bit(case: LoaderCase) -> None:
    verdict = judge(ImageLoader(case.config), first_by_pillow(case.config))
    assert (verdict.pixel, verdict.mean, verdict.labels, verdict.repeated, verdict.error) == (0, 0, True, True, 0)


@needs_dali
def test_dali_is_near_pillow(case: LoaderCase) -> None:
    work = replace(case, backend="dali").workload(CPU)
    verdict: Any = work.ours(*work.inputs)
    assert 0 < verdict.pixel <= 12 and 0 < verdict.mean < 0.5 and verdict.labels and verdict.repeated
    assert 0 < work.error(verdict) <= case.budget
    assert work.inputs[0].step == 3, "the judged batches are not given again"


class Fake:
    """Stands for a loader by DALI: the true batches, changed by a mistake that knows how often it was asked."""

    backend = "dali"

    def __init__(self, truth: list[Batch], mistake: Callable[[Batch, int], Batch]) -> None:
        self.truth, self.mistake, self.step, self.asked = truth, mistake, 0, 0

    def __next__(self) -> Batch:
        self.step, self.asked = self.step + 1, self.asked + 1
        batch = self.truth[self.step - 1]
        return self.mistake(Batch(batch.images.clone(), batch.labels.clone()), self.asked)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def one_pixel(batch: Batch, _: int) -> Batch:
    batch.images[0, 0, 0, 0] += torch.tensor(-19 if batch.images[0, 0, 0, 0] > 100 else 19).to(torch.uint8)
    return batch


def all_pixels(batch: Batch, _: int) -> Batch:
    return Batch(batch.images ^ 1, batch.labels)


def swapped_labels(batch: Batch, _: int) -> Batch:
    return Batch(batch.images, 1 - batch.labels)


def other_bits(batch: Batch, asked: int) -> Batch:
    return Batch(batch.images ^ 1, batch.labels) if asked == 5 else batch


@pytest.mark.parametrize("mistake", [one_pixel, all_pixels, swapped_labels, other_bits])
def test_mistakes_are_wrong(case: LoaderCase, mistake: Callable[[Batch, int], Batch]) -> None:
    truth = first_by_pillow(case.config)
    fine: Any = Fake(truth, lambda batch, _: batch)
    assert judge(fine, truth).error == 0
    source: Any = Fake(truth, mistake)
    assert judge(source, truth).error > case.budget


@pytest.mark.parametrize("workers", [0, 2])
def test_webdataset_cuts_the_same_pictures(case: LoaderCase, workers: int) -> None:
    case = replace(case, workers=workers)
    (peer,) = case.peers(CPU)
    take: Any = peer.setup()
    images, labels, samples = take()
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(labels, torch.from_numpy(ShardSet.open(case.path).labels[samples]))
    assert case.peer_error(images, samples.tolist()) == 0
    images[5, 2, 31, 31] ^= 1
    assert case.peer_error(images, samples.tolist()) == float("inf")


def test_a_peer_that_fails_and_dali_that_is_missing_are_named(
    case: LoaderCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("by design\nand more")

    monkeypatch.setattr(loader, "setup_webdataset", broken)
    monkeypatch.setattr(loader_measure, "dali_installed", lambda: False)
    bench = Bench(CPU, 0.01)
    assert "NVIDIA DALI is not installed" in bench.bare(case).reason
    m = bench.measure(case)
    assert m.ours is not None and m.floor != m.floor
    assert [(r.timing, r.reason[:20]) for r in m.rivals] == [
        (None, "NVIDIA DALI is not i"), (None, "ZeroDivisionError: b")
    ]  # fmt: skip


def test_a_step_is_as_long_as_asked_for_and_longer_where_it_waits(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = StepCase(path=str(shards), backend="pillow", batch=6, size=32, workers=0, step_ms=5.0)
    usual = ImageLoader.__next__

    def late(source: ImageLoader) -> Batch:
        time.sleep(0.02)
        return usual(source)

    monkeypatch.setattr(ImageLoader, "__next__", late)
    monkeypatch.setattr(loader_measure, "_UNSEEN", 0.02)
    m = Bench(CPU, 0.01).measure(case)
    assert m.ours is not None and m.ceiling == "one resident batch"
    assert 2e-3 < m.floor < 15e-3 and m.ours.median > m.floor + 0.02
    assert m.ours.calls == 4


@needs_dali
def test_bare_dali_gives_pictures_of_the_set(case: LoaderCase) -> None:
    shards = [str(path) for path in ShardSet.open(case.path).paths]
    pipeline = loader_bare._pipeline({"shards": shards, "crop": asdict(case.config.crop), "batch": 6, "gpu": None})
    images = pipeline.run()[0].as_array()
    assert images.shape == (6, 3, 32, 32) and images.dtype == np.uint8
    # Cut out of smooth random colours, no two are alike, and none is flat.
    assert len({image.tobytes() for image in images}) == 6 and images.std((1, 2, 3)).min() > 5


def test_a_crash_of_bare_dali_is_told(case: LoaderCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\necho a [segmentation] fault >&2\nkill -SEGV $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(loader_bare.sys, "executable", str(crashing))
    monkeypatch.setattr(loader_measure, "dali_installed", lambda: True)
    bare = Bench(CPU, 0.01).bare(case)
    assert bare.timing is None and bare.reason == "bare DALI ended with status -11: a [segmentation] fault"
