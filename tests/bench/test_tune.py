"""The tuner: which rows it tries, that wrong ones are dropped, and that the tables it knows are there."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from spectralar.bench.record import Provenance
from spectralar.bench.timing import Call
from spectralar.bench.tune import Tunable, bench_tune_command, table_lines, tunables, tune

from .conftest import CPU, Case, DoubleCase


@dataclasses.dataclass(frozen=True)
class Row:
    steps: int
    extra: int = 0


def launch(case: Case, row: Row) -> Call:
    def call(x: Tensor) -> Tensor:
        if row.extra == 9:
            raise MemoryError("too much shared memory")
        time.sleep(0.0005 * row.steps)
        return 2 * x + (row.extra == 7)

    return call


def tunable(present: Row) -> Tunable:
    choices = {"steps": (1, 4), "extra": (0, 7, 9)}
    return Tunable("TABLE[1]", present, choices, (DoubleCase(), DoubleCase(target="P9")), launch)


def test_near_rows_are_tried_first() -> None:
    rows = tunable(Row(4)).candidates()
    assert len(rows) == 5 and Row(4) not in rows
    assert set(rows[:3]) == {Row(1), Row(4, 7), Row(4, 9)}


def test_fastest_right_row_wins() -> None:
    said: list[str] = []
    outcomes = tune(tunable(Row(4)), CPU, 3.0, said.append)
    assert [outcome.row for outcome in outcomes] == [Row(1), Row(4)]
    assert outcomes[1].relative == 1 and 0.1 < outcomes[0].relative < 0.7
    assert sum("wrong result" in line for line in said) == 2
    assert sum("too much shared memory" in line for line in said) == 2
    origin = Provenance("GPU", "2", "3", "c", "2026-01-31")
    head, reason, row, present, _ = table_lines(tunable(Row(4)), outcomes, origin)
    assert head == "TABLE[1], on GPU, triton 3, 2026-01-31"
    assert "double" in reason and row.strip() == "Row(steps=1, extra=0)" and "the present row" in present


def test_present_row_must_be_right() -> None:
    with pytest.raises(RuntimeError, match="wrong result"):
        tune(tunable(Row(4, 7)), CPU, 1.0, lambda line: None)


def test_no_new_rows_when_time_is_up() -> None:
    said: list[str] = []
    assert [outcome.row for outcome in tune(tunable(Row(1)), CPU, 0.0, said.append)] == [Row(1)]
    assert said[0].startswith("time is up")


@pytest.mark.parametrize("op", ["dct", "vq"])
def test_tables_of_the_kernels_are_known(op: Literal["dct", "vq"]) -> None:
    found = tunables(op)
    assert len({t.name for t in found}) == len(found) >= 2
    for t in found:
        fields: dict[str, Any] = dataclasses.asdict(t.present)
        assert t.choices.keys() <= fields.keys(), t.name
        assert t.candidates() and t.cases


def test_tuning_needs_a_gpu_and_a_table() -> None:
    with pytest.raises(ValueError, match="device must be a GPU"):
        bench_tune_command("vq", device="cpu")
    with pytest.raises(ValueError, match="got 'NOTHING'"):
        bench_tune_command("dct", "NOTHING", device="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["dct", "vq"])
def test_kernels_take_rows(op: Literal["dct", "vq"]) -> None:
    for t in tunables(op):
        shrunk = dataclasses.replace(t, cases=tuple(case.small() for case in t.cases), choices={})
        [outcome] = tune(shrunk, torch.device("cuda"), 0.1, print)
        assert outcome.row == t.present
