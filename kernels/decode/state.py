"""The tensors of cached decoding: what every step reads, and what it writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import COUNTERS, EMPTY, MAX_ROWS

MATRICES = ("qkv", "proj", "fc1", "fc2", "head")
"""The weights of products, nearly all that a step reads."""


@dataclass(frozen=True)
class DecodeWeights:
    """The weights that a decoding step reads, blocks stacked, contiguous, of one dtype but for what is said below.

    L blocks of width W with H heads of W / H channels, groups of G tokens, N tokens in all, K codes.

    The five `MATRICES` may be in fp8 (`torch.float8_e4m3fn`), all of them, each with an fp32 scale for every output
    channel: output j is `sum_k(x_k w_jk) scale_j + bias_j`. With scales they may also hold the same numbers in the
    dtype of the others (`widened`). See fp8.py.

    Attributes:
        tokens: `[K, W]`, the row by which a drawn token enters.
        positions: `[N, W]`, added to the content of every position.
        starts: `[G, W]`, added to the class row at the first group.
        qkv: `[L, 3 W, W]`, queries, then keys, then values.
        qkv_bias: `[L, 3 W]`; keys have none, theirs is zero.
        query_scale: `[L, H]` fp32 (fp64 with fp64 weights), the factor of unit queries.
        proj: `[L, W, W]`.
        proj_bias: `[L, W]`.
        fc1: `[L, 4 W, W]`.
        fc1_bias: `[L, 4 W]`.
        fc2: `[L, W, 4 W]`.
        fc2_bias: `[L, W]`.
        head: `[K, W]`.
        head_bias: `[K]`.
        qkv_scale: `[L, 3 W]` with fp8 or widened matrices, else None, as all scales.
        proj_scale: `[L, W]`.
        fc1_scale: `[L, 4 W]`.
        fc2_scale: `[L, W]`.
        head_scale: `[K]`.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    query_scale: Tensor
    proj: Tensor
    proj_bias: Tensor
    fc1: Tensor
    fc1_bias: Tensor
    fc2: Tensor
    fc2_bias: Tensor
    head: Tensor
    head_bias: Tensor
    qkv_scale: Tensor | None = None
    proj_scale: Tensor | None = None
    fc1_scale: Tensor | None = None
    fc2_scale: Tensor | None = None
    head_scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the tables and biases, and of what goes into products."""
        return self.qkv_bias.dtype

    def scale(self, name: str, layer: int) -> Tensor | None:
        """The scales of a block's matrix of that name, `[O]`; None where it has none."""
        scales = getattr(self, f"{name}_scale")
        return None if scales is None else scales[layer]

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        return self.qkv.shape[0]

    @property
    def width(self) -> int:
        """Channels W."""
        return self.qkv.shape[2]

    @property
    def heads(self) -> int:
        """Attention heads H."""
        return self.query_scale.shape[1]

    @property
    def group(self) -> int:
        """Tokens of a step G."""
        return self.starts.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a sequence N."""
        return self.positions.shape[0]

    @property
    def codes(self) -> int:
        """Size of the codebook K."""
        return self.head.shape[0]


@dataclass(frozen=True)
class DecodeState:
    """The buffers of a batch. Steps write in place, so that a recorded step can be replayed.

    B images are drawn by R rows of the transformer: R = B, or 2 B with guidance, the second half without class. Row r
    reads the tokens of image r mod B. Activations between blocks are fp32 (fp64 with fp64 weights), the other
    intermediates have the weights' dtype (`DecodeWeights.dtype`).

    Attributes:
        first: `[]` int64, position of the first token of the coming group; the caller moves it on.
        tokens: `[B, N]` int64; a step reads those of the group before.
        start: `[R, W]`, class rows.
        modulations: `[L, R, 6, W]`: gate1, gate2, scale1, scale2, shift1, shift2.
        head_modulation: `[R, 2, W]`, scale, shift.
        keys: `[L, R, H, N, D]`, unit keys.
        values: `[L, R, H, N, D]`.
        x: `[R, G, W]` fp32, the residual stream.
        qkv: `[R, G, 3 W]`.
        attended: `[R, G, W]`.
        hidden: `[R, G, 4 W]`.
        logits: `[R, G, K]` fp32.
        mailboxes: `[2, words]` int32, the persistent kernel's, for few rows; the next set is empty between steps.
        turn: `[64]` int32, the persistent kernel's: which set of mailboxes is next, and how many programs are done.
    """

    first: Tensor
    tokens: Tensor
    start: Tensor
    modulations: Tensor
    head_modulation: Tensor
    keys: Tensor
    values: Tensor
    x: Tensor
    qkv: Tensor
    attended: Tensor
    hidden: Tensor
    logits: Tensor
    mailboxes: Tensor
    turn: Tensor

    @staticmethod
    def allocate(weights: DecodeWeights, images: int, rows: int) -> DecodeState:
        """Buffers for `images` images drawn by `rows` rows; activations, caches and tokens are not initialised."""
        w, device, dtype = weights, weights.qkv.device, weights.dtype
        wide = torch.promote_types(dtype, torch.float32)

        def buffer(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device=device)

        cache = (w.depth, rows, w.heads, w.length, w.width // w.heads)
        words = mailbox_words(w.depth, w.width, rows * w.group, dtype)
        return DecodeState(
            first=torch.zeros((), dtype=torch.int64, device=device),
            tokens=buffer(images, w.length, of=torch.int64),
            start=buffer(rows, w.width),
            modulations=buffer(w.depth, rows, 6, w.width),
            head_modulation=buffer(rows, 2, w.width),
            keys=buffer(*cache),
            values=buffer(*cache),
            x=buffer(rows, w.group, w.width, of=wide),
            qkv=buffer(rows, w.group, 3 * w.width),
            attended=buffer(rows, w.group, w.width),
            hidden=buffer(rows, w.group, 4 * w.width),
            logits=buffer(rows, w.group, w.codes, of=wide),
            mailboxes=torch.full((2, words), EMPTY, dtype=torch.int32, device=device),
            turn=torch.zeros(COUNTERS, dtype=torch.int32, device=device),
        )


def mailbox_words(depth: int, width: int, tokens: int, dtype: torch.dtype) -> int:
    """Words of a set of mailboxes: x, qkv, x again, attended and hidden of every block, and x at the end.

    Args:
        depth: number of blocks.
        width: channels.
        tokens: rows times tokens of a group; more than `config.MAX_ROWS` need no mailboxes.
        dtype: of the weights.
    """
    if tokens > MAX_ROWS:
        return 0
    x = tokens * width
    return depth * (5 * x + 5 * x * min(4, dtype.itemsize) // 4) + x
