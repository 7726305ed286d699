"""A tokenizer learns the same with the Triton kernels as with their references."""

from __future__ import annotations

import pytest
import torch

from spectralar.config import TokenizerConfig, ViTConfig
from spectralar.kernels.dct import ops as dct_ops
from spectralar.kernels.vq import ops as vq_ops
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def curve(steps: int, normalize: bool) -> torch.Tensor:
    """Losses of a few steps on coloured noise: `[steps, 4]`, and codes in use."""
    torch.manual_seed(0)
    vit = ViTConfig(32, 2, 2)
    config = TokenizerConfig(
        image_size=32, patch_size=8, tokens=8, codebook_size=64, encoder=vit, decoder=vit,
        latent_norm="batch", normalize_codes=normalize,
    )  # fmt: skip
    model = SpectralTokenizer(config).to(DEVICE).train()
    task = TokenizerTask(model, TokenizerLossConfig(pixel=15.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows = []
    for step in range(steps):
        torch.manual_seed(step)
        images = (torch.rand(8, 3, 32, 32) * 100 + torch.rand(8, 3, 1, 1) * 150).byte().to(DEVICE)
        losses = task.loss((images, torch.zeros(8)))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        rows.append([losses[k].item() for k in ("pixel", "commitment", "codebook", "codes_used")])
    return torch.tensor(rows)


@pytest.mark.parametrize("normalize", [True, False])
def test_losses_are_those_of_the_reference(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = []
    # In the interpreter the kernels take CPU tensors too.
    for kernels in (False, True):
        monkeypatch.setattr(dct_ops, "runs_kernels", lambda images, exact, on=kernels: on and not exact)
        monkeypatch.setattr(vq_ops, "runs_kernels", lambda *tensors, on=kernels: on)
        curves.append(curve(4, normalize))
    reference, ours = curves
    assert torch.equal(reference[:, 3], ours[:, 3])
    # Sub-images of noise in fp16: a thousandth of the loss; the losses of the codes see them through the weights only.
    assert ((ours - reference)[:, 0].abs() <= 1e-3 * reference[:, 0]).all()
    assert ((ours - reference)[:, 1:3].abs() <= 1e-4 * reference[:, 1:3]).all()
    assert not torch.equal(reference[:, 0], ours[:, 0])
