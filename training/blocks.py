"""What training does to the blocks of a model: compiles them, with the ends of their stacks, and computes them twice to
save memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectralar.generator.model import Block as GeneratorBlock
from spectralar.tokenizer.vit import Block as TokenizerBlock
from spectralar.tokenizer.vit import SpectralViT

Forward = Callable[..., Tensor]


def prepare_blocks(model: nn.Module, *, compiled: bool, checkpointing: bool) -> None:
    """Changes how the transformer blocks of a tokenizer or generator run in training mode; weights keep their names.

    With the tokenizer's blocks go the ends of their stacks, where rows are put together and normalised.

    Before the model is divided over ranks (`parallelize`), so that what puts weights together stays outside of what is
    compiled or computed again. In evaluation mode everything runs as it is: validation and pictures come in other
    sizes, and each would be compiled anew.

    Args:
        model: changed in place.
        compiled: under torch.compile, for static shapes; parts of one kind share their code.
        checkpointing: keep a block's input only, and compute the block once more in the backward pass (Chen et al.,
            "Training deep nets with sublinear memory cost", 2016).
    """
    if not (compiled or checkpointing):
        return
    for part in model.modules():
        if isinstance(part, TokenizerBlock | GeneratorBlock):
            run: Forward = type(part).forward
            if compiled:
                run = _compiled(run)
            if checkpointing:
                run = functools.partial(_recomputed, run)
            _in_training(part, "forward", run)
        elif compiled and isinstance(part, SpectralViT):
            _in_training(part, "enter", _compiled(type(part).enter))
            _in_training(part, "leave", _compiled(type(part).leave))


def _in_training(part: nn.Module, method: str, run: Forward) -> None:
    """In training mode `part.method` runs `run` from now on."""
    # A partial object and no closure, so that a copy of the model runs the copy's parts.
    setattr(part, method, functools.partial(_run, run, getattr(type(part), method), part))


def _run(training: Forward, evaluation: Forward, part: nn.Module, *inputs: Any) -> Tensor:
    return training(part, *inputs) if part.training else evaluation(part, *inputs)


def _recomputed(run: Forward, *inputs: Any) -> Tensor:
    # No block draws random numbers, and to keep their state would wait for the device.
    output: Tensor = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    return output


@functools.cache
def _compiled(forward: Forward) -> Forward:
    # Inside of a replica (DDP) the compiler would cut a block where a bucket of gradients ends; its blocks are
    # small enough for their gradients to leave one by one.
    torch._dynamo.config.optimize_ddp = False
    # Every shape of every model that the process trains is one more code of the same function.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled: Forward = torch.compile(forward, fullgraph=True, dynamic=False)
    return compiled
