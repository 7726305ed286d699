"""Stage one: the nested spectral tokenizer (SpectralAR algorithm 1 and equation 4 with pixel and quantizer losses)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spectralar.kernels.vq import code_usage
from spectralar.pictures import prefix_strip
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.distributed import ALONE, Ranks
from spectralar.training.evaluation.reconstruction import default_lengths, evaluate_tokenizer


@dataclass(frozen=True)
class TokenizerLossConfig:
    """Weights of equation 4; perceptual and adversarial terms are not implemented yet.

    Attributes:
        pixel: weight of the mean squared error against the target of each prefix, pixels in [0, 1].
        quantizer: weight of codebook plus commitment loss.
    """

    pixel: float = 1.0
    quantizer: float = 1.0


class TokenizerTask:
    """Trains a `SpectralTokenizer`: every sample draws a prefix length n, uniform on 1..N, and rebuilds I'_n.

    Args:
        model: the tokenizer.
        loss: weights of the terms.
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
        images, config = batch[0], self.model.config
        lengths = torch.randint(1, config.tokens + 1, (len(images),), device=images.device)
        out = self.model(images, lengths)
        pixel = self.model.pixel_loss(out.images, images, lengths)
        quantizer = out.codebook_loss + out.commitment_loss
        usage = self.ranks.sum(code_usage(out.tokens, config.codebook_size))
        return {
            "loss": self.weights.pixel * pixel + self.weights.quantizer * quantizer,
            "pixel": pixel,
            "codebook": out.codebook_loss,
            "commitment": out.commitment_loss,
            "codes_used": (usage > 0).sum().float(),
        }

    def validate(self, model: nn.Module) -> dict[str, Any]:
        """Every field of the `TokenizerReport`, prefixed with `val_`, and a note."""
        assert isinstance(model, SpectralTokenizer)
        if self.validation is None:
            return {}
        report = evaluate_tokenizer(model, self.validation(), ranks=self.ranks)
        pairs = "  ".join(f"n={n} {value:.2f}" for n, value in zip(report.lengths, report.psnr, strict=True))
        note = f"PSNR (dB) {pairs}; {report.codes_used} codes in use"
        return {**{f"val_{name}": value for name, value in asdict(report).items()}, "note": note}

    def picture(self, model: nn.Module) -> Image.Image | None:
        assert isinstance(model, SpectralTokenizer)
        if self.pictured is None:
            return None
        return prefix_strip(model, self.pictured, default_lengths(model.config.tokens))
