"""A tokenizer and a generator that belong together: what is shared, loaded and sampled from as one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from spectralar.generator import SpectralGenerator
from spectralar.sampling import BackendName, Sampler, WeightFormat
from spectralar.tokenizer import SpectralTokenizer
from spectralar.weights import EMBEDDED
from spectralar.weights.pretrained import CONFIG_FILE, WeightsError, resolve


class SpectralAR(Sampler):
    """A `Sampler` whose tokenizer is always there, with saving and loading: folders `tokenizer/` and `generator/`."""

    tokenizer: SpectralTokenizer

    def __init__(
        self,
        tokenizer: SpectralTokenizer,
        generator: SpectralGenerator,
        *,
        backend: BackendName = "auto",
        weights: WeightFormat = "same",
    ) -> None:
        super().__init__(generator, tokenizer, backend=backend, weights=weights)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = EMBEDDED,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: BackendName = "auto",
        weights: WeightFormat = "same",
    ) -> SpectralAR:
        """Loads both models; without arguments the emoji model that ships inside the package.

        Args:
            source: a directory, or the id of a Hugging Face Hub repository (`user/name`).
            revision: branch, tag or commit of the repository.
            device: where the weights go; `auto` is the GPU where there is one.
            dtype: dtype of the weights.
            backend: see `Sampler`.
            weights: see `Sampler`; "fp8" keeps those that sampling reads in eight bits.

        Raises:
            WeightsError: see `Pretrained.from_pretrained`.
            ValueError: see `Sampler`; or a GPU is named that is not there.
        """
        folder = resolve(source, revision=revision)
        if (folder / CONFIG_FILE).exists():
            raise WeightsError(
                f"{folder} is a tokenizer, a generator or a training run; a model is a folder with tokenizer/ and "
                "generator/, as `spectralar train generator --tokenizer` and `SpectralAR.save_pretrained` write it"
            )
        tokenizer = SpectralTokenizer.from_pretrained(folder, subfolder="tokenizer", device=device, dtype=dtype)
        generator = SpectralGenerator.from_pretrained(folder, subfolder="generator", device=device, dtype=dtype)
        return cls(tokenizer, generator, backend=backend, weights=weights)

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Writes `tokenizer/` and `generator/` under `directory`; see `Pretrained.save_pretrained`."""
        self.tokenizer.save_pretrained(Path(directory) / "tokenizer", dtype=dtype)
        self.generator.save_pretrained(Path(directory) / "generator", dtype=dtype)
        return Path(directory)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or their numbers where the model has no names."""
        config = self.generator.config
        return config.class_names or tuple(str(i) for i in range(config.classes))

    def class_label(self, number: int) -> str:
        """Name of a class number, "no class" for the number after the last."""
        return (*self.class_names, "no class")[number]

    def find_classes(self, names: Sequence[str]) -> list[int]:
        """Class numbers of names or numbers; a name may be any part that fits exactly one class, case ignored.

        Raises:
            ValueError: a name that fits no class or several; the message lists candidates.
        """
        return [self._find_class(name) for name in names]

    def _find_class(self, name: str) -> int:
        if name.isdecimal() and int(name) < self.generator.config.classes:
            return int(name)
        lowered = [known.lower() for known in self.class_names]
        # A whole name goes before its occurrences in longer ones; two classes may still bear the same name.
        exact = [i for i, known in enumerate(lowered) if name.lower() == known]
        found = exact or [i for i, known in enumerate(lowered) if name.lower() in known]
        if len(found) == 1:
            return found[0]
        candidates = [f"{i} {self.class_names[i]}" for i in found] or list(self.class_names)
        shown = ", ".join(candidates[:12]) + (", ..." if len(candidates) > 12 else "")
        raise ValueError(f"class {name!r} fits {len(found)} classes; allowed: 0..{len(lowered) - 1} or one of {shown}")
