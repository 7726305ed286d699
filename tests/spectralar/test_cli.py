"""The command line in-process: what it prints, its exit status, and that errors come without a traceback."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import spectralar
from spectralar import cli, commands
from spectralar.cli import COMMANDS, main
from spectralar.devices import QUEUES, auto_device
from spectralar.pipeline import SpectralAR


@pytest.fixture
def saved(model: SpectralAR, tmp_path: Path) -> str:
    return str(model.save_pretrained(tmp_path / "model"))


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"spectralar {name}" in shown and text in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"spectralar {spectralar.__version__}\n"


def test_arguments_come_from_the_command_line_when_none_are_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["spectralar", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("spectralar ")


def test_a_reader_may_leave_early() -> None:
    program = "import sys; from spectralar.cli import main; sys.exit(main(['train', 'tokenizer', '--help']))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        done = subprocess.run([sys.executable, "-c", program], stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_a_group_names_its_commands(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", option]) == 0
    shown = capsys.readouterr().out
    assert "train tokenizer" in shown and "train generator" in shown and "bench" not in shown


@pytest.mark.parametrize("arguments", [["paint"], ["train"], ["train", "model"], ["[bold]x[/red]"], ["--verbose"]])
def test_an_unknown_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: no command {' '.join(arguments)!r}; see spectralar --help\n"
    assert captured.out == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([*name.split(), "--help"])
    assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert f"spectralar {name}" in shown and "--help" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_an_unknown_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([*name.split(), "--no-such-option", "1"])
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"spectralar {name}" in captured.err


@pytest.mark.parametrize("place", [place for place, _ in COMMANDS.values()])
def test_every_command_has_a_function_with_a_docstring(place: str) -> None:
    module, _, function = place.partition(":")
    assert getattr(importlib.import_module(module), function).__doc__


def test_sample(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, folder = tmp_path / "new" / "picture.png", tmp_path / "single"
    options = ["--columns", "2", "--seed", "5", "--device", "cpu", "--out", str(out), "--folder", str(folder)]
    assert main(["sample", "--model", saved, "--classes", "crane", "0", "--settings.top-k", "9", *options]) == 0
    assert "4 pictures in" in capsys.readouterr().err
    with Image.open(out) as picture, Image.open(out.with_name("picture-steps.png")) as steps:
        assert picture.height == 2 * 36 and picture.width > 2 * 36
        assert steps.height == 36 + 20 and steps.width > 4 * 36
    names = ["class0000-seed5.png", "class0000-seed6.png", "class0002-seed5.png", "class0002-seed6.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Image.open(folder / names[0]) as single:
        assert single.size == (32, 32)


def test_sample_is_reproducible(saved: str, tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"]
    for file, seed in zip(files, ("0", "0", "1"), strict=True):
        options = ["--classes", "1", "--columns", "1", "--settings.top-k", "0", "--length", "3", "--seed", seed]
        assert main(["sample", "--model", saved, *options, "--out", str(file)]) == 0
    same, again, other = (file.read_bytes() for file in files)
    assert same == again != other


def test_info(saved: str, capsys: pytest.CaptureFixture[str], model: SpectralAR) -> None:
    assert main(["info", "--model", saved]) == 0
    shown = capsys.readouterr().out
    for part in (model.tokenizer, model.generator):
        assert f"{sum(p.numel() for p in part.parameters()):,}" in shown
    for text in (
        torch.__version__,
        "red panda, Giant panda, crane",
        ", ".join(map(str, model.tokenizer.config.cutoffs)),
    ):
        assert text in shown
    assert "depth=2" in shown and "patch_size=8" in shown


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--classes", "dog"], "class 'dog' fits 0 classes; allowed: 0..2 or one of red panda, Giant panda, crane"),
        (["--columns", "0"], "columns must be at least 1, not 0"),
        (["--settings.top-k", "33"], "top_k must be at most the codebook size 32, not 33"),
        (["--settings.top-k", "0", "--length", "9"], "length must be 1..8, not 9"),
        (["--device", "abacus"], "device must be auto, cpu or cuda, not 'abacus'"),
        (["--model", "./[red]absent[/]"], "no such directory: ./[red]absent[/]"),
    ],
)
def test_an_error_is_one_line_and_status_1(
    saved: str, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    assert main(["sample", "--model", saved, "--out", str(out), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n"
    assert captured.out == "" and not out.exists()


def test_an_impossible_setting_is_a_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["sample", "--settings.guidance", "-1"])
    assert leaving.value.code == 2
    assert "guidance must be a number of at least 0, not -1.0" in capsys.readouterr().err


def test_long_messages_are_not_wrapped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    path = "./" + "x" * 90
    assert main(["info", "--model", path]) == 1
    assert capsys.readouterr().err == f"error: no such directory: {path}\n"


def test_traceback_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"no such directory: \./absent"):
        main(["info", "--model", "./absent", "--traceback"])


def test_an_interruption_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: str = "") -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "info", interrupted)
    assert main(["info"]) == 130


def test_a_mistake_in_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: str = "") -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(commands, "info", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["info"])


def test_auto_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert auto_device("auto") == torch.device(expected)
        assert auto_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert auto_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device is cuda:2, but PyTorch sees 2 GPUs"):
        auto_device("cuda:2")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, not 'meta'"):
        auto_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda, but PyTorch sees no GPU; use auto or cpu"):
        auto_device("cuda:0")


def test_commands_start_with_many_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(cli, "_resolve", lambda place: lambda: seen.append(os.environ.get(QUEUES)))
    monkeypatch.delenv(QUEUES, raising=False)
    assert main(["info"]) == 0
    monkeypatch.setenv(QUEUES, "1")
    assert main(["info"]) == 0
    assert seen == ["32", "1"]


def test_the_package_offers_its_names_lazily() -> None:
    for name in spectralar.__all__:
        value: Any = getattr(spectralar, name)
        assert value is not None
    assert dir(spectralar) == sorted(spectralar.__all__)
    with pytest.raises(AttributeError, match="module 'spectralar' has no attribute 'Diffusion'"):
        spectralar.Diffusion  # noqa: B018
