"""Several processes ("ranks", one per GPU) that train one model: what they agree on, and how they share its weights.

`torchrun --nproc-per-node 8 ...` starts the ranks; `join_ranks` finds the others. A batch is that of all ranks
together, so a recipe stays the same on any number of them.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralar.devices import auto_device
from spectralar.training.capture import forget_recordings, side_stream

T = TypeVar("T")
Batch = tuple[Tensor, Tensor]
Losses = dict[str, Tensor]

# A rank that dies is noticed at once, by its closed connections. This is for one that hangs, and longer than anything
# that one rank does while the others wait: drawing a picture, writing a checkpoint.
_TIMEOUT = datetime.timedelta(minutes=10)


class RankLostError(RuntimeError):
    """Another rank died or stopped answering."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a job as one of them sees them. Every rank must call the same methods in the same order.

    Attributes:
        rank: this process, from 0.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, batch: int, name: str) -> int:
        """This rank's part of a batch.

        Raises:
            ValueError: the ranks do not divide the batch.
        """
        if batch % self.world:
            raise ValueError(f"{name} must be a multiple of the {self.world} ranks, not {batch}")
        return batch // self.world

    def seed(self, *numbers: int) -> int:
        """A seed that differs from rank to rank; 32 bits, all that PyTorch's CPU generator looks at."""
        return int(np.random.SeedSequence((*numbers, self.rank)).generate_state(1)[0])

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's tensor; no gradient."""
        if self.world == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total

    def largest(self, number: int) -> int:
        """The largest of every rank's number, agreed on by the hosts; waits for no GPU."""
        if self.world == 1:
            return number
        held = torch.tensor(number)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def join(self, x: Tensor) -> Tensor:
        """Every rank's tensor end to end along the first dimension, in the order of ranks; no gradient."""
        if self.world == 1:
            return x
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.world)]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, which can be pickled, in the order of ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def by_first(self, action: Callable[[], T]) -> T:
        """What `action` gives on the first rank, on all of them; an error of it is raised on all of them."""
        if self.world == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


ALONE = Ranks()
"""A job of one process."""


@contextmanager
def join_ranks(device: str, *, timeout: datetime.timedelta = _TIMEOUT) -> Iterator[Ranks]:
    """Meets the other ranks that torchrun has started, for the length of the block; without torchrun there are none.

    On GPUs, rank i of a machine takes GPU i for the rest of the process. Tensors of a GPU go by NCCL, others by gloo.

    Args:
        device: auto, cpu or cuda.
        timeout: how long a rank may be behind the others; one that dies is noticed at once.

    Raises:
        ValueError: more ranks than GPUs on this machine.
        RankLostError: instead of any error by which the communication in the block fails.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE
        return
    rank, backend, own = int(os.environ["RANK"]), "gloo", None
    if auto_device(device).type == "cuda":
        place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= count:
            raise ValueError(f"torchrun --nproc-per-node must be at most the {count} GPUs of this machine")
        backend, own = "cpu:gloo,cuda:nccl", torch.device("cuda", place)
        torch.cuda.set_device(own)
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=own)
        yield Ranks(rank, world)
    except (KeyboardInterrupt, SystemExit):  # agreed on by all ranks
        _leave()
        raise
    except RuntimeError as error:
        # After an error the group is left to the end of the process: to end it in order would wait for the others.
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise RankLostError(
                f"rank {rank} of {world} stops: another rank died or does not answer, and says why if it could. "
                f"Start again to go on, training with --resume. ({str(error).splitlines()[0]})"
            ) from error
        raise
    _leave()


def _leave() -> None:
    forget_recordings()
    dist.destroy_process_group()


def parallelize(
    model: nn.Module,
    loss: Callable[[Batch], Losses],
    ranks: Ranks,
    *,
    ranks_per_copy: int = 1,
    half: bool = False,
    captured: bool = False,
) -> Callable[[Batch, bool], Losses]:
    """Prepares a model on its device for training by all ranks: gradients become means over the ranks' batches.

    Statistics of a batch (batch normalisation; whatever a module with a method `over_ranks` joins) become those of all
    ranks' batches.

    Args:
        model: changed in place; equal on all ranks.
        loss: maps a batch to scalars by name, by calling `model`.
        ranks: this job.
        ranks_per_copy: see `copies`.
        half: sharded blocks are sent in bf16 (reduced in fp32); meant for blocks that run under bf16 autocast anyway.
        captured: the copies' steps will be recorded as CUDA graphs, after `WARMUP_OF_RANKS` ordinary ones.

    Returns:
        `(batch, reduce) -> losses`. Where `reduce` is false, as for all batches of an accumulated step but the last,
        gradients stay on their rank.

    Raises:
        ValueError: see `copies`; a model that cannot be sharded.
    """
    if ranks.world == 1:
        return lambda batch, reduce: loss(batch)
    sharded = copies(ranks, ranks_per_copy) < ranks.world
    if sharded and getattr(getattr(model, "config", None), "dead_codes", "keep") == "restart":
        raise ValueError('dead_codes="restart" moves codes inside the forward pass, which needs ranks_per_copy = 1')
    _join_statistics(model, ranks)
    step: Any = _Loss(model, loss)
    if sharded:
        shard(step, ranks, ranks_per_copy, half=half)

        def run(batch: Batch, reduce: bool) -> Losses:
            step.set_requires_gradient_sync(reduce)
            return step(batch)
    else:
        with side_stream() if captured else nullcontext():  # gradients will arrive on the stream on which DDP is made
            replica = nn.parallel.DistributedDataParallel(step, gradient_as_bucket_view=True)

        def run(batch: Batch, reduce: bool) -> Losses:
            with nullcontext() if reduce else replica.no_sync():
                return replica(batch)

    return run


def copies(ranks: Ranks, ranks_per_copy: int) -> int:
    """Copies of the model that the ranks hold.

    Args:
        ranks: this job.
        ranks_per_copy: 1 gives every rank a copy (DDP), 0 divides one copy over all ranks (FSDP2), and a divisor of
            the ranks in between divides every copy over so many neighbours (hybrid sharding).

    Raises:
        ValueError: `ranks_per_copy` does not divide the ranks.
    """
    if ranks_per_copy and ranks.world % ranks_per_copy:
        raise ValueError(f"ranks_per_copy must be 0 or divide the {ranks.world} ranks, not {ranks_per_copy}")
    return ranks.world // ranks_per_copy if ranks_per_copy else 1


def shard(holder: nn.Module, ranks: Ranks, ranks_per_copy: int, *, half: bool = False) -> None:
    """Divides every parameter of a module that holds a model over the ranks of a copy.

    Blocks (the entries of each `nn.ModuleList`) are put together when they run, the rest with the first of them.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(holder.parameters()).device.type
    number = copies(ranks, ranks_per_copy)
    if number == 1:
        mesh = init_device_mesh(device, (ranks.world,), mesh_dim_names=("parts",))
    else:
        mesh = init_device_mesh(device, (number, ranks.world // number), mesh_dim_names=("copies", "parts"))
    # Only weights are rounded: what flows between blocks keeps the dtype that it has without sharding.
    narrow = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    lists = [m for m in holder.modules() if isinstance(m, nn.ModuleList)]
    for block in [block for blocks in reversed(lists) for block in blocks]:  # inner before outer
        fully_shard(block, mesh=mesh, mp_policy=narrow if half else MixedPrecisionPolicy())
    fully_shard(holder, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether every rank holds a part of it (a DTensor)."""
    # Asked without the import of DTensor's package, which takes longer than that of all of ours.
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; other tensors as they are."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, which every rank must ask for; other tensors as they are."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def divided_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, sharded as `target` is."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(target.device), mesh, placements, src_data_rank=None)


class _Loss(nn.Module):
    """The loss as the `forward` of a module that holds the model: what DDP wraps and FSDP2 changes the class of."""

    def __init__(self, model: nn.Module, loss: Callable[[Batch], Losses]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Batch) -> Losses:
        return self._loss(batch)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks in both directions: what every rank's loss owes to the sum flows back into every rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class BatchNormOverRanks(nn.BatchNorm1d):
    """`nn.BatchNorm1d` without affine part, for `[B, C]`, over the batches of all ranks, which have equal lengths.

    nn.SyncBatchNorm refuses CPU tensors, and what cannot run there could not be tested with every change. The variance
    is summed around the common mean: latents of a fresh encoder lie far closer together than their distance from zero.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, C]
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        count = len(x) * dist.get_world_size()
        mean = _SumOverRanks.apply(x.sum(0)) / count
        centred = x - mean
        variance = _SumOverRanks.apply(centred.square().sum(0)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        return centred * (variance + self.eps).rsqrt()


def _join_statistics(model: nn.Module, ranks: Ranks) -> None:
    for module in list(model.modules()):
        if hasattr(module, "over_ranks"):
            module.over_ranks(ranks.join)  # type: ignore[operator]
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm1d):
                if child.affine or child.running_mean is None or child.momentum is None:
                    raise ValueError(f"{name} must have no weights and keep running averages, to be joined over ranks")
                joined = BatchNormOverRanks(child.num_features, child.eps, child.momentum, affine=False)
                joined.to(child.running_mean).load_state_dict(child.state_dict())
                setattr(module, name, joined)
