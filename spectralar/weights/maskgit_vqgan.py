"""Import of published MaskGIT-VQGAN weights: their own checkpoint, or a TiTok checkpoint that contains them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spectralar.config import VQGANConfig
from spectralar.pixels import VQGANDecoder
from spectralar.weights.pretrained import WeightsError, load_strict, load_weights

# What else the two checkpoints hold, by how its names begin; any other name is an error.
_VQGAN_REST = ("encoder.",)
_TITOK_REST = ("latent_tokens", "encoder.", "decoder.", "quantize.")


def import_maskgit_vqgan(source: str | Path | Mapping[str, Tensor], config: VQGANConfig | None = None) -> VQGANDecoder:
    """The decoder in published weights, in fp32 and evaluation mode; `save_pretrained` then stores it in our format.

    Two sets of names are understood: `decoder.*` and `quantize.embedding.weight` of the file
    `maskgit-vqgan-imagenet-f16-256.bin`, whose `encoder.*` is left out, and `pixel_decoder.*` and
    `pixel_quantize.embedding.weight` of a two-stage TiTok checkpoint, whose own tokenizer is left out.

    Args:
        source: a PyTorch file (`.bin`, `.pt`; read without running code from it) or a safetensors file of such a
            state dict, or the state dict itself.
        config: sizes; None takes MaskGIT's.

    Raises:
        WeightsError: a missing or damaged file, missing or extra weights, or a wrong shape; the message names them.
    """
    weights, what = (source, "the state dict") if isinstance(source, Mapping) else (_read(Path(source)), str(source))
    inside_titok = any(name.startswith("pixel_") for name in weights)
    prefix, rest = ("pixel_", _TITOK_REST) if inside_titok else ("", _VQGAN_REST)
    model = VQGANDecoder(config or VQGANConfig())
    ours = {_published_name(name, prefix): name for name in model.state_dict()}
    # Names that nobody knows are quoted, which none of ours is, so that they come out as extra.
    wanted = {ours.get(name, repr(name)): tensor for name, tensor in weights.items() if not name.startswith(rest)}
    load_strict(model, wanted, what=what)
    return model.eval()


def _published_name(name: str, prefix: str) -> str:
    """The checkpoint's name of one of our weights: ours are the same, but for the codebook and the beginning."""
    return f"{prefix}quantize.embedding.weight" if name == "codebook" else f"{prefix}decoder.{name}"


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_weights(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"missing file: {path}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"damaged file: {path}: {error}") from error
    if not isinstance(weights, Mapping) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise WeightsError(f"damaged file: {path} holds no state dict")
    return weights
