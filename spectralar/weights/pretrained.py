"""`save_pretrained` and `from_pretrained`: a directory with `config.json` and `model.safetensors`, strict both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectralar.config import from_dict, to_dict
from spectralar.devices import auto_device

Config = TypeVar("Config")

EMBEDDED = Path(__file__).parent / "emoji"
"""The model that ships inside the package: a tokenizer and a generator trained on emoji."""

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


class WeightsError(ValueError):
    """A directory of weights that can't be loaded: incomplete, damaged, or of another configuration."""


class Pretrained(Generic[Config]):
    """Mixin of an `nn.Module` built as `Model(config)`, `config` being an instance of `config_class`."""

    config_class: ClassVar[type]
    config: Config

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Writes `config.json` (with the class's name) and `model.safetensors`.

        Args:
            directory: created when missing; existing files are replaced.
            dtype: store floating weights in this dtype, such as `torch.bfloat16`; None keeps theirs.

        Returns:
            The directory.
        """
        assert isinstance(self, nn.Module)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {
            name: (t.to(dtype) if dtype and t.is_floating_point() else t).contiguous().cpu()
            for name, t in self.state_dict().items()
        }
        save_file(weights, directory / WEIGHTS_FILE, metadata={"format": "pt"})
        described = {"model": type(self).__name__, **to_dict(self.config)}
        (directory / CONFIG_FILE).write_text(
            json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return directory

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str = "",
        revision: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Loads a model saved by `save_pretrained`, in evaluation mode.

        Args:
            source: a directory, or the id of a Hugging Face Hub repository (`user/name`).
            subfolder: folder inside `source`.
            revision: branch, tag or commit of the repository.
            device: where the weights go; `auto` is the GPU where there is one.
            dtype: dtype of the loaded floating weights.

        Raises:
            ValueError: a GPU is named that is not there.
            WeightsError: no such source, a missing file, another model class, an unknown configuration field, missing
                or extra weights, a wrong shape, or a damaged file; the message names it.
        """
        directory = resolve(source, revision=revision) / subfolder
        config = cls.load_config(directory)
        weights = load_weights(directory / WEIGHTS_FILE)
        model = cls(config)  # type: ignore[call-arg]
        assert isinstance(model, nn.Module)
        load_strict(model, weights, what=str(directory / WEIGHTS_FILE))
        return model.to(device=auto_device(device) if isinstance(device, str) else device, dtype=dtype).eval()

    @classmethod
    def load_config(cls, directory: Path) -> Config:
        """The configuration in `directory`, checked to be this class's."""
        path = directory / CONFIG_FILE
        values = read_json(path)
        name = values.pop("model", cls.__name__)
        if not isinstance(name, str):  # a run's configuration has a model's under this name
            raise WeightsError(f"{directory} is a training run; what it trained is in {directory / 'final'}")
        if name != cls.__name__:
            raise WeightsError(f"{path} describes a {name}, not a {cls.__name__}")
        try:
            return from_dict(cls.config_class, values)
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error


def resolve(source: str | Path, *, revision: str | None = None) -> Path:
    """The local directory of `source`: itself when it is one, otherwise a snapshot of the Hub repository.

    Raises:
        WeightsError: neither a directory nor a repository that could be downloaded.
    """
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise WeightsError(f"no such directory: {source}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except Exception as error:
        raise WeightsError(f"{source} is neither a directory nor a Hub repository that can be had: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `WeightsError` names the file when it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"missing file: {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"damaged file: {path}: {error}") from error
    if not isinstance(values, dict):
        raise WeightsError(f"damaged file: {path} holds no JSON object")
    return values


def load_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; `WeightsError` names the file when it is missing or damaged."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise WeightsError(f"{'missing' if not path.exists() else 'damaged'} file: {path}: {error}") from error


def load_strict(model: nn.Module, weights: Mapping[str, Tensor], *, what: str) -> None:
    """Loads weights that must match in names and shapes.

    Raises:
        WeightsError: listing missing, extra and misshapen weights by name.
    """
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in weights]
    problems += [f"extra {name}" for name in weights if name not in expected]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError(f"{what} does not fit {type(model).__name__}: {'; '.join(problems[:8])}{more}")
    model.load_state_dict(dict(weights))
