"""Named training runs: `paper` follows the published recipes, the others are made for small sets and machines."""

from __future__ import annotations

from dataclasses import replace

from spectralar.config import VIT_SIZES, TokenizerConfig, ViTConfig, generator_preset
from spectralar.sampling import SamplingSettings
from spectralar.training.data.images import Crop
from spectralar.training.data.loader import LoaderConfig
from spectralar.training.loop import LoopConfig
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.prefixes import PrefixConfig
from spectralar.training.runs import GeneratorRun, TokenizerRun
from spectralar.training.tokenizer import TokenizerLossConfig

_TINY = VIT_SIZES["tiny"]

# Departures from the paper, here and in the models, give every token something to say where sets are small and minutes
# few; docs/tokens.md has what was measured. With pixel weight 1 the commitment loss pulls every token that matters
# little for the error to a constant code; two prefixes of an image, half of all whole, show late tokens more images;
# high frequencies that weigh more, as `emoji` has them, give them more to do, but hold photographs back.
_LOSS = TokenizerLossConfig(pixel=15.0, prefixes=PrefixConfig(per_image=2, full=0.5))

TOKENIZER_RUNS: dict[str, TokenizerRun] = {
    # TiTok's optimizer over ImageNet; one stage with the direct pixel head, since proxy codes are not implemented yet.
    "paper": TokenizerRun(
        model=TokenizerConfig(),
        data=LoaderConfig(path="", batch=256, crop=Crop(256), workers=12),
        optimizer=OptimizerConfig(),
        loop=LoopConfig(out="runs/tokenizer", steps=1_000_000, compile=True, checkpoint_every=10_000),
    ),
    # 128-px pictures, a few thousand of them, seven minutes on one GPU.
    "emoji": TokenizerRun(
        model=TokenizerConfig(
            image_size=128,
            patch_size=16,
            encoder=ViTConfig(256, 3, 4),
            decoder=_TINY,
            commitment=0.02,
            latent_norm="batch",
            dead_codes="restart",
        ),
        data=LoaderConfig(
            path="", batch=256, crop=Crop(128, "random-resized", scale=(0.7, 1.0)), workers=14, cache=True
        ),
        loss=replace(_LOSS, emphasis=1.0),
        optimizer=OptimizerConfig(lr=1.2e-3, warmup=500),
        loop=LoopConfig(out="runs/emoji/tokenizer", steps=28_000, compile=True, validate_every=4_000, picture_every=0),
    ),
    # A few hundred 256-px photographs, both sides of size base: four minutes on one GPU.
    "photos": TokenizerRun(
        model=TokenizerConfig(commitment=0.02, latent_norm="batch", dead_codes="restart"),
        data=LoaderConfig(
            path="", batch=64, crop=Crop(256, "random-resized", scale=(0.25, 1.0)), workers=14, cache=True
        ),
        loss=_LOSS,
        optimizer=OptimizerConfig(lr=5e-4, warmup=300),
        loop=LoopConfig(out="runs/photos/tokenizer", steps=2_500, compile=True, validate_every=500, picture_every=0),
    ),
    # The demo on a laptop's processor, and on a GPU.
    "demo-cpu": TokenizerRun(
        model=TokenizerConfig(
            image_size=64,
            patch_size=16,
            tokens=32,
            codebook_size=512,
            code_dim=8,
            encoder=ViTConfig(128, 1, 2),
            decoder=ViTConfig(128, 4, 2),
            latent_norm="batch",
        ),
        data=LoaderConfig(path="", batch=24, crop=Crop(64, "none", flip=False), cache=True),
        loss=TokenizerLossConfig(pixel=20.0),
        optimizer=OptimizerConfig(lr=1.5e-3, warmup=50, ema=0.99),
        loop=LoopConfig(out="runs/demo/tokenizer", steps=2_500, log_every=10, validate_every=1_250, picture_every=500),
    ),
    "demo-gpu": TokenizerRun(
        model=TokenizerConfig(
            image_size=128, patch_size=16, codebook_size=1024, encoder=_TINY, decoder=_TINY, latent_norm="batch"
        ),
        data=LoaderConfig(path="", batch=128, crop=Crop(128, "none", flip=False), cache=True),
        loss=TokenizerLossConfig(pixel=15.0),
        optimizer=OptimizerConfig(lr=6e-4, warmup=200),
        loop=LoopConfig(out="runs/demo/tokenizer", steps=5_000, validate_every=1_000, picture_every=1_000),
    ),
}

GENERATOR_RUNS: dict[str, GeneratorRun] = {
    # VAR's recipe: peak learning rate 1e-4 (8e-5 from d24 on) per 256 sequences, 200 to 350 epochs of ImageNet.
    **{
        f"paper-d{depth}": GeneratorRun(
            model=generator_preset(f"d{depth}"),
            optimizer=OptimizerConfig(
                lr=lr,
                betas=(0.9, 0.95),
                weight_decay=0.05,
                warmup=steps // 50,
                schedule="linear",
                hold=0.05,
                final=final,
                clip=2.0,
                ema=0.0,
            ),
            loop=LoopConfig(out=f"runs/generator-d{depth}", steps=steps, compile=True, checkpoint_every=10_000),
        )
        for depth, lr, final, steps in (
            (16, 3.0e-4, 0.1, 333_800),
            (20, 3.0e-4, 0.1, 417_250),
            (24, 2.4e-4, 0.01, 584_150),
        )
    },
    "emoji": GeneratorRun(
        model=generator_preset("d4", token_input="code", drop_path=0.1),
        batch=512,
        optimizer=OptimizerConfig(
            lr=6e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=200, schedule="cosine", clip=2.0, ema=0.999
        ),
        loop=LoopConfig(out="runs/emoji/generator", steps=5_000, validate_every=500, picture_every=0),
        sampling=SamplingSettings(guidance=3.0, top_k=300, top_p=0.96),
    ),
    "demo-cpu": GeneratorRun(
        model=generator_preset("d4", depth=2),
        batch=64,
        optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05, warmup=50, clip=2.0, ema=0.99),
        loop=LoopConfig(out="runs/demo/generator", steps=500, log_every=10, validate_every=250, picture_every=250),
        sampling=SamplingSettings(guidance=2.0, top_p=0.95),
    ),
    "demo-gpu": GeneratorRun(
        model=generator_preset("d6"),
        batch=256,
        optimizer=OptimizerConfig(lr=6e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup=200, clip=2.0, ema=0.999),
        loop=LoopConfig(out="runs/demo/generator", steps=3_000, validate_every=500, picture_every=1_000),
        sampling=SamplingSettings(guidance=2.0, top_p=0.95),
    ),
}
