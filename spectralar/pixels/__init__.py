"""Pixel decoders: from a grid of codes to images."""

from spectralar.pixels.fused import FusedVQGAN
from spectralar.pixels.maskgit_vqgan import VQGANConfig, VQGANDecoder

__all__ = ["FusedVQGAN", "VQGANConfig", "VQGANDecoder"]
