"""Packs a folder of pictures into WebDataset shards: tar, DALI index and manifest.

Each sample has a key such as `00000042` and three components: the encoded image (`jpg`, `png` or `webp`), `cls`, its
class as ASCII digits for the webdataset library, and `i32`, the same number in four little-endian bytes for DALI, which
wants labels of one width. Every picture is decoded once before it is written: what cannot be read is listed and left
out here, for evaluation and tokenising stop at such a one, and training allows few.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tarfile import RECORDSIZE
from typing import Annotated, Any, TypeVar

import numpy as np
from tyro.conf import Positional, arg

from spectralar.training.data.images import Encoded, ImageError, encode_for_shard
from spectralar.training.data.shard_set import FORMAT, MANIFEST, ShardSet, file_digest, read_manifest
from spectralar.training.data.sources import Listing, Source, list_sources
from spectralar.training.data.tar_index import BLOCK, ShardError, scan_tar, write_index

__all__ = ["ShardProgress", "ShardSet", "shards_command", "write_shards"]

JOURNAL = "progress.jsonl"
PARTIAL = "writing.tar.partial"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardProgress:
    """Files looked at, samples written and files skipped, out of `total` files, and shards completed."""

    done: int
    total: int
    written: int
    skipped: int
    shards: int


@dataclass(frozen=True)
class _Settings:
    """What decides the content of the shards besides the pictures."""

    prefix: str
    samples_per_shard: int
    max_bytes_per_shard: int
    resize: int | None
    quality: int
    seed: int


@dataclass
class _Shard:
    """A shard in the making and, once complete, its line in the journal. `next` is the place in the plan after it."""

    name: str
    next: int = 0
    samples: int = 0
    bytes: int = 0
    sha256: str = ""
    labels: list[int] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    converted: dict[str, int] = field(default_factory=dict)


def write_shards(
    source: str | Path,
    out_dir: str | Path,
    *,
    labels: str | Path | None = None,
    classes_from: str | Path | None = None,
    prefix: str = "train",
    samples_per_shard: int = 10_000,
    max_bytes_per_shard: int = 1_000_000_000,
    resize: int | None = None,
    quality: int = 95,
    seed: int = 0,
    strict: bool = False,
    workers: int | None = None,
    progress: Callable[[ShardProgress], None] | None = None,
) -> ShardSet:
    """Packs the pictures below `source` into shards `<prefix>-000000.tar`, with index files and `manifest.json`.

    The order is shuffled once, by `seed`. Bytes stay untouched where every decoder shows them alike, and are re-encoded
    otherwise (see `encode_for_shard`). The same input and settings give the same bytes with the same Pillow. A run that
    was interrupted continues after its last complete shard; a complete run is only opened.

    Args:
        source: folder with one folder per class, or any folder with `labels`.
        out_dir: folder for one set of shards; made if need be.
        labels: CSV (columns file, label) or JSON (object) from file name to class number or class name.
        classes_from: another set of shards whose classes to use, so that train and val number them alike.
        prefix: first part of the shards' names.
        samples_per_shard: most samples in a shard.
        max_bytes_per_shard: most bytes in a shard; a single larger sample gets a shard of its own.
        resize: longest short side to store, in pixels.
        quality: JPEG quality of re-encoded pictures, 1..100.
        seed: seed of the order.
        strict: stop at the first picture that cannot be used and at labels of missing files, instead of listing them.
        workers: threads that decode; None is one per core. They do not change the result.
        progress: called after every file.

    Raises:
        ValueError: a bad argument, unusable labels (see `list_sources`), or an `out_dir` begun with other input.
        ShardError: under `strict`, a bad picture; or no picture is usable.
    """
    source, out_dir = Path(source), Path(out_dir)
    settings = _Settings(prefix, samples_per_shard, max_bytes_per_shard, resize, quality, seed)
    _check(settings, workers)
    class_names = None if classes_from is None else read_manifest(Path(classes_from) / MANIFEST)["class_names"]
    listing = list_sources(source, labels=None if labels is None else Path(labels), class_names=class_names)
    if strict and listing.missing:
        raise ShardError(f"labels {labels} name {len(listing.missing)} missing files, such as {listing.missing[0]}")
    order = np.random.default_rng(seed).permutation(len(listing.sources))
    plan = [listing.sources[i] for i in order]
    plan_digest = _plan_digest(plan, listing.class_names, settings)

    out_dir.mkdir(parents=True, exist_ok=True)
    done = _resume(out_dir, plan_digest)
    if done is None:
        shards = ShardSet.open(out_dir)
        _refuse_skipped(strict, shards.manifest["skipped"])
        return shards
    start = done[-1].next if done else 0
    _refuse_skipped(strict, [entry for shard in done for entry in shard.skipped])

    def encode(item: Source) -> Encoded | str:
        try:
            return encode_for_shard((source / item.name).read_bytes(), resize=resize, quality=quality)
        except (ImageError, OSError) as error:
            _refuse_skipped(strict, [{"file": item.name, "reason": str(error)}])
            return str(error)

    encoded = _ordered_map(encode, plan[start:], workers or os.cpu_count() or 1)
    for shard in _write(out_dir, settings, plan, start, encoded, done, progress):
        done.append(shard)
        _append(out_dir / JOURNAL, asdict(shard))
    usable = any(shard.samples for shard in done)
    if usable:
        _write_manifest(out_dir, settings, plan_digest, listing, done)
    (out_dir / JOURNAL).unlink()
    if not usable:
        reason = done[0].skipped[0]["reason"]
        raise ShardError(f"none of the {len(plan)} images of {source} is usable; {plan[0].name}: {reason}")
    return ShardSet.open(out_dir)


def _write(
    out_dir: Path,
    settings: _Settings,
    plan: list[Source],
    start: int,
    encoded: Iterator[Encoded | str],
    done: list[_Shard],
    progress: Callable[[ShardProgress], None] | None,
) -> Iterator[_Shard]:
    """Writes shard after shard; each is yielded when it stands complete under its final name."""
    from webdataset import TarWriter

    position = start
    key = sum(shard.samples for shard in done)
    skipped = sum(len(shard.skipped) for shard in done)
    pending: Encoded | str | None = next(encoded, None)
    number = len(done)
    while pending is not None:
        shard = _Shard(f"{settings.prefix}-{number:06d}.tar")
        expected: list[tuple[str, str, int]] = []
        size = 2 * BLOCK
        with (out_dir / PARTIAL).open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            while pending is not None:
                item = plan[position]
                if isinstance(pending, str):
                    shard.skipped.append({"file": item.name, "reason": pending})
                    skipped += 1
                else:
                    sample = _sample(pending, item.label)
                    more = sum(BLOCK + -(-len(data) // BLOCK) * BLOCK for data in sample.values())
                    total = -(-(size + more) // RECORDSIZE) * RECORDSIZE  # tar files end on a whole record
                    full = shard.samples == settings.samples_per_shard or total > settings.max_bytes_per_shard
                    if full and shard.samples:
                        break
                    tar.write({"__key__": f"{key:08d}", **sample})
                    expected += [(f"{key:08d}", name, len(data)) for name, data in sorted(sample.items())]
                    size += more
                    key += 1
                    shard.samples += 1
                    shard.labels.append(item.label)
                    if pending.reason is not None:
                        shard.converted[pending.reason] = shard.converted.get(pending.reason, 0) + 1
                position += 1
                pending = next(encoded, None)
                if progress is not None:
                    progress(ShardProgress(position, len(plan), key, skipped, number))
        shard.next = position
        if shard.samples:
            _finish(out_dir, shard, expected)
            number += 1
        else:
            (out_dir / PARTIAL).unlink()
        yield shard


def _sample(image: Encoded, label: int) -> dict[str, bytes]:
    return {image.extension: image.data, "cls": str(label).encode(), "i32": label.to_bytes(4, "little", signed=True)}


def _finish(out_dir: Path, shard: _Shard, expected: list[tuple[str, str, int]]) -> None:
    """Indexes a tar by reading it back, checks that it holds what was written, and gives it its name."""
    partial, final = out_dir / PARTIAL, out_dir / shard.name
    samples = scan_tar(partial)
    if [(key, c.extension, c.size) for key, components in samples.items() for c in components] != expected:
        raise ShardError(f"shard {final} does not read back as written")
    shard.bytes, shard.sha256 = partial.stat().st_size, file_digest(partial)
    write_index(final.with_suffix(".idx"), samples)
    partial.replace(final)


def _check(settings: _Settings, workers: int | None) -> None:
    if not settings.prefix.isascii() or not settings.prefix.replace("-", "").replace("_", "").isalnum():
        raise ValueError(f"prefix must be ASCII letters, digits, - and _, not {settings.prefix!r}")
    for name in ("samples_per_shard", "max_bytes_per_shard"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(settings, name)}")
    if settings.resize is not None and settings.resize < 1:
        raise ValueError(f"resize must be positive, not {settings.resize}")
    if not 1 <= settings.quality <= 100:
        raise ValueError(f"quality must be 1..100, not {settings.quality}")
    if settings.seed < 0:
        raise ValueError(f"seed must not be negative, not {settings.seed}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be positive, not {workers}")


def _refuse_skipped(strict: bool, skipped: list[dict[str, str]]) -> None:
    if strict and skipped:
        raise ShardError(f"{skipped[0]['file']}: {skipped[0]['reason']} ({len(skipped)} such images so far)")


def _plan_digest(plan: list[Source], class_names: tuple[str, ...], settings: _Settings) -> str:
    files = [[s.name, s.label, s.size] for s in plan]
    content = json.dumps([FORMAT, asdict(settings), class_names, files])
    return hashlib.sha256(content.encode()).hexdigest()


def _resume(out_dir: Path, plan_digest: str) -> list[_Shard] | None:
    """Shards that an interrupted run completed, or None if there is nothing left to do."""
    manifest, journal = out_dir / MANIFEST, out_dir / JOURNAL
    other = "was written from other files or with other settings; give another folder or remove it"
    if manifest.is_file():
        if read_manifest(manifest)["plan"] != plan_digest:
            raise ValueError(f"out_dir {out_dir} {other}")
        journal.unlink(missing_ok=True)
        return None
    if not journal.is_file():
        if any(out_dir.glob("*.tar")):
            raise ValueError(f"out_dir {out_dir} holds tars that were not written here; give another folder")
        _append(journal, {"plan": plan_digest})
        return []
    lines = []
    for line in journal.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # the run stopped while it wrote this line
        lines.append(json.loads(line))
    if lines and lines[0]["plan"] != plan_digest:
        raise ValueError(f"out_dir {out_dir} {other}")
    done = [_Shard(**line) for line in lines[1:]]
    for shard in done:
        path = out_dir / shard.name
        if shard.samples and not (path.is_file() and file_digest(path) == shard.sha256):
            raise ShardError(f"shard {path} is missing or has changed since an earlier run completed it")
    whole = journal.with_suffix(".partial")
    whole.unlink(missing_ok=True)
    for entry in [{"plan": plan_digest}, *map(asdict, done)]:
        _append(whole, entry)
    whole.replace(journal)
    return done


def _append(path: Path, line: dict[str, Any]) -> None:
    """Adds a line and waits until it is on disk, for it is the proof that a shard is complete."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_manifest(
    out_dir: Path, settings: _Settings, plan_digest: str, listing: Listing, shards: list[_Shard]
) -> None:
    import PIL

    per_class: Counter[int] = Counter()
    converted: Counter[str] = Counter()
    for shard in shards:
        per_class.update(shard.labels)
        converted.update(shard.converted)
    shards_written = [
        {"name": s.name, "samples": s.samples, "bytes": s.bytes, "sha256": s.sha256, "labels": s.labels}
        for s in shards
        if s.samples
    ]
    manifest = {
        "format": FORMAT,
        "samples": sum(s.samples for s in shards),
        "classes": len(listing.class_names),
        "digest": hashlib.sha256("".join(s.sha256 for s in shards).encode()).hexdigest(),
        "plan": plan_digest,
        "settings": asdict(settings),
        "pillow": PIL.__version__,
        "class_names": listing.class_names,
        "samples_per_class": [per_class[i] for i in range(len(listing.class_names))],
        "converted": dict(sorted(converted.items())),
        "ignored": listing.ignored,
        "missing": listing.missing,
        "skipped": [entry for s in shards for entry in s.skipped],
        "shards": shards_written,
    }
    partial = out_dir / f"{MANIFEST}.partial"
    lines = []
    for name, value in manifest.items():
        # One line per shard and per skipped file: readable, and a million labels do not become a million lines.
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(v)}" for v in value) + "\n  ]"
        else:
            text = json.dumps(value)
        lines.append(f"  {json.dumps(name)}: {text}")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(out_dir / MANIFEST)


def _ordered_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Like `map` on threads, with a bounded number of results waiting. Pillow decodes without the interpreter lock."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def shards_command(
    source: Annotated[Positional[Path], arg(metavar="SOURCE")],
    out_dir: Annotated[Positional[Path], arg(metavar="OUT_DIR")],
    labels: Path | None = None,
    classes_from: Path | None = None,
    prefix: str = "train",
    samples_per_shard: int = 10_000,
    max_bytes_per_shard: int = 1_000_000_000,
    resize: int | None = None,
    quality: int = 95,
    seed: int = 0,
    strict: bool = False,
) -> None:
    """Pack a folder of pictures into WebDataset shards with DALI index files and a manifest.

    Args:
        source: folder with one folder per class, or any folder together with --labels.
        out_dir: folder for the shards; an interrupted run continues here.
        labels: CSV with columns file and label, or JSON object from file to label.
        classes_from: folder of other shards whose classes to use (for val: the train shards).
        prefix: first part of the shards' names.
        samples_per_shard: most samples in a shard.
        max_bytes_per_shard: most bytes in a shard.
        resize: reduce pictures whose short side is longer than this many pixels.
        quality: JPEG quality of re-encoded pictures.
        seed: seed of the shuffled order.
        strict: stop at the first unusable picture instead of listing it in the manifest.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("packing", total=None)

        def show(p: ShardProgress) -> None:
            bar.update(task, completed=p.done, total=p.total, description=f"packing ({p.skipped} skipped)")

        shards = write_shards(
            source,
            out_dir,
            labels=labels,
            classes_from=classes_from,
            prefix=prefix,
            samples_per_shard=samples_per_shard,
            max_bytes_per_shard=max_bytes_per_shard,
            resize=resize,
            quality=quality,
            seed=seed,
            strict=strict,
            progress=show,
        )
        manifest = shards.manifest
        files = len(shards) + len(manifest["skipped"])
        bar.update(task, completed=files, total=files, description="packed")
    table = Table(show_header=False)
    table.add_row("samples", f"{len(shards):,}")
    table.add_row("classes", f"{shards.classes:,}")
    table.add_row("shards", f"{len(shards.paths):,} ({sum(s['bytes'] for s in manifest['shards']) / 1e6:,.1f} MB)")
    table.add_row(
        "re-encoded", ", ".join(f"{count} {reason}" for reason, count in manifest["converted"].items()) or "0"
    )
    table.add_row("skipped", f"{len(manifest['skipped'])}")
    table.add_row("manifest", str(out_dir / MANIFEST))
    console.print(table)
    for entry in manifest["skipped"][:10]:
        console.print(f"skipped {entry['file']}: {entry['reason']}", style="yellow", highlight=False, markup=False)
