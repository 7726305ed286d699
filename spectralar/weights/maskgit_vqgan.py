"""Import of published MaskGIT-VQGAN weights: their own checkpoint, or a TiTok checkpoint that contains them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from spectralar.pixels import VQGANConfig, VQGANDecoder
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
    wanted = {_our_name(name, prefix): tensor for name, tensor in weights.items() if not name.startswith(rest)}
    model = VQGANDecoder(config or VQGANConfig())
    load_strict(model, wanted, what=what)
    return model.eval()


def _our_name(name: str, prefix: str) -> str:
    """The model bears the checkpoint's names, without what stands before them."""
    return "codebook" if name == f"{prefix}quantize.embedding.weight" else name.removeprefix(f"{prefix}decoder.")


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
