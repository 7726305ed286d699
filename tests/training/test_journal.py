"""The log file and what is printed."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from spectralar.training import journal as module
from spectralar.training.journal import Journal, read_log


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=300, force_terminal=terminal)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    with Journal(tmp_path, "t", 0, 3, console=console()) as journal:
        journal.record(1, {"loss": 0.5})
        journal.record(3, {"val": [1.0, 2.0], "note": "ü\n"})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_log(tmp_path)
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 3, "val": [1.0, 2.0], "note": "ü\n"}]


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (2, [1, 2]), (9, [1, 2, 3])])
def test_later_records_are_dropped(tmp_path: Path, first_step: int, kept: list[int]) -> None:
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3))
    (tmp_path / "log.jsonl").write_text(lines + '{"step": 4, "cut')
    Journal(tmp_path, "t", first_step, 9, console=console())
    assert [record["step"] for record in read_log(tmp_path)] == kept


def test_no_log_is_an_empty_one(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []


def test_without_a_terminal_lines_come_seldom_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    screen = console()
    with Journal(tmp_path, "title", 0, 50, console=screen) as journal:
        for step in range(1, 51):
            now += 1
            journal.progress(step, f"note {step} [b]")
    lines = [f"title {step}/50 note {step} [b]" for step in (1, 12, 23, 34, 45, 50)]
    assert printed(screen).splitlines() == lines


def test_messages_keep_their_brackets(tmp_path: Path) -> None:
    screen = console()
    with Journal(tmp_path, "title", 0, 5, console=screen) as journal:
        journal.say("see runs/[red]/x and [/]")
    assert printed(screen) == "see runs/[red]/x and [/]\n"


def test_a_terminal_shows_a_bar(tmp_path: Path) -> None:
    screen = console(terminal=True)
    with Journal(tmp_path, "title", 2, 5, console=screen) as journal:
        journal.progress(3, "here")
        journal.say("said")
    assert "title" in printed(screen) and "3/5" in printed(screen) and "said" in printed(screen)


def test_numbers_go_to_tensorboard_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float, int]] = []

    class Writer:
        closed = False

        def add_scalar(self, name: str, value: float, step: int) -> None:
            seen.append((name, value, step))

        def close(self) -> None:
            self.closed = True

    writer = Writer()
    monkeypatch.setattr(module, "_tensorboard_writer", lambda directory: writer)
    with Journal(tmp_path, "t", 0, 3, console=console()) as journal:
        journal.record(2, {"loss": 0.5, "note": "words", "list": [1.0]})
    assert seen == [("loss", 0.5, 2)] and writer.closed
