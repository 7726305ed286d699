"""The nested spectral tokenizer (SpectralAR section 3.2): image -> 64 ordered tokens -> any prefix back to an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectralar.config import TokenizerConfig
from spectralar.images import to_float
from spectralar.kernels import vq
from spectralar.kernels.dct import spectral_mse, spectral_targets
from spectralar.tokenizer.heads import build_pixel_head
from spectralar.tokenizer.vit import SpectralViT, initialize
from spectralar.weights.pretrained import Pretrained


class TokenizerOutput(NamedTuple):
    """One training pass: `images` `[B, 3, H, W]` fp32 rebuilt from the prefixes, `tokens` `[B, N]`, scalar losses."""

    images: Tensor
    tokens: Tensor
    commitment_loss: Tensor
    codebook_loss: Tensor


class LatentBatchNorm(nn.Module):
    """Zero mean and unit variance over the batch for each coordinate of each position; running statistics in eval.

    A fresh encoder gives nearly the same latents for all images, far closer together than codes are, so that every
    position starts with one code and the decoder learns to ignore it. Standardised latents differ from the first step.
    Batch normalisation before a vector quantizer is due to Lancucki et al., "Robust training of vector quantized
    bottleneck models" (2020).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(config.tokens * config.code_dim, affine=False, momentum=0.01)

    def forward(self, latents: Tensor) -> Tensor:  # [B, N, D]
        mean = self.norm.running_mean
        assert mean is not None
        with torch.autocast(latents.device.type, enabled=False):
            return self.norm(latents.to(mean.dtype).flatten(1)).view_as(latents)


class Encoder(nn.Module):
    """Images to N latents (eq. 3, left): a ViT over patches and learned queries; the queries' rows are the latents."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width = config.encoder.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.vit = SpectralViT(config.encoder, config.patches, config.mask, "encoder")
        self.queries = nn.Parameter(width**-0.5 * torch.randn(config.tokens, width))
        self.to_latent = nn.Linear(width, config.code_dim)
        self.latent_norm = LatentBatchNorm(config) if config.latent_norm == "batch" else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] in [0, 1]
        patches = self._embed_patches(2 * images.to(self.patch_embed.weight.dtype) - 1)
        queries = self.queries.expand(len(images), -1, -1)
        return self.latent_norm(self.to_latent(self.vit(patches, queries)))  # [B, N, D]

    def _embed_patches(self, images: Tensor) -> Tensor:
        """The convolution `patch_embed` as one matrix product: `[B, 3, S, S]` to `[B, P, W]`, patches row by row.

        Libraries have no fast convolution for three channels, least of all for the gradient of its weights.
        """
        side = self.patch_embed.weight.shape[-1]
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        rows = patches.flatten(3).flatten(1, 2)  # [B, P, 3 * side * side]
        return F.linear(rows, self.patch_embed.weight.flatten(1), self.patch_embed.bias)


class Decoder(nn.Module):
    """Code vectors of a prefix to an image (eq. 6): a ViT over mask tokens and codes, then a pixel head."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width = config.decoder.width
        self.grid, self.patches = config.image_size // config.patch_size, config.patches
        self.from_code = nn.Linear(config.code_dim, width)
        self.vit = SpectralViT(config.decoder, config.patches, config.mask, "decoder")
        self.token_positions = nn.Parameter(width**-0.5 * torch.randn(config.tokens, width))
        self.mask_token = nn.Parameter(width**-0.5 * torch.randn(1, width))
        self.head = build_pixel_head(config)

    def forward(self, codes: Tensor, prefix_lengths: Tensor | None = None) -> Tensor:  # [B, n, D]
        return self.head(self.features(codes, prefix_lengths))  # [B, 3, S, S]

    def features(self, codes: Tensor, prefix_lengths: Tensor | None = None) -> Tensor:
        """What the pixel head sees: `[B, n, D]` to `[B, G, G, W]`."""
        spectral = self.from_code(codes.to(self.from_code.weight.dtype)) + self.token_positions[: codes.shape[1]]
        mask_tokens = self.mask_token.expand(len(codes), self.patches, -1)
        return self.vit(mask_tokens, spectral, prefix_lengths).unflatten(1, (self.grid, self.grid))


class SpectralTokenizer(Pretrained[TokenizerConfig], nn.Module):
    """Images to N ordered tokens and back from any prefix of them.

    Pixels are in [0, 1]. Reconstructions are floating and may leave [0, 1] slightly, as
    band-limited images do; `spectralar.images.to_uint8` clamps and rounds them.

    Args:
        config: sizes and options; see `TokenizerConfig`.
    """

    config_class = TokenizerConfig
    cutoffs: Tensor
    usage: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.apply(initialize)
        self.decoder.head.start()
        self.register_buffer("cutoffs", torch.tensor(config.cutoffs), persistent=False)
        # Unit length from the start, so that a step of the optimizer turns every code by a comparable angle.
        self.codebook = nn.Parameter(
            nn.functional.normalize(torch.randn(config.codebook_size, config.code_dim), dim=-1)
        )
        if config.dead_codes == "restart":
            # No code counts as dead in the beginning.
            self.register_buffer("usage", torch.full((config.codebook_size,), 1 / config.codebook_size))
        self._joined: Callable[[Tensor], Tensor] = _alone

    def over_ranks(self, join: Callable[[Tensor], Tensor]) -> None:
        """Lets dead codes be those that no rank uses, and restart from all ranks' latents, the same on every rank.

        Args:
            join: gives every rank's tensor end to end along the first dimension, on every rank alike.
        """
        self._joined = join

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.codebook.device

    def encode(self, images: Tensor) -> Tensor:
        """Tokens of images (eq. 3: nearest codes of the encoder's latents).

        Args:
            images: `[B, 3, S, S]` uint8 or floating in [0, 1], S = `config.image_size`.

        Returns:
            `[B, N]` int64 in 0..codebook_size - 1, low to high frequency.

        Raises:
            TypeError, ValueError: wrong dtype, shape, size or value range.
        """
        latents = self.encoder(to_float(images, size=self.config.image_size))
        return vq.nearest_code(latents, self.codebook, normalize=self.config.normalize_codes)

    def decode(self, tokens: Tensor) -> Tensor:
        """Images from the first n tokens, n = 1..N (eq. 6).

        Args:
            tokens: `[B, n]` integers in 0..codebook_size - 1.

        Returns:
            `[B, 3, S, S]` fp32, about [0, 1]: an estimate of the sub-images I'_n.

        Raises:
            TypeError, ValueError: wrong dtype, shape, prefix length or token id.
        """
        self._check_tokens(tokens)
        return self.decoder(self._codes(tokens))

    def decode_prefixes(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Images from a prefix per sample, with static shapes: hidden tokens are masked by key length.

        Args:
            tokens: `[B, n]` integers.
            lengths: `[B]` integers in 1..n.

        Returns:
            `[B, 3, S, S]` fp32; row b equals `decode(tokens[b:b+1, :lengths[b]])`.

        Raises:
            TypeError, ValueError: as `decode`; lengths outside 1..n.
        """
        self._check_tokens(tokens)
        self._check_lengths(lengths, len(tokens), tokens.shape[1], wait=True)
        return self.decoder(self._codes(tokens), lengths.to(tokens.device))

    def reconstruct(self, images: Tensor, length: int | None = None) -> Tensor:
        """`decode(encode(images)[:, :length])`; all N tokens when `length` is None.

        Raises:
            TypeError, ValueError: as `encode`; a length outside 1..N.
        """
        length = self.config.tokens if length is None else length
        if not 1 <= length <= self.config.tokens:
            raise ValueError(f"length must be 1..{self.config.tokens}, not {length}")
        return self.decode(self.encode(images)[:, :length])

    def targets(self, images: Tensor, lengths: Tensor) -> Tensor:
        """What a prefix of each length should rebuild: I'_n (eq. 5), or the image under `supervision="full"`.

        Args:
            images: `[B, 3, S, S]` uint8 or floating in [0, 1].
            lengths: `[B]` integers in 1..N.

        Returns:
            `[B, 3, S, S]` floating.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        images = to_float(images, size=self.config.image_size, check_range=False)
        self._check_lengths(lengths, len(images), self.config.tokens, wait=False)
        if self.config.supervision == "full":
            return images
        return spectral_targets(images, self.cutoffs[lengths.to(self.device) - 1])

    def pixel_loss(self, rebuilt: Tensor, images: Tensor, lengths: Tensor, weights: Tensor | None = None) -> Tensor:
        """`mean((rebuilt - targets(images, lengths))^2)`, or with frequencies weighed, see `spectral_mse`.

        On a GPU the targets are never written to memory.

        Args:
            rebuilt: `[B, 3, S, S]` floating, what `forward` gave.
            images: `[B, 3, S, S]` uint8 or floating in [0, 1]; repeated as often as an image has prefixes.
            lengths: `[B]` integers in 1..N.
            weights: `[S, S]` floating, how much the squared error at every frequency counts; None is 1.

        Returns:
            Scalar float32, differentiable in `rebuilt`.

        Raises:
            TypeError, ValueError: as `forward` and `spectral_mse`.
        """
        full = self.config.supervision == "full"
        if full and weights is None:
            return (rebuilt - self.targets(images, lengths)).square().mean()
        self._check_lengths(lengths, len(images), self.config.tokens, wait=False)
        cutoffs = self.config.image_size if full else self.cutoffs[lengths.to(self.device) - 1]
        return spectral_mse(rebuilt, images.to(self.device), cutoffs, weights=weights)

    def forward(self, images: Tensor, lengths: Tensor) -> TokenizerOutput:
        """One pass of Algorithm 1: encode all, quantize all with straight-through gradients, decode the prefixes.

        Args:
            images: `[B, 3, S, S]` uint8 or floating in [0, 1]; values are not checked here.
            lengths: `[P * B]` integers in 1..N, P prefixes of every image; number p * B + b is of image b. The images
                are encoded once, and as many as lengths are rebuilt, in their order.

        Raises:
            TypeError, ValueError: wrong dtype, shape or size of images, wrong dtype or shape of lengths, or lengths in
                CPU memory outside 1..N.
        """
        images = to_float(images, size=self.config.image_size, check_range=False)
        prefixes = max(1, lengths.numel() // max(1, len(images)))
        self._check_lengths(lengths, prefixes * len(images), self.config.tokens, wait=False)
        quantized = self.quantize(self.encoder(images))
        rebuilt = self.decoder(quantized.quantized.repeat(prefixes, 1, 1), lengths)
        return TokenizerOutput(rebuilt, quantized.indices, quantized.commitment_loss, quantized.codebook_loss)

    def quantize(self, latents: Tensor) -> vq.VectorQuantized:
        """Latents `[B, N, D]` to codes with straight-through gradients, and the quantizer's losses.

        In training mode dead codes restart here, where the configuration says so.
        """
        restart = self.training and self.config.dead_codes == "restart"
        normalize = self.config.normalize_codes
        if restart:
            with torch.no_grad():
                everyone = self._joined(latents)
                self.codebook.copy_(vq.restart_dead_codes(self.codebook, self.usage, everyone, normalize=normalize))
        quantized = vq.vector_quantize(latents, self.codebook, normalize=normalize, commitment=self.config.commitment)
        if restart:
            counts = vq.code_usage(self._joined(quantized.indices), self.config.codebook_size)
            self.usage.copy_(vq.update_usage(self.usage, counts))
        return quantized

    def _codes(self, tokens: Tensor) -> Tensor:
        return vq.lookup(tokens.long(), self.codebook, normalize=self.config.normalize_codes)

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must be integers, not {tokens.dtype}")
        if tokens.dim() != 2 or not 1 <= tokens.shape[1] <= self.config.tokens:
            raise ValueError(
                f"tokens must have shape [B, n] with n in 1..{self.config.tokens}, not {list(tokens.shape)}"
            )
        if tokens.numel():
            low, high = (int(x) for x in tokens.long().aminmax())
            if low < 0 or high >= self.config.codebook_size:
                raise ValueError(f"tokens must be in 0..{self.config.codebook_size - 1}, not {low}..{high}")

    def _check_lengths(self, lengths: Tensor, batch: int, tokens: int, *, wait: bool) -> None:
        """`wait`: look at the values also where that waits for a GPU."""
        if lengths.shape != (batch,) or lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
            raise ValueError(
                f"lengths must be {batch} integers, one per sample, not {lengths.dtype} {list(lengths.shape)}"
            )
        readable = wait or lengths.device.type == "cpu"
        if readable and batch and not (1 <= int(lengths.min()) and int(lengths.max()) <= tokens):
            raise ValueError(f"lengths must be 1..{tokens}, not {int(lengths.min())}..{int(lengths.max())}")


def _alone(x: Tensor) -> Tensor:
    return x
