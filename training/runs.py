"""A whole training run as one configuration (model, data, loss, optimizer, loop), and the functions to carry it out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from spectralar.config import GeneratorConfig, TokenizerConfig, to_dict
from spectralar.generator import SpectralGenerator
from spectralar.sampling import SamplingSettings
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data.loader import ImageLoader, LoaderConfig, evaluation_batches
from spectralar.training.data.shard_set import ShardSet
from spectralar.training.data.tokens import TokenBatch, TokenLoader, TokenStore
from spectralar.training.data.workers import Batch
from spectralar.training.distributed import ALONE, Ranks, join_ranks
from spectralar.training.generator import GeneratorTask
from spectralar.training.loop import LoopConfig, Trainer
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask


@dataclass(frozen=True)
class TokenizerRun:
    """Training of a tokenizer.

    Attributes:
        model: the tokenizer.
        data: training images; `data.batch` is the batch of all ranks together, `data.crop.size` the model's image size.
        loss: weights of the loss terms.
        optimizer: AdamW and its schedule.
        loop: length, device and what is written when.
        validation: shards of validation images; empty for no validation.
        validation_images: at most this many of them are used during training.
        pictured: number of validation images on the strips.
    """

    model: TokenizerConfig
    data: LoaderConfig
    loss: TokenizerLossConfig = field(default_factory=TokenizerLossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    validation: str = ""
    validation_images: int = 1024
    pictured: int = 4

    def __post_init__(self) -> None:
        if self.data.crop.size != self.model.image_size:
            raise ValueError(
                f"data.crop.size must be model.image_size {self.model.image_size}, not {self.data.crop.size}"
            )
        if self.validation_images < 1:
            raise ValueError(f"validation_images must be at least 1, not {self.validation_images}")


@dataclass(frozen=True)
class GeneratorRun:
    """Training of a generator on stored tokens.

    Attributes:
        model: the generator; `tokens`, `codebook_size`, `classes` and `class_names` are taken from the token store.
        tokens: folder of the token store.
        batch: sequences per step, of all ranks together.
        optimizer: AdamW and its schedule.
        loop: length, device and what is written when.
        validation: token store of the validation images; empty for no validation.
        tokenizer: saved tokenizer that decodes the pictured samples and gives `token_input="code"` its codes.
        pictured: classes on the pictures; empty is the first four.
        sampling: how the pictured samples are drawn.
    """

    model: GeneratorConfig
    tokens: str = ""
    batch: int = 768
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    validation: str = ""
    tokenizer: str = ""
    pictured: tuple[int, ...] = ()
    sampling: SamplingSettings = field(default_factory=lambda: SamplingSettings(guidance=3.0, top_k=900, top_p=0.96))


def train_tokenizer(run: TokenizerRun, *, resume: bool = False, console: Console | None = None) -> Path:
    """Trains a tokenizer; returns the folder of the final model. Under torchrun, on all of its ranks.

    Args:
        run: the configuration.
        resume: go on from the newest checkpoint in `run.loop.out`.
        console: where to print; None is standard error.

    Raises:
        ValueError, ShardError, CheckpointError, RunLockedError, NonFiniteLossError, RankLostError: see those.
    """
    _need(run.data.path, "data.path", "a folder of shards (make one with `spectralar shards`)")
    with join_ranks(run.loop.device) as ranks:
        return _tokenizer_trainer(run, ranks, console).run(resume=resume)


def _tokenizer_trainer(run: TokenizerRun, ranks: Ranks, console: Console | None) -> Trainer:
    data = replace(run.data, batch=ranks.share(run.data.batch, "data.batch"))
    loader = ImageLoader(data, rank=ranks.rank, world=ranks.world, device=run.loop.resolved_device())
    torch.manual_seed(run.loop.seed)
    model = SpectralTokenizer(run.model)
    pictured: Tensor | None = None

    def validation() -> Iterable[Batch]:
        return validation_images(run.validation, run.model.image_size, run.validation_images, ranks=ranks)

    if run.validation and run.pictured > 0:
        batches = validation_images(run.validation, run.model.image_size, run.pictured)
        pictured = torch.cat([batch.images for batch in batches])
    task = TokenizerTask(
        model, run.loss, validation=validation if run.validation else None, pictured=pictured, ranks=ranks
    )
    return Trainer(task, loader, run.optimizer, run.loop, to_dict(run), ranks=ranks, console=console)


def validation_images(path: str, size: int, limit: int, *, batch: int = 64, ranks: Ranks = ALONE) -> Iterable[Batch]:
    """Up to `limit` centre-cropped images, evenly spread over the set, in a fixed order; each on one of the ranks."""
    # A rank of evaluation_batches is every stride-th sample, which is the even spread wanted here.
    stride = math.ceil(len(ShardSet.open(path)) / limit)
    return evaluation_batches(path, batch=batch, size=size, rank=stride * ranks.rank, world=stride * ranks.world)


def train_generator(run: GeneratorRun, *, resume: bool = False, console: Console | None = None) -> Path:
    """Trains a generator; returns the folder of the final model. Under torchrun, on all of its ranks.

    Args:
        run: the configuration.
        resume: go on from the newest checkpoint in `run.loop.out`.
        console: where to print; None is standard error.

    Raises:
        ValueError, TokenStoreError, CheckpointError, RunLockedError, NonFiniteLossError, RankLostError: see those.
    """
    _need(run.tokens, "tokens", "a token store (make one with `spectralar tokenize`)")
    if run.model.token_input == "code":
        _need(run.tokenizer, "tokenizer", 'a saved tokenizer, which gives token_input="code" its codes')
    with join_ranks(run.loop.device) as ranks:
        return _generator_trainer(run, ranks, console).run(resume=resume)


def _generator_trainer(run: GeneratorRun, ranks: Ranks, console: Console | None) -> Trainer:
    store = TokenStore.open(run.tokens)
    run = replace(run, model=fitted(run.model, store))
    held_out = TokenStore.open(run.validation) if run.validation else None
    if held_out is not None and fitted(run.model, held_out) != run.model:
        raise ValueError(f"validation {run.validation} has other tokens, codes or classes than {run.tokens}")
    device = run.loop.resolved_device()
    share = ranks.share(run.batch, "batch")
    loader = TokenLoader(store, share, seed=run.loop.seed, device=device, rank=ranks.rank, world=ranks.world)
    tokenizer = SpectralTokenizer.from_pretrained(run.tokenizer, device=device) if run.tokenizer else None
    digest = weights_digest(tokenizer) if tokenizer is not None else store.info.tokenizer_digest
    for path, source in ((run.tokens, store), (run.validation, held_out)):
        if source is not None and len({source.info.tokenizer_digest, digest} - {""}) > 1:
            raise ValueError(f"the tokens of {path} come from another tokenizer than {run.tokenizer or run.tokens}")
    torch.manual_seed(run.loop.seed)
    model = SpectralGenerator(run.model, codebook=tokenizer.codebook if tokenizer is not None else None)

    def validation() -> Iterable[TokenBatch]:
        assert held_out is not None
        mine = slice(ranks.rank, None, ranks.world)
        tokens = torch.from_numpy(held_out.tokens[mine].astype("int64")).split(256)
        labels = torch.from_numpy(held_out.labels[mine].astype("int64")).split(256)
        return map(TokenBatch, tokens, labels)

    task = GeneratorTask(
        model,
        validation=validation if held_out is not None else None,
        tokenizer=tokenizer,
        pictured=run.pictured or tuple(range(min(4, run.model.classes))),
        settings=run.sampling,
        ranks=ranks,
    )
    return Trainer(task, loader, run.optimizer, run.loop, to_dict(run), ranks=ranks, console=console)


def fitted(config: GeneratorConfig, store: TokenStore) -> GeneratorConfig:
    """The configuration with lengths, codes and classes of a token store."""
    info = store.info
    return replace(
        config,
        tokens=info.tokens,
        codebook_size=info.codebook_size,
        classes=info.classes,
        class_names=info.class_names,
    )


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _need(value: str, name: str, what: str) -> None:
    if not value:
        raise ValueError(f"{name} must name {what}")
