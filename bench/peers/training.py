"""The tokenizer and the generator in plain PyTorch, and their training step as one writes it first.

The same models with the same weights, by names that `our_name` translates, and the same random draws in
the same order: attention with dense masks, codes by `cdist`, sub-images by four matrix products, autocast to bf16,
fused AdamW, and PyTorch's own average of the weights. In fp32 this is what training is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from spectralar.bench.peers.dct import setup_four_matmuls
from spectralar.config import GeneratorConfig, TokenizerConfig, ViTConfig
from spectralar.kernels.attention.reference import group_causal_mask, spectral_mask
from spectralar.training.optimizer import OptimizerConfig

Losses = dict[str, Tensor]

# `nn.MultiheadAttention` packs queries, keys and values as our blocks do.
_RENAMED = (
    ("attention.in_proj_weight", "qkv.weight"),
    ("attention.in_proj_bias", "qkv.bias"),
    ("attention.out_proj.", "proj."),
    ("layers.", "blocks."),
)


class PlainStep:
    """Training steps of a plain model; `model` holds its gradients afterwards.

    Args:
        model: a `PlainTokenizer` or `PlainGenerator`.
        weights: parameters and buffers by the names of our model.
        optimizer: AdamW's settings; the learning rate stays at its peak.
        undecayed: parts of the names of what has no weight decay.
        half: bf16 autocast; else fp32 throughout.
        compiled: blocks under torch.compile.
        recomputed: blocks keep only their inputs for the backward pass.
    """

    def __init__(
        self,
        model: PlainTokenizer | PlainGenerator,
        weights: dict[str, Tensor],
        optimizer: OptimizerConfig,
        undecayed: tuple[str, ...],
        *,
        half: bool = True,
        compiled: bool = False,
        recomputed: bool = False,
    ) -> None:
        self.model = model
        renamed = {our_name(name): tensor for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for name, tensor in renamed.items():
                tensor.copy_(weights[name])
        device = next(model.parameters()).device
        self._precision: Callable[[], AbstractContextManager[object]] = (
            (lambda: torch.autocast(device.type, dtype=torch.bfloat16)) if half else nullcontext
        )
        named = [(our_name(name), p) for name, p in model.named_parameters()]
        plain = {name for name, p in named if p.dim() < 2 or any(part in name for part in undecayed)}
        groups = [
            {"params": [p for name, p in named if name not in plain], "weight_decay": optimizer.weight_decay},
            {"params": [p for name, p in named if name in plain], "weight_decay": 0.0},
        ]
        fused = device.type == "cuda"
        self._optimizer = torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, fused=fused)
        self._clip = optimizer.clip
        average = get_ema_multi_avg_fn(optimizer.ema)
        self._average = AveragedModel(model, multi_avg_fn=average) if optimizer.ema else None
        model.train()
        for block in model.blocks():
            if compiled:
                block.compile(fullgraph=True, dynamic=False)
        model.recomputed = recomputed

    def __call__(self, inputs: list[Tensor]) -> Losses:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 is what others are judged by
            with self._precision():
                losses = self.model(*inputs)
            losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)
        return {name: value.detach() for name, value in losses.items()} | {"gradient_norm": norm}

    def gradients(self) -> dict[str, Tensor]:
        """Clipped gradients of the last step by the names of our model's parameters."""
        return {our_name(name): p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def our_name(name: str) -> str:
    """The name of a plain model's parameter in our model."""
    for theirs, ours in _RENAMED:
        name = name.replace(theirs, ours)
    return name


class _Plain(nn.Module):
    recomputed = False

    def blocks(self) -> list[nn.Module]:
        """All transformer blocks."""
        return [m for m in self.modules() if isinstance(m, _ViTBlock | _GeneratorBlock)]

    def run(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        output: Tensor = checkpoint(block, *inputs, use_reentrant=False) if self.recomputed else block(*inputs)
        return output


class _ViTBlock(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [B, T, W], [T, T] or [B * H, T, T] to be added
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _ViT(nn.Module):
    def __init__(self, config: ViTConfig, patches: int) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(1, config.width))
        self.positions = nn.Parameter(torch.empty(1 + patches, config.width))
        self.norm_before, self.norm_after = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(_ViTBlock(config) for _ in range(config.depth))


class _Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.vit = _ViT(config.encoder, config.patches)
        self.queries = nn.Parameter(torch.empty(config.tokens, width))
        self.to_latent = nn.Linear(width, config.code_dim)
        self.latent_norm = nn.ModuleDict()
        if config.latent_norm == "batch":
            self.latent_norm["norm"] = nn.BatchNorm1d(config.tokens * config.code_dim, affine=False, momentum=0.01)


class _Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width = config.decoder.width
        self.from_code = nn.Linear(config.code_dim, width)
        self.vit = _ViT(config.decoder, config.patches)
        self.token_positions = nn.Parameter(torch.empty(config.tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, width))
        self.head = nn.ModuleDict(
            {"to_patch": nn.Linear(width, 3 * config.patch_size**2), "smooth": nn.Conv2d(3, 3, 3, padding=1)}
        )


class PlainTokenizer(_Plain):
    """Algorithm 1 for `mask="figure"` and the direct pixel head, one prefix an image; weights are given later.

    Args:
        config: of our model.
        device: where.
        draw_lengths: prefix lengths of a batch of images.
        exact: sub-images in fp32, else by products in TF32.
    """

    cutoffs: Tensor

    def __init__(
        self, config: TokenizerConfig, device: torch.device, draw_lengths: Callable[[Tensor], Tensor], *, exact: bool
    ) -> None:
        super().__init__()
        self.config, self._draw_lengths = config, draw_lengths
        with device:
            self.encoder, self.decoder = _Encoder(config), _Decoder(config)
            self.codebook = nn.Parameter(torch.empty(config.codebook_size, config.code_dim))
            self.register_buffer("cutoffs", torch.tensor(config.cutoffs), persistent=False)
        self._targets = setup_four_matmuls(config.image_size, device, torch.float32, "fp32" if exact else "tf32")

    def forward(self, images: Tensor, labels: Tensor) -> Losses:  # uint8 [B, 3, S, S]
        config, batch = self.config, len(images)
        lengths = self._draw_lengths(images)
        patches = self.encoder.patch_embed(2 * (images.float() / 255) - 1).flatten(2).transpose(1, 2)
        queries = self.encoder.queries.expand(batch, -1, -1)
        latents = self._vit(self.encoder.vit, patches, queries, None)[:, 1 + config.patches :]
        latents = self.encoder.to_latent(self.encoder.vit.norm_after(latents)).float()
        for norm in self.encoder.latent_norm.values():
            latents = norm(latents.flatten(1)).view_as(latents)
        with torch.autocast(images.device.type, enabled=False):
            vectors, codes = F.normalize(latents, dim=-1), F.normalize(self.codebook, dim=-1)
            chosen = torch.cdist(vectors.flatten(0, 1), codes).argmin(-1).view(batch, -1)
            quantized = F.embedding(chosen, codes)
            commitment = config.commitment * F.mse_loss(vectors, quantized.detach())
            codebook = F.mse_loss(quantized, vectors.detach())
            targets = self._targets(images, self.cutoffs[lengths - 1])
        straight = vectors + (quantized - vectors).detach()
        spectral = self.decoder.from_code(straight) + self.decoder.token_positions
        rows = self._vit(self.decoder.vit, self.decoder.mask_token.expand(batch, config.patches, -1), spectral, lengths)
        features = self.decoder.vit.norm_after(rows[:, 1 : 1 + config.patches])
        grid, p = config.image_size // config.patch_size, config.patch_size
        pixels = self.decoder.head["to_patch"](features).view(batch, grid, grid, p, p, 3).permute(0, 5, 1, 3, 2, 4)
        pixels = (self.decoder.head["smooth"](pixels.reshape(batch, 3, grid * p, grid * p)) + 1) / 2
        pixel = F.mse_loss(pixels.float(), targets)
        return {"loss": pixel + codebook + commitment, "pixel": pixel}

    def _vit(self, vit: _ViT, image_rows: Tensor, spectral_rows: Tensor, lengths: Tensor | None) -> Tensor:
        start = vit.class_token.expand(len(image_rows), 1, -1)
        rows = torch.cat([start, image_rows], dim=1) + vit.positions
        x = vit.norm_before(torch.cat([rows, spectral_rows], dim=1))
        role = "encoder" if lengths is None else "decoder"
        visible = spectral_mask(x.shape[1], 1 + self.config.patches, lengths, "figure", role, x.device)
        half = torch.is_autocast_enabled(x.device.type)
        mask = torch.zeros(visible.shape, device=x.device, dtype=torch.bfloat16 if half else torch.float32)
        mask = mask.masked_fill(~visible, float("-inf"))
        heads = (self.config.encoder if lengths is None else self.config.decoder).heads
        mask = mask[0] if lengths is None else mask.repeat_interleave(heads, dim=0)
        for block in vit.blocks:
            x = self.run(block, x, mask)
        return x


class _GeneratorAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.log_scale = nn.Parameter(torch.empty(heads))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        packed = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = packed.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
        scale = self.log_scale.clamp(max=math.log(100.0)).exp()[:, None, None]
        q = F.normalize(q.float(), dim=-1) * scale
        k = F.normalize(k.float(), dim=-1)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=visible, scale=1.0)
        return self.proj(out.transpose(1, 2).flatten(2))


class _GeneratorBlock(nn.Module):
    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        width = config.width
        self.attention = _GeneratorAttention(width, config.heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaln = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, keep: Tensor, visible: Tensor) -> Tensor:
        modulation = self.adaln(F.silu(condition)).unflatten(-1, (6, -1))[:, :, None]
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(1)
        kept = keep[:, :, None, None]
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        x = x + kept[0] * gate1 * self.attention(y, visible)
        y = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        return x + kept[1] * gate2 * self.fc2(F.gelu(self.fc1(y), approximate="tanh"))


class PlainGenerator(_Plain):
    """The generator for `token_input="table"`, trained by the cross entropy of all tokens; weights are given later."""

    def __init__(self, config: GeneratorConfig, device: torch.device) -> None:
        super().__init__()
        self.config = config
        width = config.width
        with device:
            self.class_table = nn.Embedding(config.classes + 1, width)
            self.token_table = nn.Embedding(config.codebook_size, width)
            self.start_positions = nn.Parameter(torch.empty(config.group, width))
            self.positions = nn.Parameter(torch.empty(config.tokens, width))
            self.layers = nn.ModuleList(_GeneratorBlock(config) for _ in range(config.depth))
            self.head_adaln, self.head = nn.Linear(width, 2 * width), nn.Linear(width, config.codebook_size)

    def forward(self, tokens: Tensor, labels: Tensor) -> Losses:  # [B, N], [B]
        config, device = self.config, tokens.device
        dropped = torch.rand(len(labels), device=device) < config.class_drop
        condition = self.class_table(labels.masked_fill(dropped, config.classes))
        keep = 1 - torch.linspace(0, config.max_drop_path, config.depth, device=device)[:, None, None]
        kept = (torch.rand(config.depth, 2, len(labels), device=device) < keep) / keep
        start = condition[:, None] + self.start_positions
        x = torch.cat([start, self.token_table(tokens[:, : -config.group])], dim=1) + self.positions
        visible = group_causal_mask(config.group_sizes, device)
        for block, factors in zip(self.layers, kept, strict=True):
            x = self.run(block, x, condition, factors, visible)
        scale, shift = self.head_adaln(F.silu(condition)).unflatten(-1, (2, -1))[:, :, None].unbind(1)
        logits = self.head(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return {"loss": loss, "accuracy": (logits.detach().argmax(-1) == tokens).float().mean()}
