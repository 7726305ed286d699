"""Configurations: exact round trips, errors that name the field in full, and cost formulas that are true."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from spectralar.config import (
    GENERATOR_DEPTHS,
    VIT_SIZES,
    GeneratorConfig,
    TokenizerConfig,
    ViTConfig,
    from_dict,
    generator_preset,
    load_yaml,
    to_dict,
)
from spectralar.generator import SpectralGenerator
from spectralar.spectrum import spectral_cutoffs
from spectralar.tokenizer import SpectralTokenizer


@dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5


@dataclass(frozen=True)
class Outer:
    inner: Inner
    other: Inner | None = None
    pair: tuple[int, float] = (1, 2.0)
    parts: tuple[Inner, ...] = ()
    vit: ViTConfig = VIT_SIZES["tiny"]
    choice: Literal["a", "b"] = "a"
    name: str = ""
    flag: bool = False
    limit: int | None = None
    tags: tuple[str, ...] = field(default_factory=tuple)


OUTER = Outer(Inner(1), Inner(2, 0.25), (3, 4.0), (Inner(5), Inner(6)), VIT_SIZES["base"], "b", "x", True, 7, ("t",))


def through_json(config: Any) -> Any:
    return from_dict(type(config), json.loads(json.dumps(to_dict(config))))


@pytest.mark.parametrize(
    "config",
    [
        Outer(Inner(1)),
        OUTER,
        TokenizerConfig(),
        TokenizerConfig(image_size=8, patch_size=4, tokens=2, custom_cutoffs=(3, 8), mask="strict"),
        GeneratorConfig(),
        GeneratorConfig(classes=2, class_names=("\u00e9t\u00e9", "\U0001f600"), drop_path=0.0),
        GeneratorConfig(drop_path=None, token_input="code"),
    ],
)
def test_a_configuration_survives_json_exactly(config: Any) -> None:
    restored = through_json(config)
    assert restored == config
    assert repr(restored) == repr(config), "equal also in types: 1 and 1.0, tuple and list"
    assert hash(restored) == hash(config)


@settings(deadline=None, max_examples=50)
@given(rate=st.floats(allow_nan=False), size=st.integers(), tags=st.lists(st.text()), limit=st.none() | st.integers())
def test_any_values_survive_json_exactly(rate: float, size: int, tags: list[str], limit: int | None) -> None:
    config = Outer(Inner(size, rate), tags=tuple(tags), limit=limit)
    assert repr(through_json(config)) == repr(config)


def test_to_dict_gives_plain_values() -> None:
    assert to_dict(Outer(Inner(1), parts=(Inner(2),))) == {
        "inner": {"size": 1, "rate": 0.5},
        "other": None,
        "pair": [1, 2.0],
        "parts": [{"size": 2, "rate": 0.5}],
        "vit": {"width": 256, "depth": 4, "heads": 4},
        "choice": "a",
        "name": "",
        "flag": False,
        "limit": None,
        "tags": [],
    }


def test_fields_left_out_keep_their_defaults() -> None:
    assert from_dict(Outer, {"inner": {"size": 4}}) == Outer(Inner(4))


def test_whole_numbers_are_good_floats() -> None:
    rate = from_dict(Inner, {"size": 1, "rate": 2}).rate
    assert rate == 2 and isinstance(rate, float)


@pytest.mark.parametrize("name", VIT_SIZES)
def test_a_vision_transformer_may_be_given_by_name(name: str) -> None:
    assert from_dict(TokenizerConfig, {"encoder": name}).encoder == VIT_SIZES[name]


@pytest.mark.parametrize(
    "values, message",
    [
        ({"inner": {"size": 1}, "colour": 1}, "unknown field colour; Outer has inner, other, pair,"),
        ({"inner": {"size": 1, "sice": 2}}, "unknown field inner.sice; Inner has size, rate"),
        ({"inner": {"size": 1}, "parts": [{"size": 1}, {"x": 1}]}, "unknown field parts[1].x; Inner has size, rate"),
        ({}, "missing field inner of Outer"),
        ({"inner": {}}, "missing field inner.size of Inner"),
        ({"inner": {"size": 1}, "vit": {"depth": 1}}, "missing field vit.width, vit.heads of ViTConfig"),
        ({"inner": {"size": 1}, "parts": [{}]}, "missing field parts[0].size of Inner"),
        ({"inner": 3}, "inner: expected a mapping of fields, not 3"),
        ({"inner": {"size": "1"}}, "inner.size must be of type int, not '1'"),
        ({"inner": {"size": 1.0}}, "inner.size must be of type int, not 1.0"),
        ({"inner": {"size": True}}, "inner.size must be of type int, not True"),
        ({"inner": {"size": None}}, "inner.size must be of type int, not None"),
        ({"inner": {"size": 1, "rate": "fast"}}, "inner.rate must be of type float, not 'fast'"),
        ({"inner": {"size": 1, "rate": False}}, "inner.rate must be of type float, not False"),
        ({"inner": {"size": 1}, "other": {"size": []}}, "other.size must be of type int, not []"),
        ({"inner": {"size": 1}, "flag": 1}, "flag must be of type bool, not 1"),
        ({"inner": {"size": 1}, "name": 1}, "name must be of type str, not 1"),
        ({"inner": {"size": 1}, "limit": 0.5}, "limit must be of type int, not 0.5"),
        ({"inner": {"size": 1}, "choice": "c"}, "choice must be one of a, b, not 'c'"),
        ({"inner": {"size": 1}, "pair": [1]}, "pair must have 2 entries, not 1"),
        ({"inner": {"size": 1}, "pair": "12"}, "pair must be a list, not '12'"),
        ({"inner": {"size": 1}, "pair": ["1", 2]}, "pair[0] must be of type int, not '1'"),
        ({"inner": {"size": 1}, "tags": ["a", 2]}, "tags[1] must be of type str, not 2"),
        ({"inner": {"size": 1}, "vit": "huge"}, "vit must be one of tiny, small, base, large or a mapping, not 'huge'"),
        ({"inner": {"size": 1}, "vit": {"width": 7, "depth": 1, "heads": 2}}, "width 7 must be a multiple of heads 2"),
        ([1], "Outer: expected a mapping of fields, not [1]"),
    ],
)
def test_errors_name_the_field_in_full(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        from_dict(Outer, values)


def test_only_dataclasses_become_dictionaries() -> None:
    with pytest.raises(ValueError, match="expected a configuration dataclass, not int"):
        to_dict(3)


def test_yaml_over_the_defaults_and_over_a_base(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("inner: {rate: 0.75}\nlimit: 9\nvit: small\ntags: [a, b]\nother: null\n")
    expected = Outer(Inner(1, 0.75), None, (3, 4.0), OUTER.parts, VIT_SIZES["small"], "b", "x", True, 9, ("a", "b"))
    assert load_yaml(Outer, path, base=OUTER) == expected
    with pytest.raises(ValueError, match=r"missing field inner\.size of Inner"):
        load_yaml(Outer, path)
    path.write_text("inner: {rate: 1e-3}\n")  # text to YAML 1.1
    assert load_yaml(Outer, path, base=OUTER).inner == Inner(1, 1e-3)
    path.write_text("inner:\n  size: 3\n")
    assert load_yaml(Outer, path) == Outer(Inner(3))


def test_an_empty_yaml_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert load_yaml(Outer, path, base=OUTER) == OUTER
    assert load_yaml(GeneratorConfig, path) == GeneratorConfig()


def test_errors_of_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in (
        ("- 1\n- 2\n", f"{path}: expected a mapping of fields"),
        ("a: [1\n", f"{path}: while parsing a flow sequence"),
        ("depht: 3\n", "unknown field depht; GeneratorConfig has depth"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            load_yaml(GeneratorConfig, path)
    with pytest.raises(FileNotFoundError):
        load_yaml(GeneratorConfig, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "kind, values, message",
    [
        (ViTConfig, {"width": 0, "depth": 1, "heads": 1}, "width, depth and heads must be positive: ViTConfig(width=0"),
        (ViTConfig, {"width": 8, "depth": 0, "heads": 1}, "width, depth and heads must be positive"),
        (ViTConfig, {"width": 8, "depth": 1, "heads": -1}, "width, depth and heads must be positive"),
        (ViTConfig, {"width": 8, "depth": 1, "heads": 3}, "width 8 must be a multiple of heads 3"),
        (TokenizerConfig, {"image_size": 0}, "image_size and patch_size must be positive"),
        (TokenizerConfig, {"patch_size": -2}, "image_size and patch_size must be positive"),
        (TokenizerConfig, {"image_size": 100}, "image_size 100 must be a multiple of patch_size 16"),
        (TokenizerConfig, {"tokens": 0}, "tokens must be between 1 and image_size 256"),
        (TokenizerConfig, {"tokens": 257}, "(one new frequency per token at least), not 257"),
        (TokenizerConfig, {"codebook_size": 1}, "codebook_size must be 2..65536, not 1"),
        (TokenizerConfig, {"codebook_size": 65537}, "codebook_size must be 2..65536, not 65537"),
        (TokenizerConfig, {"code_dim": 0}, "code_dim must be positive, not 0"),
        (TokenizerConfig, {"commitment": -0.1}, "commitment must not be negative, not -0.1"),
        (TokenizerConfig, {"commitment": float("nan")}, "commitment must not be negative, not nan"),
        (TokenizerConfig, {"custom_cutoffs": (1, 256)}, "custom_cutoffs must be one per token (64), not 2"),
        (TokenizerConfig, {"tokens": 2, "custom_cutoffs": (1, 200)}, "cutoffs must end at the image size 256"),
        (TokenizerConfig, {"latent_norm": "layer"}, "latent_norm must be one of none, batch, not 'layer'"),
        (TokenizerConfig, {"mask": "causal"}, "mask must be one of figure, strict, none, not 'causal'"),
        (TokenizerConfig, {"supervision": "half"}, "supervision must be one of spectral, full, not 'half'"),
        (TokenizerConfig, {"mapping": "log"}, "mapping must be one of nonuniform, uniform, not 'log'"),
        (TokenizerConfig, {"pixel_head": "proxy"}, "pixel_head must be one of direct, vqgan, not 'proxy'"),
        (
            TokenizerConfig,
            {"pixel_head": "vqgan", "patch_size": 32},
            "patch_size must be 16 with pixel_head vqgan, not 32",
        ),
        (GeneratorConfig, {"depth": 0}, "depth, tokens and classes must be positive"),
        (GeneratorConfig, {"tokens": 0}, "depth, tokens and classes must be positive"),
        (GeneratorConfig, {"classes": 0}, "depth, tokens and classes must be positive"),
        (GeneratorConfig, {"group": 0}, "group must divide tokens 64, not 0"),
        (GeneratorConfig, {"group": 5}, "group must divide tokens 64, not 5"),
        (GeneratorConfig, {"codebook_size": 70000}, "codebook_size must be 2..65536, not 70000"),
        (GeneratorConfig, {"code_dim": 0}, "code_dim must be positive, not 0"),
        (GeneratorConfig, {"class_drop": 1.0}, "class_drop must be in [0, 1), not 1.0"),
        (GeneratorConfig, {"class_drop": -0.1}, "class_drop must be in [0, 1), not -0.1"),
        (GeneratorConfig, {"drop_path": 1.0}, "drop_path must be in [0, 1), not 1.0"),
        (GeneratorConfig, {"depth": 240}, "drop_path must be in [0, 1), not 1.0"),
        (GeneratorConfig, {"class_names": ("a", "b")}, "class_names must be empty or one per class (1000), not 2"),
        (GeneratorConfig, {"token_input": "vector"}, "token_input must be one of table, code, not 'vector'"),
    ],
)
def test_impossible_values_are_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**values)


def test_the_defaults_are_the_paper_s_main_experiment() -> None:
    config = TokenizerConfig()
    assert (config.image_size, config.patch_size, config.tokens) == (256, 16, 64)
    assert (config.codebook_size, config.code_dim, config.encoder) == (4096, 12, ViTConfig(768, 12, 12))
    assert config.patches == 256
    assert config.cutoffs == spectral_cutoffs(64, 256)
    assert TokenizerConfig(mapping="uniform").cutoffs == tuple(range(4, 257, 4))
    assert TokenizerConfig(tokens=2, custom_cutoffs=(9, 256)).cutoffs == (9, 256)


@pytest.mark.parametrize("depth", GENERATOR_DEPTHS)
def test_presets(depth: int) -> None:
    single, grouped = generator_preset(f"d{depth}"), generator_preset(f"d{depth}-p4")
    assert (single.depth, single.width, single.heads, single.steps) == (depth, 64 * depth, depth, 64)
    assert (grouped.depth, grouped.group, grouped.steps, grouped.group_sizes) == (depth, 4, 16, (4,) * 16)
    assert single.gate_init == {24: 1e-4, 30: 1e-5}.get(depth, 1e-3)
    assert single.max_drop_path == pytest.approx(0.1 * depth / 24)


def test_presets_take_changes_and_refuse_unknown_names() -> None:
    changed = generator_preset("d16-p4", classes=7, group=2, drop_path=0.0)
    assert (changed.depth, changed.classes, changed.group, changed.max_drop_path) == (16, 7, 2, 0.0)
    for name in ("d5", "16", "d16-p2", "d16-", ""):
        with pytest.raises(ValueError, match=f"generator preset must be one of d4, d4-p4, .*, not {name!r}"):
            generator_preset(name)


def count(config: GeneratorConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SpectralGenerator(config).parameters())


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("token_input", ["table", "code"])
def test_the_parameter_formula_is_exact(token_input: Any, group: int) -> None:
    config = generator_preset("d4", token_input=token_input, group=group, classes=11, codebook_size=50, code_dim=5)
    assert count(config) == config.parameters()


@pytest.mark.parametrize(
    "name, published, tolerance", [("d16", 310e6, 0.02), ("d20", 600e6, 0.02), ("d24", 1.0e9, 0.05)]
)
def test_the_sizes_are_those_of_the_paper(name: str, published: float, tolerance: float) -> None:
    """Within 2 %, or, where the paper gives a single decimal of billions, within its rounding."""
    config = generator_preset(name)
    assert count(config) == config.parameters()
    assert config.parameters() == pytest.approx(published, rel=tolerance)


def counted_flops(call: Any) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_generator_s_flops_are_those_of_its_matrix_products() -> None:
    config = GeneratorConfig(depth=2, tokens=16, codebook_size=64, classes=3)
    model = SpectralGenerator(config).eval()
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    assert counted_flops(lambda: model(torch.tensor([0]), tokens)) == config.flops()


def test_the_tokenizer_s_flops_are_those_of_its_matrix_products() -> None:
    vit = ViTConfig(64, 2, 2)
    config = TokenizerConfig(
        image_size=32, patch_size=8, tokens=8, encoder=vit, decoder=vit, codebook_size=2, code_dim=1, mask="none"
    )
    model = SpectralTokenizer(config).eval().requires_grad_(False)
    counted = counted_flops(lambda: model.decoder(torch.zeros(1, 8, 1)))
    counted += counted_flops(lambda: model.encoder(torch.zeros(1, 3, 32, 32)))
    # Left out: to_latent, from_code, the margins of 16 patches, the last convolution, which is that of 65 maps.
    ends = 2 * (2 * 8 * 1 * 64) + 2 * 16 * 64 * 3 * (10**2 - 8**2) + 65 * 2 * 3 * 3 * 9 * 10**2
    assert counted == config.flops() + ends


def test_the_flops_of_the_proxy_code_head() -> None:
    vit = ViTConfig(64, 1, 2)
    config = TokenizerConfig(
        image_size=32, tokens=8, encoder=vit, decoder=vit, codebook_size=2, code_dim=1, mask="none", pixel_head="vqgan"
    )
    model = SpectralTokenizer(config).eval().requires_grad_(False)
    counted = counted_flops(lambda: model.decoder(torch.zeros(1, 8, 1)))
    counted += counted_flops(lambda: model.encoder(torch.zeros(1, 3, 32, 32)))
    assert counted == config.flops() + 2 * (2 * 8 * 1 * 64)


def test_bytes_of_a_cached_step() -> None:
    config = GeneratorConfig(depth=2, tokens=16, codebook_size=64, classes=3)
    model = SpectralGenerator(config)
    matrices = {name: w for name, w in model.named_parameters() if name.endswith("weight")}
    elements = sum(w.numel() for name, w in matrices.items() if "adaln" not in name and "table" not in name)
    assert config.decode_weight_bytes() == 2 * elements
    assert config.decode_weight_bytes(4) == 4 * elements
    state = model.start(torch.tensor([0, 1, 2]))
    assert config.cache_bytes(3, 4) == state.keys.nbytes + state.values.nbytes
    assert config.cache_bytes(3) == config.cache_bytes(3, 4) // 2


@pytest.mark.parametrize("group", [1, 4])
def test_the_flops_and_bytes_of_a_generation_are_those_of_its_steps(group: int) -> None:
    config = GeneratorConfig(depth=2, tokens=16, group=group, codebook_size=64, classes=3)
    model = SpectralGenerator(config).eval()
    state = model.start(torch.tensor([0, 1, 2]))
    previous = None
    flops = cached = 0
    for step in range(config.steps):
        flops += counted_flops(lambda: model.step(state, previous))  # noqa: B023 - called here and nowhere else
        previous = torch.zeros(3, group, dtype=torch.int64)
        # Read what is there, write the group's own.
        for held in (state.keys, state.values):
            cached += held[:, :, : step * group].numel() + held[:, :, step * group : (step + 1) * group].numel()
    assert config.decode_flops(3) == flops
    assert config.cache_traffic(3, 4) == 4 * cached
    assert config.decode_bytes(3) == config.steps * config.decode_weight_bytes() + 2 * cached


@pytest.mark.parametrize("head", ["direct", "vqgan"])
def test_decoding_is_a_part_of_the_tokenizer_s_flops(head: Any) -> None:
    config = TokenizerConfig(encoder=VIT_SIZES["small"], pixel_head=head)
    patches = 2 * 256 * 3 * 16**2 * 512
    assert config.flops() - config.decode_flops() == VIT_SIZES["small"].flops(1 + 256 + 64) + patches
