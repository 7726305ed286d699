"""Cases of training: one step of the tokenizer or the generator as the trainer makes it; costs and targets."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.bench.cases import Case, Condition, Measurement, Peer, Workload
from spectralar.bench.peers.training import PlainGenerator, PlainStep, PlainTokenizer
from spectralar.bench.training_truth import Judge, Verdict, gradients_of
from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig, generator_preset
from spectralar.generator import SpectralGenerator
from spectralar.generator.model import Block
from spectralar.images import to_float
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.distributed import ALONE, Ranks
from spectralar.training.generator import GeneratorTask
from spectralar.training.loop import LoopConfig, Task, Trainer
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask

Kind = Literal["tokenizer", "generator"]
# Radians from a latent to its code. On 12 pictures at full size every latent is nearer to its code than to any other by
# 0.13 at least, and bf16 moves it by 0.01.
_TURN = 0.15

PLAIN, PLAIN_COMPILED = "plain PyTorch, eager", "plain PyTorch, blocks compiled"

# At the peak at once: the losses of the first steps then tell whether gradients and updates were right.
OPTIMIZERS = {
    "tokenizer": OptimizerConfig(warmup=0, schedule="constant"),
    "generator": OptimizerConfig(
        betas=(0.9, 0.95), weight_decay=0.05, warmup=0, schedule="constant", clip=2.0, ema=0.0
    ),
}


@dataclass(frozen=True)
class Settings:
    """How the trainer runs its step; see `LoopConfig`."""

    compile: bool = False
    capture: bool = False
    checkpointing: bool = False
    precision: Literal["bf16", "fp32"] = "bf16"
    ranks_per_copy: int = 1

    @property
    def name(self) -> str:
        """What is switched on."""
        chosen = (("compiled", self.compile), ("captured", self.capture), ("checkpointing", self.checkpointing))
        return ", ".join(name for name, on in chosen if on) or "eager"


@dataclass(frozen=True, kw_only=True)
class TrainingCase(Case):
    """One step on random inputs that lie on the device: forward, backward, clipping, AdamW and the average.

    Attributes:
        kind: what is trained.
        size: of the generator, a preset; the tokenizer's sides are of size base.
        batch: samples of a step, two or more.
        tiny: models in a size for a CPU.
    """

    kind: Kind = "tokenizer"
    size: str = "base"
    batch: int = 256
    tiny: bool = False

    budget = 2.0
    peer_budget = 2.0
    arithmetic = "bf16"

    @property
    def name(self) -> str:
        config = self.model_config
        pixels = f"{config.image_size} px, " if isinstance(config, TokenizerConfig) else ""
        size = "base/base" if self.kind == "tokenizer" else self.size
        tiny = ", tiny" if self.tiny else ""
        return f"{self.kind} training step {size}{tiny}, {pixels}{config.tokens} tokens, bf16, B={self.batch}"

    @property
    def costs(self) -> str:
        operations = f"{self.flops() / 1e12:.3g} TFLOP, three times the forward pass's"
        return f"{operations}; {self.bytes() / 1e9:.3g} GB for the optimizer"

    @property
    def model_config(self) -> TokenizerConfig | GeneratorConfig:
        if self.kind == "generator":
            config = generator_preset(self.size)
            return replace(config, depth=2, tokens=8, codebook_size=64, classes=10) if self.tiny else config
        if not self.tiny:
            return TokenizerConfig()
        side = ViTConfig(64, 2, 1)
        return TokenizerConfig(image_size=32, tokens=8, encoder=side, decoder=side, codebook_size=64)

    @property
    def optimizer(self) -> OptimizerConfig:
        return OPTIMIZERS[self.kind]

    def bytes(self) -> int:
        # What the optimizer alone moves: weight, gradient and both moments read, all but the gradient written, fp32.
        return 28 * sum(p.numel() for p in self._meta().parameters())

    def flops(self) -> int:
        # Of the backward pass twice the forward pass's; nothing for activations that are computed again.
        return 3 * self.batch * self.model_config.flops()

    def small(self) -> Self:
        size = "d16" if self.kind == "generator" else self.size  # tiny presets are all the same
        return replace(self, batch=min(self.batch, 4), size=size, tiny=True, target=None, condition=None)

    def model(self, device: torch.device) -> SpectralTokenizer | SpectralGenerator:
        """Always the same weights, far from those that training starts with, so that mistakes matter.

        The generator's blocks matter from the start, and so do the tokenizer's codes to its pictures. No code depends
        on rounding: a vector that goes to another code changes gradients more than rounding does, and a fresh encoder
        gives all pictures of a kind nearly the same latents, so all would change their code at once.
        """
        with torch.random.fork_rng(), device:
            torch.manual_seed(0)
            return self._tokenizer() if self.kind == "tokenizer" else self._generator()

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Smooth random pictures, 8 bits, the first half of them dark and the others bright, or random tokens; labels.

        Dark and bright pictures have different codes.
        """
        config = self.model_config
        with torch.random.fork_rng(), device:
            torch.manual_seed(1)
            if isinstance(config, GeneratorConfig):
                tokens = torch.randint(config.codebook_size, (self.batch, config.tokens))
                return [tokens, torch.randint(config.classes, (self.batch,))]
            coarse = torch.rand(self.batch, 3, 8, 8)
            images = 0.4 * F.interpolate(coarse, size=config.image_size, mode="bicubic").clamp(0, 1)
            images[self.batch // 2 :] += 0.6
            return [(255 * images).byte(), torch.zeros(self.batch, dtype=torch.int64)]

    def trainer(self, settings: Settings, device: torch.device, ranks: Ranks = ALONE) -> Trainer:
        """A trainer of the case's model that never writes."""
        model = self.model(device)
        task: Task = GeneratorTask(model, ranks=ranks) if isinstance(model, SpectralGenerator) else TokenizerTask(
            model, TokenizerLossConfig(), ranks=ranks
        )  # fmt: skip
        loop = LoopConfig(
            device="cuda" if device.type == "cuda" else "cpu",
            precision=settings.precision,
            capture=settings.capture,
            compile=settings.compile,
            checkpointing=settings.checkpointing,
            ranks_per_copy=settings.ranks_per_copy,
        )
        return Trainer(task, _NoLoader(), self.optimizer, loop, {}, ranks=ranks)

    def plain(self, device: torch.device, **options: bool) -> PlainStep:
        """The same step in plain PyTorch, from the same weights; options are those of `PlainStep`."""
        ours, config = self.model(device), self.model_config
        model: PlainTokenizer | PlainGenerator
        if isinstance(config, TokenizerConfig):
            drawing = TokenizerTask(self._meta(), TokenizerLossConfig())
            model = PlainTokenizer(config, device, drawing.draw_lengths, exact=not options.get("half", True))
        else:
            model = PlainGenerator(config, device)
        undecayed = TokenizerTask.undecayed if self.kind == "tokenizer" else GeneratorTask.undecayed
        return PlainStep(model, ours.state_dict(), self.optimizer, undecayed, **options)

    def variants(self, device: torch.device) -> tuple[Settings, ...]:
        """The trainer's settings to measure; nothing is compiled or captured without a GPU."""
        if device.type != "cuda":
            return Settings(), Settings(checkpointing=True)
        best, small = Settings(compile=True, capture=True), Settings(compile=True, capture=True, checkpointing=True)
        if self.target is None:
            return best, small
        return best, Settings(capture=True), Settings(compile=True), Settings(), small

    def workload(self, device: torch.device) -> Workload:
        inputs = self.inputs(device)
        judge = Judge(functools.partial(self.plain, device), inputs)

        def ours(*_: Tensor) -> Verdict:
            trainer = self.trainer(self.variants(device)[0], device)
            return judge(trainer.advance, gradients_of(trainer.model))

        def error(result: object) -> float:
            assert isinstance(result, Verdict)
            return result.error

        return Workload(tuple(inputs), ours, error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        eager = Peer(PLAIN, functools.partial(self.plain, device), capture=False)
        if device.type != "cuda" or self.target is None:
            return (eager,)
        compiled = functools.partial(self.plain, device, compiled=True)
        return eager, Peer(PLAIN_COMPILED, compiled, compiled=True, capture=False)

    @torch.no_grad()
    def _tokenizer(self) -> SpectralTokenizer:
        config = self.model_config
        assert isinstance(config, TokenizerConfig)
        tokenizer = SpectralTokenizer(config)
        if self.tiny:
            for name, weight in tokenizer.named_parameters():
                if ".blocks." in name and weight.dim() == 2:
                    weight.mul_(4)  # narrow blocks do little with the variance of wide ones
        tokenizer.get_parameter("decoder.from_code.weight").mul_(10)
        tokenizer.get_parameter("decoder.head.to_patch.weight").mul_(5)
        both = self.inputs(tokenizer.device)[0][[0, -1]]  # a picture of each kind
        latents = F.normalize(tokenizer.encoder(to_float(both)), dim=-1).flatten(0, 1)
        turned = latents + _TURN * F.normalize(torch.randn_like(latents), dim=-1)
        places = torch.randperm(config.codebook_size)[: len(turned)]
        tokenizer.codebook[places] = F.normalize(turned, dim=-1)
        return tokenizer

    @torch.no_grad()
    def _generator(self) -> SpectralGenerator:
        config = self.model_config
        assert isinstance(config, GeneratorConfig)
        generator = SpectralGenerator(config)
        for block in generator.blocks:
            assert isinstance(block, Block)
            block.adaln.weight.normal_(std=0.5 * config.width**-0.5)
            block.adaln.bias[: 2 * config.width] = 1  # gates
        return generator

    def _meta(self) -> Any:
        """The model without memory for its weights."""
        config = self.model_config
        with torch.device("meta"):
            return SpectralTokenizer(config) if isinstance(config, TokenizerConfig) else SpectralGenerator(config)


class _NoLoader:
    """Inputs are handed to the trainer's step by the measurement."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no position to take over."""


def _of_gemm(least: float) -> Condition:
    def holds(m: Measurement) -> bool:
        return m.ours is not None and m.ceiling.endswith("GEMM") and m.floor >= least * m.ours.median

    return Condition(f">= {least:.0%} of the GEMM rate", holds)


CASES = (
    TrainingCase(target="P10", condition=_of_gemm(0.5)),
    TrainingCase(kind="generator", size="d16", batch=768, target="P11", condition=_of_gemm(0.55)),
    *(TrainingCase(batch=batch) for batch in (32, 64, 128)),
    *(TrainingCase(kind="generator", size="d16", batch=batch) for batch in (256, 512)),
    TrainingCase(kind="generator", size="d20", batch=256),
    TrainingCase(kind="generator", size="d24", batch=256),
    TrainingCase(kind="generator", size="d30", batch=128),
)
