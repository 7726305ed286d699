"""Cases of `spectralar.kernels.vq`: the nearest code, and the quantizer forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from spectralar.bench.cases import Case, Peer, Workload, within_microseconds
from spectralar.bench.peers import vq as others
from spectralar.kernels import vq
from spectralar.kernels.vq import reference

# "Equal to the fp64 argmin except where the two best distances differ by less than this", relative.
_BUDGET = 1e-6
# Products in TF32 choose a code that is a little farther; beyond this a peer is wrong rather than coarse.
_PEER_BUDGET = 2e-2
_STEP_BUDGET = 1e-5
_COMMITMENT = 0.25


@dataclass(frozen=True, kw_only=True)
class CodeCase(Case):
    """What the cases of this room share: `tokens` vectors of `width` numbers against `codes` codewords."""

    tokens: int = 16384
    width: int = 12
    codes: int = 4096
    normalize: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> str:
        metric = "cosine" if self.normalize else "Euclidean"
        return f"N={self.tokens} D={self.width} K={self.codes} {str(self.dtype)[6:]}, {metric}"

    @property
    def arithmetic(self) -> str:
        return "fp16"

    def small(self) -> Self:
        return replace(self, tokens=self.tokens // 64, codes=self.codes // 16, target=None, condition=None)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        z, codebook = (
            torch.randn(rows, self.width, generator=generator, device=device).to(self.dtype)
            for rows in (self.tokens, self.codes)
        )
        return z, codebook


@dataclass(frozen=True, kw_only=True)
class NearestCase(CodeCase):
    """`nearest_code`."""

    @property
    def name(self) -> str:
        return f"nearest_code {self.shape}"

    @property
    def budget(self) -> float:
        return _BUDGET

    @property
    def peer_budget(self) -> float:
        return _PEER_BUDGET

    def bytes(self) -> int:
        # Vectors and codewords once, int64 codes out.
        return (self.tokens + self.codes) * self.width * self.dtype.itemsize + 8 * self.tokens

    def flops(self) -> int:
        return 2 * self.tokens * self.codes * self.width

    def workload(self, device: torch.device) -> Workload:
        z, codebook = self.tensors(device)
        normalize = self.normalize

        def ours(z: Tensor, codebook: Tensor) -> Tensor:
            return vq.nearest_code(z, codebook, normalize=normalize)

        return Workload((z, codebook), ours, excess_distance(z, codebook, normalize=normalize))

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        normalize = self.normalize
        compiled = functools.partial(others.setup_matmul, normalize, compiled=True)
        return (
            Peer("cdist + argmin", lambda: others.setup_cdist(normalize)),
            Peer("matmul + argmin tf32", lambda: others.setup_matmul(normalize)),
            Peer("matmul + argmin tf32, compiled", compiled, compiled=True),
            Peer("flash-kmeans", lambda: others.setup_flash_kmeans(normalize, device)),
            Peer("FAISS", lambda: others.setup_faiss(normalize, device), capture=False),
        )


@dataclass(frozen=True, kw_only=True)
class QuantizeCase(CodeCase):
    """`vector_quantize` forward, and backward into the vectors and the codebook."""

    @property
    def name(self) -> str:
        return f"vector_quantize forward+backward {self.shape}"

    @property
    def budget(self) -> float:
        return _STEP_BUDGET

    @property
    def peer_budget(self) -> float:
        return _PEER_BUDGET

    def bytes(self) -> int:
        # Forward: vectors and codebook in, codewords and codes out. Backward: the incoming gradient, the vectors, the
        # codes and the codebook in, both gradients out.
        rows = self.tokens * self.width * self.dtype.itemsize
        book = self.codes * self.width * self.dtype.itemsize
        return (2 * rows + book + 8 * self.tokens) + (3 * rows + 2 * book + 8 * self.tokens)

    def flops(self) -> int:
        return 2 * self.tokens * self.codes * self.width

    def workload(self, device: torch.device) -> Workload:
        z, codebook = (x.requires_grad_() for x in self.tensors(device))
        normalize = self.normalize

        def error(result: object) -> float:
            return step_error(cast(tuple[Tensor, ...], result), z.detach(), codebook.detach(), normalize=normalize)

        return Workload((z, codebook), quantize_step(vq.vector_quantize, normalize), error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        eager = functools.partial(others.setup_straight_through, self.normalize, _COMMITMENT)
        return (Peer("matmul tf32, argmin, embedding, losses", eager),)


def quantize_step(quantize: Callable[..., vq.VectorQuantized], normalize: bool) -> Callable[..., tuple[Tensor, ...]]:
    """Codes, codewords, loss, and the gradients of loss + sum of the codewords by vectors and codebook."""

    def step(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        out = quantize(z, codebook, normalize=normalize, commitment=_COMMITMENT)
        loss = out.commitment_loss + out.codebook_loss
        grads = torch.autograd.grad(loss + out.quantized.sum(), (z, codebook))
        return (out.indices, out.quantized.detach(), loss.detach(), *grads)

    return step


def excess_distance(z: Tensor, codebook: Tensor, *, normalize: bool) -> Callable[[object], float]:
    """A judge: how much farther, relatively, the chosen code lies than the nearest, at worst; squared, in fp64."""
    vectors, codes = z.double(), codebook.double()
    if normalize:
        vectors, codes = (torch.nn.functional.normalize(x, dim=-1) for x in (vectors, codes))

    def distance(indices: Tensor) -> Tensor:
        return (vectors - codes[indices]).square().sum(-1)

    best = distance(reference.nearest_code(z.double(), codebook.double(), normalize=normalize))

    def judge(indices: object) -> float:
        if not isinstance(indices, Tensor) or indices.shape != z.shape[:-1] or indices.is_floating_point():
            return float("inf")
        indices = indices.long()
        if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= len(codebook)):
            return float("inf")
        # A vector that is a codeword has distance zero: its square is uncertain by about 1e-16 of the lengths.
        excess = (distance(indices) - best) / best.clamp_min(1e-9)
        return float(excess.amax().clamp_min(0)) if indices.numel() else 0.0

    return judge


def step_error(result: tuple[Tensor, ...], z: Tensor, codebook: Tensor, *, normalize: bool) -> float:
    """Largest relative error of codewords, loss and both gradients against the fp64 reference with the same codes.

    A code that is farther than the nearest counts with its excess distance, and all that follows from it as right.
    """
    indices, *rest = result
    excess = excess_distance(z, codebook, normalize=normalize)(indices)
    if not excess <= _PEER_BUDGET:
        return excess
    doubles = tuple(x.double().requires_grad_() for x in (z, codebook))

    def quantize(z: Tensor, codebook: Tensor, *, normalize: bool, commitment: float) -> vq.VectorQuantized:
        vectors = torch.nn.functional.normalize(z, dim=-1) if normalize else z
        codewords = reference.lookup(indices, codebook, normalize=normalize)
        return vq.VectorQuantized(
            codewords.detach() + (vectors - vectors.detach()),
            indices,
            commitment * (codewords.detach() - vectors).square().mean(),
            (codewords - vectors.detach()).square().mean(),
        )

    wanted = quantize_step(quantize, normalize)(*doubles)[1:]
    errors = [excess]
    for got, want in zip(rest, wanted, strict=True):
        if got.shape != want.shape:
            return float("inf")
        errors.append(float((got.double() - want).abs().amax() / want.abs().amax()))
    return max(errors) if all(e == e for e in errors) else float("nan")


_P3 = NearestCase(target="P3", condition=within_microseconds(25))
_P3_LARGE = replace(_P3, tokens=65536, condition=within_microseconds(80))
_P4 = NearestCase(width=16, codes=65536, target="P4", condition=within_microseconds(300))

_TARGETS = (_P3, _P3_LARGE, _P4)

CASES: tuple[Case, ...] = (
    *_TARGETS,
    # The tokenizer compares cosines; distances of unscaled vectors are an option without a target.
    *(replace(case, normalize=False, target=None, condition=None) for case in _TARGETS),
    NearestCase(tokens=174080, width=32),
    NearestCase(dtype=torch.bfloat16),
    QuantizeCase(),
)
