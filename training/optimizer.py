"""AdamW with the two recipes' parameter groups, learning-rate schedules, and an average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectralar.training.distributed import is_sharded, local


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule. The defaults are TiTok's stage one, which the paper follows for the tokenizer.

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        weight_decay: decoupled weight decay of matrices (biases, norms, positions and codes have none).
        warmup: steps of linear warm-up from 0.
        schedule: after the warm-up `cosine` or `linear` decay to `final`, or `constant`.
        hold: share of the steps after the warm-up that stay at the peak before the decay (VAR's "lin0": 0.05).
        final: learning rate of the last step, as a share of the peak.
        clip: largest global gradient norm.
        ema: decay of the averaged weights; the decay of step s is min(ema, (1 + s) / (10 + s)); 0 keeps no average.
        accumulation: batches per optimizer step.
        code_rate: learning rate of a tokenizer's codes, as a multiple of that of all else.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    warmup: int = 10_000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    hold: float = 0.0
    final: float = 0.1
    clip: float = 1.0
    ema: float = 0.999
    accumulation: int = 1
    code_rate: float = 1.0

    def __post_init__(self) -> None:
        for name, good in {
            "lr must be positive": self.lr > 0,
            "weight_decay must not be negative": self.weight_decay >= 0,
            "warmup must not be negative": self.warmup >= 0,
            "schedule must be cosine, linear or constant": self.schedule in ("cosine", "linear", "constant"),
            "hold must be in [0, 1)": 0 <= self.hold < 1,
            "final must be in [0, 1]": 0 <= self.final <= 1,
            "clip must be positive": self.clip > 0,
            "ema must be in [0, 1)": 0 <= self.ema < 1,
            "accumulation must be at least 1": self.accumulation >= 1,
            "code_rate must be positive": self.code_rate > 0,
        }.items():
            if not good:
                raise ValueError(f"{name}, not {getattr(self, name.split()[0])}")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        done = (step - self.warmup) / max(1, steps - 1 - self.warmup)
        done = min(1.0, max(0.0, (done - self.hold) / (1 - self.hold)))
        left = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.lr * (self.final + (1 - self.final) * left)


def build_optimizer(model: nn.Module, config: OptimizerConfig, undecayed: Iterable[str]) -> torch.optim.AdamW:
    """AdamW in two groups: matrices decay; vectors and parameters whose name contains an entry of `undecayed` do not.

    Where `code_rate` is not 1, the codebook is a third group, which does not decay, with a "rate" for `set_lr`.

    On a GPU the optimizer is fused, and its learning rate is a tensor, so that a captured step can follow a schedule;
    steps on sharded parameters are not captured, and fused AdamW takes no plain tensor beside them.
    """
    parts = tuple(undecayed)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed: dict[str, Any] = {"params": [], "weight_decay": config.weight_decay}
    plain: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    codes: dict[str, Any] = {"params": [], "weight_decay": 0.0, "rate": config.code_rate}
    for name, p in trained:
        if "codebook" in name and config.code_rate != 1:
            codes["params"].append(p)
        elif p.dim() < 2 or any(part in name for part in parts):
            plain["params"].append(p)
        else:
            decayed["params"].append(p)
    groups = [decayed, plain, codes] if codes["params"] else [decayed, plain]
    if any(is_sharded(p) for _, p in trained):
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=trained[0][1].is_cuda)
    elif all(p.is_cuda for _, p in trained):
        for group in groups:
            group["lr"] = torch.tensor(config.lr, device=trained[0][1].device)
        optimizer = torch.optim.AdamW(groups, betas=config.betas, fused=True, capturable=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
    set_lr(optimizer, config.lr)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, times its "rate" where it has one, in place where it is a tensor."""
    for group in optimizer.param_groups:
        own = lr * group.get("rate", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


class AveragedModel:
    """A copy of a model whose weights follow the trained ones by an exponential moving average (TiTok's warm start)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def rate_at(self, step: int) -> float:
        """How far the average moves after optimizer step `step` (from 0): 1 - min(decay, (1 + step) / (10 + step))."""
        return 1 - min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, rate: Tensor) -> None:
        """Moves the average towards `model`; `rate` is a scalar on the model's device."""
        averages = [local(p) for p in self.model.parameters()]
        current = [local(p) for p in model.parameters()]
        moves = torch._foreach_sub(current, averages)
        torch._foreach_mul_(moves, rate)
        torch._foreach_add_(averages, moves)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
