"""The class-conditional generator."""

from spectralar.generator.model import DecodeState, SpectralGenerator

__all__ = ["DecodeState", "SpectralGenerator"]
