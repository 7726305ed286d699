"""Encodes a set of images into a token store: on any number of ranks, and after a kill from where it was."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from spectralar.devices import Precision, in_bf16
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data.images import TEN
from spectralar.training.data.loader import LoaderConfig, choose_backend, crop_batches, crop_requests
from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.token_parts import TokenParts
from spectralar.training.data.tokens import TokenStore, TokenWriter
from spectralar.training.data.workers import Request
from spectralar.training.distributed import ALONE, Ranks
from spectralar.training.lock import RunLock
from spectralar.training.meter import Wait
from spectralar.training.runs import weights_digest

# Batches in a part, of which a kill costs each rank up to two: seconds of work on a GPU.
_PART = 16


class _Times(NamedTuple):
    """Of one rank: images, seconds in which its device stood still for them, and seconds in all."""

    images: int = 0
    waiting: float = 0.0
    all: float = 0.0


def tokenize(
    tokenizer: SpectralTokenizer,
    data: LoaderConfig,
    out: str | Path,
    *,
    crops: int | None = None,
    precision: Precision = "auto",
    ranks: Ranks = ALONE,
    console: Console | None = None,
) -> TokenStore:
    """Encodes every image of a set `crops` times, each time another crop, into a token store.

    The ranks share the work. A job that was stopped or killed goes on when it is started again, on as many ranks or
    others, and makes the same store. Until that is complete, its parts are in the folder `out` + `.parts`.

    Args:
        tokenizer: trained, on the device to use; equal on all ranks.
        data: the images and their crop; `kind="center"` without flip makes all crops of an image equal.
        out: folder of the store; must not exist.
        crops: rows per image; None is 10 for `kind="ten-crop"`, else 1.
        precision: of the encoder; bf16 is what tokenizers are trained in on GPUs.
        ranks: this job.
        console: where the first rank shows progress and speed; None is standard error.

    Raises:
        ValueError: a crop size that is not the tokenizer's, a number of crops other than 10 with `ten-crop`, an
            existing `out`, or parts of another tokenizer, set or configuration.
        RunLockedError: another job writes the same store.
        ShardError: for a shard or image that cannot be read.
    """
    config, out = tokenizer.config, Path(out)
    if data.crop.size != config.image_size:
        raise ValueError(f"crop.size must be the tokenizer's {config.image_size}, not {data.crop.size}")
    if crops is None:
        crops = TEN if data.crop.kind == "ten-crop" else 1
    elif data.crop.kind == "ten-crop" and crops != TEN:
        raise ValueError(f"crops must be {TEN} with kind ten-crop, not {crops}")
    shards = ShardSet.open(data.path, classes=data.classes)
    requests = crop_requests(len(shards), data.batch, crops)
    groups = [requests[start : start + _PART] for start in range(0, len(requests), _PART)]
    parts = TokenParts(out, [sum(len(indices) for _, indices in group) for group in groups], config.tokens)
    shown = console or Console(stderr=True)
    digest = weights_digest(tokenizer)
    half = in_bf16(precision, tokenizer.device)
    plan = {
        "shards": shards.digest,
        "tokenizer": digest,
        "crop": asdict(data.crop),
        "crops": crops,
        "seed": data.seed,
        "batch": data.batch,
        "decoder": choose_backend(data, tokenizer.device)[0],
        "precision": "bf16" if half else "fp32",
    }

    with ExitStack() as held:

        def begin() -> list[int]:
            if out.exists():
                raise ValueError(f"path {out} exists already")
            parts.folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(RunLock(parts.folder))
            missing = parts.begin(plan)
            if len(missing) < len(groups):
                shown.print(f"going on: {len(groups) - len(missing)} of {len(groups)} parts are in {parts.folder}")
            return missing

        def finish() -> None:
            with TokenWriter(
                out,
                tokens=config.tokens,
                codebook_size=config.codebook_size,
                class_names=shards.class_names,
                crops=crops,
                source_digest=shards.digest,
                tokenizer_digest=digest,
            ) as writer:
                for part, group in enumerate(groups):
                    labels = np.concatenate([shards.labels[indices] for _, indices in group])
                    writer.append(torch.from_numpy(parts.read(part).astype(np.int64)), torch.from_numpy(labels))
            parts.remove()

        mine = ranks.by_first(begin)[ranks.rank :: ranks.world]
        work = {part: groups[part] for part in mine}
        times = _encode(tokenizer, data, work, parts, shown if ranks.first else None, half=half)
        everyone = ranks.gather(times)
        ranks.by_first(finish)
    if ranks.first and any(t.images > 0 for t in everyone):
        shown.print(_speed(everyone))
    return TokenStore.open(out)


def _encode(
    tokenizer: SpectralTokenizer,
    data: LoaderConfig,
    work: dict[int, list[Request]],
    parts: TokenParts,
    console: Console | None,
    *,
    half: bool,
) -> _Times:
    """Writes the parts whose requests `work` holds; with a console it shows how far it is.

    A thread waits for the tokens of a part and writes them, while the next one is encoded.
    """
    device = tokenizer.device
    requests = [request for group in work.values() for request in group]
    batches = crop_batches(data, requests, device=device, tells=console is not None)
    waits, images_seen, began, ended = list[Wait](), 0, None, 0.0
    written: Future[None] | None = None
    with (
        Progress(console=console, transient=True, disable=console is None) as progress,
        ThreadPoolExecutor(1) as writer,
    ):
        bar = progress.add_task("tokenizing", total=len(requests))
        for part, group in work.items():
            rows = []
            for _ in group:
                with Wait(device) as wait:
                    images, _ = next(batches)
                with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=half):
                    rows.append(tokenizer.encode(images.to(device, non_blocking=True)))
                if began is None:  # the first batch starts workers and compiles, so it is not timed
                    rows[0].cpu()
                    began = time.perf_counter()
                else:
                    images_seen += len(images)
                    waits.append(wait)
                progress.advance(bar)
            if written is not None:
                written.result()
            written = writer.submit(_keep, parts, part, torch.cat(rows))
        if written is not None:
            written.result()
            ended = time.perf_counter()
    return _Times(images_seen, sum(wait.seconds for wait in waits), ended - (began or ended))


def _keep(parts: TokenParts, part: int, tokens: torch.Tensor) -> None:
    parts.write(part, tokens.cpu().numpy())


def _speed(ranks: list[_Times]) -> str:
    """The speed of all ranks, and what bounded it: waiting is the loader's part, the rest nearly all the encoder's."""
    images = sum(t.images for t in ranks)
    waiting, spent = sum(t.waiting for t in ranks), sum(t.all for t in ranks)
    return (
        f"{images / max(t.all for t in ranks):,.0f} images/s on {len(ranks)} rank{'s'[: len(ranks) - 1]}; "
        f"{waiting / spent:.0%} of the time went into waiting for images, and encoding alone does "
        f"{images / (spent - waiting) * len(ranks):,.0f} images/s"
    )
