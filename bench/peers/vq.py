"""Other ways to find the nearest code. Each `setup_*` gives a callable `(z, codebook)` -> indices, or `Missing`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.bench.cases import Missing
from spectralar.bench.ceilings import tf32
from spectralar.bench.peers.dct import installed

Nearest = Callable[[Tensor, Tensor], Tensor]


def setup_cdist(normalize: bool) -> Nearest:
    """`torch.cdist` and `argmin`."""

    def nearest(z: Tensor, codebook: Tensor) -> Tensor:
        if normalize:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        return torch.cdist(z, codebook).argmin(-1)

    return nearest


def setup_matmul(normalize: bool, *, compiled: bool = False) -> Nearest:
    """One matrix product in TF32 and `argmin`, as most quantizers do it; the length of `z` changes no choice."""

    def nearest(z: Tensor, codebook: Tensor) -> Tensor:
        if normalize:
            return (z @ F.normalize(codebook, dim=-1).T).argmax(-1)
        return (codebook.square().sum(-1) - 2 * (z @ codebook.T)).argmin(-1)

    inner = torch.compile(nearest, dynamic=False) if compiled else nearest

    def run(z: Tensor, codebook: Tensor) -> Tensor:
        with tf32(True):
            return inner(z, codebook)

    return run


def setup_flash_kmeans(normalize: bool, device: torch.device) -> Nearest | Missing:
    """The assignment kernel of the package flash-kmeans, if installed."""
    package = installed("flash_kmeans.assign_euclid_triton")
    if isinstance(package, Missing):
        return package
    if device.type != "cuda":
        return Missing("flash-kmeans needs a GPU")
    assign = package.euclid_assign_triton

    def nearest(z: Tensor, codebook: Tensor) -> Tensor:
        if normalize:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        return assign(z[None], codebook[None], z[None].square().sum(-1))[0]

    return nearest


def setup_faiss(normalize: bool, device: torch.device) -> Nearest | Missing:
    """Exact search on the GPU by the package faiss, if installed."""
    package, tensors = installed("faiss"), installed("faiss.contrib.torch_utils")
    if isinstance(package, Missing) or isinstance(tensors, Missing):
        return Missing("faiss is not installed")
    if device.type != "cuda" or not hasattr(package, "StandardGpuResources"):
        return Missing("faiss is installed without GPU support")
    resources = package.StandardGpuResources()

    def nearest(z: Tensor, codebook: Tensor) -> Tensor:
        if normalize:
            z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        return package.knn_gpu(resources, z, codebook, 1)[1][:, 0]

    return nearest


def setup_straight_through(normalize: bool, commitment: float) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """The quantizer as most code bases write it, forward and backward: product, `argmin`, embedding, two losses."""
    nearest = setup_matmul(normalize)

    def step(z: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        indices = nearest(z.detach(), codebook.detach())
        codewords = F.embedding(indices, codebook)
        vectors = z
        if normalize:
            vectors, codewords = F.normalize(z, dim=-1), F.normalize(codewords, dim=-1)
        loss = commitment * F.mse_loss(vectors, codewords.detach()) + F.mse_loss(codewords, vectors.detach())
        quantized = vectors + (codewords - vectors).detach()
        # Ones as the gradient of `quantized`: the sum joins both paths into one backward pass.
        grads = torch.autograd.grad(loss + quantized.sum(), (z, codebook))
        return (indices, quantized.detach(), loss.detach(), *grads)

    return step
