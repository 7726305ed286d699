"""The launches of the sampling head that tests/kernels/compiling.py compiles: every table entry, all filters."""

from __future__ import annotations

import torch

from spectralar.kernels.draw import kernel
from spectralar.kernels.draw.config import CHUNKED, DRAW

ROWS = 2


def sample_launches(capability: int = 90) -> None:
    """Launches what runs on a GPU of that compute capability: the same on all."""
    seeds = torch.zeros(ROWS, dtype=torch.int64)

    def launch(
        codes: int,
        top_k: int = 0,
        top_p: float = 0.0,
        dtype: torch.dtype = torch.float32,
        temperature: float = 1.0,
        greedy: bool = False,
    ) -> None:
        logits = torch.zeros(2 * ROWS, codes, dtype=dtype)
        kernel.launch(logits[:ROWS], logits[ROWS:], seeds, 3, 2.0, temperature, top_k, top_p, greedy)

    for codes in (*DRAW, 8 * CHUNKED.block):
        launch(codes, 10, 0.5)
    for top_k, top_p in ((10, 0.0), (0, 0.5)):
        launch(4096, top_k, top_p)
    launch(4096, 10, 0.5, torch.bfloat16)
    launch(4096, 10, 0.5, temperature=0.9)
    launch(4096, greedy=True)
    position = torch.zeros((), dtype=torch.int64)
    kernel.launch(torch.zeros(ROWS, 4096), None, seeds, position, 1.0, 1.0, 0, 0.0, False)

    for rows, dtype in ((2 * ROWS, torch.float32), (ROWS, torch.float32), (2 * ROWS, torch.float64)):
        tokens, scales = torch.zeros(ROWS, 8, dtype=torch.int64), torch.ones(4, dtype=dtype)
        kernel.launch_group(
            tokens, torch.zeros(rows, 2, 4096), seeds, position, scales, position, 1.0, 10, 0.5, False
        )  # fmt: skip
