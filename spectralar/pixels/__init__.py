"""Pixel decoders: from a grid of codes to images."""

from spectralar.pixels.fused import FusedVQGAN
from spectralar.pixels.maskgit_vqgan import VQGANDecoder

__all__ = ["FusedVQGAN", "VQGANDecoder"]
