"""The demo: a tokenizer and a generator learn from photographs that ship inside scikit-image, and draw new ones."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from spectralar.commands import EXAMPLES, GOOD_LOOKING
from spectralar.generator import SpectralGenerator
from spectralar.pictures import coarse_to_fine, prefix_strip, sample_grid
from spectralar.pipeline import SpectralAR
from spectralar.sampling import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Batch, ShardSet, evaluation_batches, write_shards
from spectralar.training.data.shard_set import MANIFEST
from spectralar.training.evaluation.reconstruction import TokenizerReport, default_lengths, evaluate_tokenizer
from spectralar.training.journal import read_log
from spectralar.training.presets import GENERATOR_RUNS, TOKENIZER_RUNS
from spectralar.training.runs import train_generator, train_tokenizer
from spectralar.training.tokenizing import tokenize

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
"""Class names and files of the colour photographs in scikit-image's package."""

TRAIN_CROPS, HELD_OUT_CROPS = 160, 8

MARKER = ".spectralar-demo"
"""File by which the demo knows a folder of its own."""


def photographs() -> dict[str, Image.Image]:
    """The colour photographs of the installed scikit-image, by class name.

    Raises:
        ValueError: scikit-image is not installed, or lacks a file.
    """
    try:
        import skimage
    except ImportError as error:
        raise ValueError("the demo needs scikit-image: pip install 'spectralar[demo]'") from error
    folder = Path(skimage.__file__).parent / "data"
    missing = [file for file in PHOTOGRAPHS.values() if not (folder / file).exists()]
    if missing:
        raise ValueError(f"the installed scikit-image lacks {', '.join(missing)} in {folder}")
    return {name: Image.open(folder / file).convert("RGB") for name, file in PHOTOGRAPHS.items()}


def cut_crops(out: Path, size: int, *, seed: int = 0) -> tuple[Path, Path]:
    """Cuts squares of 90 to 100 % of the side of every photograph's central square into class folders.

    Training and held-out crops are different cuts of the same photographs, so they overlap; the held-out figures tell
    how well a model rebuilds crops that it has not seen, not photographs that it has not seen.

    Args:
        out: folder to write `train/` and `held-out/` under.
        size: side of the stored crops in pixels.
        seed: seed of the cuts.

    Returns:
        The two folders.
    """
    random = np.random.default_rng(seed)
    for name, photograph in photographs().items():
        square = ImageOps.fit(photograph, (min(photograph.size),) * 2)
        for index in range(TRAIN_CROPS + HELD_OUT_CROPS):
            side = int(square.width * random.uniform(0.9, 1.0))
            left, top = (int(random.integers(0, square.width - side + 1)) for _ in range(2))
            box = (left, top, left + side, top + side)
            crop = square.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
            folder = out / ("train" if index < TRAIN_CROPS else "held-out") / name
            folder.mkdir(parents=True, exist_ok=True)
            crop.save(folder / f"{index:04d}.png")
    return out / "train", out / "held-out"


def demo(out: Path = Path("runs/demo"), *, fresh: bool = True) -> None:
    """Train on eight photographs, rebuild held-out crops, and draw new pictures; minutes on a laptop, no download.

    Args:
        out: folder for shards, models, pictures and the report.
        fresh: start again if the folder holds an earlier demo; otherwise go on from its last checkpoint.

    Raises:
        ValueError: a folder that holds something else, or scikit-image is missing.
    """
    console = Console(stderr=True)
    began = time.perf_counter()
    preset = "demo-gpu" if torch.cuda.is_available() else "demo-cpu"
    _claim(out, fresh)
    _show_embedded(out, console)

    first, second = TOKENIZER_RUNS[preset], GENERATOR_RUNS[preset]
    console.rule("1  photographs to shards")
    if not (out / "shards" / "held-out" / MANIFEST).exists():
        train, held_out = cut_crops(out / "crops", first.data.crop.size)
        write_shards(train, out / "shards" / "train")
        write_shards(held_out, out / "shards" / "held-out", classes_from=out / "shards" / "train")
    train_set = ShardSet.open(out / "shards" / "train")
    console.print(f"{len(train_set)} training crops of {train_set.classes} photographs, preset {preset}")

    console.rule("2  tokenizer: image to ordered tokens and back")
    held_out_path = str(out / "shards" / "held-out")
    first = replace(
        first,
        data=replace(first.data, path=str(out / "shards" / "train")),
        loop=replace(first.loop, out=str(out / "tokenizer")),
        validation=held_out_path,
    )
    tokenizer_path = train_tokenizer(first, resume=not fresh, console=console)
    device = first.loop.resolved_device()
    tokenizer = SpectralTokenizer.from_pretrained(tokenizer_path, device=device)

    console.rule("3  generator: class to tokens")
    for name, path in (("train", first.data.path), ("held-out", held_out_path)):
        shutil.rmtree(out / "tokens" / name, ignore_errors=True)
        data = replace(first.data, path=path)
        tokenize(tokenizer, data, out / "tokens" / name, console=console)
    second = replace(
        second,
        tokens=str(out / "tokens" / "train"),
        validation=str(out / "tokens" / "held-out"),
        tokenizer=str(tokenizer_path),
        loop=replace(second.loop, out=str(out / "generator")),
    )
    generator_path = train_generator(second, resume=not fresh, console=console)
    generator = SpectralGenerator.from_pretrained(generator_path, device=device)

    console.rule("4  pictures and report")
    model = SpectralAR(tokenizer, generator)
    crops = list(evaluation_batches(held_out_path, batch=64, size=tokenizer.config.image_size))
    report = evaluate_tokenizer(tokenizer, crops, costs=True)
    model.save_pretrained(out / "model")
    _draw_strips(out, model, crops)
    _write_report(out, model, report, second.sampling, time.perf_counter() - began)
    console.print(_table(report))
    console.print(f"report: {out / 'report.md'}   pictures: {out}/*.png   model: {out / 'model'}")


def _claim(out: Path, fresh: bool) -> None:
    """Makes the demo's folder, emptied of an earlier demo if `fresh`; never touches a folder of anything else."""
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ValueError(f"out {out} holds files that no demo wrote; name a new or empty folder")
    if fresh:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def _show_embedded(out: Path, console: Console) -> None:
    console.rule("0  the model that ships with the package")
    model = SpectralAR.from_pretrained()
    began = time.perf_counter()
    classes = model.find_classes(EXAMPLES)
    sample_grid(model, classes=classes, settings=GOOD_LOOKING).save(out / "embedded.png")
    coarse_to_fine(model, classes[0], settings=GOOD_LOOKING).save(out / "embedded-steps.png")
    console.print(f"drew {out / 'embedded.png'} and embedded-steps.png in {time.perf_counter() - began:.1f} s")


def _table(report: TokenizerReport) -> Table:
    table = Table(title=f"PSNR in dB of {report.images} held-out crops")
    for column in ("tokens n", "to the crop", "to its sub-image I'_n", "of I'_n itself"):
        table.add_column(column, justify="right")
    for row in _rows(report):
        table.add_row(*row)
    return table


def _rows(report: TokenizerReport) -> list[tuple[str, ...]]:
    """Rows of the PSNR table as text; the last sub-image is the crop itself."""
    lists = zip(report.lengths, report.psnr, report.psnr_target, report.psnr_ideal, strict=True)
    rows = [(str(n), f"{a:.2f}", f"{b:.2f}", f"{c:.2f}") for n, a, b, c in lists]
    rows[-1] = (*rows[-1][:3], "exact")
    return [*rows, ("mean colour", f"{report.psnr_mean_colour:.2f}", "", "")]


def _draw_strips(out: Path, model: SpectralAR, crops: Sequence[Batch]) -> None:
    """A strip of every held-out crop under `strips/`, and one of each class together in `strips.png`."""
    lengths = default_lengths(model.tokenizer.config.tokens)
    images = torch.cat([batch.images for batch in crops])
    labels = torch.cat([batch.labels for batch in crops]).tolist()
    (out / "strips").mkdir(exist_ok=True)
    for i, label in enumerate(labels):
        place = out / "strips" / f"{model.class_names[label]}-{labels[:i].count(label)}.png"
        prefix_strip(model.tokenizer, images[i : i + 1], lengths).save(place)
    first = [labels.index(label) for label in sorted(set(labels))]
    prefix_strip(model.tokenizer, images[first], lengths).save(out / "strips.png")


def _write_report(
    out: Path,
    model: SpectralAR,
    report: TokenizerReport,
    settings: SamplingSettings,
    seconds: float,
) -> None:
    sample_grid(model, settings=settings).save(out / "samples.png")
    coarse_to_fine(model, 0, seed=0, settings=settings).save(out / "steps.png")
    _plot_losses(out)
    rows = "\n".join(f"| {' | '.join(row)} |" for row in _rows(report))
    gain = report.psnr[-1] - report.psnr_mean_colour
    said = ", ".join(str(count) for count in report.distinct)
    cost = ", ".join(f"{value:.2f}" for value in report.drop_cost)
    (out / "report.md").write_text(
        f"""# SpectralAR demo

{TRAIN_CROPS * len(PHOTOGRAPHS)} crops of {len(PHOTOGRAPHS)} photographs (from scikit-image; the class is the
photograph), {seconds / 60:.1f} minutes on {model.tokenizer.device.type}. Held-out crops are other cuts of the same
photographs.

## Rebuilding {report.images} held-out crops

One crop of every photograph; the folder `strips` has all {report.images}.

![original, sub-images, reconstructions](strips.png)

| tokens n | PSNR to the crop (dB) | to its sub-image I'_n | of I'_n itself |
|---|---|---|---|
{rows}

All tokens gain {gain:.2f} dB over predicting the mean colour. Of {model.tokenizer.config.codebook_size} codes
{report.codes_used} are in use. Different codes per position: {said}. PSNR in dB lost when the token of a position is
replaced by the most frequent one: {cost}.

## Drawing new pictures

One row per class, another seed per column ({_describe(settings)}).

![samples](samples.png)

One picture from its first tokens to its last:

![coarse to fine](steps.png)

## Learning curves

![losses](losses.png)
"""
    )


def _describe(settings: SamplingSettings) -> str:
    parts = [f"guidance {settings.guidance:g} ({settings.guidance_schedule})"]
    parts += [f"top-k {settings.top_k}"] if settings.top_k else []
    parts += [f"top-p {settings.top_p:g}"] if settings.top_p else []
    return ", ".join(parts)


def _plot_losses(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    curves: Sequence[tuple[str, str, str]] = (
        ("tokenizer", "pixel", "mean squared error"),
        ("generator", "loss", "nats per token"),
    )
    for axis, (stage, key, label) in zip(axes, curves, strict=True):
        records = read_log(out / stage)
        trained = [(r["step"], r[key]) for r in records if key in r]
        axis.plot(*zip(*trained, strict=True), label="training")
        held_out = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
        if held_out:
            axis.plot(*zip(*held_out, strict=True), "o-", label="held out")
        axis.set(title=stage, xlabel="step", ylabel=label, yscale="log" if stage == "tokenizer" else "linear")
        axis.legend()
    figure.savefig(out / "losses.png", dpi=110)
    plt.close(figure)
