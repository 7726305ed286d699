"""The commands that need models only: `sample` and `info`."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from spectralar.config import to_dict
from spectralar.devices import auto_device
from spectralar.pictures import coarse_to_fine, grid, sample_rows, to_image
from spectralar.pipeline import SpectralAR
from spectralar.sampling import BackendName, SamplingSettings, WeightFormat, weight_error
from spectralar.weights import EMBEDDED

GOOD_LOOKING = SamplingSettings(guidance=2.0, guidance_schedule="ramp", top_p=0.92)
"""Settings under which the embedded model draws clean pictures."""

EXAMPLES = ("face-tongue", "heart", "food-fruit", "country-flag", "time", "plant-flower", "person-role", "lock")
"""Classes of the embedded model that `sample` draws when none are named."""


def spread_classes(model: SpectralAR, count: int = len(EXAMPLES)) -> list[str]:
    """Numbers of up to `count` classes, evenly spread over all of them."""
    total = model.generator.config.classes
    shown = min(count, total)
    return [str(i * total // shown) for i in range(shown)]


def sample(
    model: str = str(EMBEDDED),
    classes: tuple[str, ...] = (),
    columns: int = 4,
    seed: int = 0,
    settings: SamplingSettings = GOOD_LOOKING,
    length: int | None = None,
    out: Path = Path("samples.png"),
    folder: Path | None = None,
    device: str = "auto",
    backend: BackendName = "auto",
    weights: WeightFormat = "same",
) -> None:
    """Draw pictures: a labelled grid, and beside it one picture from its first token to its last.

    Args:
        model: directory or Hub id of a saved model; the emoji model that ships with the package unless given.
        classes: class numbers or names (a part that fits one class is enough); eight spread over all unless given.
        columns: pictures per class; column j has seed SEED + j.
        seed: seed of the first column; the same class and seed give the same picture in any batch.
        settings: guidance and filters.
        length: draw only the first so many tokens (the paper's truncation).
        out: the grid; the coarse-to-fine strip goes beside it as NAME-steps.png.
        folder: also write every picture by itself into this folder.
        device: auto, cpu or cuda.
        backend: auto, reference (eager PyTorch), graph (the same in CUDA graphs) or fused (kernels of our own).
        weights: same (the model's), or fp8: half the bytes a step reads; then a line says what that changes.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, not {columns}")
    console = Console(stderr=True)
    loaded = SpectralAR.from_pretrained(model, device=auto_device(device), backend=backend, weights=weights)
    chosen = loaded.find_classes(classes or (EXAMPLES if model == str(EMBEDDED) else spread_classes(loaded)))
    began = time.perf_counter()
    rows = sample_rows(loaded, chosen, columns=columns, seed=seed, settings=settings, length=length)
    seconds = time.perf_counter() - began
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, row_labels=[loaded.class_label(c) for c in chosen]).save(out)
    steps = out.with_name(f"{out.stem}-steps{out.suffix}")
    coarse_to_fine(loaded, chosen[0], seed=seed, settings=settings).save(steps)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for c, row in zip(chosen, rows, strict=True):
            for j, image in enumerate(row):
                to_image(image).save(folder / f"class{c:04d}-seed{seed + j}.png")
    count = len(chosen) * columns
    console.print(
        f"{count} picture{'s' * (count > 1)} in {seconds:.1f} s on {loaded.generator.device}, backend {loaded.backend} "
        f"({escape(loaded.backend_reason)}): {escape(f'{out}, {steps}')}"
    )
    if weights == "fp8":
        tokens = loaded.sample_tokens(chosen, [seed] * len(chosen), settings)
        console.print(str(weight_error(loaded.generator, chosen, tokens)), highlight=False)


def info(model: str = str(EMBEDDED)) -> None:
    """Show what is installed, and what a model is made of.

    Args:
        model: directory or Hub id of a saved model; the emoji model that ships with the package unless given.
    """
    console = Console()
    table = Table(title="installed", show_header=False)
    table.add_row("python", platform.python_version())
    for name in ("spectralar", "torch", "triton", "flash-attn", "flash-attn-4", "nvidia-dali-cuda130", "webdataset"):
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "-")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    table.add_row("GPU", gpu)
    console.print(table)

    loaded = SpectralAR.from_pretrained(model)
    tokenizer, generator = loaded.tokenizer.config, loaded.generator.config
    shape = Table(title=escape(f"model {model}"), show_header=False)
    for part, module in (("tokenizer", loaded.tokenizer), ("generator", loaded.generator)):
        count = sum(p.numel() for p in module.parameters())
        shape.add_row(f"{part} parameters", f"{count:,}")
    shape.add_row("forward pass of the tokenizer", f"{tokenizer.flops() / 1e9:.2f} GFLOP an image")
    shape.add_row("forward pass of the generator", f"{generator.flops() / 1e9:.2f} GFLOP a sequence")
    shape.add_row("weights read by one cached step", f"{generator.decode_weight_bytes() / 1e6:.1f} MB in bf16")
    shape.add_row("cutoffs", ", ".join(map(str, tokenizer.cutoffs)))
    names = ", ".join(loaded.class_names[:12]) + (", ..." if generator.classes > 12 else "")
    shape.add_row("classes", escape(names))
    for part, config in (("tokenizer", tokenizer), ("generator", generator)):
        values = {k: v for k, v in to_dict(config).items() if k not in ("class_names", "custom_cutoffs")}
        shape.add_row(part, "  ".join(f"{k}={v}" for k, v in values.items()))
    console.print(shape)
