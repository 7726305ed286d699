"""Configuration of tokenizer, pixel decoder and generator: frozen dataclasses, named sizes, every default in one place.

A configuration is plain data. `to_dict` gives nested JSON-ready dictionaries and `from_dict` restores exactly the same
object, refusing unknown names and values of the wrong type, so that a saved model or a YAML file is never half
understood. Cost formulas (parameters, FLOPs, bytes) are methods of the configuration that they describe.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from spectralar.spectrum import FrequencyMapping, check_cutoffs, spectral_cutoffs

Mask = Literal["figure", "strict", "none"]
Supervision = Literal["spectral", "full"]
TokenInput = Literal["table", "code"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_choices(config: Any) -> None:
    """A misspelt choice must not be taken for another one, whichever way the configuration is built."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            _restore(hint, getattr(config, name), name)


@dataclass(frozen=True)
class ViTConfig:
    """Size of one vision transformer: `width` channels, `depth` blocks, `heads` attention heads."""

    width: int
    depth: int
    heads: int

    def __post_init__(self) -> None:
        _require(
            self.width > 0 and self.depth > 0 and self.heads > 0, f"width, depth and heads must be positive: {self}"
        )
        _require(self.width % self.heads == 0, f"width {self.width} must be a multiple of heads {self.heads}")

    def flops(self, length: int) -> int:
        """Forward floating-point operations (2 per multiply-add) of the blocks over `length` positions."""
        return self.depth * (2 * 12 * self.width**2 * length + 4 * self.width * length**2)


VIT_SIZES: dict[str, ViTConfig] = {
    "tiny": ViTConfig(256, 4, 4),
    "small": ViTConfig(512, 8, 8),
    "base": ViTConfig(768, 12, 12),
    "large": ViTConfig(1024, 24, 16),
}
"""Named sizes. small, base and large are TiTok's; tiny is ours, for laptops and tests."""


class Convolution(NamedTuple):
    """One convolution of the decoder: channels in and out, side of its kernel, and side of the maps it works on."""

    inputs: int
    outputs: int
    kernel: int
    size: int
    bias: bool


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN decoder; the defaults are MaskGIT's for 256 x 256 images (30.5 M weights and the codebook).

    Attributes:
        image_size: side of the square images in pixels; a multiple of 2^(levels - 1), by which the grid is smaller.
        channels: channels of the finest level; a multiple of `groups`.
        multipliers: channels of every level as multiples of `channels`, from the finest level, full size, to the
            coarsest, the grid of codes.
        blocks: residual blocks of every level, and of the middle before them.
        groups: groups of every group normalisation.
        codebook_size: number of codes.
        code_dim: dimension of a code vector.
    """

    image_size: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    codebook_size: int = 1024
    code_dim: int = 256

    def __post_init__(self) -> None:
        for name in ("image_size", "channels", "blocks", "groups", "code_dim"):
            _require(getattr(self, name) > 0, f"{name} must be positive, not {getattr(self, name)}")
        _require(
            bool(self.multipliers) and min(self.multipliers) > 0,
            f"multipliers must be one or more positive integers, not {self.multipliers}",
        )
        _require(
            self.channels % self.groups == 0,
            f"channels must be a multiple of groups {self.groups}, not {self.channels}",
        )
        _require(
            self.image_size % self.scale == 0, f"image_size must be a multiple of {self.scale}, not {self.image_size}"
        )
        _require(2 <= self.codebook_size <= 65536, f"codebook_size must be 2..65536, not {self.codebook_size}")

    @property
    def scale(self) -> int:
        """Pixels along the side of one code: every level but the finest doubles the size."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def grid(self) -> int:
        """Codes along a side."""
        return self.image_size // self.scale

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every level, the finest first."""
        return tuple(self.channels * m for m in self.multipliers)

    def convolutions(self) -> Iterator[Convolution]:
        """All convolutions in the order in which they run."""
        width, size = self.widths[-1], self.grid

        def block(inputs: int, outputs: int) -> Iterator[Convolution]:
            yield Convolution(inputs, outputs, 3, size, bias=False)
            yield Convolution(outputs, outputs, 3, size, bias=False)
            if inputs != outputs:
                yield Convolution(outputs, outputs, 1, size, bias=False)

        yield Convolution(self.code_dim, width, 3, size, bias=True)
        for _ in range(self.blocks):
            yield from block(width, width)
        for level in reversed(range(len(self.widths))):
            for _ in range(self.blocks):
                yield from block(width, self.widths[level])
                width = self.widths[level]
            if level:
                size *= 2
                yield Convolution(width, width, 3, size, bias=True)
        yield Convolution(width, 3, 3, size, bias=True)

    def parameters(self) -> int:
        """Exact number of learned parameters, the codebook included."""
        total = self.codebook_size * self.code_dim
        for c in self.convolutions():
            total += c.kernel**2 * c.inputs * c.outputs + c.bias * c.outputs
            # A group normalisation stands before each 3x3 convolution of a block: a scale and a shift per channel.
            total += 2 * c.inputs if c.kernel == 3 and not c.bias else 0
        return total + 2 * self.widths[0]

    def flops(self) -> int:
        """Forward floating-point operations (2 per multiply-add) of the convolutions for one image."""
        return sum(2 * c.kernel**2 * c.inputs * c.outputs * c.size**2 for c in self.convolutions())


@dataclass(frozen=True)
class TokenizerConfig:
    """Nested spectral tokenizer. The defaults are the paper's main experiment (section 4.1) with a direct pixel head.

    Attributes:
        image_size: side of the square images, in pixels.
        patch_size: side of a patch; divides `image_size`.
        tokens: number N of spectral tokens, low to high frequency; at most `image_size`.
        encoder: size of the encoder.
        decoder: size of the decoder.
        codebook_size: number of codes.
        code_dim: dimension of a code.
        normalize_codes: L2-normalise latents and codes (cosine lookup).
        commitment: weight of the commitment loss.
        latent_norm: `batch` standardises every latent coordinate of every position over the batch before it is
            quantized (running statistics outside training), so that no position can shrink to one constant code;
            `none` is the paper's.
        mask: spectral causal mask: `figure` as drawn in Figure 3, `strict` one-way between image and spectral tokens,
            `none` fully bidirectional (Table 4).
        supervision: target of a prefix: its sub-image I'_n (`spectral`) or always the image (`full`, Table 4).
        dead_codes: `restart` draws codes that training has hardly used for a while towards latents of the batch
            (clustering VQ); `keep` leaves them.
        mapping: tokens to cutoffs: equation 9 and its rescaling (`nonuniform`) or equal bands (`uniform`, Table 4).
        custom_cutoffs: a hand-made schedule, strictly increasing to `image_size`, in place of `mapping`.
        pixel_head: how decoder features become pixels. `direct` is a linear map per patch and a 3x3 convolution;
            `vqgan` is logits over MaskGIT-VQGAN's 1,024 codes and its convolutional decoder, for patches of 16.
    """

    image_size: int = 256
    patch_size: int = 16
    tokens: int = 64
    encoder: ViTConfig = VIT_SIZES["base"]
    decoder: ViTConfig = VIT_SIZES["base"]
    codebook_size: int = 4096
    code_dim: int = 12
    normalize_codes: bool = True
    commitment: float = 0.25
    latent_norm: Literal["none", "batch"] = "none"
    dead_codes: Literal["keep", "restart"] = "keep"
    mask: Mask = "figure"
    supervision: Supervision = "spectral"
    mapping: FrequencyMapping = "nonuniform"
    custom_cutoffs: tuple[int, ...] = ()
    pixel_head: Literal["direct", "vqgan"] = "direct"

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self.image_size > 0 and self.patch_size > 0, "image_size and patch_size must be positive")
        _require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}",
        )
        _require(
            1 <= self.tokens <= self.image_size,
            f"tokens must be between 1 and image_size {self.image_size} (one new frequency per token at least), "
            f"not {self.tokens}",
        )
        _require(
            self.pixel_head == "direct" or self.patch_size == 16,
            f"patch_size must be 16 with pixel_head vqgan, not {self.patch_size}",
        )
        _require(2 <= self.codebook_size <= 65536, f"codebook_size must be 2..65536, not {self.codebook_size}")
        _require(self.code_dim > 0, f"code_dim must be positive, not {self.code_dim}")
        _require(self.commitment >= 0, f"commitment must not be negative, not {self.commitment}")
        if self.custom_cutoffs:
            _require(
                len(self.custom_cutoffs) == self.tokens,
                f"custom_cutoffs must be one per token ({self.tokens}), not {len(self.custom_cutoffs)}",
            )
            check_cutoffs(self.custom_cutoffs, self.image_size)

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """Cutoff omega_n of every prefix length n = 1..N."""
        return self.custom_cutoffs or spectral_cutoffs(self.tokens, self.image_size, self.mapping)

    @property
    def patches(self) -> int:
        """Number of image patches, (image_size / patch_size) squared."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def length(self) -> int:
        """Positions of both transformers: the class token, the patches and the spectral tokens."""
        return 1 + self.patches + self.tokens

    def flops(self) -> int:
        """Forward FLOPs of one image through encoder and decoder (blocks, patch embedding, linear map to pixels)."""
        patch_embed = 2 * self.patches * 3 * self.patch_size**2 * self.encoder.width
        return self.encoder.flops(self.length) + patch_embed + self.decode_flops()

    def decode_flops(self) -> int:
        """Forward FLOPs of the decoder for all tokens of one image: blocks and head, neither margins nor `smooth`."""
        width = self.decoder.width
        if self.pixel_head == "direct":
            head = 2 * self.patches * 3 * self.patch_size**2 * width
        else:
            vqgan = VQGANConfig(image_size=self.image_size)
            codes = 2 * self.patches * (2 * width * width + 2 * width * vqgan.codebook_size)
            head = codes + 2 * self.patches * vqgan.codebook_size * vqgan.code_dim + vqgan.flops()
        return self.decoder.flops(self.length) + head


@dataclass(frozen=True)
class GeneratorConfig:
    """Class-conditional generator: VAR's transformer over 1D groups of spectral tokens (width 64 d, d heads).

    Attributes:
        depth: number of blocks d; width is 64 d.
        tokens: length N of the sequence.
        group: tokens drawn per step: 1, or 4 for the paper's "p4"; divides `tokens`.
        codebook_size: number of codes.
        classes: number of classes; one more row stands for "no class".
        token_input: how a token enters: a learned `table` of rows, or its `code` vector projected.
        code_dim: dimension of the code vectors, used by `token_input="code"`.
        class_drop: probability that training replaces a label by "no class".
        drop_path: stochastic depth of the last block (linear ramp from 0); None is VAR's rule 0.1 d / 24.
        gate_init: scale of the initial AdaLN gates (VAR's "alng"; 1e-3 for d16 and d20, 1e-4 for d24, 1e-5 for d30).
        class_names: names of the classes, for people; empty or one per class.
    """

    depth: int = 16
    tokens: int = 64
    group: int = 1
    codebook_size: int = 4096
    classes: int = 1000
    token_input: TokenInput = "table"
    code_dim: int = 12
    class_drop: float = 0.1
    drop_path: float | None = None
    gate_init: float = 1e-3
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choices(self)
        _require(self.depth > 0 and self.tokens > 0 and self.classes > 0, "depth, tokens and classes must be positive")
        _require(
            self.group > 0 and self.tokens % self.group == 0,
            f"group must divide tokens {self.tokens}, not {self.group}",
        )
        _require(2 <= self.codebook_size <= 65536, f"codebook_size must be 2..65536, not {self.codebook_size}")
        _require(self.code_dim > 0, f"code_dim must be positive, not {self.code_dim}")
        _require(0 <= self.class_drop < 1, f"class_drop must be in [0, 1), not {self.class_drop}")
        _require(0 <= self.max_drop_path < 1, f"drop_path must be in [0, 1), not {self.max_drop_path}")
        _require(
            len(self.class_names) in (0, self.classes),
            f"class_names must be empty or one per class ({self.classes}), not {len(self.class_names)}",
        )

    @property
    def width(self) -> int:
        """Channels, 64 a head."""
        return 64 * self.depth

    @property
    def heads(self) -> int:
        """Attention heads, one per block of depth."""
        return self.depth

    @property
    def steps(self) -> int:
        """Number of autoregressive steps, tokens / group."""
        return self.tokens // self.group

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Sizes of the groups of tokens, in the order in which they are drawn; they sum to N."""
        return (self.group,) * self.steps

    @property
    def max_drop_path(self) -> float:
        """Rate of stochastic depth in the last block."""
        return 0.1 * self.depth / 24 if self.drop_path is None else self.drop_path

    def parameters(self) -> int:
        """Exact number of learned parameters (VAR's 18 w^2 + 14 w + h a block, and the ends)."""
        w, k = self.width, self.codebook_size
        block = 18 * w * w + 14 * w + self.heads
        token = k * w if self.token_input == "table" else self.code_dim * w + w
        ends = (self.classes + 1) * w + self.group * w + self.tokens * w + token
        head = 2 * w * w + 2 * w + k * w + k
        return self.depth * block + ends + head

    def flops(self) -> int:
        """Forward FLOPs of one teacher-forced sequence: matrix products of blocks and head, and attention."""
        adaln = 2 * (6 * self.depth + 2) * self.width**2
        return self.tokens * self._flops_per_token() + adaln + self.depth * 4 * self.width * self.tokens**2

    def _flops_per_token(self) -> int:
        return 2 * (12 * self.width**2 * self.depth + self.codebook_size * self.width)

    def decode_flops(self, rows: int) -> int:
        """Forward FLOPs of all cached steps for `rows` rows (guidance doubles the rows); AdaLN is read from tables."""
        scores = self.group**2 * self.steps * (self.steps + 1) // 2  # every group sees itself and those before it
        return rows * (self.tokens * self._flops_per_token() + self.depth * 4 * self.width * scores)

    def decode_weight_bytes(self, bytes_per_weight: int = 2) -> int:
        """Bytes of weights that one cached step must read once AdaLN is computed per class: blocks and head."""
        return bytes_per_weight * (12 * self.width**2 * self.depth + self.codebook_size * self.width)

    def cache_bytes(self, batch: int, bytes_per_value: int = 2) -> int:
        """Bytes of the key/value cache for `batch` rows (guidance doubles the rows)."""
        return 2 * batch * self.depth * self.tokens * self.width * bytes_per_value

    def cache_traffic(self, rows: int, bytes_per_value: int = 2) -> int:
        """Least bytes of keys and values that all cached steps move: written once, read at every later step."""
        reads = self.group * self.steps * (self.steps - 1) // 2
        return self.cache_bytes(rows, bytes_per_value) * (self.tokens + reads) // self.tokens

    def decode_bytes(self, rows: int, bytes_per_value: int = 2) -> int:
        """Least bytes that all cached steps move: the weights once a step, and keys and values."""
        return self.steps * self.decode_weight_bytes(bytes_per_value) + self.cache_traffic(rows, bytes_per_value)


GENERATOR_DEPTHS = (4, 6, 8, 12, 16, 20, 24, 30)
_GATE_INITS = {24: 1e-4, 30: 1e-5}


def generator_preset(name: str, **changes: Any) -> GeneratorConfig:
    """Named generator: `d16`, or `d16-p4` for groups of four; depths 4, 6, 8, 12, 16, 20, 24, 30.

    Args:
        name: preset name.
        changes: fields to replace.

    Raises:
        ValueError: unknown name.
    """
    depth_name, _, suffix = name.partition("-")
    allowed = [f"d{d}{p}" for d in GENERATOR_DEPTHS for p in ("", "-p4")]
    _require(name in allowed, f"generator preset must be one of {', '.join(allowed)}, not {name!r}")
    depth = int(depth_name[1:])
    preset = {"depth": depth, "group": 4 if suffix else 1, "gate_init": _GATE_INITS.get(depth, 1e-3)}
    return GeneratorConfig(**{**preset, **changes})


Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of JSON and YAML values; tuples become lists."""
    _require(dataclasses.is_dataclass(config), f"expected a configuration dataclass, not {type(config).__name__}")
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def from_dict(kind: type[Config], values: Mapping[str, Any], *, where: str = "") -> Config:
    """Restores a configuration from nested dictionaries; fields left out keep their defaults.

    A `ViTConfig` may be given by its name (`encoder: base`).

    Args:
        kind: the dataclass.
        values: field names to values.
        where: prefix of the names in error messages.

    Raises:
        ValueError: an unknown field, a missing field without default or a value of the wrong type, named in full.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where.rstrip('.') or kind.__name__}: expected a mapping of fields, not {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in values:
        _require(name in fields, f"unknown field {where}{name}; {kind.__name__} has {', '.join(fields)}")
    hints = typing.get_type_hints(kind)
    known = {name: _restore(hints[name], value, f"{where}{name}") for name, value in values.items()}
    missing = [
        name
        for name, f in fields.items()
        if name not in known and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    _require(not missing, f"missing field {', '.join(where + name for name in missing)} of {kind.__name__}")
    return kind(**known)


def load_yaml(kind: type[Config], path: str | Path, *, base: Config | None = None) -> Config:
    """Reads a configuration from a YAML file whose fields override those of `base` (default: the class's defaults).

    Raises:
        ValueError: the file is not YAML or no mapping, or see `from_dict`.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {error}") from error
    _require(isinstance(values, dict), f"{path}: expected a mapping of fields")
    merged = _merge(to_dict(base), values) if base is not None else values
    return from_dict(kind, merged)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
        merged[name] = _merge(base[name], value) if both else value
    return merged


def _restore(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _restore(inner, value, where)
    if origin is Literal:
        _require(value in arguments, f"{where} must be one of {', '.join(map(str, arguments))}, not {value!r}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where} must be a list, not {value!r}")
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        _require(len(kinds) == len(value), f"{where} must have {len(kinds)} entries, not {len(value)}")
        return tuple(_restore(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is ViTConfig and isinstance(value, str):
        _require(value in VIT_SIZES, f"{where} must be one of {', '.join(VIT_SIZES)} or a mapping, not {value!r}")
        return VIT_SIZES[value]
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where=f"{where}.")  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _is_number(value):
        return float(value)  # YAML 1.1 takes 1e-3, without a dot, for text
    good = isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)
    _require(good, f"{where} must be of type {hint.__name__}, not {value!r}")
    return value
