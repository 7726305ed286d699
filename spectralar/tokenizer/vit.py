"""The vision transformer of both tokenizer sides: pre-norm blocks as in TiTok, attention through the spectral mask."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.config import Mask, ViTConfig
from spectralar.kernels.attention import packed_spectral_attention

Role = Literal["encoder", "decoder"]


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)) with exact GELU and biases everywhere (TiTok's CLIP-style block)."""

    def __init__(self, config: ViTConfig, n_image: int, mask: Mask, role: Role) -> None:
        super().__init__()
        width = config.width
        self.heads, self.n_image, self.mask, self.role = config.heads, n_image, mask, role
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, prefix_lengths: Tensor | None) -> Tensor:  # [B, T, W]
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, H, D]
        seen = packed_spectral_attention(qkv, self.n_image, prefix_lengths, self.mask, self.role)
        x = x + self.proj(seen.flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class SpectralViT(nn.Module):
    """Blocks over `[class, image, spectral]`, normalised before and after.

    The encoder is read at its spectral rows, the decoder at its image rows.
    Owns the class token and the positions of the class and image rows, as both sides of TiTok do.
    """

    def __init__(self, config: ViTConfig, patches: int, mask: Mask, role: Role) -> None:
        super().__init__()
        self.n_image = 1 + patches
        self.read_rows = slice(self.n_image, None) if role == "encoder" else slice(1, self.n_image)
        scale = config.width**-0.5
        self.class_token = nn.Parameter(scale * torch.randn(1, config.width))
        self.positions = nn.Parameter(scale * torch.randn(self.n_image, config.width))
        self.norm_before = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config, self.n_image, mask, role) for _ in range(config.depth))
        self.norm_after = nn.LayerNorm(config.width)

    def forward(self, image_rows: Tensor, spectral_rows: Tensor, prefix_lengths: Tensor | None = None) -> Tensor:
        """Image rows `[B, P, W]` and spectral rows `[B, N, W]` to the outputs of those that are read."""
        x = self.enter(image_rows, spectral_rows)
        for block in self.blocks:
            x = block(x, prefix_lengths)
        return self.leave(x)

    def enter(self, image_rows: Tensor, spectral_rows: Tensor) -> Tensor:
        """What the first block sees, `[B, 1 + P + N, W]`."""
        start = self.class_token.expand(len(image_rows), 1, -1)
        image_rows = torch.cat([start, image_rows], dim=1) + self.positions
        return self.norm_before(torch.cat([image_rows, spectral_rows], dim=1))

    def leave(self, x: Tensor) -> Tensor:
        """What is read of the last block's output."""
        return self.norm_after(x[:, self.read_rows])


def initialize(module: nn.Module) -> None:
    """Truncated normal (0.02) for every linear and convolution weight, zero biases; TiTok's rule."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
