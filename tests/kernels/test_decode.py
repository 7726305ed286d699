"""The plain decoding step, whose operations are the twins of the kernels', against the generator's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from spectralar.config import GeneratorConfig, TokenInput
from spectralar.generator import SpectralGenerator
from spectralar.kernels.decode import DecodeState, batch_kernel, decode_step, implementation, launch, reference
from spectralar.kernels.decode.config import MAX_ROWS
from spectralar.sampling.packing import begin, class_tables, pack

# On a GPU that is no Hopper; test_decode_ring.py has those.
FP8 = SimpleNamespace(is_cuda=True, dtype=torch.float8_e4m3fn, device=torch.device("cpu"))
SCALE = torch.ones(1, 3)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("token_input", ["table", "code"])
def test_logits_of_the_generator(group: int, token_input: TokenInput) -> None:
    config = GeneratorConfig(depth=2, tokens=6, codebook_size=30, classes=5, group=group, token_input=token_input)
    generator = SpectralGenerator(config, torch.randn(30, config.code_dim)).double()
    with torch.no_grad():
        for parameter in generator.parameters():  # as initialised, the head and the gates hide much
            parameter.add_(torch.randn_like(parameter) * 0.1)
    classes, tokens = torch.tensor([3, 0, 5, 5]), torch.randint(0, 30, (2, 6))
    weights = pack(generator)
    state = DecodeState.allocate(weights, images=2, rows=4)
    begin(class_tables(generator), state, classes)
    theirs = generator.start(classes)
    for first in range(0, 6, group):
        previous = tokens[:, first - group : first].repeat(2, 1) if first else None
        expected = generator.step(theirs, previous)
        decode_step(weights, state)
        assert (state.logits - expected).abs().max() < 1e-10
        state.tokens[:, first : first + group] = tokens[:, first : first + group]
        state.first.add_(group)


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, 1, "persistent"),
        ({}, MAX_ROWS, "persistent"),
        ({"group": 4}, MAX_ROWS // 4, "persistent"),
        ({"group": 4}, MAX_ROWS // 4 + 1, "batch"),
        ({}, MAX_ROWS + 1, "batch"),
        ({"heads": 15, "width": 15 * 96}, 2, "batch"),
        ({"qkv": FP8, "qkv_scale": SCALE}, 2, "batch"),
        ({"qkv_scale": SCALE}, 2, "batch"),
        ({"dtype": torch.float64}, 2, "reference"),
        ({"qkv": FP8, "qkv_scale": SCALE, "dtype": torch.float64}, 2, "reference"),
        ({"qkv": SimpleNamespace(is_cuda=False, dtype=torch.bfloat16)}, 2, "reference"),
    ],
)
def test_which_implementation(changes: dict[str, Any], rows: int, expected: str) -> None:
    gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    sizes = {"width": 1024, "heads": 16, "group": 1}
    weights: Any = SimpleNamespace(**{"qkv": gpu, "qkv_scale": None, "dtype": gpu.dtype, **sizes} | changes)
    assert implementation(weights, rows) == expected
    state: Any = SimpleNamespace(x=torch.empty(rows, 1, 1))
    with (
        mock.patch.object(launch, "launch") as persistent,
        mock.patch.object(batch_kernel, "launch_step") as batch,
        mock.patch.object(reference, "decode_step") as plain,
    ):
        decode_step(weights, state, until=(0, "proj"))
    called = {"persistent": persistent, "batch": batch, "reference": plain}
    assert {name for name, each in called.items() if each.called} == {expected}
    called[expected].assert_called_once_with(weights, state, (0, "proj"))
