"""Measuring: no time for a wrong result, no ratio to a wrong peer, and targets judged by their own conditions."""

from __future__ import annotations

import math

import pytest

from spectralar.bench.cases import Case, measure, select, within_microseconds
from spectralar.bench.ceilings import Ceilings
from spectralar.bench.commands import CASES
from spectralar.bench.kernels_dct import COPY, P1, P2, TargetsCase

from .conftest import CPU, DoubleCase, measurement, rival

RATES = Ceilings(copy=1e9, read=1e9, gemm={"fp16": 1e9, "tf32": 1e9})


def test_right_result_is_timed_against_its_peers() -> None:
    m = measure(DoubleCase(), CPU, RATES, 0.02)
    assert m.right and m.ours is not None and m.ours.median > 0
    assert (m.floor, m.ceiling) == (8e-6, "copy")
    rivals = {r.name: r for r in m.rivals}
    assert list(rivals) == ["sum", "off by one", "copy", "coarse", "absent", "broken", "compiled"]
    assert rivals["off by one"].error == 1.0
    assert rivals["absent"].reason == "absent is not installed"
    assert rivals["broken"].reason == "ZeroDivisionError: by [design]"
    assert m.ratio(rivals["off by one"]) is None and m.ratio(rivals["absent"]) is None
    sum_ratio, copy_ratio = m.ratio(rivals["sum"]), m.ratio(rivals["copy"])
    assert sum_ratio is not None and sum_ratio > 0 and copy_ratio is not None
    assert m.best_peer is not None and m.best_peer.name in ("sum", "compiled")


def test_compiled_and_unnamed_peers_can_be_left_out() -> None:
    names = [r.name for r in measure(DoubleCase(), CPU, RATES, 0.0, compiled=False).rivals]
    assert "compiled" not in names and "sum" in names
    assert [r.name for r in measure(DoubleCase(), CPU, RATES, 0.0, peers=("copy",)).rivals] == ["copy"]


@pytest.mark.parametrize("off", [2e-6, math.nan, math.inf])
def test_wrong_result_is_not_timed(off: float) -> None:
    m = measure(DoubleCase(off=off, condition=within_microseconds(1e9)), CPU, RATES, 0.0)
    assert not m.right and m.ours is None and not m.rivals and m.best_peer is None
    assert m.met is False


def test_only_precise_peers_count() -> None:
    m = measurement(
        DoubleCase(),
        1.0,
        rival("slow", 4.0),
        rival("best", 2.0, error=1e-4),
        rival("wrong", 0.5, error=1.0),
        rival("nan", 0.5, error=math.nan),
        rival("coarse", 0.5, role="reduced"),
        rival("copy", 0.1, role="bound"),
        rival("absent", None),
    )
    assert m.best_peer is not None and m.best_peer.name == "best"
    assert [m.ratio(r) for r in m.rivals] == [4.0, 2.0, None, None, 0.5, 0.1, None]


@pytest.mark.parametrize(
    ("ours", "peer", "met"), [(1.25, 5.7, True), (1.26, 60.0, False), (1.2, 5.39, False), (1.2, None, False)]
)
def test_p1_wants_nearness_to_the_copy_and_distance_to_the_peers(ours: float, peer: float | None, met: bool) -> None:
    case = TargetsCase(target="P1", condition=P1)
    m = measurement(case, ours, rival(COPY, 1.0, role="bound"), rival("projection tf32", peer))
    assert m.met is met


def test_p1_is_not_met_without_the_copy() -> None:
    assert measurement(TargetsCase(condition=P1), 1.0, rival("projection tf32", 10.0)).met is False


@pytest.mark.parametrize(("ours", "met"), [(1.6, True), (1.61, False)])
def test_p2_wants_nearness_to_the_floor(ours: float, met: bool) -> None:
    assert measurement(TargetsCase(condition=P2), ours, floor=1.0).met is met


@pytest.mark.parametrize(("ours", "met"), [(24.9e-6, True), (25.1e-6, False)])
def test_absolute_times(ours: float, met: bool) -> None:
    assert measurement(DoubleCase(condition=within_microseconds(25)), ours).met is met


def test_case_without_a_target_is_neither_met_nor_not() -> None:
    assert measurement(DoubleCase(), 1.0).met is None


def test_cases_are_chosen_by_name_or_target() -> None:
    assert select(CASES, ()) == list(CASES)
    assert {case.target for case in select(CASES, ("p1", "P4"))} == {"P1", "P4"}
    assert all("dct2" in case.name for case in select(CASES, ("DCT2",)))
    with pytest.raises(ValueError, match="got 'nothing'"):
        select(CASES, ("P1", "nothing"))


def test_names_differ_also_in_small_sizes_and_small_cases_have_no_target() -> None:
    for cases in (list(CASES), [case.small() for case in CASES]):
        assert len({case.name for case in cases}) == len(cases)
    assert {case.target for case in CASES} == {"P1", "P2", "P3", "P4", "P5", None}
    assert all(case.small().target is None and case.small().condition is None for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_is_right_and_so_are_its_eager_peers(case: Case) -> None:
    small = case.small()
    work = small.workload(CPU)
    assert work.error(work.ours(*work.inputs)) <= small.budget
    for peer in small.peers(CPU):
        if peer.role != "bound" and not peer.compiled:
            call = peer.setup()
            if callable(call):
                limit = 0.02 if peer.role == "reduced" or "bf16" in peer.name else small.peer_budget
                assert work.error(call(*work.inputs)) <= limit, peer.name
