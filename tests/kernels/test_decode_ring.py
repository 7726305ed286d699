"""The decoding step's kernel with the ring: its plan, its text on a CPU (`lanes.py`), and on a GPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spectralar.kernels.decode import DecodeState, DecodeWeights, launch, quantized, reference, ring_plan
from spectralar.kernels.decode.config import StepConfig
from spectralar.kernels.decode.state import MATRICES
from tests.kernels import lanes
from tests.kernels import test_decode_kernel as step

OPS = [(0, op) for op in reference.OPS]


# --- when weights are asked for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 192, 1024, 1280, 1536, 1920])
@pytest.mark.parametrize("size", [1, 2])
def test_every_unit_is_asked_for_once_where_one_was_taken(size: int, width: int) -> None:
    for programs, codes, last_op in itertools.product((78, 114, 132), (50, 4096, 16384), (1, 2, 3, 4, 5)):
        if width > 16 * programs:
            continue
        plan = ring_plan.plan_of(width, size, 2, 1, codes, programs, last_op, last_op == 5, False)
        follow(plan, last_op)


def follow(plan: ring_plan.Plan, last_op: int) -> None:
    """Takes and asks for units as a program does in three blocks and, after whole ones, the head."""
    qkv, proj, fc1, head = (
        [min(ring_plan.TAKEN, plan.products[i].tiles - j) for j in range(0, plan.products[i].tiles, ring_plan.TAKEN)]
        for i in (0, 1, 2, 4)
    )
    takes = [qkv, [0], proj, fc1, [plan.chunks * plan.products[3].tiles] * (4 // plan.chunks), head]
    ops = [(block, op) for block in range(3) for op in range(last_op)] + [(3, 5)] * (last_op == 5)
    end = 3 * plan.block + sum(head) * (last_op == 5)
    asked, taken = min(plan.filled, end), 0
    for block, op in ops:
        for count, refill in zip(takes[op], plan.refills[op if op < 5 else -1], strict=True):
            taken += count
            assert taken <= asked, "a unit is taken that nobody has asked for"
            if refill.units and asked < end:
                position = block * plan.block + refill.position
                assert position == asked
                assert (taken + refill.behind) % plan.slots == position % plan.slots
            asked = min(asked + refill.units, end)
            assert asked <= taken + plan.slots, "a unit is asked for where one lies that nobody has taken"
    assert asked == taken == end


@pytest.mark.parametrize(("width", "even"), [(1024, (3, 1, 2, 3, 3)), (1536, (5, 2, 2, 6, 6))])
def test_operations_ask_for_about_as_many(width: int, even: tuple[int, ...]) -> None:
    plan = ring_plan.plan_of(width, 2, 2, 1, 4096, 132, 5, True, False)
    assert tuple(sum(each.units for each in op) for op in plan.refills[:5]) == even
    # Fewer at once than are taken at once.
    assert max(even) < max(product.units for product in plan.products[:4])


@pytest.mark.parametrize("width", [64, 1024, 1280, 1536, 1920])
@pytest.mark.parametrize("size", [1, 2])
def test_it_fits_the_shared_memory(size: int, width: int) -> None:
    plan = ring_plan.plan_of(width, size, 8, 1, 4096, 132, 5, True, False)
    assert plan.slots * ring_plan.unit_bytes(width, size) == plan.sums < plan.norms < plan.shares < plan.barriers
    assert plan.barriers + 8 * plan.slots <= plan.end <= ring_plan.SHARED_MEMORY
    # A lane for each unit asks for it.
    assert ring_plan.TAKEN <= plan.slots <= 32


@pytest.mark.parametrize("width", [64, 192, 1024, 1920])
@pytest.mark.parametrize("size", [1, 2])
def test_lanes_that_read_together_use_different_banks(size: int, width: int) -> None:
    line, lanes_together = size * (width + ring_plan.GAP), 128 // (8 * size)
    assert line % 16 == ring_plan.unit_bytes(width, size) % 16 == 0, "where a copy begins"
    for first in range(0, 32, lanes_together):
        begins = [(lane // 4) * line + lane % 4 * 8 * size for lane in range(first, first + lanes_together)]
        assert len({(begin + byte) // 4 % 32 for begin in begins for byte in range(0, 8 * size, 4)}) == 32


def test_fp8_goes_through_the_ring_or_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = quantized(step.empty_weights(256, depth=1, codes=8))
    wide = quantized(step.empty_weights(256, depth=1, codes=8, dtype=torch.float32))
    for hopper in (False, True):
        monkeypatch.setattr(launch, "_hopper", lambda device, hopper=hopper: hopper)
        assert [launch.fits(weights, rows) for rows in (1, 8, 9)] == [hopper, hopper, False]
        assert not launch.fits(wide, 2), "the ring has no fp32"
        assert launch.fits(step.empty_weights(256, dtype=torch.float32), 2)


# --- its text on a CPU -----------------------------------------------------------------------------------------------


@pytest.fixture
def on_lanes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `launch` run a kernel of `lanes` on tensors of the CPU, as so many programs."""

    def use(programs: int, kernel: Any = None) -> None:
        kernel = kernel or lanes.kernel()
        names = [parameter.name for parameter in launch.decode_ring_kernel.params]

        class Started:
            def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
                def start(*args: Any, **options: Any) -> None:
                    given = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
                    lanes.run(kernel, given, *grid)

                return start

        monkeypatch.setattr(step, "DEVICE", "cpu")
        monkeypatch.setattr(step, "PROGRAMS", None)
        monkeypatch.setattr(launch, "decode_ring_kernel", Started())
        monkeypatch.setattr(launch, "_hopper", lambda device: True)
        monkeypatch.setattr(launch, "_multiprocessors", lambda device: programs)

    return use


@pytest.mark.parametrize("until", [*OPS, (1, "fc2"), None])
def test_every_operation(until: tuple[int, str] | None, on_lanes: Callable[..., None]) -> None:
    on_lanes(5)
    weights = step.random_weights(64, torch.bfloat16, length=7, codes=90)
    step.check(weights, step.random_state(weights, 1, 2, first=3), until)


@pytest.mark.parametrize(("rows", "group", "first"), [(1, 4, 4), (2, 4, 0), (3, 1, 6)])
def test_groups_and_images(rows: int, group: int, first: int, on_lanes: Callable[..., None]) -> None:
    on_lanes(4)
    weights = step.random_weights(64, torch.float16, depth=3, group=group, length=8, codes=33)
    step.check(weights, step.random_state(weights, rows, rows, first), None)


def test_slices_that_are_not_full(on_lanes: Callable[..., None]) -> None:
    # 320 inputs are a slice of 256 and a quarter of one.
    on_lanes(20)
    weights = step.random_weights(320, torch.bfloat16, depth=1, length=3, codes=9)
    step.check(weights, step.random_state(weights, 1, 2, 1), None)


def every_number(weights: DecodeWeights) -> DecodeWeights:
    """The same with all fp8 numbers in its matrices, and only the subnormal ones in every third column of a product."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite, small = numbers[numbers.isfinite()], numbers[(numbers.abs() < 2.0**-6)]
    found = {}
    for name in MATRICES:
        matrix = getattr(weights, name)
        values = finite[torch.randint(len(finite), matrix.shape)]
        values[..., ::3, :] = small[torch.randint(len(small), values[..., ::3, :].shape)]
        # So that results are of the size of the inputs.
        scale = 1 / (values.square().mean(-1) * matrix.shape[-1]).sqrt()
        found |= {name: values.to(matrix), f"{name}_scale": scale.to(getattr(weights, f"{name}_scale"))}
    return dataclasses.replace(weights, **found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("until", [*OPS, (1, "fc2"), None])
def test_fp8_weights(until: tuple[int, str] | None, dtype: torch.dtype, on_lanes: Callable[..., None]) -> None:
    on_lanes(5)
    weights = every_number(quantized(step.random_weights(64, dtype, length=7, codes=90)))
    step.check(weights, step.random_state(weights, 1, 2, first=3), until)


def test_fp8_in_slices_that_are_not_full(on_lanes: Callable[..., None]) -> None:
    on_lanes(20)
    weights = quantized(step.random_weights(320, torch.bfloat16, depth=1, group=2, length=4, codes=9))
    step.check(weights, step.random_state(weights, 2, 2, 2), None)


def test_times_of_every_operation(on_lanes: Callable[..., None]) -> None:
    on_lanes(4)
    weights = step.random_weights(64, torch.float16, length=8, codes=33)
    state = step.random_state(weights, 1, 2, 4)
    times = torch.zeros(4, 3, 5, 2, dtype=torch.int64)
    launch._start_ring(weights, state, True, 0, 2, 5, True, times)
    inputs, results = times[:, :2].movedim(-1, 0)
    # Two rows of one head are two pieces, so two programs attend.
    assert ((inputs > 0).sum(0) == torch.tensor([4, 2, 4, 4, 4])).all()
    assert torch.equal(inputs > 0, results > 0) and (results >= inputs).all()
    # What an operation needs is there after the last program has given it.
    assert (results[:, :, 3].amax(0) <= inputs[:, :, 4].amin(0)).all()
    assert (times[:, 2, 0] > 0).all() and not times[:, 2, 1:].any()


@pytest.mark.parametrize(
    ("right", "wrong", "fp8"),
    [
        ("o_own % TILES * PLAN.programs", "o_own % TILES", False),  # other columns
        ("phase = gl.where(last, 1 - phase, phase)", "phase = phase", False),  # does not wait for weights
        ("slot + PLAN.refills[OP][TIME].behind", "slot", False),  # into slots of other units
        ("exchanged(b_most, 4 << i)", "exchanged(b_most, 2 << i)", False),  # the greatest score of other keys
        ("weights[5 + PRODUCT]", "weights[5]", True),  # the scales of another product
        ("p_scale += i_layer.to(gl.int64)", "p_scale += 0 * i_layer.to(gl.int64)", True),  # of another block
    ],
)
def test_a_broken_kernel_fails(right: str, wrong: str, fp8: bool, on_lanes: Callable[..., None]) -> None:
    assert sum((lanes.FOLDER / file).read_text().count(right) for file in lanes.FILES) == 1
    on_lanes(4, lanes.kernel(lambda text: text.replace(right, wrong)))
    weights = step.random_weights(64, torch.float16, length=8, codes=33)
    weights = quantized(weights) if fp8 else weights
    with pytest.raises((AssertionError, lanes.Failed)):
        step.check(weights, step.random_state(weights, 1, 2, 4), None)


# --- on a CPU and on a GPU -------------------------------------------------------------------------------------------


def rows_of(state: DecodeState, weights: DecodeWeights, rows: int) -> DecodeState:
    """The first rows of a state that draws an image with each."""
    found = DecodeState.allocate(weights, rows, rows)
    for name in ("first", "tokens", "start", "modulations", "head_modulation", "keys", "values"):
        part, whole = getattr(found, name), getattr(state, name)
        if name in ("modulations", "keys", "values"):
            part.copy_(whole[:, :rows])
        else:
            part.copy_(whole[:rows] if name != "first" else whole)
    return found


def check_rows(weights: DecodeWeights, most: int, fewer: tuple[int, ...], config: StepConfig) -> None:
    state = step.random_state(weights, most, most, 2 * weights.group)
    parts = [rows_of(state, weights, rows) for rows in (most, *fewer)]
    for part in parts:
        launch.launch(weights, part, config=config)
    for part in parts[1:]:
        for name in ("logits", "x", "hidden"):
            assert torch.equal(getattr(part, name), getattr(parts[0], name)[: len(part.x)])


def test_a_row_depends_on_nothing_else(on_lanes: Callable[..., None]) -> None:
    on_lanes(20)
    weights = step.random_weights(320, torch.bfloat16, depth=1, length=3, codes=9)
    for each in (weights, quantized(weights)):
        check_rows(each, 5, (2,), StepConfig())


def needs_hopper() -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


BOTH = [StepConfig(ring=False), StepConfig()]


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "rows", "dtype"), [(128, 2, torch.bfloat16), (192, 8, torch.float16)])
def test_every_operation_on_a_gpu(width: int, rows: int, dtype: torch.dtype) -> None:
    needs_hopper()
    weights = step.random_weights(width, dtype)
    for first in (0, 12, 63):
        state = step.random_state(weights, rows, rows, first)
        for until in ((0, "fc2"), *((1, op) for op in reference.OPS), None):
            step.check(weights, state, until)


@pytest.mark.gpu
@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(("width", "rows", "group"), [(128, 2, 1), (1024, 2, 1), (1024, 2, 4), (1280, 4, 1)])
def test_whole_steps_on_a_gpu(width: int, rows: int, group: int, config: StepConfig) -> None:
    needs_hopper()
    weights = step.random_weights(width, torch.bfloat16, group=group)
    for first in (0, 64 - group):
        step.check(weights, step.random_state(weights, rows, rows, first), None, config=config)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1536, 1920])
def test_whole_steps_of_wide_ones_on_a_gpu(width: int) -> None:
    needs_hopper()
    weights = step.random_weights(width, torch.bfloat16)
    step.check(weights, step.random_state(weights, 2, 2, 7), None)


@pytest.mark.gpu
@pytest.mark.parametrize(("width", "rows", "dtype"), [(128, 2, torch.bfloat16), (192, 8, torch.float16)])
def test_fp8_in_every_operation_on_a_gpu(width: int, rows: int, dtype: torch.dtype) -> None:
    needs_hopper()
    weights = every_number(quantized(step.random_weights(width, dtype)))
    for first in (0, 63):
        state = step.random_state(weights, rows, rows, first)
        for until in ((0, "fc2"), *((1, op) for op in reference.OPS), None):
            step.check(weights, state, until)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "rows", "group"), [(1024, 2, 1), (1024, 2, 4), (1280, 4, 1), (1536, 2, 1), (1920, 2, 1)]
)
def test_whole_steps_in_fp8_on_a_gpu(width: int, rows: int, group: int) -> None:
    needs_hopper()
    weights = quantized(step.random_weights(width, torch.bfloat16, group=group))
    step.check(weights, step.random_state(weights, rows, rows, 8), None)


@pytest.mark.gpu
@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("width", [128, 1024])
def test_rows_on_a_gpu(width: int, config: StepConfig) -> None:
    needs_hopper()
    weights = step.random_weights(width, torch.bfloat16)
    for each in (weights, quantized(weights)) if config.ring else (weights,):
        check_rows(each, 8, (1, 3), config)


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "fp8"), [*((config, False) for config in BOTH), (StepConfig(), True)])
@pytest.mark.parametrize("width", [128, 1024])
def test_replays_are_equal_to_the_bit(width: int, config: StepConfig, fp8: bool) -> None:
    needs_hopper()
    weights = step.random_weights(width, torch.bfloat16, depth=4)
    weights = quantized(weights) if fp8 else weights
    state = step.random_state(weights, 1, 2, 3)
    launch.launch(weights, step.copy(state), config=config)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            launch.launch(weights, state, config=config)
    seen = []
    for _ in range(20):
        graph.replay()
        seen.append({name: getattr(state, name).clone() for name in ("x", "logits", "keys", "values")})
    for each in seen[1:]:
        # Cells that nobody has written hold no numbers.
        assert all(torch.equal(each[name].view(torch.uint8), seen[0][name].view(torch.uint8)) for name in each)
