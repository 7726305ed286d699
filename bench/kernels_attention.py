"""Cases of `spectralar.kernels.attention`: the tokenizer's masks, forward, and forward with backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from spectralar.bench.cases import Case, Condition, Measurement, Missing, Peer, Workload, timed, within_microseconds
from spectralar.kernels.attention import backends, packed_spectral_attention, reference, spectral_attention

FORWARD = "our forward alone"
# Relative to the largest value; bf16 has 2^-9 of rounding, and the gradients pass two more roundings.
_BUDGET, _STEP_BUDGET = 8e-3, 2e-2
# Packed queries, keys and values, and prefix lengths, to the output.
Attend = Callable[[Tensor, Tensor | None], Tensor]
# Images of one turn of the judge, whose scores are dense and in fp32.
_JUDGED = 16


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """`packed_spectral_attention` of `batch` images: `image` rows with the class token, and `tokens` spectral ones.

    Queries, keys and values are one tensor for the peers too, as a projection leaves them, and so is its gradient.
    """

    batch: int = 256
    image: int = 257
    tokens: int = 64
    heads: int = 12
    width: int = 64
    mask: Literal["figure", "strict", "none"] = "figure"
    role: Literal["encoder", "decoder"] = "encoder"
    prefixes: bool = False
    backward: bool = False

    @property
    def name(self) -> str:
        work = "forward+backward" if self.backward else "forward"
        mask = f"{self.mask} {self.role}" if self.mask == "strict" else self.mask
        prefixes = ", random prefixes" if self.prefixes else ""
        return (
            f"packed_spectral_attention {work} B={self.batch} {self.image}+{self.tokens} {self.heads}x{self.width} "
            f"bf16, {mask}{prefixes}"
        )

    @property
    def budget(self) -> float:
        return _STEP_BUDGET if self.backward else _BUDGET

    @property
    def peer_budget(self) -> float:
        return self.budget

    @property
    def arithmetic(self) -> str:
        return "bf16"

    @property
    def length(self) -> int:
        return self.image + self.tokens

    def pairs(self) -> int:
        """Pairs of a row and a key that it sees, without prefixes."""
        causal = self.tokens * (self.tokens + 1) // 2
        if self.mask == "none":
            return self.length**2
        from_image = self.image if self.mask == "strict" and self.role == "encoder" else self.length
        to_image = 0 if self.mask == "strict" and self.role == "decoder" else self.image
        return self.image * from_image + self.tokens * to_image + causal

    def bytes(self) -> int:
        # Forward: q, k, v in, the output out. Backward: these four and the output's gradient in, three gradients out.
        return (12 if self.backward else 4) * self.batch * self.length * self.heads * self.width * 2

    def flops(self) -> int:
        # Two products forward, five backward.
        products = 7 if self.backward else 2
        return products * 2 * self.width * self.pairs() * self.heads * self.batch

    def small(self) -> Self:
        batch, image = max(1, self.batch // 128), min(self.image, 17)
        return replace(self, batch=batch, image=image, tokens=8, heads=2, target=None, condition=None)

    def workload(self, device: torch.device) -> Workload:
        generator = torch.Generator(device).manual_seed(0)
        start, end = (self.batch, self.length), (self.heads, self.width)
        shapes = (*start, 3, *end), (*start, *end)
        qkv, grad = (torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes)
        prefixes = hidden = None
        if self.prefixes:
            prefixes = torch.randint(1, self.tokens + 1, (self.batch,), generator=generator, device=device)
            # Nothing flows back from the rows of hidden tokens.
            hidden = torch.arange(self.length, device=device) >= self.image + prefixes[:, None]
            grad[hidden] = 0

        exact = self.call(self._unpacked("reference"))

        def error(result: object) -> float:
            return attention_error(result, exact, inputs, hidden)

        inputs = (qkv.requires_grad_(self.backward), prefixes, grad)
        return Workload(inputs, self.call(self._ours), error)

    def call(self, attend: Attend) -> Callable[..., object]:
        """The work of this case with a way to attend: the output, or with the gradients of q, k and v."""

        def forward(qkv: Tensor, prefixes: Tensor | None, grad: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (attend(qkv, prefixes),)

        def step(qkv: Tensor, prefixes: Tensor | None, grad: Tensor) -> tuple[Tensor, ...]:
            out = attend(qkv, prefixes)
            (grads,) = torch.autograd.grad(out, qkv, grad)
            return (out.detach(), *grads.unbind(2))

        return step if self.backward else forward

    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        def unmasked(qkv: Tensor, prefixes: Tensor | None) -> Tensor:
            q, k, v = qkv.unbind(2)
            return backends.sdpa(q, k, v, False, None)

        alone = replace(self, backward=False)
        return (
            *([Peer(FORWARD, lambda: alone.call(self._ours), "bound")] if self.backward else []),
            Peer("sdpa without a mask", lambda: self.call(unmasked), "bound"),
            Peer("sdpa, dense mask", lambda: self.call(self._dense(device))),
            Peer("sdpa, two calls", self._two_calls),
            *(
                Peer(f"{name}, two calls", functools.partial(self._flash, name, device))
                for name in ("flash2", "flash4")
            ),
        )

    def _ours(self, qkv: Tensor, prefixes: Tensor | None) -> Tensor:
        return packed_spectral_attention(qkv, self.image, prefixes, self.mask, self.role)

    def _unpacked(self, backend: backends.Backend) -> Attend:
        def attend(qkv: Tensor, prefixes: Tensor | None) -> Tensor:
            q, k, v = qkv.unbind(2)
            return spectral_attention(q, k, v, self.image, prefixes, self.mask, self.role, backend=backend)

        return attend

    def _dense(self, device: torch.device) -> Attend:
        allowed = reference.spectral_mask(self.length, self.image, None, self.mask, self.role, device)[:, None]
        position = torch.arange(self.length, device=device)

        def attend(qkv: Tensor, prefixes: Tensor | None) -> Tensor:
            q, k, v = qkv.unbind(2)
            if prefixes is None:
                return backends.sdpa(q, k, v, False, None, allowed)
            shown = (position < self.image + prefixes[:, None])[:, None, None]
            return backends.sdpa(q, k, v, False, None, allowed & (shown | (position[:, None] == position)))

        return attend

    def _two_calls(self) -> Callable[..., object] | Missing:
        if self.prefixes or self.mask != "figure" or not self.image:
            return Missing("written for the figure's mask without prefixes")
        bottom_right = causal_lower_right(self.tokens, self.length)

        def attend(qkv: Tensor, prefixes: Tensor | None) -> Tensor:
            q, k, v = qkv.unbind(2)
            image, spectral = q.split((self.image, self.tokens), dim=1)
            whole = backends.sdpa(image, k, v, False, None)
            causal = F.scaled_dot_product_attention(
                spectral.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=cast(Tensor, bottom_right)
            )
            return torch.cat([whole, causal.transpose(1, 2)], dim=1)

        return self.call(attend)

    def _flash(self, name: Literal["flash2", "flash4"], device: torch.device) -> Callable[..., object] | Missing:
        probe = torch.empty(0, 0, 0, self.width, dtype=torch.bfloat16, device=device)
        why = backends.obstacle(name, probe, "prefixes" if self.prefixes else "plain", self.backward)
        if why is not None:
            return Missing(f"{name} {why}")
        return self.call(self._unpacked(name))


def attention_error(
    result: object, exact: Callable[..., object], inputs: tuple[Any, ...], hidden: Tensor | None = None
) -> float:
    """Largest error of any result relative to its largest value, against `exact` in fp32; infinite for a wrong shape.

    Args:
        result: the output, and gradients if the case has them.
        exact: gives the same results from the inputs of the case.
        inputs: of the case.
        hidden: bool `[B, T]`, rows of the output that are not judged.
    """
    qkv, prefixes, grad = inputs
    if not isinstance(result, tuple) or any(x.shape != grad.shape for x in result):
        return float("inf")
    worst, largest = torch.zeros(2, len(result), device=qkv.device)
    for start in range(0, len(qkv), _JUDGED):
        part = slice(start, start + _JUDGED)
        leaf = qkv[part].detach().float().requires_grad_(qkv.requires_grad)
        wanted = cast(tuple[Tensor, ...], exact(leaf, prefixes if prefixes is None else prefixes[part], grad[part]))
        for i, (got, want) in enumerate(zip(result, wanted, strict=True)):
            error = (got[part].float() - want).abs()
            if i == 0 and hidden is not None:
                error = error.masked_fill(hidden[part][:, :, None, None], 0.0)
            worst[i] = torch.maximum(worst[i], error.amax())
            largest[i] = torch.maximum(largest[i], want.abs().amax())
    return float((worst / largest).amax())


def within_three_and_a_half_forwards(m: Measurement) -> bool:
    """P5's second half: forward and backward take at most 3.5 times the forward alone."""
    alone = next((rival for rival in m.rivals if rival.name == FORWARD and rival.timing), None)
    return m.ours is not None and alone is not None and m.ours.median <= 3.5 * timed(alone).median


_P5 = AttentionCase(target="P5", condition=within_microseconds(360))
_P5_STEP = replace(
    _P5, backward=True, condition=Condition("<= 3.5 x our forward alone", within_three_and_a_half_forwards)
)

CASES: tuple[Case, ...] = (
    _P5,
    _P5_STEP,
    *(
        AttentionCase(mask="strict", role=role, prefixes=role == "decoder", backward=backward)
        for role in ("encoder", "decoder")
        for backward in (False, True)
    ),
    AttentionCase(mask="none"),
    # Without image rows the figure's mask is causal: the generator d16.
    *(AttentionCase(image=0, heads=16, backward=backward) for backward in (False, True)),
    AttentionCase(batch=64),
)
