"""Whether training steps are right: judged by the same model in plain PyTorch, in fp32, from the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectralar.bench.peers.training import PlainStep

Step = Callable[[list[Tensor]], dict[str, Tensor]]
Gradients = Callable[[], Mapping[str, Tensor]]
T = TypeVar("T")

_STEPS = 3
_SEED = 2

# Rounding explains as much as this even where plain bf16 PyTorch happens to be closer.
_GRADIENT, _LOSS = 0.01, 0.0025


@dataclass(frozen=True)
class Verdict:
    """How far the first steps lie from those in fp32.

    Attributes:
        gradient: of the first step: length of the difference over length, root of the mean square over parameters.
        plain_gradient: the same of plain PyTorch under bf16 autocast.
        loss: largest relative difference of a loss.
        plain_loss: the same of plain PyTorch under bf16 autocast.
        first_call: seconds of the first step, with what is compiled.
    """

    gradient: float
    plain_gradient: float
    loss: float
    plain_loss: float
    first_call: float

    @property
    def error(self) -> float:
        """The larger of the two, each as a multiple of what rounding explains."""
        return max(self.gradient / max(self.plain_gradient, _GRADIENT), self.loss / max(self.plain_loss, _LOSS))


class Judge:
    """Judges steps by the losses of the first three and by the gradient of the first.

    Random choices are the same for all, since all start from the same seed and draw in the same order. The plain models
    compute their blocks twice here, as fp32 would not fit into memory otherwise.

    Args:
        plain: makes plain PyTorch's step; takes `half` and `recomputed`.
        inputs: of every step.
    """

    def __init__(self, plain: Callable[..., PlainStep], inputs: list[Tensor]) -> None:
        self._inputs = inputs
        step = plain(half=False, recomputed=True)
        self._losses, _, self._gradients = _observe(step, step.gradients, inputs, _on_host)
        del step  # before the next is built
        step = plain(half=True, recomputed=True)
        losses, _, self._plain_gradient = _observe(step, step.gradients, inputs, self._apart)
        self._plain_loss = self._loss_apart(losses)

    def __call__(self, step: Step, gradients: Gradients) -> Verdict:
        """Runs the first three steps of a fresh model.

        Args:
            step: one step; gives scalars with `loss` among them.
            gradients: clipped gradients of the last step by the names of our model's parameters.
        """
        losses, first_call, gradient = _observe(step, gradients, self._inputs, self._apart)
        return Verdict(gradient, self._plain_gradient, self._loss_apart(losses), self._plain_loss, first_call)

    def _apart(self, gradients: Mapping[str, Tensor]) -> float:
        if gradients.keys() != self._gradients.keys():
            different = sorted(gradients.keys() ^ self._gradients.keys())
            raise RuntimeError(f"gradients of other parameters: {', '.join(different[:4])}")
        errors = []
        for name, truth in self._gradients.items():
            right = truth.to(gradients[name].device)
            # A parameter that nothing reaches has no gradient, and none to be wrong about.
            errors.append(((gradients[name] - right).norm() / right.norm().clamp_min(1e-12)).double())
        return float(torch.stack(errors).square().mean().sqrt())

    def _loss_apart(self, losses: list[float]) -> float:
        return max(abs(loss - truth) / abs(truth) for loss, truth in zip(losses, self._losses, strict=True))


def gradients_of(model: nn.Module) -> Gradients:
    """The gradients that a model holds, by parameter."""
    return lambda: {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def first_losses(step: Step, inputs: list[Tensor]) -> list[float]:
    """Losses of the first steps from the seed that all share."""
    torch.manual_seed(_SEED)
    return torch.stack([step(inputs)["loss"].clone() for _ in range(_STEPS)]).tolist()


def _observe(
    step: Step, gradients: Gradients, inputs: list[Tensor], look: Callable[[Mapping[str, Tensor]], T]
) -> tuple[list[float], float, T]:
    """Losses, seconds of the first step, and what `look` makes of its gradients."""
    torch.manual_seed(_SEED)
    began = time.perf_counter()
    losses = [step(inputs)["loss"].item()]
    first_call = time.perf_counter() - began
    seen = look(gradients())
    losses += [step(inputs)["loss"].item() for _ in range(_STEPS - 1)]
    return losses, first_call, seen


def _on_host(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Beside the models to be judged the device has no room for it.
    return {name: gradient.cpu() for name, gradient in gradients.items()}
