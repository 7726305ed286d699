"""Inputs made in code: pictures with the spectrum of photographs, and cutoffs drawn as in training."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spectralar.spectrum import spectral_cutoffs

Draw = Literal["random", "uniform"]


def photographs(batch: int, channels: int, size: int, device: torch.device, *, seed: int = 0) -> Tensor:
    """Pictures whose amplitudes fall as 1/f, as those of photographs do, with straight edges and clipped highlights.

    Returns:
        `[batch, channels, size, size]` uint8.
    """
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(batch, channels, size, size, generator=generator, device=device)
    rows = torch.fft.fftfreq(size, device=device)[:, None]
    columns = torch.fft.rfftfreq(size, device=device)
    frequency = torch.hypot(rows, columns).clamp_min(1 / size)
    field = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(size, size))
    field = field / field.std(dim=(-2, -1), keepdim=True)
    # Half planes, each brighter or darker than the rest by its own amount in each channel.
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size, device=device)] * 2, indexing="ij")
    for _ in range(4):
        a, b, c = torch.randn(3, batch, 1, 1, 1, generator=generator, device=device).unbind()
        step = torch.randn(batch, channels, 1, 1, generator=generator, device=device)
        field = field + step * (a * x + b * y > c / 2)
    return (0.45 + 0.18 * field).clamp(0, 1).mul(255).round().to(torch.uint8)


def drawn_cutoffs(batch: int, size: int, draw: Draw | int, *, seed: int = 0) -> Tensor:
    """One cutoff per picture, as training draws them: a uniform prefix length over the schedule of 64 tokens.

    Args:
        batch: number of pictures.
        size: side of the pictures; sides below 64 take as many tokens as pixels.
        draw: "random" uses the non-uniform schedule of SpectralAR eq. 9, "uniform" the one of its Table 4, an int
            gives every picture that cutoff.
        seed: of the prefix lengths.

    Returns:
        `[batch]` int64 on the CPU.
    """
    if isinstance(draw, int):
        return torch.full((batch,), draw)
    schedule = spectral_cutoffs(min(64, size), size, "nonuniform" if draw == "random" else "uniform")
    lengths = torch.randint(len(schedule), (batch,), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(schedule)[lengths]
