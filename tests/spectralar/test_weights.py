"""Saving and loading: exact both ways, and an error that names what is wrong with a damaged or foreign directory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig
from spectralar.generator import SpectralGenerator
from spectralar.pipeline import SpectralAR
from spectralar.tokenizer import SpectralTokenizer
from spectralar.weights import WeightsError
from spectralar.weights.pretrained import load_strict, resolve

Make = Callable[..., Any]


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name


def test_a_tokenizer_survives_exactly(make_tokenizer: Make, tmp_path: Path, photos: Tensor) -> None:
    """The nested configuration too: both transformers, the tuple of cutoffs, every choice."""
    model = make_tokenizer(
        encoder=ViTConfig(16, 1, 2),
        mask="strict",
        supervision="full",
        custom_cutoffs=(1, 2, 3, 4, 5, 6, 7, 32),
        latent_norm="batch",
    ).train()
    model.encode(photos)  # moves the running statistics
    assert model.save_pretrained(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    loaded = SpectralTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config and repr(loaded.config) == repr(model.config)
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert torch.equal(loaded.cutoffs, model.cutoffs)
    assert torch.equal(loaded.encode(photos), model.eval().encode(photos))


@pytest.mark.parametrize("token_input", ["table", "code"])
def test_a_generator_survives_exactly(make_generator: Make, tmp_path: Path, token_input: str) -> None:
    model = make_generator(token_input=token_input, class_names=("a", "\u00e9", "\U0001f600"), drop_path=None, group=4)
    loaded = SpectralGenerator.from_pretrained(str(model.save_pretrained(tmp_path)))
    assert loaded.config == model.config and repr(loaded.config) == repr(model.config)
    assert_same_weights(loaded, model)
    if token_input == "code":
        assert loaded.codes.any(), "the code vectors come with the weights"


def test_a_whole_model_survives_exactly(model: SpectralAR, tmp_path: Path) -> None:
    assert model.save_pretrained(tmp_path) == tmp_path
    loaded = SpectralAR.from_pretrained(tmp_path)
    assert loaded.tokenizer.config == model.tokenizer.config and loaded.generator.config == model.generator.config
    assert_same_weights(loaded.tokenizer, model.tokenizer)
    assert_same_weights(loaded.generator, model.generator)
    assert torch.equal(loaded.generate([1], [2], length=2), model.generate([1], [2], length=2))


def test_storage_in_bf16(model: SpectralAR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "generator" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    loaded = SpectralAR.from_pretrained(tmp_path)
    for ours, theirs in ((loaded.tokenizer, model.tokenizer), (loaded.generator, model.generator)):
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b.bfloat16().float()), name
    assert model.generator.positions.dtype == torch.float32, "saving leaves the model as it is"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_can_be_loaded_and_used_in_another_dtype(model: SpectralAR, tmp_path: Path, dtype: torch.dtype) -> None:
    loaded = SpectralAR.from_pretrained(model.save_pretrained(tmp_path), dtype=dtype)
    assert loaded.generator.positions.dtype == loaded.tokenizer.codebook.dtype == dtype
    assert loaded.generate([0], [1], length=2).shape == (1, 3, 32, 32)


def test_saving_again_replaces_the_files(make_tokenizer: Make, tmp_path: Path) -> None:
    make_tokenizer(tokens=4).save_pretrained(tmp_path)
    make_tokenizer(tokens=8).save_pretrained(tmp_path)
    assert SpectralTokenizer.from_pretrained(tmp_path).config.tokens == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_another_model_class_is_refused(generator: SpectralGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    message = f"{tmp_path / 'config.json'} describes a SpectralGenerator, not a SpectralTokenizer"
    with pytest.raises(WeightsError, match=re.escape(message)):
        SpectralTokenizer.from_pretrained(tmp_path)


def test_what_is_no_model_says_what_it_is(generator: SpectralGenerator, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path / "alone")
    message = f"{tmp_path / 'alone'} is a tokenizer, a generator or a training run; a model is a folder with"
    with pytest.raises(WeightsError, match=re.escape(message)):
        SpectralAR.from_pretrained(tmp_path / "alone")
    (tmp_path / "config.json").write_text('{"model": {"tokens": 64}, "loop": {}}', encoding="utf-8")
    message = f"{tmp_path} is a training run; what it trained is in {tmp_path / 'final'}"
    with pytest.raises(WeightsError, match=re.escape(message)):
        SpectralTokenizer.from_pretrained(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(model: SpectralAR, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device is cuda, but PyTorch sees no GPU; use auto or cpu"):
        SpectralAR.from_pretrained(tmp_path, device="cuda")
    assert SpectralAR.from_pretrained(tmp_path, device="auto").tokenizer.device.type == "cpu"


def edit_config(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder": {"width": 32, "depth": 2, "heads": 2, "dropout": 0.1}}, "unknown field encoder.dropout"),
        ({"encoder": {"width": 32, "depth": 2}}, "missing field encoder.heads of ViTConfig"),
        ({"tokens": "8"}, "tokens must be of type int, not '8'"),
        ({"tokens": 64}, "tokens must be between 1 and image_size 32"),
        ({"version": 2}, "unknown field version"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(
    tokenizer: SpectralTokenizer, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    tokenizer.save_pretrained(tmp_path)
    edit_config(tmp_path / "config.json", **changes)
    with pytest.raises(WeightsError, match=re.escape(f"{tmp_path / 'config.json'}: {message}")):
        SpectralTokenizer.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_all_named(tokenizer: SpectralTokenizer, tmp_path: Path) -> None:
    file = tokenizer.save_pretrained(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["codebook"]
    weights["encoder.queries"] = weights["encoder.queries"][:3].clone()
    weights["ema.step"] = torch.zeros(1)
    save_file(weights, file)
    with pytest.raises(WeightsError) as caught:
        SpectralTokenizer.from_pretrained(tmp_path)
    assert str(caught.value) == (
        f"{file} does not fit SpectralTokenizer: missing codebook; extra ema.step; "
        "encoder.queries has shape [3, 32], expected [8, 32]"
    )


def test_a_long_list_of_misfits_is_cut(generator: SpectralGenerator) -> None:
    count = len(generator.state_dict())
    with pytest.raises(WeightsError, match=f"there does not fit SpectralGenerator: missing .* and {count - 8} more$"):
        load_strict(generator, {}, what="there")


def test_a_failed_load_changes_nothing(generator: SpectralGenerator) -> None:
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    halves = {name: tensor * 0.5 for name, tensor in before.items() if name != "positions"}
    with pytest.raises(WeightsError):
        load_strict(generator, halves, what="there")
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not safetensors", bytes(64)])
def test_damaged_weights(tokenizer: SpectralTokenizer, tmp_path: Path, content: bytes) -> None:
    file = tokenizer.save_pretrained(tmp_path) / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(f"damaged file: {file}: ")):
        SpectralTokenizer.from_pretrained(tmp_path)


def test_truncated_weights(tokenizer: SpectralTokenizer, tmp_path: Path) -> None:
    file = tokenizer.save_pretrained(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match=re.escape(f"damaged file: {file}: ")):
        SpectralTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"tokens": 8', b"\xff\xfe{}"])
def test_damaged_configuration(tokenizer: SpectralTokenizer, tmp_path: Path, content: bytes) -> None:
    file = tokenizer.save_pretrained(tmp_path) / "config.json"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(f"damaged file: {file}")):
        SpectralTokenizer.from_pretrained(tmp_path)
    file.write_text("[1, 2]")
    with pytest.raises(WeightsError, match=re.escape(f"damaged file: {file} holds no JSON object")):
        SpectralTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files(tokenizer: SpectralTokenizer, tmp_path: Path, name: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(WeightsError, match=re.escape(f"missing file: {tmp_path / name}")):
        SpectralTokenizer.from_pretrained(tmp_path)


def test_a_missing_part_of_a_model(model: SpectralAR, tmp_path: Path) -> None:
    model.tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(WeightsError, match=re.escape(f"missing file: {tmp_path / 'generator' / 'config.json'}")):
        SpectralAR.from_pretrained(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Hub: `folder` is what a download gives; `calls` are the downloads asked for."""
    state: dict[str, Any] = {"folder": None, "calls": []}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        state["calls"].append((repo_id, options["revision"]))
        if state["folder"] is None:
            raise ConnectionError("no such repository")
        return str(state["folder"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return state


def test_a_hub_repository(hub: dict[str, Any], model: SpectralAR, tmp_path: Path) -> None:
    hub["folder"] = model.save_pretrained(tmp_path)
    loaded = SpectralAR.from_pretrained("someone/spectralar-emoji", revision="v2")
    assert_same_weights(loaded.generator, model.generator)
    SpectralTokenizer.from_pretrained("someone/spectralar-emoji", subfolder="tokenizer")
    assert hub["calls"] == [("someone/spectralar-emoji", "v2"), ("someone/spectralar-emoji", None)]


def test_a_hub_repository_that_cannot_be_had(hub: dict[str, Any]) -> None:
    message = "some/thing is neither a directory nor a Hub repository that can be had: no such repository"
    with pytest.raises(WeightsError, match=message):
        SpectralAR.from_pretrained("some/thing")


@pytest.mark.parametrize("source", ["absent", "./absent", "/absent/folder", "~/absent", "a/b/c", Path("some/thing")])
def test_what_cannot_be_a_repository_is_not_asked_for(hub: dict[str, Any], source: str | Path) -> None:
    with pytest.raises(WeightsError, match=re.escape(f"no such directory: {source}")):
        resolve(source)
    assert hub["calls"] == []


def test_a_directory_comes_before_the_hub(hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some" / "thing").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("some/thing") == Path("some/thing")
    assert hub["calls"] == []


def test_errors_of_weights_are_value_errors() -> None:
    assert issubclass(WeightsError, ValueError)


def test_class_names(model: SpectralAR, make_generator: Make, tokenizer: SpectralTokenizer) -> None:
    assert model.class_names == ("red panda", "Giant panda", "crane")
    assert SpectralAR(tokenizer, make_generator()).class_names == ("0", "1", "2")


def test_find_classes(model: SpectralAR) -> None:
    assert model.find_classes(["2", "RED PANDA", "giant", "Cra", "0"]) == [2, 0, 1, 2, 0]
    assert model.find_classes([]) == []


def test_a_whole_name_goes_before_a_part_of_another(make_generator: Make, tokenizer: SpectralTokenizer) -> None:
    model = SpectralAR(tokenizer, make_generator(class_names=("cat", "wildcat", "7")))
    assert model.find_classes(["cat", "wild", "7", "2"]) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    "name, message",
    [
        ("panda", "class 'panda' fits 2 classes; allowed: 0..2 or one of 0 red panda, 1 Giant panda"),
        ("dog", "class 'dog' fits 0 classes; allowed: 0..2 or one of red panda, Giant panda, crane"),
        ("3", "class '3' fits 0 classes; allowed: 0..2 or one of red panda"),
        ("-1", "class '-1' fits 0 classes"),
        ("\u00b2", "class '\u00b2' fits 0 classes"),
    ],
)
def test_errors_of_find_classes(model: SpectralAR, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        model.find_classes([name])


def test_classes_of_the_same_name_are_not_confused(make_generator: Make, tokenizer: SpectralTokenizer) -> None:
    model = SpectralAR(tokenizer, make_generator(class_names=("crane", "ox", "Crane")))
    with pytest.raises(ValueError, match=r"class 'crane' fits 2 classes; allowed: 0\.\.2 or one of 0 crane, 2 Crane"):
        model.find_classes(["crane"])
    assert model.find_classes(["2"]) == [2]


def test_a_long_list_of_candidates_is_cut(make_generator: Make, tokenizer: SpectralTokenizer) -> None:
    model = SpectralAR(tokenizer, make_generator(classes=20))
    with pytest.raises(ValueError, match=r"one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\.$"):
        model.find_classes(["x"])


def test_configurations_keep_their_defaults_when_fields_are_missing(tokenizer: SpectralTokenizer) -> None:
    """A model saved before a field existed loads with the field's default."""
    from spectralar.config import from_dict, to_dict

    for config in (tokenizer.config, GeneratorConfig()):
        values = to_dict(config)
        assert isinstance(config, TokenizerConfig | GeneratorConfig)
        values.pop("codebook_size")
        assert from_dict(type(config), values).codebook_size == 4096
