"""Rates of the device, and the floor that they set."""

from __future__ import annotations

import pytest
import torch

from spectralar.bench import ceilings
from spectralar.bench.ceilings import Ceilings, measure_ceilings, tf32


def test_floor_is_set_by_the_scarcer_resource() -> None:
    rates = Ceilings(copy=100.0, read=120.0, gemm={"fp16": 1000.0, "tf32": 500.0})
    assert rates.floor(200, 1000, "fp16") == (2.0, "copy")
    assert rates.floor(200, 4000, "fp16") == (4.0, "fp16 GEMM")
    assert rates.floor(200, 4000, "tf32") == (8.0, "tf32 GEMM")


def test_rates_of_a_cpu_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_CPU_SIDE", 128)
    rates = measure_ceilings(torch.device("cpu"), 0.05)
    assert rates.gemm.keys() == {"bf16", "fp16", "tf32"}
    assert 1e8 < rates.copy < 1e13 and 1e8 < rates.read < 1e13
    assert all(1e6 < rate < 1e14 for rate in rates.gemm.values())


@pytest.mark.parametrize("before", [True, False])
def test_tf32_is_put_back_even_after_an_error(before: bool) -> None:
    with tf32(before):
        with pytest.raises(KeyError), tf32(not before):
            assert torch.backends.cuda.matmul.allow_tf32 is not before
            raise KeyError
        assert torch.backends.cuda.matmul.allow_tf32 is before
    assert torch.backends.cuda.matmul.allow_tf32 is False
