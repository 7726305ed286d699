"""A case: what is computed, on which inputs, what it costs at least, how its result is judged, and against whom."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import torch

from spectralar.bench.ceilings import Ceilings
from spectralar.bench.timing import Call, Inputs, Timing, prepare, rotating_sets, run_once, take_turns

Role = Literal["peer", "reduced", "bound"]


@dataclass(frozen=True)
class Missing:
    """Why a peer is not there."""

    reason: str


@dataclass(frozen=True)
class Peer:
    """Another way to compute the case.

    Attributes:
        name: as it stands in the table.
        setup: prepares tables and the like outside of the measured time; gives a callable that takes the case's
            inputs, or `Missing`.
        role: "peer" counts in the ratio; "reduced" computes in a lower precision than the case asks for and "bound"
            does less work (a copy): both are shown only.
        compiled: needs torch.compile, so seconds before the first call returns.
        capture: False if it does not work in a CUDA graph.
    """

    name: str
    setup: Callable[[], Call | Missing]
    role: Role = "peer"
    compiled: bool = False
    capture: bool = True


@dataclass(frozen=True)
class Workload:
    """A case on a device: inputs, our call, and the judge, which gives the error of a result against fp64."""

    inputs: Inputs
    ours: Call
    error: Callable[[object], float]


@dataclass(frozen=True)
class Condition:
    """What a target of the project asks of a measurement."""

    text: str
    holds: Callable[[Measurement], bool]


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One line of the table.

    Attributes:
        target: the target that this case is the measure of, if it is.
        condition: what that target asks.
    """

    target: str | None = None
    condition: Condition | None = None

    @property
    def weight(self) -> float:
        """Its share of a run's time, beside 1 for most."""
        return 1.0

    @property
    def costs(self) -> str:
        """What the floor is made of, in words, where a case takes so long that it is announced."""
        return ""

    @property
    @abstractmethod
    def name(self) -> str:
        """Operation, shape, dtypes and options."""

    @property
    @abstractmethod
    def budget(self) -> float:
        """The largest error that our result may have; beyond it nothing is timed."""

    @property
    @abstractmethod
    def peer_budget(self) -> float:
        """The largest error with which a peer still counts."""

    @property
    @abstractmethod
    def arithmetic(self) -> str:
        """The fastest arithmetic whose precision the case allows; its GEMM rate bounds the case."""

    @abstractmethod
    def bytes(self) -> int:
        """Least bytes read from and written to memory: every input once, every output once."""

    @abstractmethod
    def flops(self) -> int:
        """Least floating point operations of the forms known to us."""

    @abstractmethod
    def small(self) -> Self:
        """The same case in a size for a CPU; it is no measure of a target."""

    @abstractmethod
    def workload(self, device: torch.device) -> Workload:
        """Inputs, our call and the judge on a device."""

    @abstractmethod
    def peers(self, device: torch.device) -> tuple[Peer, ...]:
        """Who else computes the case on a device; nothing is set up yet."""


C = TypeVar("C", bound=Case)


@dataclass(frozen=True)
class Rival:
    """A peer in one measurement; `timing` is None when it did not run, and `reason` says why."""

    name: str
    role: Role
    error: float | None = None
    timing: Timing | None = None
    reason: str = ""


@dataclass(frozen=True)
class Measurement:
    """A case as it came out.

    Attributes:
        case: the case.
        error: of our result, in the unit of `case.budget`.
        ours: None when the result is wrong: then nothing was timed.
        rivals: the peers, in the case's order.
        floor: seconds that the ceiling's rate allows at best.
        ceiling: the rate that sets the floor.
    """

    case: Case
    error: float
    ours: Timing | None
    rivals: tuple[Rival, ...]
    floor: float
    ceiling: str

    @property
    def right(self) -> bool:
        """Whether the result was within its budget (a NaN is not)."""
        return self.error <= self.case.budget

    @property
    def best_peer(self) -> Rival | None:
        """The fastest of those that count: role "peer" and error within the peers' budget."""
        return min((r for r in self.rivals if self.counts(r)), key=lambda r: timed(r).median, default=None)

    def counts(self, rival: Rival) -> bool:
        """Whether a rival's time is a measure of ours."""
        right = rival.error is not None and rival.error <= self.case.peer_budget
        return rival.role == "peer" and rival.timing is not None and right

    def ratio(self, rival: Rival) -> float | None:
        """How many times longer the rival takes; None if its or our result is wrong or it did not run."""
        if self.ours is None or rival.timing is None or rival.error is None:
            return None
        if rival.role != "bound" and not rival.error <= self.case.peer_budget:
            return None
        return rival.timing.median / self.ours.median

    @property
    def met(self) -> bool | None:
        """Whether the target's condition holds; None for a case that measures no target."""
        if self.case.condition is None:
            return None
        return self.ours is not None and self.case.condition.holds(self)


def timed(rival: Rival) -> Timing:
    """The timing of a rival that ran."""
    assert rival.timing is not None
    return rival.timing


def within_microseconds(limit: float) -> Condition:
    """An absolute time."""
    return Condition(f"<= {limit:g} us", lambda m: m.ours is not None and m.ours.median <= limit * 1e-6)


def measure(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    *,
    compiled: bool = True,
    peers: Sequence[str] | None = None,
) -> Measurement:
    """Judges our result, and if it is right times it and its peers in turns for about `seconds`.

    Args:
        case: what to measure.
        device: where.
        ceilings: rates of the device.
        seconds: time for the rounds, apart from inputs, compilation and warm-up.
        compiled: False leaves out the peers that need torch.compile.
        peers: names of the peers to measure; None for all.
    """
    work = case.workload(device)
    floor, ceiling = ceilings.floor(case.bytes(), case.flops(), case.arithmetic)
    result, first_call = run_once(work.ours, work.inputs, device)
    error = work.error(result)
    if not error <= case.budget:
        return Measurement(case, error, None, (), floor, ceiling)
    sets = rotating_sets(work.inputs, device)
    # Our own come first and must work; a peer that does not is shown with its reason.
    samplers = {"spectralar": prepare(work.ours, sets, device, first_call=first_call)}
    rivals: list[Rival] = []
    for peer in case.peers(device):
        if (peer.compiled and not compiled) or (peers is not None and peer.name not in peers):
            continue
        try:
            call = peer.setup()
            if isinstance(call, Missing):
                rivals.append(Rival(peer.name, peer.role, reason=call.reason))
                continue
            result, first_call = run_once(call, work.inputs, device)
            peer_error = work.error(result) if peer.role != "bound" else 0.0
            samplers[peer.name] = prepare(call, sets, device, capture=peer.capture, first_call=first_call)
            rivals.append(Rival(peer.name, peer.role, peer_error))
        except Exception as failure:  # a stranger's code may raise anything
            rivals.append(Rival(peer.name, peer.role, reason=first_line(failure)))
    timings = take_turns(samplers, seconds)
    done = tuple(Rival(r.name, r.role, r.error, timings.get(r.name), r.reason) for r in rivals)
    return Measurement(case, error, timings["spectralar"], done, floor, ceiling)


def select(cases: Sequence[C], wanted: Sequence[str], targets_only: bool = False) -> list[C]:
    """The cases of the given targets, and those whose name holds one of the given texts; all for none.

    Raises:
        ValueError: a text that is no target and that no name holds.
    """
    targets = {case.target for case in cases}

    def chosen(case: C, text: str) -> bool:
        # "P3" is the target and not a part of "fp32".
        return case.target == text.upper() if text.upper() in targets else text.lower() in case.name.lower()

    for text in wanted:
        if not any(chosen(case, text) for case in cases):
            names = "; ".join(case.name for case in cases)
            raise ValueError(f"cases must be targets or parts of names, got {text!r}; names: {names}")
    kept = [case for case in cases if not wanted or any(chosen(case, text) for text in wanted)]
    return [case for case in kept if case.target or not targets_only]


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
