"""SpectralAR: images as 64 ordered spectral tokens, and an autoregressive generator that draws them coarse to fine.

The names below are imported when first used, so that `import spectralar` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig, generator_preset
    from spectralar.generator import SpectralGenerator
    from spectralar.pipeline import SpectralAR
    from spectralar.sampling import Engine, Sampler, SamplingSettings
    from spectralar.spectrum import spectral_cutoffs
    from spectralar.tokenizer import SpectralTokenizer

__version__ = "0.1.0"

_HOMES = {
    "GeneratorConfig": "config",
    "TokenizerConfig": "config",
    "ViTConfig": "config",
    "generator_preset": "config",
    "SpectralGenerator": "generator",
    "SpectralAR": "pipeline",
    "Engine": "sampling",
    "Sampler": "sampling",
    "SamplingSettings": "sampling",
    "spectral_cutoffs": "spectrum",
    "SpectralTokenizer": "tokenizer",
}

__all__ = [
    "Engine",
    "GeneratorConfig",
    "Sampler",
    "SamplingSettings",
    "SpectralAR",
    "SpectralGenerator",
    "SpectralTokenizer",
    "TokenizerConfig",
    "ViTConfig",
    "__version__",
    "generator_preset",
    "spectral_cutoffs",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"spectralar.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'spectralar' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
