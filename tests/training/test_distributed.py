"""Two ranks over gloo on the CPU: the same training as one process, the same bits after a stop, and no hanging."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralar.config import GeneratorConfig, TokenizerConfig, from_dict, to_dict
from spectralar.generator import SpectralGenerator
from spectralar.tokenizer import SpectralTokenizer
from spectralar.training.checkpoint import checkpoints, load_checkpoint
from spectralar.training.data import Crop, LoaderConfig, TokenBatch, TokenStore, evaluation_batches
from spectralar.training.distributed import (
    ALONE,
    BatchNormOverRanks,
    Ranks,
    copies,
    join_ranks,
    local,
    parallelize,
    whole,
)
from spectralar.training.evaluation.reconstruction import evaluate_tokenizer
from spectralar.training.generator import GeneratorTask
from spectralar.training.journal import read_log
from spectralar.training.loop import LoopConfig
from spectralar.training.optimizer import OptimizerConfig
from spectralar.training.runs import GeneratorRun, TokenizerRun, train_generator, train_tokenizer, validation_images
from spectralar.training.tokenizer import TokenizerLossConfig, TokenizerTask
from tests.training.harness import assert_same_run, damaged_copy
from tests.training.jobs import Job, command, wait_for


@pytest.fixture
def generator_run(token_store: TokenStore, generator_config: GeneratorConfig, tmp_path: Path) -> GeneratorRun:
    """Without any random choice, so that ranks and a single process compute the same."""
    return GeneratorRun(
        model=replace(generator_config, class_drop=0.0, drop_path=0.0),
        tokens=str(token_store.path),
        validation=str(token_store.path),
        batch=4,
        optimizer=OptimizerConfig(lr=1e-3, warmup=3, ema=0.9, accumulation=2),
        loop=LoopConfig(
            out=str(tmp_path / "run"),
            steps=8,
            device="cpu",
            log_every=1,
            validate_every=4,
            picture_every=0,
            checkpoint_every=4,
        ),
    )


def at(run: GeneratorRun, out: Path, **loop: Any) -> GeneratorRun:
    return replace(run, loop=replace(run.loop, out=str(out), **loop))


def train(run: dict[str, Any], resume: bool = False) -> None:
    train_generator(from_dict(GeneratorRun, run), resume=resume)


def job(run: GeneratorRun, world: int, *, resume: bool = False) -> Job:
    return Job(Path(run.loop.out).with_suffix(".printed"), world, train, to_dict(run), resume)


def assert_close_runs(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    """The same run up to the order of sums; AdamW divides by moments, so weights may differ by more than a rounding."""
    (last,) = (load_checkpoint(checkpoints(out / "checkpoints")[-1]) for out in (one,))
    other = load_checkpoint(checkpoints(two / "checkpoints")[-1])
    assert last.average is not None and other.average is not None
    for a, b in ((last.model, other.model), (last.average, other.average)):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=10 * tolerance, msg=name)
    for a_record, b_record in zip(read_log(one), read_log(two), strict=True):
        assert a_record.keys() == b_record.keys()
        for name in a_record.keys() - {"images_per_second", "loader_wait", "note"}:
            assert a_record[name] == pytest.approx(b_record[name], rel=tolerance, abs=tolerance), name


def test_alone_costs_nothing(tokenizer: SpectralTokenizer) -> None:
    x = torch.arange(3)
    assert ALONE.sum(x) is x and ALONE.join(x) is x and ALONE.gather(x)[0] is x
    assert ALONE.first and ALONE.largest(-4) == -4 and ALONE.by_first(lambda: 5) == 5 and ALONE.share(7, "batch") == 7
    with join_ranks("cpu") as ranks:
        assert ranks is ALONE and not dist.is_initialized()
    losses = {"loss": x}
    assert parallelize(tokenizer, lambda _: losses, ALONE)((x, x), True) is losses


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch must be a multiple of the 3 ranks, not 8"):
        Ranks(1, 3).share(8, "data.batch")
    with pytest.raises(ValueError, match="ranks_per_copy must be 0 or divide the 4 ranks, not 3"):
        copies(Ranks(0, 4), 3)
    assert [copies(Ranks(0, 4), n) for n in (0, 1, 2, 4)] == [1, 4, 2, 1]
    with pytest.raises(ValueError, match="ranks_per_copy must not be negative, not -1"):
        LoopConfig(ranks_per_copy=-1)


def test_seeds_differ_between_ranks() -> None:
    first = []
    for rank in range(4):
        torch.manual_seed(Ranks(rank, 4).seed(7))
        first.append(torch.rand(()).item())
    assert len(set(first)) == 4


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="nproc-per-node must be at most the 2 GPUs"), join_ranks("auto"):
        pass


def test_codes_that_move_in_the_forward_pass_are_not_sharded(tokenizer_config: TokenizerConfig) -> None:
    model = SpectralTokenizer(replace(tokenizer_config, dead_codes="restart"))
    with pytest.raises(ValueError, match='dead_codes="restart" moves codes inside the forward pass'):
        parallelize(model, lambda _: {}, Ranks(0, 2), ranks_per_copy=0)


def test_two_ranks_compute_what_one_does(
    tokenizer_config: TokenizerConfig, generator_config: GeneratorConfig, photo_shards: Path, tmp_path: Path
) -> None:
    """All checks that need no files share one start of two ranks."""
    Job(tmp_path, 2, check_ranks, to_dict(tokenizer_config), to_dict(generator_config), photo_shards).succeed()


def check_ranks(tokenizer: dict[str, Any], generator: dict[str, Any], shards: Path) -> None:
    config = replace(from_dict(TokenizerConfig, tokenizer), latent_norm="batch")
    with join_ranks("cpu") as ranks:
        check_agreement(ranks)
        check_batch_norm(ranks)
        for ranks_per_copy in (1, 0):
            check_gradients(config, ranks, ranks_per_copy)
        check_gradients(replace(config, dead_codes="restart", codebook_size=64), ranks, 1)
        check_evaluation(config, from_dict(GeneratorConfig, generator), shards, ranks)


def check_agreement(ranks: Ranks) -> None:
    rank = ranks.rank
    own = torch.tensor([[1.0, rank]])
    assert ranks.sum(own).tolist() == [[2.0, 1.0]] and own.tolist() == [[1.0, rank]]
    assert ranks.join(own.T).tolist() == [[1.0], [0.0], [1.0], [1.0]]
    assert ranks.largest(rank - 5) == -4 and ranks.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.by_first(lambda: f"from {rank}") == "from 0"

    def fail() -> None:
        raise FileNotFoundError(f"only {rank} looked")

    with pytest.raises(FileNotFoundError, match="only 0 looked"):
        ranks.by_first(fail)


def check_batch_norm(ranks: Ranks) -> None:
    """Values, gradients and running averages of the joined batch, for latents far from zero, in fp64."""
    generator = torch.Generator().manual_seed(1)
    batch = 100 + torch.rand(6, 5, dtype=torch.float64, generator=generator)
    weights = torch.rand(6, 5, dtype=torch.float64, generator=generator)
    plain = nn.BatchNorm1d(5, affine=False, momentum=0.1).double()
    joined = BatchNormOverRanks(5, affine=False, momentum=0.1).double()
    mine = slice(3 * ranks.rank, 3 * ranks.rank + 3)
    everything, part = batch.clone().requires_grad_(), batch[mine].clone().requires_grad_()
    for _ in range(2):
        expected, got = plain(everything), joined(part)
        torch.testing.assert_close(got, expected[mine], rtol=1e-9, atol=1e-9)
        # Every rank has its own loss; what flows into its inputs is the gradient of their sum.
        (expected.square() * weights).sum().backward()
        (got.square() * weights[mine]).sum().backward()
    assert everything.grad is not None and part.grad is not None
    torch.testing.assert_close(part.grad, everything.grad[mine], rtol=1e-7, atol=1e-9)
    for a, b in zip(joined.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(joined.eval()(part), plain.eval()(everything)[mine], rtol=1e-9, atol=1e-9)


def check_gradients(config: TokenizerConfig, ranks: Ranks, ranks_per_copy: int) -> None:
    """Two accumulated batches of 6: 3 a rank give the gradients of 6 on one, in fp64, and only the last is reduced.

    So do codes that restart, of which 64 are too many for 24 latents.
    """
    torch.manual_seed(0)
    plain = SpectralTokenizer(config).double()
    torch.manual_seed(0)
    model = SpectralTokenizer(config).double()
    start = plain.codebook.detach().clone()
    if config.dead_codes == "restart":
        for tokenizer in (plain, model):
            tokenizer.usage.fill_(1e-5)
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(2, 6, 3, 16, 16, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, config.tokens + 1, (2, 6), generator=generator)
    mine = slice(3 * ranks.rank, 3 * ranks.rank + 3)

    def task(model: SpectralTokenizer, part: slice, ranks: Ranks = ALONE) -> Callable[[Any], dict[str, Tensor]]:
        made = TokenizerTask(model, TokenizerLossConfig(pixel=5.0), ranks=ranks)

        def loss(batch: Any) -> dict[str, Tensor]:
            made.draw_lengths = lambda _: lengths[batch[1]][part]  # type: ignore[method-assign]
            return made.loss((batch[0], batch[0]))

        return loss

    run = parallelize(model, task(model, mine, ranks), ranks, ranks_per_copy=ranks_per_copy)
    alone = task(plain, slice(None))
    for i, reduce in enumerate((False, True)):
        expected, got = alone((images[i], i)), run((images[i][mine], i), reduce)  # type: ignore[arg-type]
        for name, value in expected.items():
            same = got[name] if name == "codes_used" else ranks.sum(got[name]) / 2
            torch.testing.assert_close(same, value.detach().to(same.dtype), rtol=1e-9, atol=1e-12, msg=name)
        expected["loss"].backward()
        got["loss"].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if ranks_per_copy == 1 and not reduce:
            flat = torch.cat([g.flatten() for g in gradients])
            assert not torch.equal(ranks.join(flat)[: len(flat)], ranks.join(flat)[len(flat) :])
    if ranks_per_copy == 0:
        assert sum(local(p).numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(whole(p.grad), q.grad, rtol=1e-7, atol=1e-10, msg=name)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    if config.dead_codes == "restart":
        assert ((plain.codebook - start).norm(dim=1) > 0.1).sum() > 32
        torch.testing.assert_close(model.codebook, plain.codebook)


def check_evaluation(config: TokenizerConfig, generator: GeneratorConfig, shards: Path, ranks: Ranks) -> None:
    """Every image once, whatever the limit; figures equal to those of one process; also with an idle rank."""
    torch.manual_seed(3)
    tokenizer = SpectralTokenizer(config).eval()
    (everything,) = evaluation_batches(shards / "val", batch=10, size=16)
    for limit in (1, 3, 7, 99):
        alone = torch.cat([b.images for b in validation_images(str(shards / "val"), 16, limit)])
        mine = [b.images for b in validation_images(str(shards / "val"), 16, limit, batch=2, ranks=ranks)]
        parts = ranks.gather(torch.cat([*mine, everything.images[:0]]))
        seen = torch.cat(parts)
        assert sorted(x.sum().item() for x in seen) == sorted(x.sum().item() for x in alone)
        expected = asdict(evaluate_tokenizer(tokenizer, [(alone,)], costs=True))
        got = asdict(evaluate_tokenizer(tokenizer, [(b,) for b in mine], costs=True, ranks=ranks))
        for name, value in expected.items():
            assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    with pytest.raises(ValueError, match="no images"):
        evaluate_tokenizer(tokenizer, [], ranks=ranks)
    model = SpectralGenerator(generator).eval()
    tokens, labels = torch.randint(16, (7, 4)), torch.arange(7) % 2
    for rows in (7, 1):
        batch = TokenBatch(tokens[:rows], labels[:rows])
        own = TokenBatch(*(x[ranks.rank :: 2] for x in batch))
        split = [own] if len(own.tokens) else []
        expected = GeneratorTask(model, validation=lambda batch=batch: [batch]).validate(model)  # type: ignore[misc]
        got = GeneratorTask(model, validation=lambda split=split: split, ranks=ranks).validate(model)  # type: ignore[misc]
        assert got["val_loss_by_position"] == pytest.approx(expected["val_loss_by_position"], rel=1e-6)
        assert got["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
        assert got["val_accuracy"] == pytest.approx(expected["val_accuracy"])


def test_replicas_shards_and_both_train_as_one_process(generator_run: GeneratorRun, tmp_path: Path) -> None:
    """From the same start: one process, two copies, one copy on two ranks, two copies on two ranks each."""
    train_generator(at(generator_run, tmp_path / "one"))
    for name, world, ranks_per_copy in (("ddp", 2, 1), ("fsdp", 2, 0), ("hybrid", 4, 2)):
        run = at(generator_run, tmp_path / name, ranks_per_copy=ranks_per_copy)
        job(run, world).succeed()
        assert_close_runs(tmp_path / "one", tmp_path / name)
        final = SpectralGenerator.from_pretrained(tmp_path / name / "final").state_dict()
        average = load_checkpoint(tmp_path / name / "checkpoints" / "step-00000008").average
        assert average is not None
        assert all(torch.equal(final[n], average[n]) for n in final)
        assert (tmp_path / name / "best" / "model.safetensors").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_one_rank_stops_both_and_resuming_gives_the_same_bits(
    tokenizer_yaml: str, photo_shards: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The one that the signal reaches tells the other; then two ranks go on, from their own random states."""

    def start(name: str, *more: str) -> Job:
        options = ["--config", tokenizer_yaml, "--data.path", str(photo_shards / "train"), "--preset", "demo-cpu"]
        options += ["--loop.out", str(tmp_path / name), "--loop.steps", "40", "--loop.checkpoint-every", "40"]
        return Job(tmp_path / f"{name}.printed", 2, command, "train", "tokenizer", *options, *more)

    straight, stopped = start("straight"), start("stopped")
    wait_for(tmp_path / "stopped" / "log.jsonl", lines=3)
    victim = stopped.processes[int(number == signal.SIGINT)].pid
    assert victim is not None
    os.kill(victim, number)
    straight.succeed()
    assert stopped.wait() == [code] * 2, stopped.texts()
    (saved,) = checkpoints(tmp_path / "stopped" / "checkpoints")
    assert 3 <= load_checkpoint(saved).step < 40
    assert f"{number.name}: the checkpoint of step" in stopped.texts()[0] and stopped.texts()[1] == ""
    states = load_checkpoint(saved).random
    assert len(states) == 2 and not torch.equal(states[0]["cpu"], states[1]["cpu"])
    again = start("stopped", "--resume")
    again.succeed()
    assert f"resumed from {saved}\n" in again.texts()[0] and again.texts()[1] == ""
    assert_same_run(tmp_path / "straight", tmp_path / "stopped", "step-00000040")


def test_other_numbers_of_ranks_go_on(generator_run: GeneratorRun, tmp_path: Path) -> None:
    """Two sharing one copy, then one process, then two copies: as one process throughout, but for random states."""
    train_generator(at(generator_run, tmp_path / "one"))
    out = tmp_path / "changing"
    job(at(generator_run, out, steps=4, ranks_per_copy=0), 2).succeed()
    alone = job(at(generator_run, out, steps=6), 1, resume=True)
    alone.succeed()
    assert "on 1 ranks after 2: all goes on but the random states, which start anew" in alone.texts()[0]
    job(at(generator_run, out), 2, resume=True).succeed()
    steps = [r["step"] for r in read_log(out) if "lr" in r]
    assert steps == list(range(1, 9))
    data = load_checkpoint(out / "checkpoints" / "step-00000008").data
    assert [(d["step"], d["batch"], d["world"]) for d in data] == [(16, 2, 2)] * 2
    # The schedule of the shortened runs is another, so only the data are compared: the same images in every step.
    assert load_checkpoint(tmp_path / "one" / "checkpoints" / "step-00000008").data[0]["step"] == 16


def test_a_batch_that_the_ranks_do_not_divide_stops_both(generator_run: GeneratorRun, tmp_path: Path) -> None:
    started = job(replace(at(generator_run, tmp_path / "run"), batch=5), 2)
    assert started.wait() == [1, 1]
    assert all("batch must be a multiple of the 2 ranks, not 5" in text for text in started.texts())


def test_a_second_job_is_refused_while_the_first_writes(generator_run: GeneratorRun, tmp_path: Path) -> None:
    run = at(generator_run, tmp_path / "run", steps=100_000)
    first = job(run, 1)
    wait_for(tmp_path / "run" / "log.jsonl", lines=2)
    second = Job(tmp_path / "second", 2, train, to_dict(run), True)
    assert second.wait() == [1, 1]
    assert all(f"process {first.processes[0].pid} on " in text for text in second.texts()), second.texts()
    first.kill()
    found = checkpoints(tmp_path / "run" / "checkpoints")
    done = load_checkpoint(found[-1]).step if found else 0
    job(at(run, tmp_path / "run", steps=done + 1), 2, resume=True).succeed()


@pytest.mark.parametrize("how", ["killed", "error"])
def test_a_rank_that_dies_ends_the_other_in_seconds(generator_run: GeneratorRun, tmp_path: Path, how: str) -> None:
    run = at(generator_run, tmp_path / "run", steps=100_000)
    started = Job(tmp_path / "printed", 2, train if how == "killed" else fail_on_rank_1, to_dict(run))
    wait_for(tmp_path / "run" / "log.jsonl", lines=2)
    began = time.monotonic()
    if how == "killed":
        started.processes[1].kill()
    codes = started.wait(20)
    assert codes == [1, -signal.SIGKILL if how == "killed" else 1], codes
    assert "RankLostError: rank 0 of 2 stops: another rank died or does not answer" in started.texts()[0]
    assert how == "killed" or "ZeroDivisionError: on rank 1" in started.texts()[1]
    assert time.monotonic() - began < 15


def fail_on_rank_1(run: dict[str, Any]) -> None:
    usual, calls = GeneratorTask.loss, []

    def loss(task: GeneratorTask, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        if task.ranks.rank == 1 and len(calls) == 12:
            raise ZeroDivisionError("on rank 1")
        return usual(task, batch)

    GeneratorTask.loss = loss  # type: ignore[method-assign]
    train(run)


def test_a_bad_loss_on_one_rank_stops_both_at_the_same_step(generator_run: GeneratorRun, tmp_path: Path) -> None:
    started = Job(tmp_path / "printed", 2, poison_rank_1, to_dict(at(generator_run, tmp_path / "run")))
    assert started.wait() == [1, 1]
    for text in started.texts():
        assert "non-finite at step 6; the last good checkpoint is" in text and "step-00000004" in text


def poison_rank_1(run: dict[str, Any]) -> None:
    usual, calls = GeneratorTask.loss, []

    def loss(task: GeneratorTask, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        losses = usual(task, batch)
        bad = task.ranks.rank == 1 and len(calls) == 12  # the second batch of step 6
        return {**losses, "loss": losses["loss"] * float("nan")} if bad else losses

    GeneratorTask.loss = loss  # type: ignore[method-assign]
    train(run)


def test_two_ranks_count_what_either_could_not_read(
    tokenizer_config: TokenizerConfig, photo_shards: Path, tmp_path: Path
) -> None:
    """After two epochs of two steps each rank has met both bad images, or one of them has: two, either way."""
    folder = damaged_copy(photo_shards / "train", tmp_path / "damaged", [3, 9])
    data = LoaderConfig(str(folder), 8, Crop(16, "random", resize=18), max_unreadable=0.2)
    loop = LoopConfig(str(tmp_path / "run"), steps=4, device="cpu", log_every=1)
    run = TokenizerRun(tokenizer_config, data, loop=loop)
    Job(tmp_path, 2, train_pictures, to_dict(run)).succeed()
    counts = [record["unreadable"] for record in read_log(tmp_path / "run") if "unreadable" in record]
    assert counts[-3:] == [2, 2, 2]
    # On one rank alone neither is forgotten: what both have met is the one's.
    alone = TokenizerRun(tokenizer_config, data, loop=replace(loop, steps=5))
    state = tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json"
    saved = json.loads(state.read_text())
    met = {sample: reason for place in saved["data"] for sample, reason in place["unreadable"]}
    for place, sample in zip(saved["data"], sorted(met), strict=True):
        place["unreadable"] = [[sample, met[sample]]]
    state.write_text(json.dumps(saved))
    train_tokenizer(alone, resume=True)
    assert [record["unreadable"] for record in read_log(tmp_path / "run") if record["step"] == 5] == [2]


def train_pictures(run: dict[str, Any]) -> None:
    train_tokenizer(from_dict(TokenizerRun, run))


def test_torchrun_trains_by_the_command_line(tokenizer_yaml: str, photo_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    call += ["spectralar.cli", "train", "tokenizer", "--preset", "demo-cpu", "--config", tokenizer_yaml]
    call += ["--data.path", str(photo_shards / "train"), "--validation", str(photo_shards / "val")]
    call += ["--loop.out", str(out), "--loop.steps", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"tokenizer: {out / 'final'}\n"
    records = read_log(out)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 4] and records[-1]["val_images"] == 10
    assert len(list((out / "pictures").iterdir())) == 1
    SpectralTokenizer.from_pretrained(out / "final")
