"""The trials by name: what each changes in the plain recipe, and what it was predicted to give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from spectralar.config import TokenizerConfig, ViTConfig
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.runs import TokenizerRun
from spectralar.training.tokenizer import TokenizerTask
from spectralar.training.trials.variants import (
    EntropyTokenizer,
    FullFirstTask,
    LatentStartTokenizer,
    MovingAverageTokenizer,
    PerceptualTask,
    ResidualTokenizer,
    RotatedTokenizer,
    Validation,
    embedding_norm,
    fast_queries,
    fsq,
    plain_task,
    simvq,
)

Config = TypeVar("Config")


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        prediction: what it should give, written before it ran, for 240 s on one H200 (about 9,000 steps of `base`).
        changes: fields of the run, `model.codebook_size` and the like, to new values.
        build: makes the tokenizer.
        task: makes what is trained.
    """

    prediction: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    build: Callable[[TokenizerConfig], SpectralTokenizer] = SpectralTokenizer
    task: Callable[[SpectralTokenizer, TokenizerRun, Validation | None], TokenizerTask] = plain_task


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration dataclass with fields replaced; a dotted name reaches into nested ones.

    Raises:
        ValueError: a name that is no field.
    """
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if not hasattr(config, head):
            raise ValueError(f"{type(config).__name__} has no field {head}")
        inner = override(getattr(config, head), {rest: value}) if rest else value
        config = replace(config, **{head: inner})  # type: ignore[type-var]
    return config


# What the preset `emoji` was before the trials; they start from it.
PLAIN = {
    "model.codebook_size": 2048,
    "model.dead_codes": "keep",
    "model.commitment": 0.25,
    "loss.prefixes.per_image": 1,
    "loss.prefixes.full": 0.0,
    "loss.emphasis": 0.0,
    "optimizer.lr": 6e-4,
}

_TWO = {"loss.prefixes.per_image": 2}
_RESTART = {"model.codebook_size": 4096, "model.dead_codes": "restart"}
_BET = {**_TWO, "loss.prefixes.full": 0.25, **_RESTART}
_WIDE = {"model.encoder": ViTConfig(384, 4, 6), "model.decoder": ViTConfig(512, 6, 8)}
_LOOSE = {"model.commitment": 0.02}
_RECIPE = {**_BET, **_LOOSE}
_ALL = {**_RECIPE, "loss.emphasis": 1.0, "optimizer.lr": 1.2e-3}
_PRESET = {**_ALL, "loss.prefixes.full": 0.5}

TRIALS: dict[str, Trial] = {
    "base": Trial("as the first embedded model, a little short: Q1 20.9, Q2 0.6, Q3 26, Q4 800; the last seven silent"),
    "bet": Trial(
        "two prefixes of an image, a quarter of all full, 4096 codes that restart: the last seven seen in 1 of 3 "
        "prefixes instead of 1 of 16, so they wake: Q1 21.3, Q2 1.0, Q3 90, Q4 2000",
        _BET,
    ),
    "bet-wide-loose": Trial(
        "bet, wide and loose together: Q1 22.2, Q2 1.5, Q3 130, Q4 2300; a fifth fewer steps",
        {**_BET, **_WIDE, **_LOOSE},
    ),
    "bet-loose": Trial("bet and loose: Q1 0.15 dB over the same with 2048 codes, Q4 2700", _RECIPE),
    "wide": Trial(
        "27 M instead of 6 M weights: training and validation PSNR of the first embedded model are 0.2 dB apart, so it "
        "underfits: Q1 21.7, Q2 0.9; the last tokens stay silent, Q3 26",
        _WIDE,
    ),
    "loose": Trial(
        "commitment 0.02 instead of 0.25: at position 60 its pull is stronger than the pixels'; standardised latents "
        "need no leash: Q1 21.0, Q2 0.75, Q3 80, Q4 1000",
        _LOOSE,
    ),
    "full-half": Trial(
        "of two prefixes of an image one is full: late tokens are trained in every image: Q1 21.4, Q2 1.1, Q3 80; "
        "PSNR at n = 8 falls by 0.2",
        {**_TWO, "loss.prefixes.full": 0.5},
    ),
    "codes-4096-restart": Trial("twice the codes, none dead: Q4 2000, Q1 + 0.2 dB, Q3 60, Q2 unchanged", _RESTART),
    "prefixes-4": Trial(
        "four prefixes of an image, one from each quarter: the same mean gradient with less noise, at twice the time "
        "of a step: Q1 21.0, Q2 0.75, Q3 30",
        {"loss.prefixes.per_image": 4},
    ),
    "tilt": Trial(
        "two prefixes of an image, the longer the likelier: between prefixes-4 and full-half: Q1 21.2, Q2 0.9, Q3 50",
        {**_TWO, "loss.prefixes.tilt": 1.0},
    ),
    "emphasis": Trial(
        "high frequencies weigh (1 + r / 8): tokens from 32 on do more in their own bands, the sum of squares pays: "
        "Q1 20.7, Q2 0.8, Q3 50",
        {"loss.emphasis": 1.0},
    ),
    "full-first": Trial(
        "full prefixes first, uniform ones from half of the run: late tokens are awake at half time and lose half of "
        "their gain afterwards: Q1 21.1, Q2 0.8, Q3 50",
        task=FullFirstTask,
    ),
    "lr-double": Trial(
        "it underfits, so a learning rate of 1.2e-3 gains what more steps would: Q1 21.0, Q2, Q3 and Q4 as base",
        {"optimizer.lr": 1.2e-3},
    ),
    "patch-8": Trial(
        "256 patches of 8 instead of 64 of 16: finer queries of the picture, under half of the steps: Q1 20.8, Q2 0.6",
        {"model.patch_size": 8},
    ),
    "codes-16384": Trial(
        "bet with four times the codes: two more bits a token at most, of which half are used: Q1 + 0.25 dB over bet, "
        "Q4 5000",
        {**_BET, "model.codebook_size": 16384},
    ),
    "strict": Trial("image rows of the encoder see no tokens: Q1 - 0.1 dB, nothing else", {"model.mask": "strict"}),
    "entropy": Trial(
        "a reward for many codes at every position: Q3 150, Q4 1500, but silent tokens stay silent: Q2 0.6, Q1 20.8",
        build=EntropyTokenizer,
    ),
    "rotation": Trial("gradients turn with the code: Q1 + 0.05 dB, Q2 and Q3 as base", build=RotatedTokenizer),
    "fsq": Trial(
        "a grid without losses of its own: nothing pulls to one code, so Q3 150, Q4 1500; four coordinates are few: "
        "Q1 20.6, Q2 0.7",
        {"loss.quantizer": 0.0},
        build=fsq,
    ),
    "simvq": Trial("all codes move together: none dies, Q4 1300; Q1 and Q2 as base, Q3 26", build=simvq),
    "moving-average": Trial(
        "codes follow their latents at once, without a gradient: Q1 + 0.1 dB over base, Q4 half as much again; nothing "
        "wakes, Q2 and Q3 as base",
        build=MovingAverageTokenizer,
    ),
    "no-latent-norm": Trial(
        "latents as the encoder gives them lie closer together than the codes: two hundred codes, the worst position "
        "has 1 to 3 of them, Q1 1 dB below base, Q2 0.1",
        {"model.latent_norm": "none"},
    ),
    "residual": Trial(
        "tokens after the 16th see only what those leave over: Q2 + 0.2 dB over base, Q1 + 0.1; half of the silent "
        "positions wake",
        build=ResidualTokenizer,
    ),
    "perceptual": Trial(
        "features of a random network weigh edges: Q1 - 0.3 dB, Q2 + 0.1; what it asks for is in the tokens' own bands "
        "only in part, silent positions stay",
        task=PerceptualTask,
    ),
    # How things begin, and how fast they move; predicted for 4,000 steps, where `base` has 19.40 dB and twice the
    # learning rate is worth 1 dB.
    "codes-from-latents": Trial(
        "codes begin where latents are: Q1 + 0.3 dB over base, Q4 600; as many silent",
        build=LatentStartTokenizer,
    ),
    "fast-codes": Trial(
        "five times the learning rate for codes alone: Q4 900, Q1 + 0.3 dB; Q2 as base",
        {"optimizer.code_rate": 5.0},
    ),
    "fast-queries": Trial(
        "the same for queries and token positions alone: nothing, they lie far apart from the start",
        build=fast_queries,
    ),
    "embedding-norm": Trial(
        "codes as loud as positions from the start, not a third: Q1 + 0.1 dB, Q2 + 0.05",
        build=embedding_norm,
    ),
    # What helped alone, together with the recipe; predicted for 4,000 steps, where `bet-loose` has Q1 20.7 and Q2 1.1.
    "bet-loose-emphasis": Trial(
        "most of what an emphasis gives alone the recipe has already: Q1 + 0.2 dB, Q2 + 0.2",
        {**_RECIPE, "loss.emphasis": 1.0},
    ),
    "bet-loose-half": Trial(
        "half of the prefixes whole: Q2 + 0.3 dB, Q1 + 0.05, n = 8 0.15 less",
        {**_RECIPE, "loss.prefixes.full": 0.5},
    ),
    "bet-loose-first": Trial(
        "whole prefixes first: awake from the start, so Q1 + 0.15 dB, Q2 + 0.15",
        _RECIPE,
        task=FullFirstTask,
    ),
    "bet-loose-rotation": Trial(
        "gradients turn with the code: Q1 + 0.15 dB, Q2 as the recipe", _RECIPE, build=RotatedTokenizer
    ),
    "bet-loose-lr": Trial(
        "a learning rate of 1.2e-3, since 4,000 steps are far from the end: Q1 + 0.3 dB",
        {**_RECIPE, "optimizer.lr": 1.2e-3},
    ),
    "bet-loose-16384": Trial("four times the codes: Q1 + 0.3 dB, Q4 5000", {**_RECIPE, "model.codebook_size": 16384}),
    "bet-loose-all": Trial(
        "emphasis, rotation and learning rate: what they give adds up to two thirds, Q1 + 0.4 dB, Q2 + 0.2",
        _ALL,
        build=RotatedTokenizer,
    ),
    # Predicted when those before it had run: 21.95 dB for bet-loose-all, nothing for the rotation.
    "bet-loose-emphasis-lr-half": Trial(
        "bet-loose-all without the rotation and with half of the prefixes whole: Q1 22.05, Q2 1.8, n = 8 15.85",
        _PRESET,
    ),
    "preset-slow-codes": Trial(
        "the preset's recipe with a quarter of the learning rate for codes; predicted where that was 2.4e-3: Q3 130, "
        "Q4 3100, Q1 + 0.1 dB",
        {**_PRESET, "optimizer.code_rate": 0.25},
    ),
    "preset-strict": Trial(
        "the strict mask, which alone woke 23 of 26 positions; predicted at 2.4e-3: Q1 + 0.1 dB over the preset's "
        "recipe, Q3 + 20",
        {**_PRESET, "model.mask": "strict"},
    ),
    "preset-from-latents": Trial(
        "codes begin where latents are, as dead ones restart there anyway: Q1 + 0.1 dB over the preset's recipe",
        _PRESET,
        build=LatentStartTokenizer,
    ),
    "bet-loose-lr-more": Trial(
        "a learning rate of 2.4e-3: beyond the best one, Q1 + 0.1 dB over bet-loose",
        {**_RECIPE, "optimizer.lr": 2.4e-3},
    ),
}
