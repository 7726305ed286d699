"""From decoder features to pixels. A head maps features `[B, G, G, W]` to images `[B, 3, S, S]`, about [0, 1]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.config import TokenizerConfig, VQGANConfig
from spectralar.pixels import VQGANDecoder


class DirectPixelHead(nn.Module):
    """A linear map from each feature to its patch, then a 3x3 convolution over the picture (single-stage TiTok).

    The convolution starts as the identity, so that the first pictures are the linear map's. Computed in fp32 (fp64
    for fp64) also under autocast and with bf16 weights: bf16 pixels would be a whole 8-bit step wrong near white.

    Libraries have no fast convolution of three channels, and a batch has far more pixels than weights. So the linear
    map is convolved instead of the picture: it then gives patches with a margin of one pixel, (1 + 2 / p)^2 times as
    large, and where these overlap they are added up.
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
            (weight, bias), (kernel, offset) = (_parameters(layer, dtype) for layer in (self.to_patch, self.smooth))
            p = self.patch_size
            # The layers work on [-1, 1], hence the halves.
            maps = torch.cat([weight, bias[:, None]], dim=1).view(p, p, 3, -1).permute(3, 2, 0, 1)  # [W + 1, 3, p, p]
            maps = F.conv2d(maps, kernel / 2, padding=2).flatten(1)  # [W + 1, 3 * (p + 2) ** 2]
            patches = F.linear(features.to(dtype), maps[:-1].T, maps[-1])  # [B, G, G, 3 * (p + 2) ** 2]
            pixels: Tensor = _Overlap.apply(patches, p)  # [B, 3, S, S]
            return pixels + (offset / 2 + 0.5)[:, None, None]


def _parameters(layer: nn.Linear | nn.Conv2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert layer.bias is not None
    return layer.weight.to(dtype), layer.bias.to(dtype)


class _Overlap(torch.autograd.Function):
    """Patches of p + 2 pixels a side `[B, G, G, 3 * (p + 2) ** 2]`, one every p pixels, added up to `[B, 3, S, S]`.

    The gradient is what every patch covers, in one copy: that of `F.fold` is a small kernel for every image on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, patches: Tensor, p: int) -> Tensor:
        ctx.p = p
        return F.fold(patches.flatten(1, 2).transpose(1, 2), patches.shape[1] * p, p + 2, padding=1, stride=p)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        p = ctx.p
        framed = F.pad(gradients[0], (1, 1, 1, 1))
        covered = framed.unfold(2, p + 2, p).unfold(3, p + 2, p)  # [B, 3, G, G, p + 2, p + 2]
        return covered.permute(0, 2, 3, 1, 4, 5).flatten(3), None


class ProxyCodeHead(nn.Module):
    """Logits over the codes of a VQGAN for every feature, their mixture of code vectors, and the VQGAN's decoder.

    TiTok's two-stage head: a softmax over all codes in training and afterwards, so that pixels have gradients. The
    published decoder is loaded with `import_maskgit_vqgan`: `head.vqgan.load_state_dict(imported.state_dict())`.
    """

    def __init__(self, width: int, image_size: int) -> None:
        super().__init__()
        self.vqgan = VQGANDecoder(VQGANConfig(image_size=image_size))
        self.to_hidden = nn.Linear(width, 2 * width)
        self.to_logits = nn.Linear(2 * width, self.vqgan.config.codebook_size)

    def start(self) -> None:
        """Nothing to set: every layer keeps its own initialisation."""

    def logits(self, features: Tensor) -> Tensor:
        """`[B, G, G, W]` -> `[B, G, G, K]`, scores of the VQGAN's codes."""
        return self.to_logits(torch.tanh(self.to_hidden(features)))

    def vectors(self, features: Tensor) -> Tensor:
        """`[B, G, G, W]` -> `[B, G, G, D]`, mixtures of the VQGAN's code vectors."""
        # Under autocast the softmax is fp32; its product with the codebook need not be.
        return self.logits(features).softmax(-1).to(self.vqgan.codebook.dtype) @ self.vqgan.codebook

    def forward(self, features: Tensor) -> Tensor:  # [B, G, G, W]
        return self.vqgan(self.vectors(features))


def build_pixel_head(config: TokenizerConfig) -> DirectPixelHead | ProxyCodeHead:
    """The head that `config.pixel_head` names."""
    if config.pixel_head == "vqgan":
        return ProxyCodeHead(config.decoder.width, config.image_size)
    return DirectPixelHead(config.decoder.width, config.patch_size)
