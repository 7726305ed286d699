"""The generator: VAR's transformer over one-dimensional groups of spectral tokens (SpectralAR section 3.3, eq. 8)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.config import GeneratorConfig
from spectralar.kernels.attention import cached_attention, group_causal_attention
from spectralar.kernels.norm import modulated_layer_norm
from spectralar.weights.pretrained import Pretrained

_MAX_LOG_SCALE = math.log(100.0)


@dataclass
class DecodeState:
    """What cached decoding of a batch carries from step to step.

    Attributes:
        start: class rows `[B, W]`, the content of the start tokens.
        modulations: AdaLN outputs of every block `[L, B, 6, W]`; they depend on the class only.
        head_modulation: `[B, 2, W]`, scale then shift.
        keys: normalised keys `[L, B, N, H, D]`.
        values: `[L, B, N, H, D]`.
        step: steps done so far.
    """

    start: Tensor
    modulations: Tensor
    head_modulation: Tensor
    keys: Tensor
    values: Tensor
    step: int = 0


class SelfAttention(nn.Module):
    """Packed q, k, v without key bias; queries and keys L2-normalised, queries times a learned scale per head."""

    def __init__(self, width: int, heads: int, group_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.group_sizes = heads, group_sizes
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, W] -> 3 x [B, T, H, D]
        """Scaled unit queries, unit keys, and values."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q = F.normalize(_wide(q), dim=-1, eps=1e-12) * self.query_scale()[:, None]
        return q.to(v.dtype), F.normalize(_wide(k), dim=-1, eps=1e-12).to(v.dtype), v

    def query_scale(self) -> Tensor:
        """The factor of every head's unit queries `[H]`."""
        return self.log_scale.clamp(max=_MAX_LOG_SCALE).exp()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.proj(group_causal_attention(q, k, v, self.group_sizes, 1.0).flatten(2))

    def decode(self, x: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """One group `[B, G, W]` at positions `start`.. of the cache `[B, N, H, D]`, which it is written into."""
        q, k, v = self.project(x)
        end = start + x.shape[1]
        keys[:, start:end], values[:, start:end] = k, v
        return self.proj(cached_attention(q, keys, values, end, 1.0).flatten(2))


class Block(nn.Module):
    """x += gate1 attention(adaln(x)); x += gate2 mlp(adaln(x)), tanh GELU, stochastic depth per sample."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.width
        self.attention = SelfAttention(width, config.heads, config.group_sizes)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.adaln = nn.Linear(width, 6 * width)

    def modulation(self, condition: Tensor) -> Tensor:
        """gate1, gate2, scale1, scale2, shift1, shift2 as `[B, 6, W]` from the class rows `[B, W]` (VAR's order)."""
        return self.adaln(F.silu(condition)).unflatten(-1, (6, -1))

    def forward(self, x: Tensor, condition: Tensor, keep: Tensor) -> Tensor:  # [B, T, W], [B, W], [2, B]
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(condition)[:, :, None].unbind(1)
        keep1, keep2 = keep[:, :, None, None].to(gate1.dtype)
        x = x + keep1 * gate1 * self.attention(modulated_layer_norm(x, scale1, shift1))
        return x + keep2 * gate2 * self._mlp(modulated_layer_norm(x, scale2, shift2))

    def decode(self, x: Tensor, modulation: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """One group `[B, G, W]` with a cache, given the block's modulation `[B, 6, W]`."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation[:, :, None].unbind(1)
        x = x + gate1 * self.attention.decode(modulated_layer_norm(x, scale1, shift1), keys, values, start)
        return x + gate2 * self._mlp(modulated_layer_norm(x, scale2, shift2))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SpectralGenerator(Pretrained[GeneratorConfig], nn.Module):
    """Class-conditional autoregressive transformer over N spectral tokens in groups.

    The input at a group's positions is the previous group's tokens (an ordinary shift by one group); the first group
    sees the class row and learned start positions. Row `classes` of the class table means "no class".

    Args:
        config: sizes and options; see `GeneratorConfig` and `generator_preset`.
        codebook: the tokenizer's codes `[K, code_dim]`, required by `token_input="code"` when training from scratch
            (loading a saved model restores them); they stay fixed.
    """

    config_class = GeneratorConfig
    codes: Tensor

    def __init__(self, config: GeneratorConfig, codebook: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.class_table = nn.Embedding(config.classes + 1, width)
        self.start_positions = nn.Parameter(torch.empty(config.group, width))
        self.positions = nn.Parameter(torch.empty(config.tokens, width))
        if config.token_input == "table":
            self.token_table = nn.Embedding(config.codebook_size, width)
        else:
            shape = (config.codebook_size, config.code_dim)
            if codebook is not None and tuple(codebook.shape) != shape:
                raise ValueError(f"codebook must have shape {list(shape)}, not {list(codebook.shape)}")
            codes = torch.zeros(shape) if codebook is None else F.normalize(codebook.detach().float().cpu(), dim=-1)
            self.register_buffer("codes", codes)
            self.from_code = nn.Linear(config.code_dim, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_adaln = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, config.codebook_size)
        self._initialize()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.positions.device

    def forward(self, classes: Tensor, tokens: Tensor) -> Tensor:
        """Teacher-forced logits of every token given the class and the earlier groups.

        Args:
            classes: `[B]` integers in 0..classes (the last one is "no class"). In training mode each is replaced by
                "no class" with probability `config.class_drop`.
            tokens: `[B, N]` integers; the last group is not read.

        Returns:
            `[B, N, K]` logits, fp32 (fp64 for an fp64 model); position t predicts token t.

        Raises:
            TypeError, ValueError: wrong dtype, shape or range (values of CUDA tensors are not read).
        """
        self._check(classes, tokens)
        if self.training and self.config.class_drop > 0:
            dropped = torch.rand(len(classes), device=classes.device) < self.config.class_drop
            classes = classes.masked_fill(dropped, self.config.classes)
        condition = self.class_table(classes.long())  # [B, W]
        start = condition[:, None] + self.start_positions
        later = self.embed(tokens[:, : self.config.tokens - self.config.group])
        x = torch.cat([start, later], dim=1) + self.positions
        for block, keep in zip(self.blocks, self._stochastic_depth(len(classes)), strict=True):
            x = block(x, condition, keep)
        return self._logits(x, self.head_adaln(F.silu(condition)).unflatten(-1, (2, -1)))

    @torch.no_grad()
    def start(self, classes: Tensor) -> DecodeState:
        """Begins cached decoding: computes what depends on the class only and allocates the cache.

        Args:
            classes: `[B]` integers in 0..classes.
        """
        self._check(classes, None)
        config, batch = self.config, len(classes)
        condition = self.class_table(classes.long())
        modulations = torch.stack([block.modulation(condition) for block in self.blocks])  # type: ignore[operator]
        head = self.head_adaln(F.silu(condition)).unflatten(-1, (2, -1))
        shape = (config.depth, batch, config.tokens, config.heads, config.width // config.heads)
        keys, values = (torch.empty(shape, device=condition.device, dtype=modulations.dtype) for _ in range(2))
        return DecodeState(condition, modulations, head, keys, values)

    @torch.no_grad()
    def step(self, state: DecodeState, previous: Tensor | None) -> Tensor:
        """Logits of the next group, given the tokens of the group before; advances the state.

        Args:
            state: from `start`.
            previous: `[B, group]` tokens of the previous step, None at the first.

        Returns:
            `[B, group, K]` logits, fp32 (fp64 for an fp64 model).

        Raises:
            ValueError: all steps are done, or `previous` does not fit the step.
        """
        config = self.config
        if state.step >= config.steps:
            raise ValueError(f"all {config.steps} steps are done")
        if (previous is None) != (state.step == 0):
            raise ValueError("previous must be None at the first step and the last group's tokens afterwards")
        if previous is not None and previous.shape != (len(state.start), config.group):
            expected = [len(state.start), config.group]
            raise ValueError(f"previous must have shape {expected}, not {list(previous.shape)}")
        first = state.step * config.group
        content = state.start[:, None] + self.start_positions if previous is None else self.embed(previous)
        x = content + self.positions[first : first + config.group]
        for i, block in enumerate(self.blocks):
            x = block.decode(x, state.modulations[i], state.keys[i], state.values[i], first)  # type: ignore[operator]
        state.step += 1
        return self._logits(x, state.head_modulation)

    def _stochastic_depth(self, batch: int) -> Tensor:
        """Factors `[L, 2, B]` of every residual branch: 1, or in training 0 or 1 / keep with a linear ramp of rates."""
        config = self.config
        if not self.training or config.max_drop_path == 0:
            return torch.ones(config.depth, 2, batch, device=self.device)
        keep = 1 - torch.linspace(0, config.max_drop_path, config.depth, device=self.device)[:, None, None]
        return (torch.rand(config.depth, 2, batch, device=self.device) < keep) / keep

    def embed(self, tokens: Tensor) -> Tensor:
        """How tokens enter, without their positions: `[...]` integers to `[..., W]`."""
        if self.config.token_input == "table":
            return self.token_table(tokens.long())
        return self.from_code(F.embedding(tokens.long(), self.codes))

    def _logits(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift = _wide(modulation)[:, :, None].unbind(1)
        return _wide(self.head(modulated_layer_norm(_wide(x), scale, shift).to(self.head.weight.dtype)))

    def _check(self, classes: Tensor, tokens: Tensor | None) -> None:
        config = self.config
        if classes.dim() != 1 or classes.dtype.is_floating_point:
            raise ValueError(f"classes must be integers of shape [B], not {classes.dtype} {list(classes.shape)}")
        _check_range(classes, config.classes, "classes")
        if tokens is None:
            return
        if tokens.shape != (len(classes), config.tokens) or tokens.dtype.is_floating_point:
            expected = [len(classes), config.tokens]
            raise ValueError(f"tokens must be integers of shape {expected}, not {tokens.dtype} {list(tokens.shape)}")
        _check_range(tokens, config.codebook_size - 1, "tokens")

    def _initialize(self) -> None:
        """VAR's rule: std sqrt(1 / 3w); residual outputs / sqrt(2 d), head x 0.02, AdaLN x 0.5, gates x gate_init."""
        config = self.config
        std = math.sqrt(1 / (3 * config.width))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.start_positions, std=std)
        nn.init.trunc_normal_(self.positions, std=std)
        with torch.no_grad():
            self.head.weight.mul_(0.02)
            self.head_adaln.weight.mul_(0.5)
            for block in self.blocks:
                assert isinstance(block, Block)
                block.attention.proj.weight.div_(math.sqrt(2 * config.depth))
                block.fc2.weight.div_(math.sqrt(2 * config.depth))
                block.adaln.weight[: 2 * config.width].mul_(config.gate_init)
                block.adaln.weight[2 * config.width :].mul_(0.5)


def _wide(x: Tensor) -> Tensor:
    """At least fp32: where bf16 would cost too much."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_range(values: Tensor, highest: int, name: str) -> None:
    if values.device.type == "cpu" and values.numel():
        low, high = (int(x) for x in values.long().aminmax())
        if low < 0 or high > highest:
            raise ValueError(f"{name} must be in 0..{highest}, not {low}..{high}")
