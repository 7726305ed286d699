"""Runs the Gluon kernel of the decoding step on a CPU: its Python text with tensors of one number a thread.

Gluon has no interpreter. `kernels/decode/simt.py`, one function for an instruction, is replaced by functions here that
do the same to PyTorch tensors; the text of the files above it runs as it is. Programs are Python threads that wait for
each other's mailboxes; the threads of a program go together, instruction by instruction, so what this cannot find are
missing barriers, and what the machine does at its own pace.
"""

from __future__ import annotations

import ast
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from spectralar.kernels.decode import config, ring_plan

WARPS, THREADS = config.RING_WARPS, 32 * config.RING_WARPS
FOLDER = Path(ring_plan.__file__).parent
FILES = ("weight_ring.py", "ring_attend.py", "ring_kernel.py")
"""What runs, a file after those that it imports."""

# Of the program that a Python thread is.
_here = threading.local()


class Failed(Exception):
    """What the machine would hang on."""


class Memory:
    """Tensors one after the other in memory of which an address is a place."""

    def __init__(self, size: int) -> None:
        self.bytes, self.used = torch.zeros(size, dtype=torch.uint8), 1024

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        return self.bytes.view(dtype)

    def put(self, tensor: torch.Tensor) -> Pointer:
        data, start = tensor.contiguous().view(-1).view(torch.uint8), self.used
        self.bytes[start : start + len(data)] = data
        self.used += -(-len(data) // 256) * 256 + 256
        return Pointer(Lanes(torch.tensor(start)), tensor.dtype, self)

    def get(self, pointer: Pointer, like: torch.Tensor) -> torch.Tensor:
        size = like.numel() * like.element_size()
        return self.bytes[int(pointer.address) :][:size].clone().view(like.dtype).view(like.shape)


def _tensor(x: Any) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x
    if isinstance(x, Lanes):
        return x.t
    if isinstance(x, float):
        return torch.tensor(x, dtype=torch.float32)
    return torch.tensor(x, dtype=torch.int64 if abs(x) > 2**31 else torch.int32)


class Lanes:
    """A number, or one for each thread."""

    def __init__(self, t: torch.Tensor) -> None:
        self.t = t

    def __index__(self) -> int:
        return int(self.t)

    def __bool__(self) -> bool:
        return bool(self.t)

    def to(self, dtype: Any, bitcast: bool = False) -> Lanes:
        return Lanes(self.t.view(dtype) if bitcast else self.t.to(dtype))

    def _with(self, other: Any, operation: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        other = other if isinstance(other, Lanes) else Lanes(torch.tensor(other, dtype=_kind(self.t, other)))
        return Lanes(operation(self.t, other.t))

    def __invert__(self) -> Lanes:
        return Lanes(~self.t)

    def __neg__(self) -> Lanes:
        return Lanes(-self.t)


def _operator(operation: Callable[[Any, Any], Any]) -> Callable[[Lanes, Any], Any]:
    return lambda self, other: self._with(other, operation)


for _name, _operation in {
    "add": torch.add,
    "radd": torch.add,
    "sub": torch.sub,
    "rsub": lambda a, b: b - a,
    "mul": torch.mul,
    "rmul": torch.mul,
    "truediv": torch.div,
    "rtruediv": lambda a, b: b / a,
    # As the machine divides integers.
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "rshift": lambda a, b: a >> b,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
}.items():
    setattr(Lanes, f"__{_name}__", _operator(_operation))


def _kind(t: torch.Tensor, other: Any) -> torch.dtype:
    if isinstance(other, bool) or t.is_floating_point():
        return t.dtype if t.is_floating_point() else torch.bool
    return torch.float32 if isinstance(other, float) else torch.int32 if t.dtype == torch.bool else t.dtype


class Pointer:
    def __init__(self, address: Lanes, dtype: torch.dtype, memory: Memory) -> None:
        self.address, self.element, self.memory = address, dtype, memory
        self.dtype = SimpleNamespace(element_ty=dtype)

    def __add__(self, offset: Any) -> Pointer:
        offset = _tensor(offset).to(torch.int64)
        return Pointer(Lanes(self.address.t + offset * self.element.itemsize), self.element, self.memory)

    def __sub__(self, offset: Any) -> Pointer:
        return self + -offset

    def to(self, what: Any) -> Any:
        if isinstance(what, tuple):
            return Pointer(self.address, what[1], self.memory)
        return Lanes(self.address.t.to(what))


def _all(x: Any) -> torch.Tensor:
    return _tensor(x).expand(THREADS)


def _load(pointer: Pointer, mask: Any = True, other: float = 0) -> Lanes:
    m = torch.as_tensor(mask.t if isinstance(mask, Lanes) else mask)
    place = torch.where(m, pointer.address.t // pointer.element.itemsize, 0)
    found = pointer.memory.view(pointer.element)[place]
    return Lanes(torch.where(m, found, torch.tensor(other, dtype=pointer.element)))


def _store(pointer: Pointer, value: Lanes, mask: Lanes) -> None:
    m = mask.t & torch.ones(THREADS, dtype=torch.bool)
    place = (pointer.address.t // pointer.element.itemsize).expand(THREADS)[m]
    pointer.memory.view(pointer.element)[place] = value.t.expand(THREADS)[m].to(pointer.element)


def _where(m: Any, a: Any, b: Any) -> Lanes:
    return Lanes(torch.where(_tensor(m), _tensor(a), _tensor(b)))


def _each(function: Any) -> Any:
    return lambda *x: Lanes(function(*map(_tensor, x)))


gl = SimpleNamespace(
    constexpr=lambda x: x, static_range=range, int32=torch.int32, int64=torch.int64, float32=torch.float32,
    pointer_type=lambda dtype: ("pointer", dtype), load=_load, store=_store, where=_where,
    zeros_like=lambda x: Lanes(torch.zeros_like(x.t)), full_like=lambda x, v: Lanes(torch.full_like(x.t, v)),
    maximum=_each(torch.maximum), exp=_each(torch.exp), rsqrt=_each(torch.rsqrt), sqrt=_each(torch.sqrt),
    fma=_each(lambda a, b, c: a * b + c), program_id=lambda axis: Lanes(torch.tensor(_here.program, dtype=torch.int32)),
)  # fmt: skip


def _jit(function: Any = None, **_: Any) -> Any:
    return function if function else lambda function: function


gluon = SimpleNamespace(jit=_jit, constexpr_function=lambda function: function)

# --- simt.py ---------------------------------------------------------------------------------------------------------


def threads() -> Lanes:
    return Lanes(torch.arange(THREADS, dtype=torch.int32))


def shared_memory(BYTES: int) -> tuple[Any, Lanes]:
    # What nobody has written is no number.
    _here.shared, _here.arrivals = torch.full((BYTES // 4,), -1, dtype=torch.int32), {}
    return SimpleNamespace(_keep_alive=lambda: None), Lanes(torch.tensor(0, dtype=torch.int32))


def barrier() -> None:
    pass


def from_shared_where(m: Any, address: Lanes, OFFSET: int, COUNT: int) -> tuple[Lanes, ...]:
    place = (_all(address).long() + OFFSET) // 4
    assert not (_all(address) % (4 * COUNT)).any(), "16 bytes must begin at a place that 16 divides"
    return tuple(Lanes(torch.where(_all(m), _here.shared[torch.where(_all(m), place + i, 0)], 0)) for i in range(COUNT))


def from_shared(address: Lanes, OFFSET: int, COUNT: int) -> tuple[Lanes, ...]:
    return from_shared_where(Lanes(torch.tensor(True)), address, OFFSET, COUNT)


def from_global_where(m: Any, address: Lanes, OFFSET: int, COUNT: int) -> tuple[Lanes, ...]:
    m, place = _all(m).bool(), (_all(address) + OFFSET) // 4
    assert not ((_all(address) + OFFSET)[m] % (4 * COUNT)).any()
    words = _here.memory.view(torch.int32)
    return tuple(Lanes(torch.where(m, words[torch.where(m, place + i, 0)], 0)) for i in range(COUNT))


def to_shared(m: Any, address: Lanes, *words: Lanes) -> None:
    for i, word in enumerate(words):
        _here.shared[(_all(address).long() // 4 + i)[_all(m)]] = _all(word).view(torch.int32)[_all(m)]


def exchanged(x: Lanes, LANES: int) -> Lanes:
    return Lanes(x.t[torch.arange(THREADS) ^ LANES])


def of_lane(x: Lanes, LANE: int) -> Lanes:
    return Lanes(x.t[torch.arange(THREADS) // 32 * 32 + LANE])


def packed(low: Lanes, high: Lanes, DTYPE: torch.dtype) -> Lanes:
    return Lanes(torch.stack([low.t, high.t], -1).to(DTYPE).view(torch.int32)[:, 0])


def unpacked(word: Lanes, DTYPE: torch.dtype) -> tuple[Lanes, Lanes]:
    both = word.t.contiguous()[:, None].view(DTYPE).float()
    return Lanes(both[:, 0]), Lanes(both[:, 1])


def from_e4m3(word: Lanes, DTYPE: torch.dtype) -> tuple[Lanes, Lanes]:
    numbers = word.t.contiguous()[:, None].view(torch.float8_e4m3fn).to(DTYPE)
    both = numbers.view(torch.int32)
    return Lanes(both[:, 0]), Lanes(both[:, 1])


def multiplied(
    sums: Any, a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, DTYPE: torch.dtype
) -> tuple[Lanes, ...]:
    def halves(*words: Lanes) -> torch.Tensor:  # [warps, g, word, t, half]
        both = torch.stack([_all(w) for w in words], -1).contiguous()[..., None].view(DTYPE).double()
        return both.view(WARPS, 8, 4, len(words), 2).transpose(2, 3)

    a = torch.cat([halves(a0, a2).reshape(WARPS, 8, 16), halves(a1, a3).reshape(WARPS, 8, 16)], 1)
    b = halves(b0, b1).reshape(WARPS, 8, 16)
    # A line that holds no numbers spoils no other.
    found = (a[:, :, None] * b[:, None]).sum(-1).view(WARPS, 2, 8, 4, 2)
    return tuple(
        Lanes((found[:, i // 2, :, :, i % 2].reshape(THREADS) + sums[i].t.double()).float()) for i in range(4)
    )  # fmt: skip


@dataclass
class Arrival:
    """What a barrier of a unit counts."""

    arrived: int = 0  # since the last phase was over
    over: int = 0  # phases
    awaited: int = 0


def make_arrivals(address: Lanes, COUNT: int, ARRIVALS: int) -> None:
    _here.arrivals = {int(address) + 8 * i: Arrival() for i in range(COUNT)}
    _here.expected = ARRIVALS


def copy_to_shared(arrival: Lanes, address: Lanes, source: Lanes, m_nothing: Lanes, m_copy: Lanes, SIZE: int) -> None:
    assert not (m_nothing.t & m_copy.t).any()
    for i in torch.nonzero(m_nothing.t | m_copy.t).flatten().tolist():
        state = _here.arrivals[int(arrival.t[i])]
        if state.over > state.awaited:
            raise Failed("weights where others are that nobody has taken")
        if m_copy.t[i]:
            start, to = int(source.t[i]), int(address.t[i])
            assert to % 16 == start % 16 == 0
            _here.shared[to // 4 : (to + SIZE) // 4] = _here.memory.view(torch.int32)[start // 4 : (start + SIZE) // 4]
        state.arrived += 1
        if state.arrived == _here.expected:
            state.arrived, state.over = 0, state.over + 1


def await_arrival(arrival: Lanes, phase: Lanes) -> None:
    state = _here.arrivals[int(arrival)]
    if state.over == state.awaited or int(phase) != state.awaited % 2:
        raise Failed("weights that nobody has asked for")
    state.awaited += 1


def receive(pointers: Any, mask: Lanes, LOADS: Any) -> tuple[Lanes, ...]:
    end = time.monotonic() + 20
    while True:
        words: tuple[Lanes, ...] = ()
        for pointer, offset, count, bit in LOADS:
            words += from_global_where(Lanes((_all(mask) >> bit) & 1), pointers[pointer], offset, count)
        if not any((word.t == -1).any() for word in words):
            return words
        if time.monotonic() > end or _here.stop.is_set():
            raise Failed("a word that nobody writes")
        # Another program runs, one at a time: threads in each other's way would take many times as long.
        _here.lock.release()
        time.sleep(0.0005)
        _here.lock.acquire()


def post(m: Lanes, p_word: Pointer, word: Lanes) -> None:
    place = (p_word.address.t // 4)[m.t]
    assert (_here.memory.view(torch.int32)[place] == -1).all(), "a word that is written twice"
    _here.memory.view(torch.int32)[place] = word.t.view(torch.int32)[m.t]


def leave(p_turn: Pointer, PROGRAMS: int) -> None:
    assert all(state.arrived == 0 and state.over == state.awaited for state in _here.arrivals.values())
    _here.left[0] += 1
    if _here.left[0] == PROGRAMS:
        place = int(p_turn.address) // 4
        _here.memory.view(torch.int32)[place] ^= 1


def mark(p_trace: Pointer, i: Lanes) -> None:
    p_trace.memory.view(torch.int64)[int(p_trace.address) // 8 + int(i)] = time.monotonic_ns()


def _range(*bounds: Any) -> Any:
    numbers = range(*map(int, bounds))
    if not any(isinstance(bound, Lanes) for bound in bounds):
        return numbers
    return (Lanes(torch.tensor(i, dtype=torch.int32)) for i in numbers)


def kernel(change: Callable[[str], str] = lambda text: text) -> Any:
    """The kernel's function, of the text of `FILES` after a change."""
    instructions = (
        threads, shared_memory, barrier, from_shared, from_shared_where, from_global_where, to_shared,
        exchanged, of_lane, packed, unpacked, from_e4m3, multiplied, make_arrivals, copy_to_shared, await_arrival,
        receive, post, leave, mark,
    )  # fmt: skip
    names = {
        **{name: getattr(module, name) for module in (config, ring_plan) for name in vars(module)},
        **{function.__name__: function for function in instructions},
    }
    names |= {"gl": gl, "gluon": gluon, "range": _range, "WARPS": WARPS, "THREADS": THREADS}
    names |= {"threads_here": threads, "to_shared_2": to_shared}
    for file in FILES:
        tree = ast.parse(change((FOLDER / file).read_text()))
        tree.body = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(tree, file, "exec", flags=annotations.compiler_flag), names)
    return names["decode_ring_kernel"]


def run(function: Any, arguments: dict[str, Any], programs: int) -> None:
    """Launches `kernel()` with tensors as arguments; those it writes are written."""
    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    memory = Memory(sum(v.numel() * v.element_size() // 256 * 256 + 1024 for v in tensors.values()) + 4096)
    places = {v.data_ptr(): memory.put(v) for v in tensors.values()}  # one may be two arguments
    given = {k: places[v.data_ptr()] if k in tensors else v for k, v in arguments.items()}
    for k in ("i_begin", "i_end"):
        given[k] = Lanes(torch.tensor(given[k], dtype=torch.int32))
    lock, left, stop, failures = threading.Lock(), [0], threading.Event(), []

    def program(i: int) -> None:
        _here.program, _here.memory, _here.lock, _here.left, _here.stop = i, memory, lock, left, stop
        with lock:
            try:
                function(**given)
            except BaseException as e:
                failures.append(e)
                stop.set()

    running = [threading.Thread(target=program, args=(i,)) for i in range(programs)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    if failures:
        raise failures[0]
    for k, v in tensors.items():
        v.copy_(memory.get(given[k], v))
