"""Pictures to new pictures through the command line alone, as a user would go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spectralar.cli import main
from spectralar.pipeline import SpectralAR
from spectralar.training.data import TokenStore

SMALL = """
model:
  image_size: 16
  patch_size: 4
  tokens: 8
  codebook_size: 32
  encoder: {width: 32, depth: 1, heads: 2}
  decoder: {width: 32, depth: 1, heads: 2}
data: {batch: 8, workers: 0, cache: true, crop: {size: 16, kind: random, resize: 18}}
optimizer: {warmup: 4}
loop: {steps: 20, device: cpu, log_every: 5}
"""


def pictures(folder: Path, each: int, seed: int) -> None:
    """Three classes of smooth pictures of various shapes, as PNG and JPEG."""
    random = np.random.default_rng(seed)
    for name in ("lake", "meadow", "town"):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noise = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
            noise.resize((20 + i, 24), Image.Resampling.BICUBIC).save(
                folder / name / f"{i}.{'png' if i % 2 else 'jpg'}"
            )


def call(*arguments: object) -> None:
    assert main([str(a) for a in arguments]) == 0, arguments


def test_shards_to_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(Path("photos/train"), 6, seed=0)
    pictures(Path("photos/val"), 2, seed=1)
    (tmp_path / "photos/train/lake/broken.jpg").write_bytes(b"no picture")
    call("shards", "photos/train", "shards/train", "--samples-per-shard", 7)
    assert "broken.jpg" in capsys.readouterr().out
    call("shards", "photos/val", "shards/val", "--classes-from", "shards/train", "--prefix", "val")

    Path("small.yaml").write_text(SMALL)
    stage_one = ("--preset", "demo-cpu", "--config", "small.yaml", "--data.path", "shards/train")
    call(
        "train", "tokenizer", *stage_one, "--validation", "shards/val", "--loop.out", "one", "--loop.validate-every", 10
    )

    for name, crops in (("train", 2), ("val", 1)):
        folders = ("one/final", f"shards/{name}", f"tokens/{name}")
        call("tokenize", *folders, "--crops", crops, "--kind", "random", "--device", "cpu")
    assert TokenStore.open("tokens/train").info.rows == 2 * 18

    stage_two = "--loop.steps 10 --loop.device cpu --loop.log-every 5 --model.depth 2 --batch 9".split()
    stores = ("--tokens", "tokens/train", "--validation", "tokens/val", "--tokenizer", "one/final")
    call("train", "generator", "--preset", "demo-cpu", *stores, *stage_two, "--loop.out", "two")

    shutil.copytree("one/final", "model/tokenizer")
    shutil.copytree("two/final", "model/generator")
    capsys.readouterr()
    sample = ("sample", "--model", "model", "--classes", "lake", "2", "--columns", 2, "--device", "cpu")
    options = ("--settings.guidance", 2, "--settings.top-k", 8)
    for run in ("first", "second"):
        call(*sample, *options, "--out", f"{run}.png", "--folder", run)
    names = sorted(path.name for path in Path("first").iterdir())
    assert names == [f"class{c:04d}-seed{s}.png" for c in (0, 2) for s in (0, 1)]
    for name in names:
        assert (Path("first") / name).read_bytes() == (Path("second") / name).read_bytes()
    assert Path("first-steps.png").exists() and Path("first.png").read_bytes() == Path("second.png").read_bytes()

    call(
        "reconstruct",
        "photos/val/town/0.jpg",
        "--model",
        "model",
        "--lengths",
        1,
        8,
        "--out",
        "strip.png",
    )
    assert Path("strip.png").exists()
    call("info", "--model", "model")
    assert "lake, meadow, town" in capsys.readouterr().out

    model = SpectralAR.from_pretrained("model")
    assert model.class_names == ("lake", "meadow", "town")
    drawn = model.generate([0, 1], [0, 1])
    assert drawn.shape == (2, 3, 16, 16) and drawn.dtype == torch.uint8
    for stage in ("one", "two"):
        for line in Path(stage, "log.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
