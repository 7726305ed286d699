"""The commands that need data or training: `reconstruct`, `tokenize`, `train tokenizer`, `train generator`."""

from __future__ import annotations

import argparse
import datetime
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from spectralar.config import load_yaml
from spectralar.devices import Precision, auto_device
from spectralar.generator import SpectralGenerator
from spectralar.images import psnr, to_float
from spectralar.pictures import prefix_strip
from spectralar.pipeline import SpectralAR
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Crop, LoaderConfig, apply_crop, decode_image
from spectralar.training.data.images import CropKind
from spectralar.training.data.loader import LoaderBackend
from spectralar.training.distributed import join_ranks
from spectralar.training.evaluation.reconstruction import default_lengths
from spectralar.training.presets import GENERATOR_RUNS, TOKENIZER_RUNS
from spectralar.training.runs import GeneratorRun, TokenizerRun, train_generator, train_tokenizer
from spectralar.training.tokenizing import tokenize
from spectralar.weights import EMBEDDED
from spectralar.weights.pretrained import CONFIG_FILE, resolve

Run = TypeVar("Run")


def reconstruct(
    pictures: Positional[tuple[Path, ...]],
    model: str = str(EMBEDDED),
    lengths: tuple[int, ...] = (),
    out: Path = Path("reconstructed.png"),
    device: str = "auto",
) -> None:
    """Rebuild pictures from their first n tokens: a strip with sub-images and reconstructions, and a table of PSNR.

    Args:
        pictures: image files; each is cut to its central square.
        model: directory or Hub id of a saved model or tokenizer; the emoji model of the package unless given.
        lengths: prefix lengths n; a selection up to N unless given.
        out: the picture to write.
        device: auto, cpu or cuda.
    """
    if not pictures:
        raise ValueError("pictures must name at least one image file")
    tokenizer = load_tokenizer(model, auto_device(device))
    total = tokenizer.config.tokens
    chosen = lengths or default_lengths(total)
    if not all(1 <= n <= total for n in chosen):
        raise ValueError(f"lengths must be in 1..{total}, not {', '.join(map(str, chosen))}")
    crop = Crop(tokenizer.config.image_size, "center", flip=False)
    images = torch.stack([_read(path, crop) for path in pictures]).to(tokenizer.device)
    with torch.inference_mode():
        tokens = tokenizer.encode(images)
        table = Table(title="PSNR in dB")
        for column in ("picture", *(f"n = {n}" for n in chosen)):
            table.add_column(column, justify="right")
        figures = [psnr(tokenizer.decode(tokens[:, :n]), to_float(images)).tolist() for n in chosen]
    for i, path in enumerate(pictures):
        table.add_row(path.name, *(f"{row[i]:.2f}" for row in figures))
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix_strip(tokenizer, images, chosen).save(out)
    Console().print(table)
    print(out)


def tokenize_command(
    tokenizer: Positional[str],
    shards: Positional[Path],
    out: Positional[Path],
    crops: int | None = None,
    kind: CropKind = "center",
    resize: int | None = None,
    scale: tuple[float, float] = (0.25, 1.0),
    flip: bool = False,
    batch: int = 256,
    workers: int = 8,
    backend: LoaderBackend = "auto",
    precision: Precision = "auto",
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Encode every picture of a set of shards into a token store, from which a generator trains.

    On the 8 GPUs of one machine: torchrun --nproc-per-node 8 -m spectralar.cli tokenize ...

    A job that was killed goes on when the same command is given again.

    Args:
        tokenizer: directory or Hub id of a saved tokenizer or model.
        shards: folder of shards, one tar, or a pattern of tars.
        out: folder of the token store; must not exist.
        crops: crops per picture, each drawn anew; 1 unless given, and 10 for ten-crop.
        kind: how a crop is cut; ten-crop cuts four corners and the centre, and these five mirrored.
        resize: short side before a random, center or ten-crop cut; the tokenizer's image size unless given.
        scale: least and greatest share of the area for random-resized.
        flip: mirror half of the crops.
        batch: pictures per forward pass.
        workers: processes that read and, unless DALI does, decode, but no more than this rank has processors; more than
            8 bring nothing, as so many feed DALI on an idle GPU.
        backend: dali decodes on the GPU, pillow in the workers; auto is dali on a GPU where it is installed.
        precision: of the encoder, bf16 or fp32; auto is bf16 on a GPU, as in training.
        seed: seed of the crops.
        device: auto, cpu or cuda.
    """
    # The ranks go their own ways, and meet at the end.
    with join_ranks(device, timeout=datetime.timedelta(days=7)) as ranks:
        loaded = load_tokenizer(tokenizer, auto_device(device))
        crop = Crop(loaded.config.image_size, kind, resize=resize, scale=scale, flip=flip)
        data = LoaderConfig(path=str(shards), batch=batch, crop=crop, seed=seed, workers=workers, backend=backend)
        info = tokenize(loaded, data, out, crops=crops, precision=precision, ranks=ranks).info
    if ranks.first:
        print(f"{info.rows:,} rows of {info.tokens} tokens, {info.classes} classes: {out}")


def train_tokenizer_command(arguments: list[str], program: str) -> None:
    """Train a tokenizer from shards (stage one).

    On the 8 GPUs of one machine: torchrun --nproc-per-node 8 -m spectralar.cli train tokenizer ...

    The batch is that of all GPUs together. A job that was killed goes on with --resume, on as many GPUs or others.
    """
    run, resume = _parse(TokenizerRun, TOKENIZER_RUNS, "emoji", arguments, program, train_tokenizer_command)
    _tell("tokenizer", train_tokenizer(run, resume=resume))


def train_generator_command(arguments: list[str], program: str) -> None:
    """Train a generator from a token store (stage two).

    On the 8 GPUs of one machine: torchrun --nproc-per-node 8 -m spectralar.cli train generator ...

    The batch is that of all GPUs together. A job that was killed goes on with --resume, on as many GPUs or others.
    With a tokenizer, the two together are written as a model, which `spectralar sample --model` draws from.
    """
    run, resume = _parse(GeneratorRun, GENERATOR_RUNS, "emoji", arguments, program, train_generator_command)
    final = train_generator(run, resume=resume)
    _tell("generator", final)
    if run.tokenizer and _first():
        model = SpectralAR(SpectralTokenizer.from_pretrained(run.tokenizer), SpectralGenerator.from_pretrained(final))
        _tell("model", model.save_pretrained(final.parent / "model"))


for _command in (train_tokenizer_command, train_generator_command):
    _command.parses_arguments = True  # type: ignore[attr-defined]


def load_tokenizer(source: str, device: torch.device) -> SpectralTokenizer:
    """The tokenizer of a saved tokenizer or of a saved model."""
    folder = resolve(source)
    subfolder = "" if (folder / CONFIG_FILE).exists() else "tokenizer"
    return SpectralTokenizer.from_pretrained(folder, subfolder=subfolder, device=device)


def _tell(what: str, folder: Path) -> None:
    """Says where the result is, once for all ranks of torchrun."""
    if _first():
        print(f"{what}: {folder}")


def _first() -> bool:
    """Whether this is the first rank of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def _read(path: Path, crop: Crop) -> torch.Tensor:
    import numpy as np

    try:
        return apply_crop(decode_image(path.read_bytes()), crop, np.random.default_rng(0))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(
    kind: type[Run],
    presets: dict[str, Run],
    default: str,
    arguments: list[str],
    program: str,
    command: Callable[..., Any],
) -> tuple[Run, bool]:
    """A run from a preset, then a YAML file, then single options; and whether to resume."""
    import tyro

    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(presets), default=default)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--traceback", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    run = presets[known.preset]
    if known.config is not None:
        run = load_yaml(kind, known.config, base=run)
    description = (
        f"{inspect.getdoc(command)}\n\n"
        f"--preset NAME starts from one of: {', '.join(presets)} (default {default}).\n"
        "--config FILE overrides it by the fields of a YAML file, nested as below.\n"
        "--resume goes on from the newest checkpoint in --loop.out.\n\n"
        "Every field can be overridden by an option:"
    )
    return tyro.cli(kind, default=run, args=rest, prog=program, description=description), known.resume
