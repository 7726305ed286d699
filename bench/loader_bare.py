"""What DALI can do by itself: its own reader, decoder, crop and flip, with no order of ours and no labels.

`python -m spectralar.bench.loader_bare JSON` measures, in a process of its own: DALI's decoders have crashed in some
releases, which must not end a benchmark.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spectralar.bench.loader_timing import time_batches
from spectralar.bench.processes import child_environment, last_report
from spectralar.bench.timing import Timing
from spectralar.training.data.dali import decoder_threads
from spectralar.training.data.images import Crop

# To import, and to build a pipeline.
_SETUP = 60.0
_QUEUE = 3


def measure_bare(
    shards: Sequence[Path], crop: Crop, batch: int, seconds: float, *, gpu: int | None
) -> tuple[Timing, float | None]:
    """Seconds per batch, and the processors that were busy.

    Args:
        shards: tars; their indexes are used where all have one.
        crop: of kind `random-resized`.
        batch: pictures at once.
        seconds: for the timed batches.
        gpu: its number; None decodes on processors.

    Raises:
        RuntimeError: DALI failed, or crashed.
    """
    order = {
        "shards": [str(path) for path in shards],
        "crop": asdict(crop),
        "batch": batch,
        "seconds": seconds,
        "gpu": gpu,
    }
    call = [sys.executable, "-m", "spectralar.bench.loader_bare", json.dumps(order)]
    try:
        done = subprocess.run(
            call, env=child_environment(), capture_output=True, text=True, timeout=_SETUP + 2 * seconds
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"bare DALI was not done after {_SETUP + 2 * seconds:g} s") from late
    report = last_report(done.stdout)
    if done.returncode or report is None:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(f"bare DALI ended with status {done.returncode}: {said[-1][:200] if said else 'no word'}")
    return Timing(**report["timing"]), report["processors"]


def _pipeline(order: dict[str, Any]) -> Any:
    from nvidia.dali import Pipeline, fn, types

    crop, gpu = Crop(**order["crop"]), order["gpu"]
    shards = [Path(path) for path in order["shards"]]
    indexes = [path.with_suffix(".idx") for path in shards]
    pipeline = Pipeline(
        batch_size=order["batch"], num_threads=decoder_threads(), device_id=gpu, prefetch_queue_depth=_QUEUE, seed=0
    )
    with pipeline:
        files = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path) for path in indexes] if all(path.is_file() for path in indexes) else [],
            ext=["jpg;jpeg;png;webp"],
            missing_component_behavior="error",
            random_shuffle=True,
        )
        images = fn.decoders.image(
            files, device="cpu" if gpu is None else "mixed", output_type=types.RGB, hw_decoder_load=1.0
        )
        images = fn.random_resized_crop(
            images,
            size=[crop.size] * 2,
            random_area=list(crop.scale),
            random_aspect_ratio=[3 / 4, 4 / 3],
            interp_type=types.INTERP_CUBIC,
            antialias=True,
        )
        images = fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), dtype=types.UINT8, output_layout="CHW", mean=[0.0], std=[1.0]
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _measure(order: dict[str, Any]) -> None:
    pipeline = _pipeline(order)
    # Without a stream to wait on, `run` returns once the device is done with the batch.
    timing, processors = time_batches(pipeline.run, order["seconds"], warm=4 * _QUEUE)
    print(json.dumps({"timing": asdict(timing), "processors": processors}), flush=True)


if __name__ == "__main__":
    _measure(json.loads(sys.argv[1]))
