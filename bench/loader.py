"""Cases of the loader: pictures from shards to the device, and a training step that is fed with them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch

from spectralar.bench.cases import Case, Condition, Measurement, Missing, Peer, Workload
from spectralar.bench.peers.loader import setup_webdataset
from spectralar.bench.timing import Call
from spectralar.training.data import Batch, Crop, ImageLoader, LoaderConfig, ShardSet, crop_batches
from spectralar.training.data.dali import dali_installed

LARGEST_PIXEL = 18
"""Largest difference of a pixel that DALI's pictures may have from Pillow's, of 255. On CPUs 9 is seen for photographs
and 12 at hard edges; a GPU's inverse DCT rounds differently, which a resize that enlarges turns into a few more."""
LARGEST_MEAN = 0.8
"""The same on average over all pixels; 0.15 is seen on CPUs."""
LONGER = 1.1
"""Length of a step, in batches of the loader, unless it is given."""
SEED = 0

# Of the crops that P12 is about.
_TARGET_SIZE = 256
_JUDGED = 3
# Batches that DALI's path holds beside those of its workers: in DALI's queue, and ahead of being asked for.
_BEHIND_WORKERS = 6


@dataclass(frozen=True)
class Verdict:
    """The first batches of a loader against those of Pillow.

    Attributes:
        pixel: largest difference, of 255.
        mean: mean difference over all pixels.
        labels: all are the same, in the same order.
        repeated: decoded again, all bits are the same.
    """

    pixel: float
    mean: float
    labels: bool
    repeated: bool

    @property
    def error(self) -> float:
        """The larger of both differences over what is allowed."""
        if not (self.labels and self.repeated):
            return float("inf")
        return max(self.pixel / LARGEST_PIXEL, self.mean / LARGEST_MEAN)


def _of_bare(m: Measurement) -> bool:
    return m.ours is not None and m.floor >= 0.9 * m.ours.median


_OF_BARE = Condition(">= 90 % of bare DALI", _of_bare)


@dataclass(frozen=True, kw_only=True)
class LoaderCase(Case):
    """Batches of `ImageLoader` on the device, random-resized crops with flips.

    Attributes:
        path: of the shards.
        backend: who decodes.
        batch: pictures of a batch.
        size: side of the crops.
        workers: processes.
    """

    path: str
    backend: Literal["dali", "pillow"]
    batch: int = 256
    size: int = 256
    workers: int = 8

    budget = 1.0
    peer_budget = 1.0
    arithmetic = "bf16"

    @property
    def name(self) -> str:
        return f"loader by {self.backend}, {self._sizes}"

    @property
    def _sizes(self) -> str:
        return f"{self.size} px, B={self.batch}, {self.workers} workers"

    @property
    def config(self) -> LoaderConfig:
        """Of the loader."""
        crop = Crop(self.size, "random-resized")
        return LoaderConfig(
            self.path, self.batch, crop, seed=SEED, workers=self.workers, backend=self.backend, max_unreadable=0.0
        )

    @property
    def queued(self) -> int:
        """Batches that are made before they are asked for, at most."""
        return max(1, 2 * self.workers + (_BEHIND_WORKERS if self.backend == "dali" else 0))

    def bytes(self) -> int:
        return 3 * self.batch * self.size**2

    def flops(self) -> int:
        return 0

    def small(self) -> Self:
        batch, size, workers = min(self.batch, 8), min(self.size, 64), min(self.workers, 2)
        return replace(self, batch=batch, size=size, workers=workers, target=None, condition=None)

    def workload(self, device: torch.device) -> Workload:
        """The input is a loader, which stands behind the judged batches afterwards."""
        source = ImageLoader(self.config, device=device)

        def ours(source: ImageLoader) -> Verdict:
            return judge(source, first_by_pillow(replace(self.config, backend="pillow")))

        def error(result: object) -> float:
            assert isinstance(result, Verdict)
            return result.error

        return Workload((source,), ours, error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        def setup() -> Call | Missing:
            shards, config = ShardSet.open(self.path), self.config
            return setup_webdataset(shards, config.crop, self.batch, self.workers, device, config.seed)

        return (Peer("webdataset + Pillow, WebLoader", setup, capture=False),)

    def peer_error(self, images: torch.Tensor, samples: list[int]) -> float:
        """Of a peer's batch that is cut as in the first epoch: 0 for the same pictures, else infinite."""
        parts = np.array_split(np.array(samples), max(1, self.workers))
        requests = [(0, part) for part in parts if len(part)]
        ours = crop_batches(replace(self.config, backend="pillow"), requests, tells=False)
        same = torch.equal(torch.cat([batch.images for batch in ours]), images.cpu())
        return 0.0 if same else float("inf")


@dataclass(frozen=True, kw_only=True)
class StepCase(LoaderCase):
    """A training step that takes the GPU some time, fed by the loader; its floor is the step on one resident batch.

    Attributes:
        step_ms: length of the step; None is `LONGER` times what the loader takes for a batch.
    """

    step_ms: float | None = None

    @property
    def name(self) -> str:
        length = f"{LONGER:g} x a batch's time" if self.step_ms is None else f"{self.step_ms:g} ms"
        return f"step of {length} fed by {self.backend}, {self._sizes}"


def loader_cases(path: str, batch: int, size: int, workers: int, step_ms: float | None) -> list[LoaderCase]:
    """DALI, where it is installed, and the step that it feeds, then Pillow; or Pillow and its step.

    Raises:
        ValueError: a step that is not positive.
    """
    if step_ms is not None and not step_ms > 0:
        raise ValueError(f"step_ms must be positive, got {step_ms:g}")
    backend: Literal["dali", "pillow"] = "dali" if dali_installed() else "pillow"
    step = StepCase(path=path, backend=backend, batch=batch, size=size, workers=workers, step_ms=step_ms)
    pillow = LoaderCase(path=path, backend="pillow", batch=batch, size=size, workers=workers)
    if backend == "pillow":
        return [pillow, step]
    dali = replace(pillow, backend="dali")
    return [replace(dali, target="P12", condition=_OF_BARE) if size == _TARGET_SIZE else dali, step, pillow]


def judge(source: ImageLoader, truth: list[Batch]) -> Verdict:
    """Compares the first batches of a loader with the truth, and, of DALI, with themselves.

    Pillow's are compared to the bit with the truth, which other processes have decoded.
    """
    start = source.state_dict()
    first = [next(source) for _ in truth]
    again = truth
    if source.backend == "dali":
        source.load_state_dict(start)
        again = [next(source) for _ in truth]
    pixel = mean = 0.0
    labels = repeated = True
    for ours, theirs, second in zip(first, truth, again, strict=True):
        labels &= torch.equal(ours.labels.cpu(), theirs.labels)
        repeated &= torch.equal(ours.images, second.images)
        difference = (ours.images.short() - theirs.images.to(ours.images.device).short()).abs()
        pixel = max(pixel, float(difference.amax()))
        mean += float(difference.float().mean()) / len(truth)
    return Verdict(pixel, mean, labels, repeated)


@functools.lru_cache(maxsize=1)
def first_by_pillow(config: LoaderConfig) -> list[Batch]:
    """The first batches of a loader that decodes by Pillow; kept, as several cases are judged by the same ones."""
    source = ImageLoader(config)
    return [next(source) for _ in range(_JUDGED)]
