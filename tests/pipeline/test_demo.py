"""The demo with few crops and short runs: every file of the report, and going on from where it was."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spectralar.config import ViTConfig
from spectralar.pipeline import SpectralAR
from spectralar.training import demo as module
from spectralar.training.data import Crop, ShardSet
from spectralar.training.journal import read_log
from spectralar.training.presets import GENERATOR_RUNS, TOKENIZER_RUNS

pytest.importorskip("skimage", reason="the demo needs scikit-image")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "demo-gpu" if torch.cuda.is_available() else "demo-cpu"
    side = ViTConfig(32, 1, 2)
    one, two = TOKENIZER_RUNS[name], GENERATOR_RUNS[name]
    model = replace(
        one.model,
        image_size=16,
        patch_size=4,
        tokens=8,
        codebook_size=32,
        encoder=side,
        decoder=side,
        custom_cutoffs=(),
    )
    loop: dict[str, Any] = {"steps": 6, "log_every": 2, "validate_every": 3, "picture_every": 0, "checkpoint_every": 0}
    data = replace(one.data, batch=8, workers=0, crop=Crop(16, "none", flip=False))
    monkeypatch.setitem(
        TOKENIZER_RUNS,
        name,
        replace(
            one, model=model, data=data, optimizer=replace(one.optimizer, warmup=2), loop=replace(one.loop, **loop)
        ),
    )
    monkeypatch.setitem(
        GENERATOR_RUNS,
        name,
        replace(
            two,
            model=replace(two.model, depth=2),
            batch=8,
            sampling=replace(two.sampling, top_k=8),
            optimizer=replace(two.optimizer, warmup=2),
            loop=replace(two.loop, **loop),
        ),
    )
    monkeypatch.setattr(module, "TRAIN_CROPS", 3)
    monkeypatch.setattr(module, "HELD_OUT_CROPS", 1)
    monkeypatch.setattr(module, "EXAMPLES", ("heart",))


def test_the_demo_writes_its_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    out.mkdir()
    (out / "old.txt").write_text("no demo wrote this")
    with pytest.raises(ValueError, match="holds files that no demo wrote"):
        module.demo(out)
    assert (out / "old.txt").exists()
    (out / module.MARKER).touch()
    module.demo(out)
    assert not (out / "old.txt").exists()
    for name in ("embedded.png", "embedded-steps.png", "strips.png", "samples.png", "steps.png", "losses.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) >= 16, name
    assert len(list((out / "strips").glob("*.png"))) == 8
    report = (out / "report.md").read_text()
    linked = re.findall(r"\]\((.*?)\)", report)
    assert linked and all((out / name).exists() for name in linked)
    assert "24 crops of 8 photographs" in report and "8 held-out crops" in report and "nan" not in report
    rows = re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.]+ \| (?:[\d.]+|exact) \|$", report, re.MULTILINE)
    assert rows == ["1", "4", "8"]
    model = SpectralAR.from_pretrained(out / "model")
    assert model.class_names == tuple(module.PHOTOGRAPHS)
    assert model.generate([3], [0]).shape == (1, 3, 16, 16)
    assert len(ShardSet.open(out / "shards" / "train")) == 24

    log = [read_log(out / stage) for stage in ("tokenizer", "generator")]
    (out / "report.md").unlink()
    module.demo(out, fresh=False)
    assert (out / "report.md").exists()
    assert [read_log(out / stage) for stage in ("tokenizer", "generator")] == log


def test_crops_are_cut_from_every_photograph_and_repeat(tmp_path: Path) -> None:
    for run in ("a", "b"):
        train, held_out = module.cut_crops(tmp_path / run, 12)
    assert (
        sorted(p.name for p in train.iterdir())
        == sorted(p.name for p in held_out.iterdir())
        == sorted(module.PHOTOGRAPHS)
    )
    files = sorted((tmp_path / "a").rglob("*.png"))
    assert len(files) == 8 * 4
    for file in files:
        with Image.open(file) as image:
            assert image.size == (12, 12) and image.mode == "RGB"
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PHOTOGRAPHS, "unicorn", "unicorn.png")
    with pytest.raises(ValueError, match=r"the installed scikit-image lacks unicorn\.png in"):
        module.photographs()


def test_scikit_image_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    with pytest.raises(ValueError, match=r"the demo needs scikit-image: pip install 'spectralar\[demo\]'"):
        module.photographs()
