"""Stage one: the nested spectral tokenizer (SpectralAR algorithm 1 and equation 4 with pixel and quantizer losses)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spectralar.kernels.vq import code_usage
from spectralar.pictures import prefix_strip
from spectralar.tokenizer import SpectralTokenizer, TokenizerOutput
from spectralar.training.distributed import ALONE, Ranks
from spectralar.training.evaluation.gradients import TokenGradients, token_gradients
from spectralar.training.evaluation.reconstruction import default_lengths, evaluate_tokenizer
from spectralar.training.prefixes import PrefixConfig


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of equation 4; perceptual and adversarial terms are not implemented yet.

    Attributes:
        pixel: weight of the mean squared error against the target of each prefix, pixels in [0, 1].
        quantizer: weight of codebook plus commitment loss.
        prefixes: which prefixes a step rebuilds.
        emphasis: exponent g by which high frequencies weigh more in the pixel error: the squared error at vertical
            frequency u and horizontal frequency v counts (1 + max(u, v) / knee) ** g times. 0 is the plain error; at
            most 2, since the weights are applied in fp16 on a GPU.
        knee: frequency up to which the weights hardly grow.
    """

    pixel: float = 1.0
    quantizer: float = 1.0
    prefixes: PrefixConfig = field(default_factory=PrefixConfig)
    emphasis: float = 0.0
    knee: float = 8.0

    def __post_init__(self) -> None:
        if not 0 <= self.emphasis <= 2:
            raise ValueError(f"emphasis must lie from 0 to 2, not {self.emphasis}")
        if self.knee <= 0:
            raise ValueError(f"knee must be positive, not {self.knee}")

    def frequency_weights(self, size: int, device: torch.device) -> Tensor | None:
        """What the squared error at every frequency of `size` pixels a side counts, `[S, S]` fp32; None where all 1."""
        if not self.emphasis:
            return None
        frequency = torch.arange(size, dtype=torch.float32, device=device)
        return (1 + torch.maximum(frequency[:, None], frequency) / self.knee) ** self.emphasis


class TokenizerTask:
    """Trains a `SpectralTokenizer`: every sample draws prefix lengths n out of 1..N and rebuilds I'_n.

    Args:
        model: the tokenizer.
        loss: weights of the terms and distribution of the prefixes.
        validation: gives batches of this rank's validation images in a fixed order, or None for no validation.
        pictured: images `[B, 3, S, S]` for the strips, or None.
        ranks: the processes that train together.
    """

    title = "tokenizer"
    # TiTok's rule: positions, queries, class and mask tokens, codes and the input projections are not decayed.
    undecayed = ("positions", "queries", "_token", "codebook", "patch_embed", "from_code")

    def __init__(
        self,
        model: SpectralTokenizer,
        loss: TokenizerLossConfig,
        *,
        validation: Callable[[], Iterable[Any]] | None = None,
        pictured: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.weights, self.validation, self.pictured = model, loss, validation, pictured
        self.ranks = ranks

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Scalars of one batch `(images [B, 3, S, S], labels)`: loss, pixel, codebook, commitment, codes in use.

        The codes in use are those of all ranks' batches, the others are this rank's.
        """
        images = batch[0]
        total, pixel, out = self.objective(self.model, images, self.draw_lengths(images))
        usage = self.ranks.sum(code_usage(out.tokens, self.model.config.codebook_size))
        return {
            "loss": total,
            "pixel": pixel,
            "codebook": out.codebook_loss,
            "commitment": out.commitment_loss,
            "codes_used": (usage > 0).sum().float(),
        }

    def draw_lengths(self, images: Tensor) -> Tensor:
        """Random prefix lengths `[P * B]` for a batch, P of every image."""
        prefixes = self.weights.prefixes
        quantiles = prefixes.draw_quantiles(len(images), images.device)
        return prefixes.lengths_at(quantiles, self.model.config.tokens).flatten()

    def objective(
        self, model: SpectralTokenizer, images: Tensor, lengths: Tensor
    ) -> tuple[Tensor, Tensor, TokenizerOutput]:
        """What `model` should minimise on images `[B, 3, S, S]` and lengths `[P * B]`: the loss, its pixel error, all.

        Nothing random happens, and nothing is joined with other ranks, beyond what `model` does itself.
        """
        out = model(images, lengths)
        repeated = images.repeat(len(lengths) // len(images), 1, 1, 1)
        weights = self.weights.frequency_weights(model.config.image_size, out.images.device)
        pixel = model.pixel_loss(out.images, repeated, lengths, weights)
        quantizer = out.codebook_loss + out.commitment_loss
        return self.weights.pixel * pixel + self.weights.quantizer * quantizer, pixel, out

    def validate(self, model: nn.Module) -> dict[str, Any]:
        """Every field of the `TokenizerReport` and of `TokenGradients`, prefixed with `val_`, and a note."""
        assert isinstance(model, SpectralTokenizer)
        if self.validation is None:
            return {}
        report = evaluate_tokenizer(model, self.validation(), costs=True, ranks=self.ranks)
        gradients = self.gradients(model)
        pairs = "  ".join(f"n={n} {value:.2f}" for n, value in zip(report.lengths, report.psnr, strict=True))
        note = f"PSNR (dB) {pairs}; {report.codes_used} codes in use"
        return {
            **{f"val_{name}": value for name, value in {**asdict(report), **asdict(gradients)}.items()},
            "note": note,
        }

    def gradients(self, model: SpectralTokenizer) -> TokenGradients:
        """What the training loss does to every token of `model`, on the first batch of validation images.

        The prefix lengths are spread evenly: validation must not touch the random states of training.
        """
        assert self.validation is not None

        def loss(model: SpectralTokenizer, images: Tensor) -> Tensor:
            prefixes = self.weights.prefixes
            quantiles = prefixes.even_quantiles(len(images), images.device)
            return self.objective(model, images, prefixes.lengths_at(quantiles, model.config.tokens).flatten())[0]

        return token_gradients(model, loss, self.validation(), ranks=self.ranks)

    def picture(self, model: nn.Module) -> Image.Image | None:
        assert isinstance(model, SpectralTokenizer)
        if self.pictured is None:
            return None
        return prefix_strip(model, self.pictured, default_lengths(model.config.tokens))
