"""Saving, loading and sharing models."""

from spectralar.weights.pretrained import EMBEDDED, Pretrained, WeightsError

__all__ = ["EMBEDDED", "Pretrained", "WeightsError"]
