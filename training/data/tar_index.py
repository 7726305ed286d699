"""Where the samples of a WebDataset tar lie, and the index file that lets DALI (and us) read without scanning.

An index has a first line `v1.2 <samples>` and per sample a line of `extension offset size name` groups. Names with
spaces, further dots or more than 100 characters break DALI's readers; our writer makes none of them.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

INDEX_VERSION = "v1.2"
BLOCK = 512


class ShardError(ValueError):
    """A shard cannot be used; the message names it, and the sample's key where one is to blame."""


@dataclass(frozen=True)
class Component:
    """One file of a sample: `offset` and `size` in bytes of its data within the tar."""

    extension: str
    offset: int
    size: int
    name: str


Samples = dict[str, list[Component]]
"""The components of each sample, by key, in the order of the tar."""


def scan_tar(path: Path) -> Samples:
    """Reads the headers of an uncompressed tar.

    A key is the name up to the first dot of its last part, the extension what follows, in lower case.

    Raises:
        ShardError: no plain tar, cut short, or a component that comes twice.
    """
    samples: Samples = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                components = samples.setdefault(key, [])
                if any(c.extension == extension.lower() for c in components):
                    raise ShardError(f"shard {path}, key {key}: component {extension.lower()} comes twice")
                components.append(Component(extension.lower(), member.offset_data, member.size, member.name))
    except tarfile.TarError as error:
        raise ShardError(f"shard {path} is cut short or not an uncompressed tar: {error}") from error
    # tarfile takes a file that ends between two members for a complete one; a whole tar ends with a block of zeros.
    if path.stat().st_size < end + BLOCK:
        raise ShardError(f"shard {path} is cut short: it ends without an end-of-archive block")
    return samples


def write_index(path: Path, samples: Samples) -> None:
    """Writes the index file of one shard.

    Raises:
        ShardError: a name that the format cannot hold.
    """
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    for key, components in samples.items():
        for c in components:
            if any(ch.isspace() for ch in c.name) or c.name.count(".") != 1:
                raise ShardError(f"index {path}, key {key}: name {c.name!r} needs exactly one dot and no spaces")
        lines.append(" ".join(f"{c.extension} {c.offset} {c.size} {c.name}" for c in components))
    path.write_text("\n".join(lines) + "\n", encoding="ascii")


def read_index(path: Path, shard: Path) -> Samples:
    """Reads the index file at `path` of the tar `shard`.

    Raises:
        ShardError: missing or malformed index, or data beyond the end of the shard.
    """
    if not path.is_file():
        raise ShardError(f"shard {shard} has no index {path.name}")
    header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    if header.split() != [INDEX_VERSION, str(len(lines))]:
        raise ShardError(
            f"index {path} of shard {shard}: the first line must be '{INDEX_VERSION} {len(lines)}' "
            f"(as many lines follow), not {header!r}"
        )
    length = os.path.getsize(shard)
    samples: Samples = {}
    for number, line in enumerate(lines, start=2):
        fields = line.split()
        try:
            if not fields or len(fields) % 4:
                raise ValueError("expected groups of extension, offset, size and name")
            groups = [fields[i : i + 4] for i in range(0, len(fields), 4)]
            components = [Component(e, int(offset), int(size), name) for e, offset, size, name in groups]
            if any(c.offset < BLOCK or c.size < 0 or c.offset + c.size > length for c in components):
                raise ValueError("data outside the shard")
        except ValueError as error:
            raise ShardError(f"index {path} of shard {shard}, line {number}: {error}") from error
        samples[components[0].name.partition(".")[0]] = components
    if len(samples) != len(lines):
        raise ShardError(f"index {path} of shard {shard}: {len(lines) - len(samples)} keys come twice")
    return samples
