"""Where the time of the fused step goes, by operation."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from spectralar.bench.ceilings import Ceilings
from spectralar.bench.split import Part
from spectralar.bench.timing import prepare, take_turns
from spectralar.kernels.decode import DecodeState, DecodeWeights, decode_step
from spectralar.kernels.decode.reference import OPS
from spectralar.sampling.packing import begin, class_tables, pack

if TYPE_CHECKING:
    from spectralar.bench.sampler import SamplingCase

_SECONDS = 0.3


def split_by_operation(case: SamplingCase, ceilings: Ceilings, device: torch.device) -> tuple[Part, ...]:
    """The operations of one decoding step in the middle of a generation, by stopping after each of them.

    An operation's time is what it adds to a step that stops before it, measured in one block and taken for all.
    """
    config = case.generator_config
    with torch.inference_mode():
        weights, state = _middle_step(case, device)
        middle, last = config.depth // 2, config.depth - 1
        stops = [(middle - 1, OPS[-1]), *((middle, op) for op in OPS), (last, OPS[-1]), None]
        variants = {
            str(stop): prepare(lambda s=stop: decode_step(weights, state, until=s), [()], device) for stop in stops
        }
        times = take_turns(variants, _SECONDS * len(stops))
    at = [times[str(stop)].median for stop in stops]
    spent = [later - earlier for earlier, later in itertools.pairwise(at)]
    element = weights.qkv.element_size()

    def floor(*held: torch.Tensor) -> float:
        return sum(tensor.numel() for tensor in held) * element / ceilings.copy

    floors = {
        "qkv": floor(weights.qkv),
        "proj": floor(weights.proj),
        "fc1": floor(weights.fc1),
        "fc2": floor(weights.fc2),
    }
    blocks = [Part(op, config.depth, config.depth * t, floors.get(op)) for op, t in zip(OPS, spent, strict=False)]
    # What the step has before its blocks is what all of them do not explain.
    embed = Part("embed, start", 1, at[-2] - sum(part.seconds for part in blocks))
    return (embed, *blocks, Part("head", 1, spent[-1], floor(weights.head)))


@torch.inference_mode()
def compile_until(case: SamplingCase, device: torch.device, op: str) -> None:
    """Has the kernels compiled that `split_by_operation` needs to stop after an operation."""
    weights, state = _middle_step(case, device)
    decode_step(weights, state, until=(weights.depth // 2, op))


def _middle_step(case: SamplingCase, device: torch.device) -> tuple[DecodeWeights, DecodeState]:
    """What a step in the middle of a generation reads."""
    generator = case.sampler(device, case.backend).generator
    weights = pack(generator)
    state = DecodeState.allocate(weights, case.batch, 2 * case.batch)
    state.tokens.zero_()
    for held in (state.keys, state.values):
        held.normal_()
    begin(class_tables(generator), state, torch.tensor(2 * case.inputs[0], device=device))
    state.first.fill_(case.generator_config.tokens // 2)
    return weights, state
