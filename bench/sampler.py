"""Cases of the sampler: class -> tokens and class -> pixels, by preset and batch; their costs and targets."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self, TypeVar, cast, get_args

import torch

from spectralar.bench.cases import Case, Condition, Measurement, Missing, Peer, Workload, timed
from spectralar.bench.peers import sampler as others
from spectralar.bench.sampler_truth import Drawn, Judge
from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig, VQGANConfig, generator_preset
from spectralar.generator import SpectralGenerator
from spectralar.generator.model import Block
from spectralar.sampling import BUCKETS, BackendName, Sampler, SamplingSettings, WeightFormat
from spectralar.tokenizer import SpectralTokenizer
from spectralar.tokenizer.heads import ProxyCodeHead

Pixels = Literal["none", "direct", "vqgan"]

PRESETS = ("d16", "d16-p4", "d20", "d24", "d30")
BATCHES = (1, 8, 64, 256)
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batches of a picture of the latency."""

SETTINGS = SamplingSettings(guidance=2.5, guidance_schedule="ramp", top_k=900, top_p=0.95)
"""Guidance and both filters, as VAR draws its pictures: nothing that a user switches on is left out of the time."""

ONE_TOKEN = "one token a step"
SCALES = "VAR's shapes, 10 scales"
COMPILED = "torch.compile, steps in a graph"
BF16 = "ours with weights in bf16"

Model = TypeVar("Model", bound=torch.nn.Module)

_DTYPE = torch.bfloat16
_TINY_VIT = ViTConfig(64, 1, 1)


@dataclass(frozen=True, kw_only=True)
class SamplingCase(Case):
    """One generation with guidance, from a list of classes to tokens or 8-bit pictures on the device.

    Attributes:
        preset: of the generator.
        batch: images at once.
        pixels: the tokenizer's pixel head, or "none" for the tokens alone. Its transformers are of size base.
        backend: of the sampler that is ours.
        weights: likewise; "same" is bf16.
        aim: what the target asks for beyond its condition.
        brief: a point of a curve, measured shortly and against nobody.
        tiny: models in a size for a CPU.
    """

    preset: str = "d16"
    batch: int = 1
    pixels: Pixels = "none"
    backend: BackendName = "auto"
    weights: WeightFormat = "same"
    aim: Condition | None = None
    brief: bool = field(default=False, compare=False)
    tiny: bool = False

    budget = 2.0
    peer_budget = 2.0
    arithmetic = "bf16"

    @property
    def name(self) -> str:
        config = self.generator_config
        side = 32 if self.tiny else 256
        made = "tokens" if self.pixels == "none" else f"{side}x{side} pixels, {self.pixels} head"
        size = f"{self.preset}{', tiny' if self.tiny else ''}{'' if self.weights == 'same' else ', fp8 weights'}"
        return f"class -> {made}, {size}, {config.steps} steps, guided, B={self.batch}"

    @property
    def weight(self) -> float:
        return 0.25 if self.brief else 1.0

    @property
    def costs(self) -> str:
        config = self.generator_config
        return (
            f"{config.steps} x {count_bytes(self.weight_bytes)} of weights, "
            f"{count_bytes(config.cache_traffic(2 * self.batch))} of keys and values, {self.flops() / 1e12:.3g} TFLOP"
        )

    @property
    def generator_config(self) -> GeneratorConfig:
        config = generator_preset(self.preset)
        return replace(config, depth=2, tokens=8, codebook_size=64, classes=10) if self.tiny else config

    @property
    def tokenizer_config(self) -> TokenizerConfig | None:
        if self.pixels == "none":
            return None
        if not self.tiny:
            return TokenizerConfig(pixel_head=self.pixels)
        return TokenizerConfig(
            image_size=32, tokens=8, encoder=_TINY_VIT, decoder=_TINY_VIT, codebook_size=64, pixel_head=self.pixels
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step reads; the scales of fp8 are 0.3 % more."""
        return self.generator_config.decode_weight_bytes(2 if self.weights == "same" else 1)

    @property
    def settings(self) -> SamplingSettings:
        return replace(SETTINGS, top_k=min(SETTINGS.top_k, self.generator_config.codebook_size))

    def bytes(self) -> int:
        # The pixel decoder's share is left out: less than a hundredth for one image, bound by its arithmetic for many.
        config = self.generator_config
        return config.steps * self.weight_bytes + config.cache_traffic(2 * self.batch)

    def flops(self) -> int:
        pixels = 0 if self.tokenizer_config is None else self.batch * least_pixel_flops(self.tokenizer_config)
        return self.generator_config.decode_flops(2 * self.batch) + pixels

    def small(self) -> Self:
        return replace(self, batch=min(self.batch, 2), tiny=True, target=None, condition=None, aim=None)

    def sampler(self, device: torch.device, backend: BackendName) -> Sampler:
        """A sampler from the case's models."""
        return Sampler(
            random_generator(self.generator_config, device),
            None if self.tokenizer_config is None else random_tokenizer(self.tokenizer_config, device),
            backend=backend,
            weights=self.weights,
        )

    def runs_on(self, device: torch.device) -> bool:
        """Whether the device has arithmetic for the weights."""
        return self.weights == "same" or device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)

    def judge(self, sampler: Sampler) -> Judge:
        """Judges what a sampler of this case draws from its inputs."""
        return Judge(sampler.generator, sampler.tokenizer, *self.inputs[:2], self.weights)

    @property
    def inputs(self) -> tuple[list[int], list[int], SamplingSettings]:
        """Classes, seeds and settings of the generation."""
        classes = [389 * i % self.generator_config.classes for i in range(self.batch)]
        return classes, list(range(self.batch)), self.settings

    def workload(self, device: torch.device) -> Workload:
        sampler = self.sampler(device, self.backend)
        judge = self.judge(sampler)

        def error(result: object) -> float:
            assert isinstance(result, Drawn)
            return judge(result).error

        return Workload(self.inputs, draws(sampler), error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        ours = self.sampler(device, self.backend).backend
        return tuple(peer for name, peer in self._peers(device) if name != ours)

    def _peers(self, device: torch.device) -> Iterator[tuple[str, Peer]]:
        def backend(name: BackendName) -> Callable[[], Callable[..., Drawn]]:
            return lambda: draws(self.sampler(device, name))

        if self.generator_config.group > 1:
            whole = replace(self, preset=self.preset.partition("-")[0])
            yield "", Peer(ONE_TOKEN, lambda: draws(whole.sampler(device, self.backend)), "bound")
        if self.weights != "same":
            plain = replace(self, weights="same")
            yield "", Peer(BF16, lambda: draws(plain.sampler(device, self.backend)), "bound")
        yield "graph", Peer("plain PyTorch, steps in a graph", backend("graph"))
        if self.target is None:
            return
        if self.generator_config.group == 1:
            yield "", Peer(SCALES, functools.partial(self._scales, device), "bound")
        yield "reference", Peer("plain PyTorch, eager", backend("reference"))
        if self.generator_config.group == 1 and self.pixels == "none":
            yield "", Peer(COMPILED, functools.partial(self._compiled, device), compiled=True)

    def _compiled(self, device: torch.device) -> Callable[..., Drawn] | Missing:
        return others.setup_compiled_step(random_generator(self.generator_config, device), self.batch)

    def _scales(self, device: torch.device) -> Callable[..., Drawn]:
        # The finest scale has one place for every 16 x 16 pixels.
        sides = tuple(side for side in others.SIDES if side <= (2 if self.tiny else 16))
        config = replace(self.generator_config, tokens=others.scale_tokens(sides))
        decoder = None
        if self.tokenizer_config is not None:
            decoder = others.scale_decoder(self.tokenizer_config.image_size, device, _DTYPE)
        return others.Scales(random_generator(config, device), self.batch, sides, decoder)


def _within(milliseconds: float) -> Condition:
    return Condition(f"<= {milliseconds:g} ms", lambda m: m.ours is not None and m.ours.median <= milliseconds * 1e-3)


def _images_per_second(least: float) -> Condition:
    def holds(m: Measurement) -> bool:
        assert isinstance(m.case, SamplingCase)
        return m.ours is not None and m.case.batch / m.ours.median >= least

    return Condition(f">= {least:,.0f} images/s", holds)


def _of_single_tokens(most: float) -> Condition:
    def holds(m: Measurement) -> bool:
        whole = next((r for r in m.rivals if r.name == ONE_TOKEN and r.timing), None)
        return m.ours is not None and whole is not None and m.ours.median <= most * timed(whole).median

    return Condition(f"<= {most:g} of the time with {ONE_TOKEN}", holds)


TARGETS = (
    SamplingCase(target="P6", condition=_within(20), aim=_within(12)),
    SamplingCase(target="P8", pixels="vqgan", condition=_within(25), aim=_within(15)),
    SamplingCase(target="P14", preset="d16-p4", condition=_of_single_tokens(0.35)),
    SamplingCase(target="P7", batch=64, condition=_within(25)),
    SamplingCase(target="P7", batch=256, condition=_within(60)),
    SamplingCase(target="P9", pixels="vqgan", batch=256, condition=_images_per_second(1200)),
    SamplingCase(target="P9", pixels="direct", batch=256, condition=_images_per_second(3500)),
)

FP8 = (SamplingCase(weights="fp8"), SamplingCase(batch=64, weights="fp8"))


def sampling_cases(presets: Sequence[str], batches: Sequence[int], backend: BackendName) -> list[SamplingCase]:
    """Targets first, then fp8 weights, then tokens of every preset and batch, then pixels of the first preset.

    Raises:
        ValueError: no preset or an unknown one, or a batch outside of 1..1024.
    """
    if not presets:
        raise ValueError(f"presets must be one or more, such as {PRESETS[0]}")
    for preset in presets:
        generator_preset(preset)
    for batch in batches:
        if not 1 <= batch <= BUCKETS[-1]:
            raise ValueError(f"batches must be 1..{BUCKETS[-1]}, not {batch}")
    tokens = [SamplingCase(preset=preset, batch=batch) for preset in presets for batch in batches]
    heads: tuple[Pixels, ...] = ("vqgan", "direct")
    pixels = [SamplingCase(preset=p, batch=batch, pixels=h) for p in presets[:1] for h in heads for batch in batches]
    # The reference has no weights of its own.
    fp8 = () if backend == "reference" else FP8
    found: dict[tuple[str, int, Pixels, WeightFormat], SamplingCase] = {}
    for case in (*TARGETS, *fp8, *tokens, *pixels):
        if case.preset in presets and case.batch in batches:
            found.setdefault((case.preset, case.batch, case.pixels, case.weights), replace(case, backend=backend))
    return list(found.values())


def with_curve(cases: Sequence[SamplingCase], preset: str, backend: BackendName) -> list[SamplingCase]:
    """The cases with the batches of `CURVE` that this preset's tokens lack, behind the targets' and its own."""
    own = [case.preset == preset and case.pixels == "none" and case.weights == "same" for case in cases]
    known = {case.batch for case, is_own in zip(cases, own, strict=True) if is_own}
    end = max((i + 1 for i, case in enumerate(cases) if case.target or own[i]), default=0)
    curve = [SamplingCase(preset=preset, batch=b, backend=backend, brief=True) for b in CURVE if b not in known]
    return [*cases[:end], *curve, *cases[end:]]


_NAME = re.compile(r"class -> (?:tokens|\d+x\d+ pixels, (\w+) head), ([\w-]+)(, tiny)?(, fp8 weights)?, .*, B=(\d+)")


def case_named(name: str) -> SamplingCase | None:
    """The case of a recorded line; None for a name that no case has."""
    if not (parts := _NAME.fullmatch(name)) or (parts[1] or "none") not in get_args(Pixels):
        return None
    case = SamplingCase(
        preset=parts[2],
        batch=int(parts[5]),
        pixels=cast(Pixels, parts[1] or "none"),
        weights="fp8" if parts[4] else "same",
        tiny=bool(parts[3]),
    )
    try:
        return case if case.name == name else None
    except ValueError:  # a preset of another time
        return None


def count_bytes(count: float) -> str:
    """In words."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def draws(sampler: Sampler) -> Callable[..., Drawn]:
    """What is timed: tokens and, where the sampler has a tokenizer, pictures."""

    def draw(classes: Sequence[int], seeds: Sequence[int], settings: SamplingSettings) -> Drawn:
        tokens = sampler.sample_tokens(classes, seeds, settings)
        return Drawn(tokens, None if sampler.tokenizer is None else sampler.pictures(tokens), settings)

    return draw


def least_pixel_flops(config: TokenizerConfig) -> int:
    """`config.decode_flops()` with the VQGAN's convolutions in the cheapest form known to us.

    A 1x1 shortcut is folded into the convolution before it, and doubling before a 3x3 convolution takes four 2x2
    convolutions of the small map: 4/9 of the work.
    """
    flops = config.decode_flops()
    if config.pixel_head == "vqgan":
        for c in VQGANConfig(image_size=config.image_size).convolutions():
            plain = 2 * c.kernel**2 * c.inputs * c.outputs * c.size**2
            doubling = c.bias and c.inputs == c.outputs
            flops -= plain if c.kernel == 1 else 5 * plain // 9 if doubling else 0
    return flops


@functools.lru_cache(maxsize=2)
def random_generator(config: GeneratorConfig, device: torch.device) -> SpectralGenerator:
    """Random weights as spread as trained ones: blocks that matter and logits some units apart.

    A fresh model has gates near zero and logits that hardly differ, so that half of its blocks could be wrong unseen.
    """
    generator = _built(lambda: SpectralGenerator(config), device)
    with torch.no_grad():
        generator.class_table.weight.normal_()
        generator.positions.normal_(std=0.5)
        if config.token_input == "table":
            generator.token_table.weight.normal_()
        generator.head.weight.normal_(std=2.5 * config.width**-0.5)
        for block in generator.blocks:
            assert isinstance(block, Block)
            block.adaln.weight.normal_(std=0.8 * config.width**-0.5)
            block.adaln.bias[: 2 * config.width] = 1  # gates
            for bias in (block.attention.q_bias, block.attention.v_bias, block.fc1.bias, block.fc2.bias):
                bias.normal_(std=0.1)
    return generator.to(_DTYPE)


@functools.lru_cache(maxsize=2)
def random_tokenizer(config: TokenizerConfig, device: torch.device) -> SpectralTokenizer:
    """Random weights; pictures of a VQGAN lie around grey, as the clamp would hide half of every other mistake."""
    tokenizer = _built(lambda: SpectralTokenizer(config), device)
    head = tokenizer.decoder.head
    if isinstance(head, ProxyCodeHead):
        assert head.vqgan.conv_out.bias is not None
        with torch.no_grad():
            head.vqgan.conv_out.bias.fill_(0.5)
    return tokenizer.to(_DTYPE)


def _built(make: Callable[[], Model], device: torch.device) -> Model:
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)
