"""The VQGAN decoder for sampling: the same images as `VQGANDecoder` in 8 bits, with less arithmetic and memory traffic.

Three identities make it cheaper, all exact but for rounding:

- nearest-neighbour doubling and a 3x3 convolution see only 2x2 different pixels at a time: four 2x2 convolutions of the
  small map, one for each phase of the large one, do the same with 4/9 of the work;
- `h + S h` after a convolution is one convolution with `(I + S)` times its weights;
- sums, statistics and normalisation take two passes over a map (`spectralar.kernels.norm`), the last convolution none
  of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.kernels import norm, vq
from spectralar.pixels.maskgit_vqgan import Level, NormSiLU, ResidualBlock, VQGANDecoder, check_codes, check_vectors

IMAGES = 64
"""Images of a pass. The largest maps of so many take 1 GB each in bf16, and about five of them live at a time."""


def doubled_weight(weight: Tensor) -> Tensor:
    """The 2x2 convolution of all four phases, `[4 C', C, 2, 2]`, that stands for doubling and `weight` `[C', C, 3, 3]`.

    Pixel 2 y + i of a column sees pixels y - 1 + i and y + i of the small one; of three taps, the first or the last two
    fall on the same. With a padding of one, phase (i, j) of pixel (y, x) lies at (y + i, x + j) of the result.
    """
    taps = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [phase, small tap, tap]
    return torch.einsum("iur,jvs,ocrs->ijocuv", taps, taps, weight).flatten(0, 2)


def shortcut_weight(weight: Tensor, shortcut: Tensor) -> Tensor:
    """The convolution that stands for h + S h, h by `weight` `[C', C, 3, 3]` and S `[C', C', 1, 1]`."""
    return weight + torch.einsum("om,mcrs->ocrs", shortcut[:, :, 0, 0], weight)


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor


class _Block(NamedTuple):
    norm1: _Norm
    conv1: Tensor
    norm2: _Norm
    conv2: Tensor
    residual: bool


class _Level(NamedTuple):
    blocks: list[_Block]
    doubled: Tensor | None  # weights of all four phases
    bias: Tensor | None


class FusedVQGAN:
    """A copy of a decoder's weights, rearranged. Later changes of the decoder do not reach it.

    Args:
        decoder: the decoder, on the device where images will be made.
        dtype: of weights and maps; statistics, norms and the sums of products are fp32 (fp64 for fp64).
    """

    def __init__(self, decoder: VQGANDecoder, dtype: torch.dtype = torch.bfloat16) -> None:
        def conv(weight: Tensor) -> Tensor:
            return weight.to(dtype).contiguous(memory_format=torch.channels_last)

        def exact(parameter: Tensor | None) -> Tensor:
            assert parameter is not None
            return parameter.detach().double()

        def wide(parameter: Tensor | None) -> Tensor:
            return exact(parameter).to(torch.promote_types(dtype, torch.float32))

        def scales(layer: NormSiLU) -> _Norm:
            return _Norm(wide(layer.weight), wide(layer.bias))

        def block(layer: nn.Module) -> _Block:
            assert isinstance(layer, ResidualBlock)
            last = exact(layer.conv2.weight)
            if layer.nin_shortcut is not None:
                last = shortcut_weight(last, exact(layer.nin_shortcut.weight))
            return _Block(
                scales(layer.norm1),
                conv(exact(layer.conv1.weight)),
                scales(layer.norm2),
                conv(last),
                residual=layer.nin_shortcut is None,
            )

        def level(layer: nn.Module) -> _Level:
            assert isinstance(layer, Level)
            blocks, up = [block(b) for b in layer.block], layer.upsample_conv
            if up is None:
                return _Level(blocks, None, None)
            return _Level(blocks, conv(doubled_weight(exact(up.weight))), wide(up.bias))

        self.config = decoder.config
        self.codebook = wide(decoder.codebook)
        self._conv_in, self._bias_in = conv(exact(decoder.conv_in.weight)), wide(decoder.conv_in.bias)
        self._levels = [level(layer) for layer in reversed(decoder.up)]
        self._levels[0].blocks[:0] = [block(layer) for layer in decoder.mid]
        self._norm_out = scales(decoder.norm_out)
        self._conv_out = wide(decoder.conv_out.weight).contiguous(memory_format=torch.channels_last)
        self._bias_out = wide(decoder.conv_out.bias)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codebook.device

    @torch.no_grad()
    def decode_uint8(self, codes: Tensor, *, check_range: bool = True) -> Tensor:
        """Images of codes: `to_uint8(decoder.decode(codes))` but for the rounding of the dtype.

        Args:
            codes: `[B, G, G]` integers in 0..codebook_size - 1, rows of the image first; G = `config.grid`. B may be 0.
            check_range: look at the values of the codes. Reading them waits for a GPU and cannot be captured in a CUDA
                graph, so callers who drew them switch it off; the image of a code out of range is then undefined.

        Returns:
            `[B, 3, S, S]` uint8, S = `config.image_size`.

        Raises:
            TypeError: codes that are not integers.
            ValueError: a wrong shape or device, or a code out of range.
        """
        check_codes(codes, self.config, self.device, check_range=check_range)
        return self.to_uint8(vq.lookup(codes.long(), self.codebook, normalize=False))

    @torch.no_grad()
    def to_uint8(self, vectors: Tensor) -> Tensor:
        """Images of code vectors, or of mixtures of them: `to_uint8(decoder(vectors))` but for the dtype's rounding.

        Args:
            vectors: `[B, G, G, D]` floating, D = `config.code_dim`; brought to the dtype of the weights.

        Returns:
            `[B, 3, S, S]` uint8.

        Raises:
            TypeError, ValueError: as `VQGANDecoder.forward`.
        """
        check_vectors(vectors, self.config, self.device)
        with torch.autocast(self.device.type, enabled=False):
            parts = [self._decode(part) for part in vectors.to(self._conv_in.dtype).split(IMAGES)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, vectors: Tensor) -> Tensor:  # [B, G, G, D]
        # What is still to be added to h, and whether it comes in phases: the next norm's pass over the map joins them.
        h = F.conv2d(vectors.permute(0, 3, 1, 2), self._conv_in, padding=1)
        residual: Tensor | None = None
        offset: Tensor | None = self._bias_in
        phases = False
        for level in self._levels:
            for block in level.blocks:
                x, y = norm.join_group_norm_silu(
                    h, *block.norm1, groups=self.config.groups, residual=residual, offset=offset, interleave=phases
                )
                y = norm.group_norm_silu(F.conv2d(y, block.conv1, padding=1), *block.norm2, groups=self.config.groups)
                h = F.conv2d(y, block.conv2, padding=1)
                residual, offset, phases = x if block.residual else None, None, False
            if level.doubled is not None:
                x = h if residual is None else h + residual
                h = F.conv2d(x, level.doubled, padding=1)
                residual, offset, phases = None, level.bias, True
        return norm.group_norm_silu_to_pixels(
            h, *self._norm_out, self._conv_out, self._bias_out, groups=self.config.groups, residual=residual
        )
