"""The command `inspect tokenizer`: what every token says and does, as a table and as one picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tyro.conf import Positional

from spectralar.config import from_dict
from spectralar.devices import auto_device
from spectralar.generator import SpectralGenerator
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Batch
from spectralar.training.evaluation.reconstruction import evaluate_tokenizer
from spectralar.training.journal import read_log
from spectralar.training.loop import CONFIG
from spectralar.training.runs import validation_images
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask
from spectralar.weights.pretrained import CONFIG_FILE, resolve

# What is known of every position: name in the log (with `val_` before it), and how the table and the picture call it.
COLUMNS = {
    "distinct": ("codes", "different codes"),
    "entropy": ("bits", "entropy of codes (bits)"),
    "drop_cost": ("drop", "cost of dropping (dB)"),
    "shuffle_cost": ("shuffle", "cost of shuffling (dB)"),
    "band_drop_cost": ("band drop", "cost of dropping in its own band (dB)"),
    "band_shuffle_cost": ("band shuffle", "cost of shuffling in its own band (dB)"),
    "spread": ("spread", "spread of latents"),
    "code_distance": ("distance", "squared distance to the code"),
    "gradient_query": ("d query", "gradient of the query"),
    "gradient_code": ("d code", "gradient of the code"),
    "energy": ("energy", "energy of images"),
    "energy_rebuilt": ("rebuilt", "energy of reconstructions"),
    "energy_error": ("error", "energy of the error"),
    "generator_loss": ("needed", "generator's loss (bits)"),
}
_ENERGIES = "energy", "energy_rebuilt", "energy_error"


def inspect_tokenizer_command(
    model: Positional[str],
    shards: Positional[Path],
    log: Path | None = None,
    out: Path = Path("tokens.png"),
    images: int = 512,
    device: str = "auto",
) -> None:
    """Measure what every token of a tokenizer says and does: a table, and one picture.

    Args:
        model: directory or Hub id of a saved tokenizer or model; a model's generator is measured with it.
        shards: folder of shards, one tar, or a pattern of tars, of images that the tokenizer has not learned from.
        log: directory of the run that trained the tokenizer; the picture then shows all of training.
        out: the picture to write.
        images: at most so many images are used, evenly spread over the set.
        device: auto, cpu or cuda.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    draw = _drawing()
    weights, history = _training_log(log) if log is not None else (TokenizerLossConfig(), [])
    measured, cutoffs = inspect_tokenizer(model, shards, weights, images, auto_device(device))
    print("\n".join(_table(measured, cutoffs)))
    print(f"{measured['codes_used']} codes in use, perplexity {measured['perplexity']:.0f}", end="; ")
    pairs = zip(measured["lengths"], measured["psnr"], strict=True)
    print(f"PSNR of {measured['images']} images:", ", ".join(f"n={n} {value:.2f}" for n, value in pairs))
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(measured, history, out)
    print(out)


def inspect_tokenizer(
    source: str, shards: Path, loss: TokenizerLossConfig, limit: int, device: torch.device
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """All fields of `TokenizerReport` and `TokenGradients`, `generator_loss` where there is one; and the cutoffs.

    Args:
        source: see `model` of the command.
        shards: images.
        loss: what the tokenizer is trained with, for the gradients.
        limit: most images used.
        device: where to compute.

    Raises:
        ValueError: no images, or labels that the generator does not know.
    """
    folder = resolve(source)
    whole = not (folder / CONFIG_FILE).exists()
    tokenizer = SpectralTokenizer.from_pretrained(folder, subfolder="tokenizer" if whole else "", device=device)
    total = tokenizer.config.tokens
    lengths = tuple(sorted({n for n in (1, 2, 4, *range(8, total, 8)) if n < total} | {total}))
    held: list[Batch] = list(validation_images(str(shards), tokenizer.config.image_size, limit))
    report = evaluate_tokenizer(tokenizer, held, lengths=lengths, costs=True, cost_images=limit)
    gradients = TokenizerTask(tokenizer, loss, validation=lambda: held).gradients(tokenizer)
    measured = {**asdict(report), **asdict(gradients)}
    if whole:
        generator = SpectralGenerator.from_pretrained(folder, subfolder="generator", device=device)
        measured["generator_loss"] = generator_loss(tokenizer, generator, held)
    return measured, tokenizer.config.cutoffs


@torch.inference_mode()
def generator_loss(
    tokenizer: SpectralTokenizer, generator: SpectralGenerator, batches: Sequence[Batch]
) -> tuple[float, ...]:
    """Bits that a generator needs for the token at every position, given the class and the tokens before it.

    Entropy minus these bits is at most what class and earlier tokens tell of the token (their mutual information).

    Raises:
        ValueError: a label that the generator does not know.
    """
    sums = torch.zeros(tokenizer.config.tokens, dtype=torch.float64)
    for images, labels in batches:
        if len(labels) and int(labels.max()) >= generator.config.classes:
            raise ValueError(
                f"shards must have labels of the generator's {generator.config.classes} classes, not {labels.max()}"
            )
        tokens = tokenizer.encode(images.to(tokenizer.device))
        logits = generator(labels.to(generator.device), tokens)
        needed = F.cross_entropy(logits.flatten(0, 1).double(), tokens.flatten(), reduction="none")  # nats
        sums += needed.view_as(tokens).sum(0).cpu()
    count = sum(len(batch.images) for batch in batches)
    return tuple((sums / count / math.log(2)).tolist())


def _training_log(directory: Path) -> tuple[TokenizerLossConfig, list[dict[str, Any]]]:
    """The loss of a run, and the validation records of its log."""
    path = directory / CONFIG
    if not path.is_file():
        raise ValueError(f"log must be the directory of a tokenizer's training run, with {CONFIG}, not {directory}")
    config = json.loads(path.read_text())
    history = [record for record in read_log(directory) if "val_distinct" in record]
    return from_dict(TokenizerLossConfig, config.get("loss", {}), where="loss."), history


def _table(measured: dict[str, Any], cutoffs: Sequence[int]) -> list[str]:
    known = [name for name in COLUMNS if name in measured]
    rows = [("n", "below", *(COLUMNS[name][0] for name in known))]
    for i, cutoff in enumerate(cutoffs):
        rows.append((str(i + 1), str(cutoff), *(_short(name, measured[name][i]) for name in known)))
    widths = [max(9, len(head) + 2) for head in rows[0]]
    return ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _short(name: str, value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if name.startswith(("gradient", "energy")) else f"{value:.3f}"


def _drawing() -> Callable[[dict[str, Any], list[dict[str, Any]], Path], None]:
    """The function that draws, asked for before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RuntimeError("the picture needs matplotlib: pip install 'spectralar[demo]'") from error
    return draw_inspection


def draw_inspection(measured: dict[str, Any], history: Sequence[dict[str, Any]], path: Path) -> None:
    """One picture: every figure by position, or by position and step where there is a history of two steps or more.

    Args:
        measured: what `inspect_tokenizer` gives.
        history: validation records of a training log, in the order of their steps.
        path: file to write; its name says the format.
    """
    from matplotlib.figure import Figure

    names = [name for name in COLUMNS if name not in _ENERGIES and name in measured]
    rows = math.ceil((len(names) + 3) / 4)
    figure = Figure(figsize=(15, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, 4).flatten()
    for panel, name in zip(panels, names, strict=False):
        panel.set_title(COLUMNS[name][1])
        _by_position(panel, name, measured, [r for r in history if r.get(f"val_{name}")])
    bands, prefixes, codebook, *rest = panels[len(names) :]
    _energies(bands, measured)
    _prefixes(prefixes, measured, history)
    if history:
        _codebook(codebook, history)
    for panel in rest if history else (codebook, *rest):
        panel.axis("off")
    figure.savefig(path, dpi=100)


def _codebook(panel: Any, history: Sequence[dict[str, Any]]) -> None:
    for name, title in (("val_perplexity", "perplexity"), ("val_codes_used", "in use")):
        panel.plot([r["step"] for r in history], [r[name] for r in history], ".-", label=title)
    panel.set(title="codebook", xlabel="step")
    panel.grid(alpha=0.3)
    panel.legend()


def _by_position(panel: Any, name: str, measured: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """A heat map of steps and positions, or a line over the positions."""
    if len(records) < 2:
        panel.plot(range(1, len(measured[name]) + 1), measured[name])
        panel.set(xlabel="token n")
        panel.grid(alpha=0.3)
        return
    rows = torch.tensor([record[f"val_{name}"] for record in records], dtype=torch.float64).T  # [N, records]
    if name.startswith("gradient"):
        panel.set_title(f"log10 of {COLUMNS[name][1]}")
        rows = rows.clamp_min(1e-12).log10()
    drawn = panel.imshow(
        rows.numpy(), aspect="auto", interpolation="nearest", extent=(-0.5, len(records) - 0.5, len(rows) + 0.5, 0.5)
    )
    panel.figure.colorbar(drawn, ax=panel)
    shown = sorted({0, len(records) // 2, len(records) - 1})
    panel.set_xticks(shown, [str(records[i]["step"]) for i in shown])
    panel.set(xlabel="step", ylabel="token n")


def _energies(panel: Any, measured: dict[str, Any]) -> None:
    for name, title in zip(_ENERGIES, ("image", "rebuilt", "error"), strict=True):
        panel.plot(range(1, len(measured[name]) + 1), measured[name], label=title)
    panel.set(title="energy by band", xlabel="band n", yscale="log")
    panel.grid(alpha=0.3)
    panel.legend()


def _prefixes(panel: Any, measured: dict[str, Any], history: Sequence[dict[str, Any]]) -> None:
    """PSNR over the prefix lengths now, or over the steps for every length."""
    if len(history) < 2:
        for name, title in (("psnr", "rebuilt"), ("psnr_ideal", "sub-image")):
            shown = [(n, v) for n, v in zip(measured["lengths"], measured[name], strict=True) if v < 99]
            panel.plot(*zip(*shown, strict=True), ".-", label=title)
        panel.set(xlabel="tokens n")
    else:
        for i, n in enumerate(history[-1]["val_lengths"]):
            panel.plot([r["step"] for r in history], [r["val_psnr"][i] for r in history], ".-", label=f"n = {n}")
        panel.set(xlabel="step")
    panel.set(title="PSNR (dB)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)
