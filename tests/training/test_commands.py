"""The commands of the training room through the command line: options, exit status and the text of errors."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from spectralar.cli import main
from spectralar.generator import SpectralGenerator
from spectralar.images import psnr, to_float
from spectralar.pipeline import SpectralAR
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.checkpoint import checkpoints
from spectralar.training.data import Crop, TokenStore, apply_crop, decode_image
from spectralar.training.journal import read_log
from spectralar.training.loop import Trainer


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tokenizer_yaml: str) -> str:
    return tokenizer_yaml


@pytest.fixture
def saved(tokenizer: SpectralTokenizer, tmp_path: Path) -> Path:
    return tokenizer.save_pretrained(tmp_path / "saved")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Twice as wide as high, so that the cut to the central square shows."""
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (20, 40, 3), dtype=torch.uint8, generator=random)
    Image.fromarray(pixels.numpy()).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def test_reconstruct_writes_a_strip_and_a_table(
    saved: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "strip.png"
    call = [
        str(picture),
        "--model",
        str(saved),
        "--lengths",
        "1",
        "3",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert main(["reconstruct", *call]) == 0
    printed = capsys.readouterr().out
    tokenizer = SpectralTokenizer.from_pretrained(saved)
    crop = Crop(16, "center", flip=False)
    image = apply_crop(decode_image(picture.read_bytes()), crop, None)[None]  # type: ignore[arg-type]
    for n in (1, 3):
        value = psnr(tokenizer.reconstruct(image, n).detach(), to_float(image)).item()
        assert f"n = {n}" in printed and f"{value:.2f}" in printed
    assert "wide.png" in printed and printed.splitlines()[-1] == str(out)
    with Image.open(out) as strip:
        assert strip.height >= 2 * 16 and strip.width >= 3 * 16


def test_reconstruct_takes_whole_models_and_all_default_lengths(
    tokenizer: SpectralTokenizer, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save_pretrained(tmp_path / "model" / "tokenizer")
    assert main(["reconstruct", str(picture), str(picture), "--model", str(tmp_path / "model")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("wide.png") == 2 and "n = 1" in printed and "n = 4" in printed
    assert (tmp_path / "reconstructed.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wide.png", "--lengths", "0", "2"], "lengths must be in 1..4, not 0, 2"),
        (["wide.png", "--lengths", "5"], "lengths must be in 1..4, not 5"),
        (["none.png"], "none.png"),
        (["tokenizer.yaml"], "tokenizer.yaml: not an image that Pillow can read"),
        (["wide.png", "--device", "abacus"], "device must be auto, cpu or cuda, not 'abacus'"),
        (["wide.png", "--model", "/nowhere"], "no such directory: /nowhere"),
        ([], "pictures must name at least one image file"),
    ],
)
def test_reconstruct_refuses(
    saved: Path,
    picture: Path,
    config: str,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    defaults = [] if "--model" in arguments else ["--model", str(saved)]
    assert main(["reconstruct", *arguments, *defaults]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.out == ""
    assert not Path("reconstructed.png").exists()


def test_tokenize(saved: Path, photo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "store"
    call = [str(saved), str(photo_shards / "val"), str(out)]
    options = ["--crops", "3", "--kind", "random", "--resize", "18", "--flip", "--batch", "4", "--seed", "2"]
    assert main(["tokenize", *call, *options, "--device", "cpu"]) == 0
    assert capsys.readouterr().out == f"30 rows of 4 tokens, 2 classes: {out}\n"
    store = TokenStore.open(out)
    assert (store.info.crops, store.info.rows, store.info.class_names) == (3, 30, ("dusk", "noon"))
    assert main(["tokenize", *call]) == 1
    assert f"path {out} exists already" in capsys.readouterr().err
    ten = [*call[:2], str(tmp_path / "ten"), "--kind", "ten-crop", "--backend", "pillow", "--device", "cpu"]
    assert main(["tokenize", *ten]) == 0
    assert TokenStore.open(tmp_path / "ten").info.crops == 10


def test_tokenize_refuses(saved: Path, photo_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", str(saved), "nowhere", "store"]) == 1
    assert "nowhere" in capsys.readouterr().err
    call = [str(saved), str(photo_shards / "val"), "store"]
    assert main(["tokenize", *call, "--kind", "random", "--resize", "8"]) == 1
    assert "resize must be at least size 16, not 8" in capsys.readouterr().err
    assert not Path("store").exists()


def test_train_tokenizer_layers_preset_file_and_options(
    config: str, photo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    call = [
        "--preset",
        "demo-cpu",
        "--config",
        config,
        "--data.path",
        str(photo_shards / "train"),
        "--loop.out",
        str(out),
    ]
    assert main(["train", "tokenizer", *call, "--optimizer.lr", "0.002", "--loop.steps", "4"]) == 0
    assert capsys.readouterr().out == f"tokenizer: {out / 'final'}\n"
    written = json.loads((out / "config.json").read_text())
    assert written["optimizer"]["lr"] == 0.002  # option over file
    assert written["optimizer"]["warmup"] == 2  # file over preset
    assert written["optimizer"]["betas"] == [0.9, 0.99]  # preset
    assert SpectralTokenizer.from_pretrained(out / "final").config.tokens == 4
    assert [r["step"] for r in read_log(out)] == [1, 2, 3, 4]

    again = ["train", "tokenizer", *call, "--optimizer.lr", "0.002", "--loop.steps", "6"]
    assert main(again) == 1
    assert "step-00000004 exists: resume that run, or choose another directory" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert [p.name for p in checkpoints(out / "checkpoints")] == ["step-00000004", "step-00000006"]
    assert main(["train", "tokenizer", "--resume", *call]) == 1
    assert "optimizer.lr was 0.002, is 0.001" in capsys.readouterr().err


def test_train_generator(saved: Path, photo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenize", str(saved), str(photo_shards / "train"), "tokens", "--device", "cpu"]) == 0
    (tmp_path / "generator.yaml").write_text("model: {depth: 1}\nbatch: 4\nsampling: {top_k: 0}\n")
    options = "--loop.steps 2 --loop.device cpu --optimizer.warmup 1 --tokens tokens --loop.out run".split()
    call = ["--preset", "demo-cpu", "--config", "generator.yaml", "--tokenizer", str(saved), *options]
    capsys.readouterr()
    assert main(["train", "generator", *call]) == 0
    assert capsys.readouterr().out == "generator: run/final\nmodel: run/model\n"
    model = SpectralAR.from_pretrained("run/model")
    assert model.generate([1], seeds=[0]).shape == (1, 3, 16, 16) and model.class_names == ("dusk", "noon")
    config = SpectralGenerator.from_pretrained("run/final").config
    assert config.class_names == ("dusk", "noon") and config.depth == 1
    assert Path("run/pictures/step-00000002.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenizer"], "data.path must name a folder of shards (make one with `spectralar shards`)"),
        (["generator", "--preset", "demo-cpu"], "tokens must name a token store (make one with `spectralar tokenize`)"),
        (["generator", "--tokens", "x"], 'which gives token_input="code" its codes'),
        (["generator", "--preset", "demo-cpu", "--tokens", "x[red]"], "x[red] is no token store"),
        (["tokenizer", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["tokenizer", "--config", "bad.yaml"], "unknown field optimizer.speed; OptimizerConfig has lr, betas"),
        (["tokenizer", "--data.crop.size", "12"], "data.crop.size must be model.image_size 128, not 12"),
        (["tokenizer", "--optimizer.ema", "1"], "ema must be in [0, 1), not 1.0"),
    ],
)
def test_train_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    Path("bad.yaml").write_text("optimizer: {speed: 3}")
    try:
        status = main(["train", *arguments])
    except SystemExit as stopped:  # tyro reports the errors of a dataclass by itself
        status = stopped.code  # type: ignore[assignment]
    assert status in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "tokenizer", "--preset", "huge"],
        ["train", "tokenizer", "--loop.stepz", "3"],
        ["train", "generator", "--loop.steps", "many"],
        ["tokenize", "--crops", "2"],
    ],
)
def test_a_wrong_call_exits_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert arguments[2] in capsys.readouterr().err or arguments[0] == "tokenize"


@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_help_names_presets_and_fields(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", stage, "--preset", "demo-cpu", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for word in ("--preset NAME", "demo-gpu", "--config FILE", "--resume", "--optimizer.lr", "--loop.steps"):
        assert word in printed


def test_an_interrupt_exits_with_130(
    config: str, photo_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = Trainer._plain_update

    def interrupted(trainer: Trainer, inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGINT)
        return update(trainer, inputs)

    monkeypatch.setattr(Trainer, "_plain_update", interrupted)
    call = ["--config", config, "--data.path", str(photo_shards / "train"), "--loop.out", "run", "--preset", "demo-cpu"]
    assert main(["train", "tokenizer", *call]) == 130
    assert "resume to go on" in capsys.readouterr().err


def test_traceback_shows_the_place(config: str) -> None:
    with pytest.raises(ValueError, match=r"data\.path must name"):
        main(["train", "tokenizer", "--config", config, "--preset", "demo-cpu", "--traceback"])
