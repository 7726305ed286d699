"""Measures the cases of the loader: judged, then timed, one after the other, as each needs all processors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from spectralar.bench.cases import Measurement, Missing, Peer, Rival, first_line
from spectralar.bench.loader import LONGER, LoaderCase, StepCase, Verdict
from spectralar.bench.loader_bare import measure_bare
from spectralar.bench.loader_timing import time_batches
from spectralar.bench.timing import Timing, release
from spectralar.training.data import ShardSet
from spectralar.training.data.dali import INSTALL, dali_installed

BARE, RESIDENT = "bare DALI", "one resident batch"

# Between two synchronisations of a training step's measurement: as often as a run writes its log, at the most.
_UNSEEN = 0.25
_SIDE_GPU, _SIDE_CPU = 4096, 256


@dataclass(frozen=True)
class LoaderMeasurement(Measurement):
    """A case of the loader as it came out; a `Timing` is of one batch or step.

    Attributes:
        verdict: on its batches.
        processors: that were busy, by name of the rival, of "spectralar" for ours; without what nobody could tell.
    """

    verdict: Verdict | None = None
    processors: dict[str, float] = field(default_factory=dict)


class Bench:
    """What the cases of a run share: bare DALI and the peers are measured once.

    Args:
        device: where pictures are wanted.
        seconds: for the timed batches of each, apart from starting, judging and filling queues.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self._rivals: list[Rival] | None = None
        self._bare = Rival(BARE, "bound", reason="not measured")
        self._processors: dict[str, float] = {}

    def bare(self, case: LoaderCase) -> Rival:
        """Bare DALI with the crops and batches of a case; a failure is its reason."""
        if not dali_installed():
            self._bare = replace(self._bare, reason=f"NVIDIA DALI is not installed: {INSTALL}")
            return self._bare
        gpu = torch.cuda.current_device() if self.device.type == "cuda" else None
        paths, config = ShardSet.open(case.path).paths, case.config
        try:
            timing, busy = measure_bare(paths, config.crop, case.batch, self.seconds, gpu=gpu)
        except RuntimeError as failure:
            self._bare = replace(self._bare, reason=str(failure))
            return self._bare
        self._processors |= _known(BARE, busy)
        self._bare = Rival(BARE, "bound", 0.0, timing)
        return self._bare

    def measure(self, case: LoaderCase) -> LoaderMeasurement:
        """One case.

        Raises:
            ValueError: see `ImageLoader`.
            RuntimeError: its loader failed.
        """
        found = self._ours(case)
        release(self.device)
        if found.ours is None or isinstance(case, StepCase):
            return found
        rivals = (self._bare, *self._peers(case))
        return replace(found, rivals=rivals, processors=found.processors | self._processors)

    def _ours(self, case: LoaderCase) -> LoaderMeasurement:
        """Without rivals, which start when our processes have ended."""
        work = case.workload(self.device)
        (source,) = work.inputs
        verdict = work.ours(source)
        assert isinstance(verdict, Verdict)
        floor = self._bare.timing.median if self._bare.timing else float("nan")
        found = LoaderMeasurement(case, work.error(verdict), None, (), floor, BARE, verdict)
        if not found.right:
            return found

        def take() -> Tensor:
            images: Tensor = next(source).to(self.device).images
            return images

        if isinstance(case, StepCase):
            return self._step(found, case, take)
        timing, busy = self._time(case, take, self.seconds)
        return replace(found, ours=timing, processors=_known("spectralar", busy))

    def _time(self, case: LoaderCase, take: Callable[[], object], seconds: float) -> tuple[Timing, float | None]:
        def there() -> None:
            take()
            self._wait()

        return time_batches(there, seconds, warm=case.queued, group=max(1, case.workers))

    def _peers(self, case: LoaderCase) -> list[Rival]:
        if self._rivals is None:
            self._rivals = [self._peer(case, peer) for peer in case.peers(self.device)]
        return self._rivals

    def _peer(self, case: LoaderCase, peer: Peer) -> Rival:
        try:
            take = peer.setup()
            if isinstance(take, Missing):
                return Rival(peer.name, peer.role, reason=take.reason)
            result = take()
            assert isinstance(result, tuple)
            images, _, samples = result
            error = case.peer_error(images, samples.tolist())
            timing, busy = self._time(case, take, self.seconds)
        except Exception as failure:  # a stranger's code may raise anything
            return Rival(peer.name, peer.role, reason=first_line(failure))
        self._processors |= _known(peer.name, busy)
        return Rival(peer.name, peer.role, error, timing)

    def _step(self, found: LoaderMeasurement, case: StepCase, take: Callable[[], Tensor]) -> LoaderMeasurement:
        """Steps without a synchronisation between them, on one batch again and again, and on what the loader brings."""
        if case.step_ms is not None:
            length = case.step_ms / 1e3
        else:
            length = LONGER * self._time(case, take, self.seconds / 3)[0].median
        step, resident = self._burn(length), take().clone()
        count = max(1, math.ceil(_UNSEEN / length))

        def steps(images: Callable[[], Tensor], queued: int = 0) -> tuple[Timing, float | None]:
            def some() -> None:
                for _ in range(count):
                    step(images())
                self._wait()

            whole, busy = time_batches(some, self.seconds, warm=1 + math.ceil(queued / count))
            times = {name: getattr(whole, name) / count for name in ("median", "p20", "p80")}
            return replace(whole, **times, calls=count), busy

        alone, _ = steps(lambda: resident)
        fed, busy = steps(take, case.queued)
        rival = Rival(RESIDENT, "bound", 0.0, alone)
        return replace(
            found,
            ours=fed,
            rivals=(rival,),
            floor=alone.median,
            ceiling=RESIDENT,
            processors=_known("spectralar", busy),
        )

    def _burn(self, seconds: float) -> Callable[[Tensor], None]:
        """Work on the device that takes about so long: matrix products, and a sum over the pictures."""
        gpu = self.device.type == "cuda"
        side = _SIDE_GPU if gpu else _SIDE_CPU
        x = torch.randn(side, side, device=self.device, dtype=torch.bfloat16 if gpu else torch.float32)
        out = torch.empty_like(x)

        def products(count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                torch.mm(x, x, out=out)
            self._wait()
            return (time.perf_counter() - began) / count

        products(5)
        # A GPU that has been busy for a while clocks lower.
        once = products(max(5, math.ceil(0.2 / products(5))))
        count = max(1, round(seconds / once))

        def step(images: Tensor) -> None:
            for _ in range(count):
                torch.mm(x, x, out=out)
            images.sum()

        return step

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


def _known(name: str, busy: float | None) -> dict[str, float]:
    return {} if busy is None else {name: busy}
