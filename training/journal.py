"""What a run tells: JSON lines always, TensorBoard when installed, a progress bar or plain lines on the screen."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_FILE = "log.jsonl"


class Journal:
    """Writes `log.jsonl` (one object per record, with `step`), TensorBoard events, and the progress display.

    Args:
        directory: the run's directory.
        title: shown beside the progress bar.
        first_step: steps done before; later records of an interrupted run are dropped from the log.
        steps: steps of the whole run.
        console: where to print; None is standard error.
    """

    def __init__(
        self, directory: Path, title: str, first_step: int, steps: int, *, console: Console | None = None
    ) -> None:
        self.path = directory / LOG_FILE
        kept = [r for r in read_log(directory) if r["step"] <= first_step] if first_step else []
        # All or nothing: a kill between emptying and writing must not lose the log.
        draft = directory / f".{LOG_FILE}"
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        draft.replace(self.path)
        self.console = console or Console(stderr=True)
        self.title, self.steps = title, steps
        self._tensorboard = _tensorboard_writer(directory)
        self._last_line = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console, transient=True)
        self._task = self._progress.add_task(title, total=steps, completed=first_step, note="")
        self._live = self.console.is_terminal

    def __enter__(self) -> Journal:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def record(self, step: int, values: dict[str, Any]) -> None:
        """Appends one record to the log; numbers also go to TensorBoard."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error  # which file, too
        if self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._tensorboard.add_scalar(name, value, step)

    def progress(self, step: int, note: str) -> None:
        """Moves the bar; without a terminal prints a line, at most every ten seconds and at the end."""
        self._progress.update(self._task, completed=step, note=note)
        now = time.monotonic()
        if not self._live and (step == self.steps or now - self._last_line > 10):
            self._last_line = now
            self.console.print(f"{self.title} {step}/{self.steps} {note}", highlight=False, markup=False)

    def say(self, message: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(message, highlight=False, markup=False)


class Silence(Journal):
    """The journal of the ranks that write and print nothing."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, step: int, values: dict[str, Any]) -> None:
        pass

    def progress(self, step: int, note: str) -> None:
        pass

    def say(self, message: str) -> None:
        pass


def read_log(directory: Path) -> list[dict[str, Any]]:
    """All records of a run's log; a last line cut short by a crash is left out."""
    records = []
    path = directory / LOG_FILE
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _tensorboard_writer(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"))
