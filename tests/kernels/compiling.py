"""Compiles every Triton launch of a launch function for the A100 and the H100, on a machine without a GPU.

`launches` runs a function whose kernels are recorded instead of started; `compile_launch` gives what the compiler says
about one of them. It needs kernels that the interpreter has not taken over, so tests call it in a process of their own:

    python -m tests.kernels.compiling dct vq    # what tests/kernels/launches_dct.py, ... launch in `sample_launches()`
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

TARGETS = {80: 163 * 1024, 90: 227 * 1024}
"""Compute capability -> the most shared memory that one program may have, in bytes."""

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, the types and constants of its arguments, and the options of the launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]
    options: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        return repr((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))


@dataclass(frozen=True)
class Compiled:
    """What the compiler says: shared memory in bytes, registers a thread, bytes of local memory (spills)."""

    kernel: str
    constants: str
    options: str
    capability: int
    shared: int
    registers: int
    spilled: int


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within the block, a launch is recorded and no kernel runs."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in self.params]
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        options = tuple(sorted((k, v) for k, v in kwargs.items() if k not in names))
        signature: dict[str, str] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for i, parameter in enumerate(self.params):
            value = given.get(parameter.name, parameter.default)
            kind = _kind(value)
            # A number may be compiled in where it is 1, or known to be divisible by 16, unless the kernel forbids it.
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or kind == "constexpr" or (special and kind == "i32" and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(i,)] = value
                continue
            signature[parameter.name] = kind
            if isinstance(value, torch.Tensor) or (special and kind in ("i32", "i64") and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        found.append(Launch(self, signature, constants, attributes, options))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = original


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else "constexpr"


def launches(function: Callable[[], object]) -> list[Launch]:
    """The different launches that `function` makes, in order."""
    with recording() as found:
        function()
    return list({launch.key: launch for launch in found}.values())


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles for a GPU of that compute capability, down to machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kind = GluonASTSource if launch.kernel.is_gluon() else ASTSource
    source = kind(launch.kernel, launch.signature, launch.constants, launch.attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    registers, spilled = _resources(kernel.asm["cubin"])
    names = [p.name for p in launch.kernel.params]
    constants = {names[i]: v for (i,), v in launch.constants.items()}
    return Compiled(
        launch.kernel.__name__,
        " ".join(f"{k}={v}" for k, v in constants.items()),
        " ".join(f"{k}={v}" for k, v in launch.options),
        capability,
        kernel.metadata.shared,
        registers,
        spilled,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory, from the notes that the assembler leaves in the binary (ELF64)."""
    table, size, count = (int.from_bytes(cubin[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))

    def field(section: int, start: int, length: int) -> int:
        at = table + section * size + start
        return int.from_bytes(cubin[at : at + length], "little")

    found = {0x2F: 0, 0x11: 0}  # a function's registers, a function's stack: four bytes each, after its index
    for section in range(count):
        if field(section, 4, 4) != 0x70000000:  # .nv.info
            continue
        notes = cubin[field(section, 24, 8) : field(section, 24, 8) + field(section, 32, 8)]
        at = 0
        while at + 4 <= len(notes):
            attribute, length = notes[at + 1], int.from_bytes(notes[at + 2 : at + 4], "little")
            if notes[at] != 4:  # the value lies where other notes have their length
                at += 4
                continue
            if attribute in found:
                found[attribute] = max(found[attribute], int.from_bytes(notes[at + 8 : at + 12], "little"))
            at += 4 + length
    return found[0x2F], found[0x11]


def main(rooms: list[str]) -> None:
    """Prints one JSON line for every launch and target of the named rooms (`dct`, `vq`)."""
    jobs = []
    with ThreadPoolExecutor(2) as pool:
        for room, capability in itertools.product(rooms, TARGETS):
            sample = importlib.import_module(f"tests.kernels.launches_{room}").sample_launches
            for launch in launches(functools.partial(sample, capability)):
                jobs.append(pool.submit(compile_launch, launch, capability))
        for job in jobs:
            print(json.dumps(asdict(job.result())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
