"""The tokens of a set while they are made: a file per few batches, so ranks can share the work and a kill costs little.

What a part holds depends on the plan alone, not on the number of ranks or on interruptions, so neither changes a token.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "spectralar-token-parts 1"
PLAN = "plan.json"


class TokenParts:
    """Parts of the token store that will be `path`, in the folder `path` + `.parts`: `plan.json`, and per part one
    array file, uint16 `[rows, N]`, which has its name once it is complete.

    Args:
        path: folder of the store to be.
        rows: rows of every part.
        tokens: length N of a row.
    """

    def __init__(self, path: Path, rows: list[int], tokens: int) -> None:
        self.folder = path.with_name(path.name + ".parts")
        self._rows, self._tokens = rows, tokens

    def begin(self, plan: Mapping[str, Any]) -> list[int]:
        """Makes the folder, or goes on with that of an earlier job; returns the numbers of the parts it lacks.

        Args:
            plan: all that decides the content of the parts, as JSON values.

        Raises:
            ValueError: the folder was begun by another plan.
        """
        text = json.dumps({"format": FORMAT, **plan}, indent=2) + "\n"
        file = self.folder / PLAN
        self.folder.mkdir(parents=True, exist_ok=True)
        if not file.is_file():
            _write(file, text.encode())
        elif file.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{self.folder} was begun with other images or settings, see {file}; remove it or name another store"
            )
        return [part for part in range(len(self._rows)) if not self._is_complete(part)]

    def write(self, part: int, tokens: np.ndarray) -> None:
        """Keeps a part, integers `[rows, N]`, on disk.

        Raises:
            ValueError: another shape, or a token beyond 16 bits.
        """
        if tokens.shape != (self._rows[part], self._tokens):
            raise ValueError(f"tokens must be [{self._rows[part]}, {self._tokens}], not {list(tokens.shape)}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < 1 << 16:
            raise ValueError(f"tokens must be in 0..65535, not {tokens.min()}..{tokens.max()}")
        _write(self._file(part), tokens.astype("<u2").tobytes())

    def read(self, part: int) -> np.ndarray:
        """A part that was written, uint16 `[rows, N]`."""
        return np.fromfile(self._file(part), "<u2").reshape(self._rows[part], self._tokens)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder)

    def _file(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.u16"

    def _is_complete(self, part: int) -> bool:
        file = self._file(part)
        return file.is_file() and file.stat().st_size == 2 * self._rows[part] * self._tokens


def _write(path: Path, data: bytes) -> None:
    """A file that has its name only once it is whole and on disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
