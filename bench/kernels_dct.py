"""Cases of `spectralar.kernels.dct`: sub-image targets, their loss, and the bare transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from spectralar.bench.cases import Case, Condition, Measurement, Peer, Role, Workload, timed
from spectralar.bench.ceilings import tf32
from spectralar.bench.inputs import Draw, drawn_cutoffs, photographs
from spectralar.bench.peers import dct as others
from spectralar.kernels import dct
from spectralar.kernels.dct import reference
from spectralar.training.tokenizer import TokenizerLossConfig

Precision = Literal["pixel", "exact"]

COPY = "copy of the same tensors"
# A quarter of one 8-bit step; and for peers a whole one, so that none is left out for its rounding.
_PIXEL_BUDGET, _PEER_PIXEL_BUDGET = 0.25 / 255, 1 / 255
_EXACT_BUDGET, _PEER_EXACT_BUDGET = 1e-6, 1e-5
# On a CPU a case shrinks by these factors, so that different cases stay different.
_SMALLER_BATCH, _SMALLER_SIZE = 128, 8


@dataclass(frozen=True, kw_only=True)
class PictureCase(Case):
    """What the cases of this room share: `batch` pictures of three channels and `size` pixels a side."""

    batch: int = 256
    size: int = 256
    in_dtype: torch.dtype = torch.float32

    @property
    def values(self) -> int:
        return self.batch * 3 * self.size**2

    @property
    def shape(self) -> str:
        return f"{self.batch}x3x{self.size}x{self.size}"

    def small(self) -> Self:
        batch, size = max(1, self.batch // _SMALLER_BATCH), max(1, self.size // _SMALLER_SIZE)
        return replace(self, batch=batch, size=size, target=None, condition=None)

    def pictures(self, device: torch.device) -> Tensor:
        pictures = photographs(self.batch, 3, self.size, device)
        return pictures if self.in_dtype == torch.uint8 else (pictures.float() / 255).to(self.in_dtype)


@dataclass(frozen=True, kw_only=True)
class TargetsCase(PictureCase):
    """`spectral_targets` with a cutoff for each picture."""

    out_dtype: torch.dtype = torch.float32
    cutoffs: Draw | int = "random"
    precision: Precision = "pixel"

    @property
    def name(self) -> str:
        dtypes = f"{_short(self.in_dtype)}->{_short(self.out_dtype)}"
        return f"spectral_targets {self.shape} {dtypes}, {_cutoffs_name(self.cutoffs)}, {self.precision}"

    @property
    def budget(self) -> float:
        return _PIXEL_BUDGET if self.precision == "pixel" else _EXACT_BUDGET

    @property
    def peer_budget(self) -> float:
        return _PEER_PIXEL_BUDGET if self.precision == "pixel" else _PEER_EXACT_BUDGET

    @property
    def arithmetic(self) -> str:
        return "fp16" if self.precision == "pixel" else "tf32"

    def bytes(self) -> int:
        return self.values * (self.in_dtype.itemsize + self.out_dtype.itemsize)

    def flops(self) -> int:
        cutoffs = drawn_cutoffs(self.batch, self.size, self.cutoffs).tolist()
        return 3 * sum(targets_flops(self.size, cutoff) for cutoff in cutoffs)

    def small(self) -> Self:
        cutoffs = self.cutoffs // _SMALLER_SIZE if isinstance(self.cutoffs, int) else self.cutoffs
        return replace(super().small(), cutoffs=cutoffs)

    def workload(self, device: torch.device) -> Workload:
        images = self.pictures(device)
        cutoffs = drawn_cutoffs(self.batch, self.size, self.cutoffs).to(device)

        def ours(images: Tensor, cutoffs: Tensor) -> Tensor:
            return dct.spectral_targets(images, cutoffs, out_dtype=self.out_dtype, precision=self.precision)

        def error(result: object) -> float:
            relative = self.precision == "exact"
            return targets_error(result, images, cutoffs, self.out_dtype, relative=relative)

        return Workload((images, cutoffs), ours, error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        size, out = self.size, self.out_dtype
        full: others.Arithmetic = "tf32" if self.precision == "pixel" else "fp32"
        four = functools.partial(others.setup_four_matmuls, size, device, out)
        projection = functools.partial(others.setup_projection, size, device, out)
        # Where the result is rounded to 16 bits anyway, products in 16 bits are a fair way to it.
        role: Role = "peer" if out.itemsize == 2 else "reduced"
        halves = [Peer(f"projection {half}", functools.partial(projection, half), role) for half in _HALVES]
        copy = Peer(COPY, lambda: lambda images, cutoffs: images.clone(), "bound")
        return (
            *([copy] if self.in_dtype == out else []),
            Peer(f"projection {full}", lambda: projection(full)),
            Peer(f"projection {full}, compiled", lambda: projection(full, compiled=True), compiled=True),
            Peer(f"four matmuls {full}", lambda: four(full)),
            Peer(f"four matmuls {full}, compiled", lambda: four(full, compiled=True), compiled=True),
            *(halves if self.precision == "pixel" else []),
            Peer("FFT", lambda: others.setup_fft(size, device, out)),
            Peer("torch-dct", lambda: others.setup_torch_dct(size, device, out)),
            Peer("dctorch", lambda: others.setup_dctorch(size, device, out)),
        )


@dataclass(frozen=True, kw_only=True)
class LossCase(PictureCase):
    """`spectral_mse`, forward and gradient, against the target written out and the loss after it.

    Attributes:
        weighted: squared errors count by their frequency.
    """

    weighted: bool = False

    @property
    def name(self) -> str:
        weighted = ", weights by frequency" if self.weighted else ""
        return f"spectral_mse forward+backward {self.shape} {_short(self.in_dtype)}, eq. 9 cutoffs{weighted}"

    @property
    def budget(self) -> float:
        return _PIXEL_BUDGET

    @property
    def peer_budget(self) -> float:
        return _PEER_PIXEL_BUDGET

    @property
    def arithmetic(self) -> str:
        return "fp16"

    def bytes(self) -> int:
        # Prediction and picture are read, the prediction's gradient is written.
        return self.values * (4 + self.in_dtype.itemsize + 4)

    def flops(self) -> int:
        targets = sum(targets_flops(self.size, w) for w in drawn_cutoffs(self.batch, self.size, "random").tolist())
        # To the frequencies and back.
        return 3 * (targets + (self.batch * 8 * self.size**3 if self.weighted else 0))

    def weights(self, device: torch.device) -> Tensor | None:
        """1 at the highest frequencies, 1 / 17 at the lowest of 128 pixels: no error grows in the root mean square."""
        if not self.weighted:
            return None
        weights = TokenizerLossConfig(emphasis=1.0).frequency_weights(self.size, device)
        assert weights is not None
        return weights / weights.amax()

    def workload(self, device: torch.device) -> Workload:
        images = self.pictures(device)
        cutoffs = drawn_cutoffs(self.batch, self.size, "random").to(device)
        weights = self.weights(device)
        noise = torch.randn(images.shape, generator=torch.Generator(device).manual_seed(1), device=device)
        prediction = (others.pixels_of(images, torch.float32) + 0.1 * noise).requires_grad_()

        def error(result: object) -> float:
            loss, gradient = cast(tuple[Tensor, Tensor], result)
            return loss_error(loss, gradient, prediction.detach(), images, cutoffs, weights)

        ours = functools.partial(dct.spectral_mse, weights=weights)
        return Workload((prediction, images, cutoffs), _with_gradient(ours), error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        def apart(
            targets: Callable[..., Tensor], compare: Callable[[Tensor, Tensor], Tensor] = F.mse_loss
        ) -> Callable[..., object]:
            step = _with_gradient(lambda p, images, cutoffs: compare(p, targets(images, cutoffs)))

            def run(*arguments: Tensor) -> object:
                with tf32(True):  # of the gradient's products, too
                    return step(*arguments)

            return run

        ours = functools.partial(dct.spectral_targets, out_dtype=torch.float32)
        projection = functools.partial(others.setup_projection, self.size, device, torch.float32, "tf32")
        if (weights := self.weights(device)) is not None:
            matmuls = others.setup_two_matmuls(self.size, device, "tf32")
            halves = others.setup_two_matmuls(self.size, device, "fp16")

            def in_tf32(p: Tensor, targets: Tensor) -> Tensor:
                return (weights * matmuls(p - targets).square()).mean()

            def in_fp16(p: Tensor, targets: Tensor) -> Tensor:
                # The gradient of a mean over millions of values lies below fp16's smallest number.
                difference = others.scale_gradient(p - targets, 1 / self.values)
                loss = (weights * halves(difference.half()).float().square()).mean()
                return others.scale_gradient(loss, self.values)

            def exactly(p: Tensor, targets: Tensor) -> Tensor:
                return (weights * dct.dct2(p - targets).square()).mean()

            return (
                Peer("our targets, then two matmuls fp16", lambda: apart(ours, in_fp16)),
                Peer(
                    "our targets, then two matmuls fp16, compiled",
                    lambda: apart(ours, torch.compile(in_fp16, dynamic=False)),
                    compiled=True,
                ),
                Peer("our targets, then two matmuls tf32", lambda: apart(ours, in_tf32)),
                Peer("our targets, then dct2", lambda: apart(ours, exactly)),
                Peer("projection tf32, then two matmuls tf32", lambda: apart(projection(), in_tf32)),
            )
        return (
            Peer("our targets, then mse_loss", lambda: apart(ours)),
            Peer("projection tf32, then mse_loss", lambda: apart(projection())),
        )


@dataclass(frozen=True, kw_only=True)
class TransformCase(PictureCase):
    """`dct2` of a batch."""

    @property
    def name(self) -> str:
        return f"dct2 {self.shape} {_short(self.in_dtype)}"

    @property
    def budget(self) -> float:
        return _EXACT_BUDGET

    @property
    def peer_budget(self) -> float:
        return _PEER_EXACT_BUDGET

    @property
    def arithmetic(self) -> str:
        return "tf32"

    def bytes(self) -> int:
        return 2 * self.values * self.in_dtype.itemsize

    def flops(self) -> int:
        return self.batch * 3 * 4 * self.size**3

    def workload(self, device: torch.device) -> Workload:
        images = self.pictures(device)

        def error(result: object) -> float:
            return relative_error(result, images, self.in_dtype, lambda part: reference.dct2(part.double()))

        return Workload((images,), dct.dct2, error)

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        two = functools.partial(others.setup_two_matmuls, self.size, device)
        return (
            Peer(COPY, lambda: torch.clone, "bound"),
            Peer("two matmuls fp32", lambda: two("fp32")),
            Peer("two matmuls tf32", lambda: two("tf32"), "reduced"),
            Peer("FFT", lambda: others.fft_dct2(self.size, device)[0]),
            Peer("torch-dct", others.setup_torch_dct2),
        )


def targets_flops(size: int, cutoff: int) -> int:
    """Operations for one channel: `A_w I A_w^T` and back in `4 (H^2 w + H w^2)`, or `P I P` in `4 H^3`; a copy none."""
    if cutoff >= size:
        return 0
    return min(4 * (size**2 * cutoff + size * cutoff**2), 4 * size**3)


def targets_error(
    result: object, images: Tensor, cutoffs: Tensor, dtype: torch.dtype, *, relative: bool = False
) -> float:
    """Largest difference from the fp64 reference, beyond the rounding to `dtype`; infinite for a wrong shape or dtype.

    Absolute in units of the pixels (0 to 1), or relative to the largest value of the reference.
    """
    if not isinstance(result, Tensor) or result.shape != images.shape or result.dtype != dtype:
        return float("inf")
    # fp32 results are judged whole, since their rounding is part of what the budgets allow.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    worst = largest = torch.zeros((), dtype=torch.float64, device=images.device)
    for part, cuts, got in zip(images.split(16), cutoffs.split(16), result.split(16), strict=True):
        want = reference.spectral_targets(_double(part), cuts)
        excess = (got.double() - want).abs() - rounding * want.abs()
        worst = torch.maximum(worst, excess.amax())
        largest = torch.maximum(largest, want.abs().amax())
    return float(worst / largest if relative else worst)


def loss_error(
    loss: Tensor,
    gradient: Tensor,
    prediction: Tensor,
    images: Tensor,
    cutoffs: Tensor,
    weights: Tensor | None = None,
) -> float:
    """Largest error of a mean squared error and its gradient, as an error of the target's pixels.

    The gradient times half the number of elements is the difference of the pixels; the root of the loss is its root
    mean square, which an error of the pixels of at most `e` changes by at most `e`. With weights of at most 1 the
    former may be up to 1.7 times the error of the pixels (at 256 pixels), so it is judged more strictly.
    """
    if gradient.shape != prediction.shape or loss.ndim:
        return float("inf")
    worst = total = torch.zeros((), dtype=torch.float64, device=images.device)
    parts = zip(
        prediction.split(16), images.split(16), cutoffs.split(16), (gradient * (gradient.numel() / 2)).split(16),
        strict=True,
    )  # fmt: skip
    for predicted, part, cuts, got in parts:
        want = difference = predicted.double() - reference.spectral_targets(_double(part), cuts)
        if weights is not None:
            want = reference.weigh_frequencies(difference, weights)
        worst = torch.maximum(worst, (got.double() - want).abs().amax())
        total = total + (difference * want).sum()
    rms = (total / prediction.numel()).sqrt()
    return float(torch.maximum(worst, (loss.double().sqrt() - rms).abs()))


def relative_error(result: object, inputs: Tensor, dtype: torch.dtype, want_of: Callable[[Tensor], Tensor]) -> float:
    """Largest difference from `want_of(inputs)` over its largest value; infinite for a wrong shape or dtype."""
    if not isinstance(result, Tensor) or result.shape != inputs.shape or result.dtype != dtype:
        return float("inf")
    worst = largest = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for part, got in zip(inputs.split(16), result.split(16), strict=True):
        want = want_of(part)
        worst = torch.maximum(worst, (got.double() - want).abs().amax())
        largest = torch.maximum(largest, want.abs().amax())
    return float(worst / largest)


def near_copy_and_ahead(m: Measurement) -> bool:
    """P1: at most 1.25 times the copy of the same tensors, and at least 4.5 times the best PyTorch form."""
    copy = next((rival for rival in m.rivals if rival.name == COPY and rival.timing), None)
    if m.ours is None or copy is None or m.best_peer is None:
        return False
    return m.ours.median <= 1.25 * timed(copy).median and (m.ratio(m.best_peer) or 0) >= 4.5


P1 = Condition("<= 1.25 x the copy of the same tensors, >= 4.5 x the best PyTorch form", near_copy_and_ahead)
P2 = Condition("<= 1.6 x the byte floor", lambda m: m.ours is not None and m.ours.median <= 1.6 * m.floor)

_HALVES: tuple[others.Arithmetic, ...] = ("bf16", "fp16")


def _with_gradient(loss_of: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def step(prediction: Tensor, images: Tensor, cutoffs: Tensor) -> tuple[Tensor, Tensor]:
        loss = loss_of(prediction, images, cutoffs)
        [gradient] = torch.autograd.grad(loss, prediction)
        return loss.detach(), gradient

    return step


def _double(images: Tensor) -> Tensor:
    return images.double() / 255 if images.dtype == torch.uint8 else images.double()


def _short(dtype: torch.dtype) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name := str(dtype)[6:], name)


def _cutoffs_name(cutoffs: Draw | int) -> str:
    return {"random": "eq. 9 cutoffs", "uniform": "uniform cutoffs"}.get(str(cutoffs), f"cutoff {cutoffs}")


_P2 = TargetsCase(in_dtype=torch.uint8, out_dtype=torch.bfloat16, target="P2", condition=P2)

CASES: tuple[Case, ...] = (
    TargetsCase(target="P1", condition=P1),
    _P2,
    TargetsCase(size=128),
    replace(_P2, size=128, target=None, condition=None),
    TargetsCase(cutoffs="uniform"),
    *(TargetsCase(cutoffs=cutoff) for cutoff in (8, 64, 160, 256)),
    TargetsCase(precision="exact"),
    LossCase(),
    LossCase(size=128, batch=512),
    LossCase(size=128, batch=512, weighted=True),
    LossCase(weighted=True),
    TransformCase(),
)
