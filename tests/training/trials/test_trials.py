"""Every trial trains, is measured, and is told in one table; the quantizers of trials against their definitions."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from spectralar.config import TokenizerConfig, ViTConfig
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.data import Crop, ImageLoader
from spectralar.training.loop import Trainer
from spectralar.training.optimizer import OptimizerConfig, build_optimizer
from spectralar.training.presets import TOKENIZER_RUNS
from spectralar.training.runs import TokenizerRun
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask
from spectralar.training.trials import __main__ as command
from spectralar.training.trials.report import table
from spectralar.training.trials.runner import run_trial
from spectralar.training.trials.table import PLAIN, TRIALS, Trial, override
from spectralar.training.trials.variants import (
    EntropyTokenizer,
    FullFirstTask,
    LatentStartTokenizer,
    MovingAverageTokenizer,
    PerceptualTask,
    ResidualTokenizer,
    RotatedTokenizer,
    embedding_norm,
    fast_queries,
    fsq,
    simvq,
)

SMALL = ViTConfig(32, 1, 2)
CONFIG = TokenizerConfig(
    image_size=16, patch_size=8, tokens=4, encoder=SMALL, decoder=SMALL, codebook_size=32, code_dim=4
)


@pytest.fixture
def base(photo_shards: Path) -> TokenizerRun:
    """The preset of the trials on pictures of 16 pixels, where a trial does not say otherwise."""
    run = override(TOKENIZER_RUNS["emoji"], PLAIN)
    model = replace(run.model, image_size=16, patch_size=8, tokens=4, encoder=SMALL, decoder=SMALL)
    data = replace(run.data, path=str(photo_shards / "train"), batch=4, crop=Crop(16, "random", resize=18), workers=0)
    loop = replace(run.loop, device="cpu", compile=False, log_every=1)
    return replace(run, model=model, data=data, loop=loop, validation=str(photo_shards / "val"))


# Of every way to build and to train the trial that changes most; the others differ in values.
KINDS = {(trial.build, trial.task): name for name, trial in sorted(TRIALS.items(), key=lambda t: len(t[1].changes))}


@pytest.mark.parametrize("name", sorted(KINDS.values()))
def test_every_kind_of_trial_trains_and_is_measured(name: str, base: TokenizerRun, tmp_path: Path) -> None:
    """In the sizes of `base`; those of the trials are in `test_every_trial_fits_the_budget_of_weights`."""
    trial = TRIALS[name]
    small = {field: value for field, value in trial.changes.items() if not isinstance(value, ViTConfig)}
    result = run_trial(name, replace(trial, changes=small), base, tmp_path, steps=2)
    json.dumps(result, allow_nan=False)
    report = result["report"]
    assert result["steps"] == 2 and report["images"] == 10
    assert result["Q1"] == report["psnr"][-1] and result["Q3"] == min(report["distinct"])
    assert result["Q2"] == pytest.approx(report["psnr"][-1] - report["psnr"][report["lengths"].index(2)])
    assert len(report["drop_cost"]) == 4 and len(result["history"]) == 2
    assert result["parameters"] < 30e6
    row = table([result]).splitlines()[-1]
    assert row.startswith(f"| {name} | {result['Q1']:.2f} | {result['Q2']:.2f} |")


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(KINDS.values()))
def test_every_trial_is_recorded_and_never_waits(name: str, base: TokenizerRun, tmp_path: Path) -> None:
    trial = TRIALS[name]
    run = override(base, {**trial.changes, "loop.device": "cuda", "loop.out": str(tmp_path), "loop.steps": 9})
    task = trial.task(trial.build(run.model), run, None)
    trainer = Trainer(task, ImageLoader(run.data), run.optimizer, run.loop, {})
    batches = [[t.cuda() for t in batch] for batch in itertools.islice(trainer.loader, 9)]
    losses = []
    for i, batch in enumerate(batches):
        # Kernels are compiled at first, and the fourth step is recorded.
        torch.cuda.set_sync_debug_mode("error" if i in (2, 4, 5, 6, 7) else "default")
        losses.append(trainer.advance(batch)["loss"].clone())
    torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all() and torch.stack(losses).unique().numel() == 9


def test_every_trial_fits_the_budget_of_weights() -> None:
    plain = override(TOKENIZER_RUNS["emoji"], PLAIN)
    # Most trials have the same model.
    for build, config in {(trial.build, override(plain, trial.changes).model) for trial in TRIALS.values()}:
        assert sum(p.numel() for p in build(config).parameters()) <= 30e6, (build, config)


def test_a_budget_in_seconds_gives_steps(base: TokenizerRun, tmp_path: Path) -> None:
    result = run_trial("base", TRIALS["base"], base, tmp_path, seconds=0.2, steps=5)
    assert 1 <= result["steps"] <= 5
    again = run_trial("base", TRIALS["base"], base, tmp_path / "again", steps=result["steps"])
    # Finding the pace changes neither the data nor the weights of the run.
    assert again["report"] == result["report"]
    with pytest.raises(ValueError, match="steps or seconds must be given"):
        run_trial("base", TRIALS["base"], base, tmp_path / "none")


def test_the_command_survives_a_failing_trial(
    base: TokenizerRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(TRIALS, "broken", Trial("fails", {"model.tokens": 99}))
    monkeypatch.setitem(TOKENIZER_RUNS, "small", base)
    out = tmp_path / "results" / "out.jsonl"
    command.trials(
        base.data.path, base.validation, ("broken", "base"), steps=1, out=out, runs=tmp_path / "runs", preset="small"
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines[0]["error"].startswith("ValueError: tokens must be between 1 and image_size 16")
    assert lines[1]["trial"] == "base" and lines[1]["steps"] == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].startswith("| broken | ValueError") and shown[-1].startswith("| base |")
    with pytest.raises(ValueError, match=r"only must name some of base, bet, .*, not blessed"):
        command.trials("a", "b", ("blessed",), steps=1)


def test_override_reaches_into_nested_fields(base: TokenizerRun) -> None:
    changed = override(base, {"loss.prefixes.full": 0.5, "model.codebook_size": 64})
    assert changed.loss.prefixes.full == 0.5 and changed.model.codebook_size == 64
    assert replace(changed, loss=base.loss, model=base.model) == base
    with pytest.raises(ValueError, match="PrefixConfig has no field fill"):
        override(base, {"loss.prefixes.fill": 0.5})


def test_the_rotation_has_the_codes_value_and_a_rotated_gradient() -> None:
    model = RotatedTokenizer(CONFIG)
    latents = torch.randn(3, 4, 4, requires_grad=True)
    out = model.quantize(latents)
    plain = SpectralTokenizer.quantize(model, latents.detach())
    assert torch.equal(out.indices, plain.indices)
    torch.testing.assert_close(out.quantized, plain.quantized, rtol=0, atol=1e-6)
    # The matrix of each rotation, made the long way: in the plane of both vectors, from one to the other.
    gradient = torch.randn_like(out.quantized)
    vectors = F.normalize(latents.detach().double(), dim=-1).flatten(0, 1)
    codes = F.normalize(plain.quantized.double(), dim=-1).flatten(0, 1)
    expected = []
    for v, e, g in zip(vectors, codes, gradient.double().flatten(0, 1), strict=True):
        cosine = v @ e
        k = torch.outer(e, v) - torch.outer(v, e)
        rotation = torch.eye(4, dtype=torch.float64) + k + k @ k / (1 + cosine)
        torch.testing.assert_close(rotation @ v, e)
        expected.append(rotation.T @ g)
    (through,) = torch.autograd.grad(F.normalize(latents, dim=-1), latents, torch.stack(expected).view(3, 4, 4).float())
    (got,) = torch.autograd.grad(out.quantized, latents, gradient)
    torch.testing.assert_close(got, through, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="normalize_codes must be true"):
        RotatedTokenizer(replace(CONFIG, normalize_codes=False))


def test_the_entropy_term_rewards_many_codes_and_sure_ones() -> None:
    model = EntropyTokenizer(replace(CONFIG, commitment=0.0)).eval()
    codes = F.normalize(model.codebook.detach(), dim=-1)
    many = codes[:8, None].expand(8, 4, 4)
    one = codes[:1, None].expand(8, 4, 4)
    unsure = F.normalize(many + codes[8:16, None], dim=-1)
    terms = [model.quantize(latents).commitment_loss.item() for latents in (many, one, unsure)]
    assert terms[0] < terms[1] and terms[0] < terms[2]
    cosines = (many.flatten(0, 1).double() @ codes.double().T).view(8, 4, -1)
    shares = (cosines / model.temperature).softmax(-1)

    def entropy(p: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Categorical(probs=p).entropy()

    expected = model.weight * (entropy(shares).mean() - entropy(shares.mean(0)).mean())
    assert terms[0] == pytest.approx(expected.item(), rel=1e-4)


def test_codes_are_moving_averages_of_the_latents_that_took_them() -> None:
    model = MovingAverageTokenizer(CONFIG).train()
    first = model.codebook.detach().clone()
    expected = first.double()
    sums, taken = expected.clone(), torch.zeros(32, dtype=torch.bool)
    for _ in range(3):
        latents = torch.randn(6, 4, 4, requires_grad=True)
        vectors = F.normalize(latents.detach().double(), dim=-1).flatten(0, 1)
        chosen = (vectors @ expected.T).argmax(1)
        taken[chosen] = True
        for k in chosen.unique():
            sums[k] = 0.99 * sums[k] + 0.01 * vectors[chosen == k].sum(0)
        expected = F.normalize(sums, dim=-1)
        out = model.quantize(latents)
        torch.testing.assert_close(model.codebook.double(), expected, rtol=0, atol=1e-6)
        out.quantized.sum().backward()
    assert 0 < taken.sum() < 32 and not model.codebook.requires_grad
    torch.testing.assert_close(model.codebook[~taken], first[~taken], rtol=0, atol=1e-6)
    before = model.codebook.clone()
    model.eval().quantize(torch.randn(6, 4, 4))
    assert torch.equal(model.codebook, before)
    with pytest.raises(ValueError, match="normalize_codes must be true"):
        MovingAverageTokenizer(replace(CONFIG, normalize_codes=False))


def test_residual_decoding_adds_to_the_first_quarter() -> None:
    model, plain = ResidualTokenizer(CONFIG).eval(), SpectralTokenizer(CONFIG).eval()
    plain.load_state_dict(model.state_dict())
    tokens = torch.randint(32, (5, 4))
    assert torch.equal(model.decode(tokens[:, :1]), plain.decode(tokens[:, :1]))
    both = plain.decode(tokens) + plain.decode(tokens[:, :1])
    torch.testing.assert_close(model.decode(tokens), both)
    lengths = torch.tensor([1, 2, 3, 4, 1])
    parts = [model.decode(tokens[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(model.decode_prefixes(tokens, lengths), torch.cat(parts), rtol=1e-4, atol=1e-5)
    # What the first quarter rebuilds is held constant: gradients are those of the plain decoder.
    images = torch.rand(2, 3, 16, 16)
    for one in (model, plain):
        one(images, torch.tensor([3, 4])).images.sum().backward()
    for ours, theirs in zip(model.decoder.parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_perceptual_loss_sees_what_is_not_the_target(base: TokenizerRun) -> None:
    model = SpectralTokenizer(base.model)
    state = torch.get_rng_state()
    task = PerceptualTask(model, base, None)
    assert torch.equal(torch.get_rng_state(), state)
    images, lengths = torch.rand(4, 3, 16, 16), torch.tensor([1, 2, 3, 4])
    total, _, out = task.objective(model, images, lengths)
    plain, _, _ = TokenizerTask(model, base.loss).objective(model, images, lengths)
    distance = 0.0
    for ours, wanted in zip(task.features(out.images), task.features(model.targets(images, lengths)), strict=True):
        assert torch.allclose(ours.norm(dim=1), torch.ones(()), atol=1e-3)
        distance += (2 - 2 * (ours * wanted).sum(1)).mean().item() / 3
    assert distance > 0.01 and (total - plain).item() == pytest.approx(task.weight * distance, rel=1e-3)
    same = task.features(images)
    assert [list(x.shape[1:]) for x in same] == [[32, 8, 8], [64, 4, 4], [64, 2, 2]]
    total.backward()
    assert model.encoder.queries.grad is not None and all(p.grad is None for p in task.stages.parameters())


def test_simvq_moves_all_codes_and_learns_the_map_only() -> None:
    model = simvq(CONFIG)
    before = model.codebook.detach().clone()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1), TokenizerTask.undecayed)
    task = TokenizerTask(model, TokenizerLossConfig())
    task.loss((torch.rand(8, 3, 16, 16), torch.zeros(8)))["loss"].backward()
    optimizer.step()
    assert ((model.codebook - before).norm(dim=1) > 1e-3).all()
    learned = model.parametrizations.codebook[0].weight.detach()  # type: ignore[union-attr,index]
    torch.testing.assert_close(model.codebook, before @ learned.T)


def test_codes_begin_as_latents_of_the_first_batch_alone() -> None:
    model = LatentStartTokenizer(CONFIG)
    fresh, latents = model.codebook.detach().clone(), torch.randn(16, 4, 4)
    model.eval().quantize(latents)
    assert torch.equal(model.codebook, fresh)
    model.train().quantize(latents)
    # Of 64 latents 32 become codes: eight of every position.
    assert torch.equal(model.codebook, F.normalize(latents, dim=-1).transpose(0, 1)[:, ::2].flatten(0, 1))
    begun = model.codebook.detach().clone()
    model.quantize(torch.randn(16, 4, 4))
    assert torch.equal(model.codebook, begun)
    with pytest.raises(ValueError, match="normalize_codes must be true"):
        LatentStartTokenizer(replace(CONFIG, normalize_codes=False))


def test_a_faster_parameter_starts_the_same_and_moves_five_times_as_far() -> None:
    moved = []
    for build, code_rate in ((SpectralTokenizer, 1.0), (SpectralTokenizer, 5.0), (fast_queries, 1.0)):
        torch.manual_seed(0)
        model = build(CONFIG)
        parts = model.codebook, model.encoder.queries, model.decoder.token_positions
        before = [part.detach().clone() for part in parts]
        sum((part * torch.ones_like(part)).sum() for part in parts).backward()
        config = OptimizerConfig(lr=0.01, weight_decay=0.5, code_rate=code_rate)
        build_optimizer(model, config, TokenizerTask.undecayed).step()
        after = model.codebook, model.encoder.queries, model.decoder.token_positions
        moved.append([(b - a).mean().item() for a, b in zip(after, before, strict=True)])
        if not moved[1:]:
            plain = before
        for a, b in zip(before, plain, strict=True):
            torch.testing.assert_close(a, b)
    (codes, queries, positions), *others = moved
    for found, expected in zip(others, ((5, 1, 1), (1, 5, 5)), strict=True):
        assert found == pytest.approx([f * m for f, m in zip(expected, (codes, queries, positions), strict=True)])


def test_embedded_codes_begin_as_loud_as_positions() -> None:
    torch.manual_seed(0)
    plain = SpectralTokenizer(CONFIG)
    torch.manual_seed(0)
    model = embedding_norm(CONFIG)
    codes = F.normalize(torch.randn(50, 4), dim=-1)
    with torch.no_grad():
        ours, theirs = model.decoder.from_code(codes), plain.decoder.from_code(codes)
    assert torch.allclose(ours, F.layer_norm(theirs, (32,)) * 32**-0.5)
    assert ours.norm(dim=1).mean() == pytest.approx(
        plain.decoder.token_positions.data.norm(dim=1).mean().item(), rel=0.3
    )


def test_the_preset_is_what_its_trial_says() -> None:
    preset = TOKENIZER_RUNS["emoji"]
    assert override(preset, {**PLAIN, **TRIALS["bet-loose-emphasis-lr-half"].changes}) == preset


def test_codes_behind_a_map_cannot_restart() -> None:
    with pytest.raises(ValueError, match="dead_codes must be keep for simvq"):
        simvq(replace(CONFIG, dead_codes="restart"))


def test_fsq_rounds_bounded_latents_to_a_grid() -> None:
    model = fsq(CONFIG).eval()
    assert model.config.codebook_size == 4096 and model.config.code_dim == 4
    latents = model.encoder(torch.rand(5, 3, 16, 16)) + torch.rand(5, 4, 4) * 2 - 1
    latents = latents.clamp(-1, 1).detach().requires_grad_()
    out = model.quantize(latents)
    torch.testing.assert_close(out.quantized, ((latents + 1) * 3.5).round() / 3.5 - 1)
    assert out.commitment_loss == 0
    (gradient,) = torch.autograd.grad(out.quantized.sum() + out.codebook_loss, latents)
    assert torch.equal(gradient, torch.ones_like(latents))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "codebook" not in trained and "encoder.queries" in trained


def test_full_prefixes_first(base: TokenizerRun) -> None:
    run = override(base, {"loop.steps": 40, "loss.prefixes.full": 0.25})
    task = FullFirstTask(SpectralTokenizer(run.model), run, None)
    images = torch.zeros(2000, 3, 1, 1)
    shares = torch.stack([(task.draw_lengths(images) == 4).double().mean() for _ in range(40)])
    # All at first; later a quarter, and a quarter of the rest is drawn full.
    assert shares[0] == 1.0
    assert shares[10] == pytest.approx(0.625 + 0.375 / 4, abs=0.05)
    assert shares[20:].mean() == pytest.approx(0.25 + 0.75 / 4, abs=0.02)
