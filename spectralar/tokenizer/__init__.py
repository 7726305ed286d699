"""The nested spectral tokenizer."""

from spectralar.tokenizer.model import SpectralTokenizer, TokenizerOutput

__all__ = ["SpectralTokenizer", "TokenizerOutput"]
