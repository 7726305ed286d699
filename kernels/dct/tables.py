"""Tables of projections that a DCT kernel reads, made once for a size, a dtype and a device, in fp64, and kept."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import reference


@lru_cache(maxsize=16)
def projections(n: int, first: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`P_w = A_w^T A_w` for w = first, ..., n: `[n - first + 1, n, n]`; 25 MB for n = 256 and first = 64 in fp16."""
    with torch.inference_mode(False), torch.no_grad():
        matrix = reference.cached_matrix(n, torch.float64, device)
        projection = matrix[:first].T @ matrix[:first]
        table = torch.empty(n - first + 1, n, n, dtype=dtype, device=device)
        table[0] = projection
        for w in range(first, n):
            projection += torch.outer(matrix[w], matrix[w])
            table[w - first + 1] = projection
        return table
