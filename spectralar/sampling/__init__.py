"""Sampling: one interface, interchangeable backends, and an engine that batches requests."""

from spectralar.sampling.captured import BUCKETS
from spectralar.sampling.engine import Drawn, Engine, EngineClosed, EngineFull, EngineStats
from spectralar.sampling.packing import Memory, WeightFormat, memory_needed
from spectralar.sampling.rounding import WeightError, weight_error
from spectralar.sampling.sampler import BackendName, Sampler, SamplerStep
from spectralar.sampling.settings import SamplingSettings

__all__ = [
    "BUCKETS",
    "BackendName",
    "Drawn",
    "Engine",
    "EngineClosed",
    "EngineFull",
    "EngineStats",
    "Memory",
    "Sampler",
    "SamplerStep",
    "SamplingSettings",
    "WeightError",
    "WeightFormat",
    "memory_needed",
    "weight_error",
]
