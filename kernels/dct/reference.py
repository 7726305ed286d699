"""Plain PyTorch definition of the whole-image cosine transform and of SpectralAR's sub-images.

No argument is checked here; the public functions in `__init__.py` do that. Arithmetic is fp32, or fp64 for fp64
input, whatever autocast says, and the result is rounded once to the output dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def cached_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    # An inference tensor could not be saved for a later backward pass, and this one outlives the first caller.
    with torch.inference_mode(False):
        index = torch.arange(n, dtype=torch.int64, device="cpu")
        # The cosine has period 4n in this integer phase; reducing it before the division keeps all fp64 digits.
        phase = torch.outer(index, 2 * index + 1) % (4 * n)
        matrix = torch.cos(phase.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
        matrix[0] = math.sqrt(1 / n)
        return matrix.to(device=device, dtype=dtype)


def dct_matrix(n: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    place = torch.get_default_device() if device is None else torch.device(device)
    return cached_matrix(n, dtype, place).clone()


def dct2(images: Tensor) -> Tensor:
    # [..., H, W]
    with _full_precision(images):
        return _forward(_upcast(images)).to(images.dtype)


def idct2(coefficients: Tensor) -> Tensor:
    # [..., H, W]
    with _full_precision(coefficients):
        return _inverse(_upcast(coefficients)).to(coefficients.dtype)


def spectral_targets(
    images: Tensor, cutoffs: int | Sequence[int] | Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    # [B, C, H, W]
    height, width = images.shape[-2:]
    limit = cutoffs if isinstance(cutoffs, int) else torch.as_tensor(cutoffs, device=images.device).view(-1, 1, 1, 1)
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    kept = torch.maximum(rows, columns) < limit  # [H, W] or [B, 1, H, W]
    with _full_precision(images):
        pixels = _pixels(images)
        filtered = _inverse(torch.where(kept, _forward(pixels), 0.0))
        # The last coefficient is kept exactly when all are: then the sub-image is the image, with no rounding.
        whole = kept[..., -1:, -1:]
        return torch.where(whole, pixels, filtered).to(out_dtype or _output_dtype(images))


def spectral_mse(
    prediction: Tensor, images: Tensor, cutoffs: int | Sequence[int] | Tensor, *, weights: Tensor | None = None
) -> Tensor:
    # [B, C, H, W] twice -> []
    targets = spectral_targets(images, cutoffs, out_dtype=work_dtype(prediction, images))
    difference = prediction.to(targets.dtype) - targets
    weighted = difference if weights is None else weigh_frequencies(difference, weights)
    return mse_and_gradient(difference, weighted, prediction.dtype)[0]


def weigh_frequencies(x: Tensor, weights: Tensor) -> Tensor:
    # [..., H, W], [H, W]: the coefficients times the weights, as pixels again
    with _full_precision(x):
        return _inverse(weights.to(x.dtype) * _forward(x))


def mse_and_gradient(difference: Tensor, weighted: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # [B, C, H, W] twice -> [], [B, C, H, W]; the mean over nothing is zero
    count = max(1, difference.numel())
    return (difference * weighted).sum() / count, (weighted * (2 / count)).to(dtype)


def spectral_pyramid(images: Tensor, cutoffs: Sequence[int]) -> Tensor:
    # [B, C, H, W] -> [B, N, C, H, W]
    height, width = images.shape[-2:]
    with _full_precision(images):
        pixels = _pixels(images)
        coefficients = _forward(pixels)
        vertical, horizontal = _matrices(pixels)
        levels = [
            pixels if w >= max(height, width) else vertical[:w].mT @ coefficients[..., :w, :w] @ horizontal[:w]
            for w in cutoffs
        ]
        return torch.stack([level.to(_output_dtype(images)) for level in levels], dim=1)


def _full_precision(x: Tensor) -> torch.autocast:
    return torch.autocast(device_type=x.device.type, enabled=False)


def work_dtype(*inputs: Tensor) -> torch.dtype:
    """fp64 where an input is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pixels(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else _upcast(images)


def _output_dtype(images: Tensor) -> torch.dtype:
    return torch.float32 if images.dtype == torch.uint8 else images.dtype


def _matrices(x: Tensor) -> tuple[Tensor, Tensor]:
    height, width = x.shape[-2:]
    return cached_matrix(height, x.dtype, x.device), cached_matrix(width, x.dtype, x.device)


def _forward(pixels: Tensor) -> Tensor:
    vertical, horizontal = _matrices(pixels)
    return vertical @ pixels @ horizontal.mT


def _inverse(coefficients: Tensor) -> Tensor:
    vertical, horizontal = _matrices(coefficients)
    return vertical.mT @ coefficients @ horizontal
