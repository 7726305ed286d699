"""The least memory of training, counted by hand and against what PyTorch allocates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from spectralar.training.memory import check_memory, state_bytes
from tests.training.harness import Bench


def test_state_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3, affine=False))
    model[1].requires_grad_(False)
    trained, frozen, buffers = 55, 15, 4 * 3 + 4 * 3 + 8
    assert state_bytes(model, averaged=True) == 20 * trained + 8 * frozen + 2 * buffers
    assert state_bytes(model, averaged=False) == 16 * trained + 4 * frozen + buffers
    one = 4 * (trained + frozen) + buffers
    divided = (20 * trained + 8 * frozen) // 4 + 2 * buffers
    assert state_bytes(model, averaged=True, ranks_per_copy=4) == divided + one > 2 * one, "when it is validated"
    assert state_bytes(model, averaged=True, ranks_per_copy=400) == 2 * one, "before it is divided"


def test_state_bytes_are_what_a_trainer_holds(bench: Bench, tmp_path: Path) -> None:
    trainer = bench.trainer("generator", tmp_path, steps=1)
    trainer.run()
    assert trainer.average is not None
    held = [*trainer.model.parameters(), *(p.grad for p in trainer.model.parameters())]
    held += [*trainer.average.model.parameters()]
    held += [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim() > 0]
    assert state_bytes(trainer.model, averaged=True) == sum(t.numel() * t.element_size() for t in held if t is not None)


def test_a_gpu_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3_000_000_000, 8_000_000_000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tiny")
    gpu = torch.device("cuda")
    check_memory(3_000_000_000, gpu)
    with pytest.raises(ValueError, match=r"at least 3\.1 GB .* 3\.0 GB of 8\.0 GB are free on Tiny\. .*ranks_per_copy"):
        check_memory(3_100_000_000, gpu)
    check_memory(2**60, torch.device("cpu"))


def test_running_out_of_memory_says_what_helps(bench: Bench, tmp_path: Path) -> None:
    def full(_: int, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("Tried to allocate 3 PB")

    trainer = bench.trainer("generator", tmp_path, hook=full)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"Set loop\.checkpointing, or lower the batch and raise optimizer\.accumulation.*3 PB",
    ):
        trainer.run()
