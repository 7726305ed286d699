"""The command `inspect tokenizer`, and the generator's loss by position."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from spectralar.cli import main
from spectralar.config import GeneratorConfig
from spectralar.generator import SpectralGenerator
from spectralar.pipeline import SpectralAR
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Batch
from spectralar.training.evaluation.inspection import generator_loss
from spectralar.training.runs import validation_images
from tests.training.harness import Bench

pytest.importorskip("matplotlib", reason="the picture needs matplotlib")


def test_a_run_is_inspected_over_its_steps(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, shards, out = tmp_path / "run", str(bench.shards / "val"), tmp_path / "new" / "tokens.png"
    validation = {"validation": lambda: validation_images(shards, 16, 8)}
    saved = bench.trainer("tokenizer", run, steps=6, validate_every=2, task=validation).run()
    assert main(["inspect", "tokenizer", str(saved), shards, "--log", str(run), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = "n below codes bits drop shuffle band drop band shuffle spread distance d query d code energy rebuilt error"
    assert lines[0].split() == heads.split()
    assert [line.split()[:2] for line in lines[1:5]] == [["1", "1"], ["2", "2"], ["3", "4"], ["4", "16"]]
    assert "PSNR of 10 images: n=1 " in lines[5] and lines[6] == str(out)
    with Image.open(out) as picture:
        history = picture.size
    assert main(["inspect", "tokenizer", str(saved), shards, "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == history and picture.convert("L").getextrema() == (0, 255)


def test_a_model_shows_what_its_generator_needs(
    tokenizer: SpectralTokenizer,
    generator_config: GeneratorConfig,
    photo_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator = SpectralGenerator(generator_config).eval()
    model = str(SpectralAR(tokenizer, generator).save_pretrained(tmp_path / "model"))
    out = tmp_path / "tokens.png"
    assert main(["inspect", "tokenizer", model, str(photo_shards / "val"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    batches = list(validation_images(str(photo_shards / "val"), 16, 99))
    expected = generator_loss(tokenizer, generator, batches)
    assert lines[0].split()[-1] == "needed"
    assert [float(line.split()[-1]) for line in lines[1:5]] == pytest.approx(expected, abs=6e-4)


def test_generator_loss_is_the_cross_entropy_in_bits(
    tokenizer: SpectralTokenizer, generator_config: GeneratorConfig
) -> None:
    generator = SpectralGenerator(generator_config).eval()
    images, labels = torch.randint(256, (7, 3, 16, 16), dtype=torch.uint8), torch.arange(7) % 2
    batches = [Batch(*part) for part in zip(images.split(3), labels.split(3), strict=True)]
    tokens = tokenizer.encode(images)
    picked = F.log_softmax(generator(labels, tokens).double(), -1).gather(-1, tokens[..., None])[..., 0]
    expected = (-picked.mean(0) / math.log(2)).tolist()
    assert generator_loss(tokenizer, generator, batches) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="labels of the generator's 2 classes, not 2"):
        generator_loss(tokenizer, generator, [Batch(images, labels + 1)])


def test_wrong_calls(
    bench: Bench, tokenizer: SpectralTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, shards = str(tokenizer.save_pretrained(tmp_path / "model")), str(bench.shards / "val")
    for extra, message in (
        (["--images", "0"], "images must be at least 1, not 0"),
        (
            ["--log", str(tmp_path)],
            f"log must be the directory of a tokenizer's training run, with config.json, not {tmp_path}",
        ),
    ):
        assert main(["inspect", "tokenizer", model, shards, *extra]) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
