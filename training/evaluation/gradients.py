"""How strongly the training loss pulls at every token: the gradients of its query and of its code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from spectralar.images import to_float
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.distributed import ALONE, Ranks


@dataclass(frozen=True)
class TokenGradients:
    """Gradients on one batch of every rank; a token without any cannot learn.

    Attributes:
        gradient_query: per position, length of the mean gradient of the encoder's learned query.
        gradient_code: per position, root mean square over images of the length of the gradient with respect to the
            code vector that the decoder is given, for the loss of that image alone.
    """

    gradient_query: tuple[float, ...]
    gradient_code: tuple[float, ...]


def token_gradients(
    tokenizer: SpectralTokenizer,
    loss: Callable[[SpectralTokenizer, Tensor], Tensor],
    batches: Iterable[Any],
    *,
    ranks: Ranks = ALONE,
) -> TokenGradients:
    """Measures the gradients on the first batch; weights, gradients and random states stay as they are.

    Args:
        tokenizer: in evaluation mode; may have frozen weights.
        loss: the loss of a tokenizer on images `[B, 3, S, S]`, a mean over the images.
        batches: tuples whose first entry is images, uint8 or floating in [0, 1]; none where a rank has none.
        ranks: the processes that measure together; all get the same figures.
    """
    config, queries = tokenizer.config, tokenizer.encoder.queries
    # Of all ranks: the sum over images of the queries' gradient, the squared lengths of the codes', the images.
    query = torch.zeros(queries.shape, dtype=torch.float64)
    code = torch.zeros(config.tokens + 1, dtype=torch.float64)
    batch = next(iter(batches), None)
    if batch is not None:
        images = to_float(batch[0].to(tokenizer.device), size=config.image_size)
        count = len(images)
        by_query, by_code = _gradients(tokenizer, loss, images)
        query += count * by_query.double().cpu()
        # The decoder's rows are images, or prefixes of images one after the other, of which the loss is the mean.
        by_image = (count * by_code.double()).unflatten(0, (-1, count)).sum(0)  # [B, N, D]
        code[:-1] += by_image.square().sum((0, 2)).cpu()
        code[-1] += count
    query, code = ranks.sum(query), ranks.sum(code)
    total = code[-1].clamp_min(1)
    return TokenGradients(
        tuple((query / total).norm(dim=1).tolist()),
        tuple((code[:-1] / total).sqrt().tolist()),
    )


def _gradients(
    tokenizer: SpectralTokenizer, loss: Callable[[SpectralTokenizer, Tensor], Tensor], images: Tensor
) -> tuple[Tensor, Tensor]:
    """With respect to the queries `[N, W]` and to what the decoder gets `[P * B, N, D]`."""
    given: list[Tensor] = []

    def remember(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        given.append(inputs[0])

    # Queries that are parametrized are the same tensor here and in the encoder.
    with parametrize.cached():
        queries = tokenizer.encoder.queries
        trained = queries.requires_grad
        queries.requires_grad_(True)
        hook = tokenizer.decoder.register_forward_pre_hook(remember)
        try:
            with torch.enable_grad():
                value = loss(tokenizer, images)
                query, code = torch.autograd.grad(value, [queries, given[0]])
        finally:
            hook.remove()
            queries.requires_grad_(trained)
    return query, code
