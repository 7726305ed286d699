"""The decoder of MaskGIT's VQGAN: a 16 x 16 grid of codes to 256 x 256 pixels, by convolutions alone.

Chang et al., "MaskGIT: Masked Generative Image Transformer" (2022). The names of the weights are those of the published
PyTorch checkpoint, which `spectralar.weights.maskgit_vqgan` reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.config import VQGANConfig
from spectralar.kernels import vq
from spectralar.weights.pretrained import Pretrained


class NormSiLU(nn.GroupNorm):
    """silu(group_norm(x)) with a scale and a shift per channel; statistics in fp32 for shorter dtypes."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return F.silu(super().forward(x))


class ResidualBlock(nn.Module):
    """h + x with h = conv(norm_silu(conv(norm_silu(x)))); where the number of channels changes, h + S h.

    S is a 1x1 convolution of h, not of x: such a block has no path around its convolutions. That is not how residual
    networks are usually built, but the published weights were trained so.
    """

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = NormSiLU(groups, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm2 = NormSiLU(groups, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


class Level(nn.Module):
    """Residual blocks at one size, then, but for the finest level, pixels doubled both ways and a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, config: VQGANConfig, *, finest: bool) -> None:
        super().__init__()
        widths = [inputs] + config.blocks * [outputs]
        self.block = nn.ModuleList(ResidualBlock(a, outputs, config.groups) for a in widths[:-1])
        self.upsample_conv = None if finest else nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        for block in self.block:
            x = block(x)
        if self.upsample_conv is None:
            return x
        return self.upsample_conv(F.interpolate(x, scale_factor=2, mode="nearest"))  # [B, C', 2 H, 2 W]


class VQGANDecoder(Pretrained[VQGANConfig], nn.Module):
    """Codes, or vectors in their place, to images. Weights lie channels-last in memory, and vectors enter so.

    Args:
        config: sizes; see `VQGANConfig`.
    """

    config_class = VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        widths, groups = config.widths, config.groups
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.code_dim))
        self.conv_in = nn.Conv2d(config.code_dim, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], groups) for _ in range(config.blocks))
        inputs = (*widths[1:], widths[-1])  # of every level: what the next coarser one, which runs before it, gives
        self.up = nn.ModuleList(
            Level(a, b, config, finest=level == 0) for level, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norm_out = NormSiLU(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codebook.device

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes. Reads the codes to check them, which waits for a GPU.

        Args:
            codes: `[B, G, G]` integers in 0..codebook_size - 1, rows of the image first; G = `config.grid`. B may be 0.

        Returns:
            `[B, 3, S, S]` fp32 (fp64 for fp64 weights) in [0, 1], S = `config.image_size`.
            `spectralar.images.to_uint8` rounds them. Differentiable in the weights and the codebook.

        Raises:
            TypeError: codes that are not integers.
            ValueError: a wrong shape or device, or a code out of range.
        """
        check_codes(codes, self.config, self.device)
        return self(vq.lookup(codes.long(), self.codebook, normalize=False)).clamp(0, 1)

    def forward(self, vectors: Tensor) -> Tensor:
        """Images of code vectors, or of mixtures of them as a softmax over codes gives.

        Args:
            vectors: `[B, G, G, D]` floating, D = `config.code_dim`; brought to the dtype of the weights.

        Returns:
            `[B, 3, S, S]` fp32 (fp64 for fp64 weights), about [0, 1] but not clamped, so that gradients pass.

        Raises:
            TypeError: vectors that are not floating.
            ValueError: a wrong shape or device.
        """
        check_vectors(vectors, self.config, self.device)
        x = self.conv_in(vectors.to(self.conv_in.weight.dtype).permute(0, 3, 1, 2))  # [B, C, G, G]
        for block in self.mid:
            x = block(x)
        for level in reversed(self.up):
            x = level(x)
        return self._to_pixels(self.norm_out(x))

    def _to_pixels(self, features: Tensor) -> Tensor:  # [B, C, S, S]
        weight, bias = self.conv_out.weight, self.conv_out.bias
        assert bias is not None
        # In fp32 also under autocast and with bf16 weights: in bf16 the pixels above one half would lie 1/256 apart.
        with torch.autocast(features.device.type, enabled=False):
            dtype = torch.promote_types(weight.dtype, torch.float32)
            return F.conv2d(features.to(dtype), weight.to(dtype), bias.to(dtype), padding=1).contiguous()


def check_vectors(vectors: Tensor, config: VQGANConfig, device: torch.device) -> None:
    """Raises what `VQGANDecoder.forward` says of its vectors."""
    if not isinstance(vectors, Tensor):
        raise TypeError(f"vectors must be a tensor, not {type(vectors).__name__}")
    if not vectors.is_floating_point():
        raise TypeError(f"vectors must be floating, not {vectors.dtype}")
    shape = (config.grid, config.grid, config.code_dim)
    if vectors.dim() != 4 or vectors.shape[1:] != shape:
        raise ValueError(f"vectors must have shape [B, {', '.join(map(str, shape))}], not {list(vectors.shape)}")
    _check_device("vectors", vectors, device)


def check_codes(codes: Tensor, config: VQGANConfig, device: torch.device, *, check_range: bool = True) -> None:
    """Raises what `VQGANDecoder.decode` says of its codes; reads their values only with `check_range`."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes must be a tensor, not {type(codes).__name__}")
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise TypeError(f"codes must be integers, not {codes.dtype}")
    grid = config.grid
    if codes.dim() != 3 or codes.shape[1:] != (grid, grid):
        raise ValueError(f"codes must have shape [B, {grid}, {grid}], not {list(codes.shape)}")
    _check_device("codes", codes, device)
    if check_range and codes.numel():
        low, high = (int(x) for x in codes.long().aminmax())
        if low < 0 or high >= config.codebook_size:
            raise ValueError(f"codes must be in 0..{config.codebook_size - 1}, not {low}..{high}")


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the model's device {device}, not {tensor.device}")
