"""Costs, judges and peers of the quantizer's cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectralar.bench.kernels_vq import NearestCase, QuantizeCase, excess_distance, quantize_step, step_error
from spectralar.bench.peers import vq as peers
from spectralar.kernels.vq import nearest_code, vector_quantize


def test_costs_are_those_computed_by_hand() -> None:
    case = NearestCase(tokens=16384, width=12, codes=4096)
    assert case.flops() == QuantizeCase().flops() == 1_610_612_736
    assert case.bytes() == 4 * 12 * (16384 + 4096) + 8 * 16384 == 1_114_112
    assert NearestCase(dtype=torch.bfloat16).bytes() == 2 * 12 * (16384 + 4096) + 8 * 16384
    rows, book, indices = 4 * 12 * 16384, 4 * 12 * 4096, 8 * 16384
    assert QuantizeCase().bytes() == 5 * rows + 3 * book + 2 * indices


@pytest.fixture
def z() -> Tensor:
    return torch.randn(50, 6)


@pytest.fixture
def codebook() -> Tensor:
    return torch.randn(20, 6)


@pytest.mark.parametrize("normalize", [True, False])
def test_judge_sees_one_wrong_code(z: Tensor, codebook: Tensor, normalize: bool) -> None:
    judge = excess_distance(z, codebook, normalize=normalize)
    right = nearest_code(z, codebook, normalize=normalize)
    assert judge(right) == 0 and judge(right.int()) == 0
    wrong = right.clone()
    wrong[17] = (wrong[17] + 1) % 20
    vectors, codes = (
        torch.nn.functional.normalize(x.double(), dim=-1) if normalize else x.double() for x in (z, codebook)
    )
    distances = (vectors[17] - codes).square().sum(-1)
    assert judge(wrong) == pytest.approx((distances[wrong[17]] / distances[right[17]] - 1).item())


def test_judge_lets_ties_be(z: Tensor, codebook: Tensor) -> None:
    doubled = torch.cat([codebook, codebook])
    right = nearest_code(z, doubled)
    assert (right < 20).all() and excess_distance(z, doubled, normalize=True)(right + 20) == 0


def test_judge_refuses_what_are_no_codes(z: Tensor, codebook: Tensor) -> None:
    judge = excess_distance(z, codebook, normalize=True)
    right = nearest_code(z, codebook)
    for bad in (right + 20, right - 20, right[1:], right.float(), None):
        assert judge(bad) == math.inf


@pytest.mark.parametrize("normalize", [True, False])
def test_judge_of_the_step_sees_every_output(z: Tensor, codebook: Tensor, normalize: bool) -> None:
    a, b = z.clone().requires_grad_(), codebook.clone().requires_grad_()
    right = quantize_step(vector_quantize, normalize)(a, b)
    assert step_error(right, z, codebook, normalize=normalize) < 1e-6
    for i in range(1, 5):
        wrong = [x.clone() for x in right]
        wrong[i].view(-1)[-1] += 0.1 * wrong[i].abs().max()
        assert step_error(tuple(wrong), z, codebook, normalize=normalize) == pytest.approx(0.1, rel=0.5)
        wrong[i].view(-1)[-1] = math.nan
        assert math.isnan(step_error(tuple(wrong), z, codebook, normalize=normalize))
    assert step_error((right[0] + 20, *right[1:]), z, codebook, normalize=normalize) == math.inf


@pytest.mark.parametrize("normalize", [True, False])
def test_peers_find_the_nearest_code(z: Tensor, codebook: Tensor, normalize: bool) -> None:
    judge = excess_distance(z, codebook, normalize=normalize)
    assert judge(peers.setup_cdist(normalize)(z, codebook)) < 1e-4
    assert judge(peers.setup_matmul(normalize)(z, codebook)) < 1e-4
    step = peers.setup_straight_through(normalize, 0.25)
    assert (
        step_error(
            step(z.requires_grad_(), codebook.requires_grad_()), z.detach(), codebook.detach(), normalize=normalize
        )
        < 1e-4
    )
