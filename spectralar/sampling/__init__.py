"""Sampling: one interface, interchangeable backends, and an engine that batches requests."""

from spectralar.sampling.captured import BUCKETS
from spectralar.sampling.engine import Drawn, Engine, EngineClosed, EngineFull, EngineStats
from spectralar.sampling.packing import Memory, memory_needed
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
    "memory_needed",
]
