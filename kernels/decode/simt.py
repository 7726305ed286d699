"""Single instructions of a thread, for kernels that are written thread by thread in Gluon.

All tensors are `[THREADS]`, one number for each thread of a program, so nothing ever moves between threads unless it is
told to, and nothing waits for a barrier that is not written here. Addresses in shared memory are int32.
"""

# Gluon's arguments are pointers and constants without types, its tuples grow by addition only.
# ruff: noqa: RUF005
# mypy: ignore-errors

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from .config import RING_WARPS

WARPS = RING_WARPS
THREADS = 32 * WARPS
_THREADS = gl.constexpr(THREADS)
_LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS], [0]))
_SHARED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def threads():
    """The number of each thread."""
    return gl.arange(0, _THREADS, _LAYOUT)


@gluon.jit
def threads_here():
    """The same. What follows from it is computed where it stands: held across all blocks it would take registers."""
    return gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [threads()], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def shared_memory(BYTES: gl.constexpr):
    """All shared memory of the program: what to keep alive to its end, and its address."""
    memory = gl.allocate_shared_memory(gl.int32, [BYTES // (4 * _THREADS), _THREADS], _SHARED)
    # Without a use that the compiler sees, it would not declare the memory.
    memory.index(0).store(threads())
    address = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    return memory, address


@gluon.jit
def barrier():
    gl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _reading(count, offset, where, masked):
    words = ", ".join(f"${i}" for i in range(count))
    words = f"{{{words}}}" if count > 1 else "$0"
    vector = {1: "", 2: ".v2", 4: ".v4"}[count]
    load = f"ld.{where}{vector}.b32 {words}, [${count}+{offset}];"
    if not masked:
        return load
    zeros = " ".join(f"mov.b32 ${i}, 0;" for i in range(count))
    return f"{{ .reg .pred some; setp.ne.u32 some, ${count + 1}, 0; {zeros} @some {load} }}"


@gluon.constexpr_function
def _operands(count, *inputs):
    return ",".join(["=&r"] * count + list(inputs))


@gluon.constexpr_function
def _words(count):
    return (gl.int32,) * count


@gluon.jit
def from_shared(address, OFFSET: gl.constexpr, COUNT: gl.constexpr):
    """COUNT words from shared memory."""
    return gl.inline_asm_elementwise(
        _reading(COUNT, OFFSET, "shared", False), _operands(COUNT, "r"), [address], dtype=_words(COUNT), is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def from_shared_where(m, address, OFFSET: gl.constexpr, COUNT: gl.constexpr):
    """The same, zeros where `m` is not."""
    return gl.inline_asm_elementwise(
        _reading(COUNT, OFFSET, "shared", True), _operands(COUNT, "r", "r"), [address, m.to(gl.int32)],
        dtype=_words(COUNT), is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def from_global_where(m, address, OFFSET: gl.constexpr, COUNT: gl.constexpr):
    """COUNT words from an int64 address, zeros where `m` is not."""
    return gl.inline_asm_elementwise(
        _reading(COUNT, OFFSET, "global", True), _operands(COUNT, "l", "r"), [address, m.to(gl.int32)],
        dtype=_words(COUNT), is_pure=False, pack=1,
    )  # fmt: skip


_TO_SHARED = gl.constexpr("{ .reg .pred some; setp.ne.u32 some, $3, 0; @some st.shared.b32 [$1], $2; mov.u32 $0, 0; }")
_TO_SHARED_2 = gl.constexpr(
    "{ .reg .pred some; setp.ne.u32 some, $4, 0; @some st.shared.v2.b32 [$1], {$2, $3}; mov.u32 $0, 0; }"
)


@gluon.jit
def to_shared(m, address, word):
    gl.inline_asm_elementwise(
        _TO_SHARED, "=r,r,r,r", [address, word.to(gl.int32, bitcast=True), m.to(gl.int32)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def to_shared_2(m, address, low, high):
    gl.inline_asm_elementwise(
        _TO_SHARED_2, "=r,r,r,r,r",
        [address, low.to(gl.int32, bitcast=True), high.to(gl.int32, bitcast=True), m.to(gl.int32)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _exchange(lanes):
    return f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, 0xffffffff;"


@gluon.jit
def exchanged(x, LANES: gl.constexpr):
    """The fp32 number of the lane whose number differs by the bits of LANES."""
    return gl.inline_asm_elementwise(_exchange(LANES), "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.constexpr_function
def _lane(lane):
    return f"shfl.sync.idx.b32 $0, $1, {lane}, 31, 0xffffffff;"


@gluon.jit
def of_lane(x, LANE: gl.constexpr):
    return gl.inline_asm_elementwise(_lane(LANE), "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.constexpr_function
def _packing(dtype):
    return f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"


@gluon.constexpr_function
def _unpacking(dtype):
    if dtype == gl.bfloat16:
        return "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    return "{ .reg .f16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"


@gluon.jit
def packed(low, high, DTYPE: gl.constexpr):
    """Two fp32 numbers, rounded to 16 bits, as a word."""
    return gl.inline_asm_elementwise(_packing(DTYPE), "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(word, DTYPE: gl.constexpr):
    """The two 16-bit numbers of a word in fp32."""
    return gl.inline_asm_elementwise(
        _unpacking(DTYPE), "=&f,=f,r", [word], dtype=(gl.float32, gl.float32), is_pure=True, pack=1
    )


@gluon.constexpr_function
def _from_e4m3(dtype):
    lines = ["{", ".reg .b16 low, high;", "mov.b32 {low, high}, $2;"]
    if dtype == gl.float16:
        return "\n".join([*lines, "cvt.rn.f16x2.e4m3x2 $0, low;", "cvt.rn.f16x2.e4m3x2 $1, high;", "}"])
    # There is no instruction to bf16, and moving bits takes more of them than the way through fp32.
    lines += [".reg .b32 pair;", ".reg .f16 first, second;", ".reg .f32 a, b;"]
    for i in range(2):
        lines += [f"cvt.rn.f16x2.e4m3x2 pair, {('low', 'high')[i]};", "mov.b32 {first, second}, pair;"]
        lines += ["cvt.f32.f16 a, first;", "cvt.f32.f16 b, second;", f"cvt.rn.bf16x2.f32 ${i}, b, a;"]
    return "\n".join([*lines, "}"])


@gluon.jit
def from_e4m3(word, DTYPE: gl.constexpr):
    """The four e4m3 numbers of a word in 16 bits, exactly, as two words. It is done where it stands."""
    return gl.inline_asm_elementwise(
        _from_e4m3(DTYPE), "=r,=r,r", [word], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.constexpr_function
def _mma(dtype):
    kind = "bf16" if dtype == gl.bfloat16 else "f16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )


@gluon.jit
def multiplied(sums, a0, a1, a2, a3, b0, b1, DTYPE: gl.constexpr):
    """sums + A @ B, a warp's tile `[16, 8]` of 16 inputs, in the tensor core's order: thread 4 g + t has of A the lines
    g (a0, a2) and g + 8 (a1, a3), of B the column g, two inputs a word, and of the sums the lines g and g + 8 at
    columns 2 t and 2 t + 1."""
    return gl.inline_asm_elementwise(
        _mma(DTYPE), "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


# --- copies to shared memory -----------------------------------------------------------------------------------------


@gluon.constexpr_function
def _making(count, arrivals):
    barriers = [f"mbarrier.init.shared::cta.b64 [$1+{8 * i}], {arrivals};" for i in range(count)]
    lines = ["{", ".reg .pred later;", ".reg .u32 thread;", "mov.u32 $0, 0;", "mov.u32 thread, %tid.x;"]
    lines += ["setp.ne.u32 later, thread, 0;", "@later bra done;", *barriers, "fence.mbarrier_init.release.cluster;"]
    return "\n".join([*lines, "done:", "bar.sync 0;", "fence.proxy.async.shared::cta;", "}"])


@gluon.jit
def make_arrivals(address, COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT words of 64 bits that count ARRIVALS each time, for all threads to use."""
    gl.inline_asm_elementwise(_making(COUNT, ARRIVALS), "=r,r", [address], dtype=gl.int32, is_pure=False, pack=1)


@gluon.constexpr_function
def _copying(size):
    return f"""{{
.reg .pred some;
.reg .b64 policy;
mov.b64 policy, 0x12F0000000000000;
mov.u32 $0, 0;
setp.ne.u32 some, $5, 0;
@some mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {size};
@some cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [$2], [$3], {size}, [$1], policy;
setp.ne.u32 some, $4, 0;
@some mbarrier.arrive.shared::cta.b64 _, [$1];
}}"""


@gluon.jit
def copy_to_shared(arrival, address, source, m_nothing, m_copy, SIZE: gl.constexpr):
    """Asks for SIZE bytes, which arrive at `arrival` when they are there, and are the first to leave the L2 cache;
    where `m_nothing`, only arrives."""
    gl.inline_asm_elementwise(
        _copying(SIZE), "=r,r,r,l,r,r", [arrival, address, source, m_nothing.to(gl.int32), m_copy.to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


_AWAITING = gl.constexpr("""{
.reg .pred there;
mov.u32 $0, 0;
again:
mbarrier.try_wait.parity.shared::cta.b64 there, [$1], $2;
@!there bra again;
}""")


@gluon.jit
def await_arrival(arrival, phase):
    """Waits for the end of a phase, 0 or 1 by turns."""
    gl.inline_asm_elementwise(_AWAITING, "=r,r,r", [arrival, phase], dtype=gl.int32, is_pure=False, pack=1)


# --- mailboxes -------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _receiving(loads, pointers):
    """PTX that reads words until none is empty. A load is (pointer, byte offset, words, bit of the mask)."""
    count = sum(load[2] for load in loads)
    mask = f"${count + pointers}"
    lines = ["{", ".reg .pred some, empty, more;", ".reg .u32 highest, bits;"]
    lines += [f"mov.b32 ${i}, 0;" for i in range(count)]
    bodies, first = [], 0
    for load in loads:
        pointer, offset, width = load[:3]
        words = [f"${first + i}" for i in range(width)]
        first += width
        vector = {1: "", 2: ".v2", 4: ".v4"}[width]
        target = words[0] if width == 1 else "{" + ", ".join(words) + "}"
        bodies.append((words, f"ld.relaxed.gpu.global{vector}.b32 {target}, [${count + pointer}+{offset}];"))
    bit_before = None
    for i in range(len(loads)):
        bit = loads[i][3]
        if bit != bit_before:
            lines += [f"and.b32 bits, {mask}, {1 << bit};", "setp.ne.u32 some, bits, 0;"]
        bit_before = bit
        lines.append(f"@some {bodies[i][1]}")
    lines += ["again:", "setp.ne.u32 more, 0, 0;"]
    for body in bodies:
        words = body[0]
        highest = words[0]
        for word in words[1:]:
            lines.append(f"max.u32 highest, {highest}, {word};")
            highest = "highest"
        lines += [f"setp.eq.u32 empty, {highest}, 0xffffffff;", f"@empty {body[1]}", "or.pred more, more, empty;"]
    lines.append("vote.sync.any.pred more, more, 0xffffffff;")
    lines += ["@more bra again;", "}"]
    return "\n".join(lines)


@gluon.constexpr_function
def _receiving_operands(loads, pointers):
    return ",".join(["=&r"] * sum(load[2] for load in loads) + ["l"] * pointers + ["r"])


@gluon.constexpr_function
def _received(loads):
    return (gl.int32,) * sum(load[2] for load in loads)


@gluon.jit
def receive(pointers, mask, LOADS: gl.constexpr):
    """Words of mailboxes, read until they are there; zeros where a load's bit of the mask is not set.

    A load of LOADS is (place of its int64 address in `pointers`, bytes to add, words side by side, bit of the mask).
    All loads are under way together, and only what was empty is read again.
    """
    return gl.inline_asm_elementwise(
        _receiving(LOADS, len(pointers)), _receiving_operands(LOADS, len(pointers)), pointers + (mask,),
        dtype=_received(LOADS), is_pure=False, pack=1,
    )  # fmt: skip


_POST = gl.constexpr(
    "{ .reg .pred some; setp.ne.u32 some, $3, 0; @some st.relaxed.gpu.global.b32 [$1], $2; mov.u32 $0, 0; }"
)


@gluon.jit
def post(m, p_word, word):
    """Writes a word to a mailbox."""
    gl.inline_asm_elementwise(
        _POST, "=r,l,r,r", [p_word.to(gl.int64), word.to(gl.int32, bitcast=True), m.to(gl.int32)], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.constexpr_function
def _leaving(programs):
    return f"""{{
.reg .pred last;
.reg .u32 thread, before, turn;
bar.sync 0;
mov.u32 $0, 0;
mov.u32 thread, %tid.x;
setp.ne.u32 last, thread, 0;
@last bra done;
atom.acq_rel.gpu.global.add.u32 before, [$1+128], 1;
setp.ne.u32 last, before, {programs - 1};
@last bra done;
st.relaxed.gpu.global.u32 [$1+128], 0;
ld.relaxed.gpu.global.u32 turn, [$1];
xor.b32 turn, turn, 1;
st.relaxed.gpu.global.u32 [$1], turn;
done:
}}"""


@gluon.jit
def leave(p_turn, PROGRAMS: gl.constexpr):
    """The last program to leave gives the turn to the other set of mailboxes; all others know theirs already."""
    gl.inline_asm_elementwise(_leaving(PROGRAMS), "=r,l", [p_turn.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


_MARK = gl.constexpr("""{
.reg .pred first; .reg .u32 thread; .reg .u64 now;
mov.u32 $0, 0;
mov.u32 thread, %tid.x;
setp.eq.u32 first, thread, 0;
mov.u64 now, %globaltimer;
@first st.global.u64 [$1], now;
}""")


@gluon.jit
def mark(p_trace, i):
    """Writes the time, in nanoseconds, to place `i`."""
    gl.inline_asm_elementwise(
        _MARK, "=r,l", [p_trace.to(gl.int64) + 8 * i.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )
