"""Sampling: one interface, interchangeable backends."""

from spectralar.sampling.sampler import Sampler, SamplerStep
from spectralar.sampling.settings import SamplingSettings

__all__ = ["Sampler", "SamplerStep", "SamplingSettings"]
