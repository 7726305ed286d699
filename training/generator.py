"""Stage two: the generator, by cross entropy on stored tokens (SpectralAR section 3.3, VAR's recipe)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from spectralar.generator import SpectralGenerator
from spectralar.pictures import grid
from spectralar.sampling import Sampler, SamplingSettings
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.distributed import ALONE, Ranks


class GeneratorTask:
    """Trains a `SpectralGenerator`: mean cross entropy over all N tokens, every position with the same weight.

    Args:
        model: the generator.
        validation: gives this rank's batches `(tokens, labels)` in a fixed order, or None for no validation.
        tokenizer: decodes the pictured samples; None draws no pictures.
        pictured: class numbers of the pictured samples, one row each.
        settings: how the pictured samples are drawn.
        ranks: the processes that train together.

    Raises:
        ValueError: the pictured samples could not be drawn: a wrong class, settings or tokenizer.
    """

    title = "generator"
    # VAR's rule: positions, per-head scales and biases are not decayed; the class and token tables are.
    undecayed = ("positions", "log_scale")

    def __init__(
        self,
        model: SpectralGenerator,
        *,
        validation: Callable[[], Iterable[Any]] | None = None,
        tokenizer: SpectralTokenizer | None = None,
        pictured: tuple[int, ...] = (),
        settings: SamplingSettings | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.validation, self.tokenizer, self.ranks = model, validation, tokenizer, ranks
        self.pictured, self.settings = pictured, settings or SamplingSettings()
        if tokenizer is not None and pictured:
            try:  # the first picture may be hours away
                Sampler(model, tokenizer, backend="reference").stream(
                    pictured, list(range(len(pictured))), self.settings
                )
            except ValueError as error:
                raise ValueError(f"the pictured samples cannot be drawn: {error}") from error

    def loss(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Scalars of one batch `(tokens [B, N], labels [B])`: loss in nats per token, and accuracy."""
        tokens, labels = batch
        logits = self.model(labels, tokens)
        return {
            "loss": F.cross_entropy(logits.flatten(0, 1), tokens.flatten()),
            "accuracy": (logits.detach().argmax(-1) == tokens).float().mean(),
        }

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, Any]:
        """Validation loss in nats per token, per position and overall, without class drop; and accuracy."""
        if self.validation is None:
            return {}
        device = next(model.parameters()).device
        length = self.model.config.tokens
        # Losses by position, then right answers by position, then rows; all added up in fp64.
        sums = torch.zeros(2 * length + 1, dtype=torch.float64, device=device)
        for batch in self.validation():
            tokens, labels = (x.to(device) for x in batch)
            logits = model(labels, tokens)
            losses = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
            right = logits.argmax(-1) == tokens
            sums += torch.cat([losses.double().sum(0), right.double().sum(0), sums.new_tensor([len(tokens)])])
        *sums_by_position, rows = self.ranks.sum(sums).tolist()
        if not rows:
            return {}
        by_position = [total / rows for total in sums_by_position]
        loss, accuracy = sum(by_position[:length]) / length, sum(by_position[length:]) / length
        return {
            "val_loss": loss,
            "val_accuracy": accuracy,
            "val_loss_by_position": by_position[:length],
            "note": f"validation loss {loss:.4f} nats per token, accuracy {accuracy:.1%}",
        }

    def picture(self, model: nn.Module) -> Image.Image | None:
        assert isinstance(model, SpectralGenerator)
        if self.tokenizer is None or not self.pictured:
            return None
        columns = 4
        classes = [c for c in self.pictured for _ in range(columns)]
        # One batch of ever new weights is not worth recording.
        sampler = Sampler(model, self.tokenizer.to(model.device), backend="reference")
        images = sampler.generate(classes, list(range(len(classes))), self.settings)
        names = model.config.class_names or tuple(str(i) for i in range(model.config.classes))
        rows = [list(images[i : i + columns]) for i in range(0, len(images), columns)]
        return grid(rows, row_labels=[names[c] for c in self.pictured])
