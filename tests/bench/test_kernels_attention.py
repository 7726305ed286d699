"""Costs, judge and peers of the attention cases."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from spectralar.bench.cases import Missing
from spectralar.bench.kernels_attention import CASES, AttentionCase
from spectralar.bench.timing import run_once
from spectralar.kernels.attention import reference

CPU = torch.device("cpu")
MASKS = [("figure", "encoder"), ("strict", "encoder"), ("strict", "decoder"), ("none", "encoder")]


@pytest.mark.parametrize("mask, role", MASKS)
def test_pairs_are_those_of_the_mask(mask: str, role: str) -> None:
    case = replace(AttentionCase().small(), mask=mask, role=role)
    dense = reference.spectral_mask(case.length, case.image, None, mask, role, CPU)
    assert case.pairs() == int(dense.sum())


def test_costs_are_those_computed_by_hand() -> None:
    case = AttentionCase()
    assert case.flops() == 4 * 64 * 101_025 * 12 * 256
    assert case.bytes() == 4 * 256 * 321 * 768 * 2
    step = replace(case, backward=True)
    assert (step.flops() * 2, step.bytes()) == (case.flops() * 7, case.bytes() * 3)


@pytest.mark.parametrize("case", [case.small() for case in CASES], ids=lambda case: case.name)
def test_our_result_and_those_of_the_peers_are_right(case: AttentionCase) -> None:
    work = case.workload(CPU)
    assert work.error(run_once(work.ours, work.inputs, CPU)[0]) <= case.budget
    for peer in case.peers(CPU):
        call = peer.setup()
        if isinstance(call, Missing):
            continue
        result = run_once(call, work.inputs, CPU)[0]
        assert peer.role == "bound" or work.error(result) <= case.peer_budget, peer.name


def test_judge_sees_every_result() -> None:
    case = AttentionCase(backward=True, prefixes=True).small()
    work = case.workload(CPU)
    right = work.ours(*work.inputs)
    assert isinstance(right, tuple)
    for i in range(4):
        wrong = [x.clone() for x in right]
        wrong[i][1, 3, 1, 5] += 0.5 * wrong[i].abs().max()
        assert work.error(tuple(wrong)) == pytest.approx(0.5, rel=0.1)
        wrong[i][1, 3, 1, 5] = math.nan
        assert not work.error(tuple(wrong)) <= case.budget
    assert work.error(right[0]) == work.error(tuple(x[1:] for x in right)) == math.inf
