"""Finds the pictures to be packed into shards, and the class of each.

Two layouts are understood: one folder per class, and any folder with a table of file names and labels.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
        ".jp2",
        ".avif",
        ".ico",
    ]
)
"""File name endings, in lower case, that are taken for pictures."""


@dataclass(frozen=True)
class Source:
    """One file: `name` relative to the source folder with forward slashes, its class and its size in bytes.

    The size of what is not there, as behind a dangling link, is -1.
    """

    name: str
    label: int
    size: int


@dataclass(frozen=True)
class Listing:
    """What a source folder holds.

    Attributes:
        sources: the pictures, sorted by name.
        class_names: name of every class.
        ignored: number of visible files that are no pictures by their ending.
        missing: names that the table of labels has and the folder has not.
    """

    sources: tuple[Source, ...]
    class_names: tuple[str, ...]
    ignored: int
    missing: tuple[str, ...]


def list_sources(root: Path, *, labels: Path | None, class_names: Sequence[str] | None) -> Listing:
    """Lists the pictures below `root`; hidden files and folders are passed over.

    Args:
        root: the source folder.
        labels: table of labels: CSV with the columns `file` and `label`, or a JSON object from file to label. File
            names are relative to `root`; labels are all integers (class numbers) or all words (class names). None
            takes the first folder of every name for its class, numbered in sorted order.
        class_names: the classes to number by; needed when this folder may lack some of them. None finds them here.

    Raises:
        ValueError: no folder, no pictures, a picture without class, or labels that contradict `class_names`.
    """
    if not root.is_dir():
        raise ValueError(f"source {root} is not a folder")
    names, ignored = _walk(root)
    if not names:
        raise ValueError(f"source {root} holds no images (endings {', '.join(sorted(SUFFIXES))})")
    if labels is None:
        loose = [name for name in names if "/" not in name]
        if loose:
            raise ValueError(
                f"source {root} holds {len(loose)} images outside a class folder, such as {loose[0]}: "
                "put them into one folder per class (one folder if there are no classes), or give labels"
            )
        table: dict[str, int | str] = {name: name.partition("/")[0] for name in names}
    else:
        table = read_labels(labels)
        unlabelled = [name for name in names if name not in table]
        if unlabelled:
            raise ValueError(f"labels {labels} lack {len(unlabelled)} files of {root}, such as {unlabelled[0]}")
    present = set(names)
    numbers, class_names = _number(table, class_names, where=labels or root)
    sources = tuple(Source(name, numbers[name], _bytes_of(root / name)) for name in names)
    return Listing(sources, class_names, ignored, tuple(sorted(name for name in table if name not in present)))


def read_labels(path: Path) -> dict[str, int | str]:
    """Reads a table of labels (see `list_sources`).

    Raises:
        ValueError: unreadable table, a file named twice, or labels that are neither all integers nor all words.
    """
    if not path.is_file():
        raise ValueError(f"labels {path} is not a file")
    if path.suffix.lower() == ".csv":
        rows = _read_csv(path)
    elif path.suffix.lower() == ".json":
        rows = _read_json(path)
    else:
        raise ValueError(f"labels must be a .csv or .json file, not {path}")
    table: dict[str, int | str] = {}
    for name, label in rows:
        if name in table:
            raise ValueError(f"labels {path}: file {name} comes twice")
        table[name] = label
    kinds = {type(label) for label in table.values()}
    if len(kinds) > 1:
        words = next(name for name, label in table.items() if isinstance(label, str))
        numbers = next(name for name, label in table.items() if isinstance(label, int))
        raise ValueError(
            f"labels {path}: labels must be all class numbers or all class names, "
            f"but {numbers} has {table[numbers]} and {words} has {table[words]!r}"
        )
    return table


def _read_csv(path: Path) -> list[tuple[str, int | str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not {"file", "label"} <= set(reader.fieldnames):
            raise ValueError(f"labels {path}: the first line must name the columns file and label")
        rows = [(row["file"], row["label"]) for row in reader]
    for number, (name, label) in enumerate(rows, start=2):
        if not name or not label:
            raise ValueError(f"labels {path}: row {number} has no file or no label")
    try:
        return [(name, int(label)) for name, label in rows]
    except ValueError:
        return list(rows)


def _read_json(path: Path) -> list[tuple[str, int | str]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except ValueError as error:
        raise ValueError(f"labels {path}: not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, tuple) for row in rows):
        raise ValueError(f"labels {path}: expected an object from file name to label")
    for name, label in rows:
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise ValueError(f"labels {path}: the label of {name} must be a number or a word, not {label!r}")
    return rows


def _number(
    table: dict[str, int | str], class_names: Sequence[str] | None, *, where: Path
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Turns labels into class numbers 0..classes-1, and names the classes."""
    first = next(iter(table.values()), "")
    if class_names is None:
        class_names = (
            [str(i) for i in range(max(label for label in table.values() if isinstance(label, int)) + 1)]
            if isinstance(first, int)
            else sorted({str(label) for label in table.values()})
        )
    known = {name: i for i, name in enumerate(class_names)}
    numbers = {}
    for name, label in table.items():
        number = label if isinstance(label, int) else known.get(label, -1)
        if not 0 <= number < len(class_names):
            allowed = f"0..{len(class_names) - 1}" if isinstance(label, int) else "one of the known class names"
            raise ValueError(f"{where}: {name} is of class {label!r}, but classes are {allowed}")
        numbers[name] = number
    return numbers, tuple(class_names)


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _is_above(folder: Path, place: str) -> bool:
    real = os.path.realpath(folder)
    return place == real or place.startswith(real.rstrip(os.sep) + os.sep)


def _walk(root: Path) -> tuple[list[str], int]:
    names, ignored = [], 0
    for folder, folders, files in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        # A link to a folder above would be followed for ever.
        folders[:] = [f for f in folders if not f.startswith(".") and not _is_above(Path(folder, f), here)]
        for file in files:
            path = Path(folder, file)
            if file.startswith("."):
                continue
            if path.suffix.lower() in SUFFIXES:
                names.append(path.relative_to(root).as_posix())
            else:
                ignored += 1
    return sorted(names), ignored
