"""From decoder features to pixels. A head maps features `[B, G, G, W]` to images `[B, 3, S, S]`.

The direct head is here. A head over proxy codes with a convolutional pixel decoder fits the same place: it is chosen
by `TokenizerConfig.pixel_head` in `build_pixel_head`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.config import TokenizerConfig


class DirectPixelHead(nn.Module):
    """A linear map from each feature to its patch, then a 3x3 convolution over the picture (single-stage TiTok).

    The convolution starts as the identity, so that the first pictures are the linear map's. Computed in fp32 (fp64
    for fp64) also under autocast and with bf16 weights: bf16 pixels would be a whole 8-bit step wrong near white.
    """

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.to_patch = nn.Linear(width, 3 * patch_size**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)

    def start(self) -> None:
        """Makes the convolution the identity."""
        nn.init.dirac_(self.smooth.weight)

    def forward(self, features: Tensor) -> Tensor:  # [B, G, G, W]
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(features.dtype, torch.float32)
            patches = F.linear(features.to(dtype), *_parameters(self.to_patch, dtype))  # [B, G, G, p * p * 3]
            batch, grid = patches.shape[:2]
            p = self.patch_size
            pixels = patches.view(batch, grid, grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
            return F.conv2d(pixels.reshape(batch, 3, grid * p, grid * p), *_parameters(self.smooth, dtype), padding=1)


def _parameters(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight.to(dtype), layer.bias.to(dtype)


def build_pixel_head(config: TokenizerConfig) -> DirectPixelHead:
    """The head that `config.pixel_head` names."""
    return DirectPixelHead(config.decoder.width, config.patch_size)
