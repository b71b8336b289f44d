"""Layer norm's CUDA kernels from the PTX that nvcc makes of them, through the public functions:
numbers by the tolerance rule against float64, and nothing for the executor to report.

By default from the PTX of one architecture; of the schedulers each takes its turn, and not every
kernel runs in every dtype (cuda_in_turn). Under the marker `sweep` every one does, from the PTX of
each architecture.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ptx
from kernels import dispatch
from kernels.layer_norm import LayerNorm, layer_norm
from kernels.layer_norm.op import choose
from ptx import build
from ptx.executor import readable
from tests.layer_norm.test_layer_norm import NAMES, check, results
from tests.ptx.conftest import ARCHS, SCHEDULES
from tests.ptx.layer_norm_cases import (
    BF16,
    CUDA_ARCH,
    DTYPES,
    FP16,
    FP32,
    check_sharp,
    cuda_in_turn,
)
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SOURCE = build.op_sources()["layer_norm"]
CPP_TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}
# Row lengths where another kernel, or another number of columns per thread, takes over
# (items_for, max_register_columns and kMaxRegisterColumnsBackward in csrc/layer_norm/), and the
# kernels that all run around those: together every one.
SHORT = (256, 512, 1024), "rows_kernel<"
LONG = (4096, 8192, 16384), "long_kernel<|column_sums_kernel<|reduce_partials_kernel"
RESIDUES = 64


@contextmanager
def cuda(turn: int = 0, **options: object) -> Iterator[ptx.Session]:
    """One multiprocessor, so that blocks walk over many rows; the scheduler by the turn."""
    schedule = SCHEDULES[turn % len(SCHEDULES)]
    defaults = {"arch": CUDA_ARCH, "schedule": schedule, "seed": turn, "multiprocessors": 1}
    with ptx.run(**defaults | options) as session, dispatch.use("cuda"):
        yield session


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def check_rows(rows: int, cols: int, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
    x = (torch.randn(rows, cols) * 3 + torch.randn(rows, 1)).to(dtype)
    weight, bias = random(cols, dtype=parameter_dtype), random(cols, dtype=parameter_dtype)
    check(x, (cols,), weight, bias, random(rows, cols, dtype=dtype))
    if rows:
        check_sharp(rows, cols, dtype, parameter_dtype)


def lengths(switch: int) -> range:
    """Every residue mod 64, half of them on either side of the switch."""
    return range(max(1, switch - RESIDUES // 2 + 1), switch + RESIDUES // 2 + 1)


def named(dtype: torch.dtype, kernels: str) -> set[str]:
    """Of the kernels that `kernels` matches those for this dtype, and those that have none."""
    every = set(map(readable, build.kernel_names(SOURCE, CUDA_ARCH)))
    wanted = {name for name in every if "<" not in name or f"<{CPP_TYPES[dtype]}," in name}
    return {name for name in wanted if re.search(kernels, name)}


def run_lengths(arch: str, dtype: torch.dtype, chosen: Sequence[int]) -> set[str]:
    """Schedulers, numbers of rows and dtypes of the parameters take turns; the kernels launched."""
    launched = set()
    for turn, cols in enumerate(chosen):
        rows = 9 if turn % 8 == 0 else 1 + turn % 2
        # two multiprocessors, so that 9 rows leave several partial sums to add up
        with cuda(turn, arch=arch, multiprocessors=1 + (rows == 9)) as session:
            check_rows(rows, cols, dtype, DTYPES[turn // 2 % 3])
        launched |= {launch.name for launch in session.launches}
    return launched


def by_turns(switches: Sequence[int], dtype: torch.dtype) -> list[int]:
    """Of all dtypes together each residue mod 64 at one of the switches, and at each of them every
    residue mod 8; of each dtype the lengths next to a switch, with vectors on either side.

    bfloat16 takes the turns of the kernels that do not run in the others (cuda_in_turn)."""
    cells = list(itertools.product(switches, DTYPES))
    chosen = []
    for switch in switches:
        near = (switch - 1, switch, switch + 1, switch + 8)
        for cols in filter(partial(cuda_in_turn, dtype), lengths(switch)):
            at, turn = cells[cols % RESIDUES % len(cells)]
            taken = turn if cuda_in_turn(turn, cols) else BF16
            if cols in near or (at, taken) == (switch, dtype):
                chosen.append(cols)
    return chosen


@pytest.mark.parametrize("switches", [SHORT[0], LONG[0]], ids=["short", "long"])
def test_the_turns_leave_no_residue_out(switches):
    chosen = [cols for dtype in DTYPES for cols in by_turns(switches, dtype)]
    assert {cols % RESIDUES for cols in chosen} == set(range(RESIDUES))
    for switch in switches:
        assert {cols % 8 for cols in chosen if cols in lengths(switch)} == set(range(8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("switches", "kernels"), [SHORT, LONG], ids=["short", "long"])
def test_every_residue_around_the_switches(dtype, switches, kernels):
    launched = run_lengths(CUDA_ARCH, dtype, by_turns(switches, dtype))
    elements = {FP32: "[48]", FP16: "1", BF16: r"\d"}[dtype]  # of a vector
    assert {
        name
        for name in named(dtype, kernels)
        if re.search(f"<{CPP_TYPES[dtype]}, {elements}[,>]|kernel$", name)
    } <= launched


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("switches", "kernels"), [SHORT, LONG], ids=["short", "long"])
def test_every_residue_around_every_switch(arch, dtype, switches, kernels):
    chosen = [cols for switch in switches for cols in lengths(switch)]
    assert named(dtype, kernels) <= run_lengths(arch, dtype, chosen)


def test_the_sweep_names_every_kernel():
    every = {readable(name) for name in build.kernel_names(SOURCE, CUDA_ARCH)}
    assert len(every) == 49
    assert all(re.search(f"{SHORT[1]}|{LONG[1]}", name) for name in every)


@pytest.mark.parametrize(
    "shift", [0, *(pytest.param(shift, marks=pytest.mark.sweep) for shift in (1, 2))]
)
def test_few_and_many_rows(shift):
    """No row, fewer than a block's, and more than the grid has room for at once; the backward with
    column sums in one pass and, for few long rows, in kernels of their own."""
    cases = itertools.product([0, 1, 2, 7, 70, 300], [1, 8, 64, 65])
    for turn, (rows, cols) in enumerate([*cases, (40, 1000), (40, 1001), (33, 2048), (3, 2048)]):
        dtype = DTYPES[(turn + turn // 4 + shift) % 3]
        with cuda(turn):
            check_rows(rows, cols, dtype, dtype)


@pytest.mark.parametrize("cols", [40, 41])
def test_every_mix_of_dtypes(cols):
    for turn, (dtype, weight_dtype, bias_dtype) in enumerate(itertools.product(DTYPES, repeat=3)):
        x, dy = random(9, cols, dtype=dtype), random(9, cols, dtype=dtype)
        weight, bias = random(cols, dtype=weight_dtype), random(cols, dtype=bias_dtype)
        with cuda(turn):
            check(x, (cols,), weight, bias, dy)


@pytest.mark.parametrize("cols", [64, 1001, 2048, 16_400])
def test_every_choice_of_gradients_and_parameters(cols):
    """What is not asked for is neither computed nor touched."""
    wanted = itertools.product([False, True], repeat=3)
    for turn, (dx, dweight, dbias) in enumerate(wanted):
        x, dy = torch.randn(5, cols), torch.randn(5, cols)
        parameters = [torch.randn(cols) if there else None for there in (turn != 1, turn != 2)]
        mask = [dx, dweight and parameters[0] is not None, dbias and parameters[1] is not None]
        exact = results(F.layer_norm, [x, *parameters], (cols,), dy, dtype=torch.float64)
        torchs = results(F.layer_norm, [x, *parameters], (cols,), dy)
        with cuda(turn):
            backend = choose(x, (cols,), *parameters)
            y, statistics = backend.forward(x, (cols,), *parameters, 1e-5)
            got = backend.backward(dy, x, (cols,), *parameters, statistics, mask)
        assert [gradient is not None for gradient in got] == mask
        for found in (torchs, exact):
            found[1:] = [
                each if asked else None for each, asked in zip(found[1:], mask, strict=True)
            ]
        assert_as_exact_as_torch([y, *got], torchs, exact, NAMES)


@pytest.mark.parametrize(
    ("cols", "dtypes"),
    [
        (64, DTYPES),
        (1024, DTYPES),
        (2048, (FP16,)),
        (16_392, (BF16,)),
        pytest.param(2048, (BF16, FP32), marks=pytest.mark.sweep),
        pytest.param(16_392, (FP16, FP32), marks=pytest.mark.sweep),
    ],
)
def test_misaligned_and_strided_views(cols, dtypes):
    """Rows that start off a 16-byte boundary take element-wise kernels; strided ones are copied."""
    for turn, (offset, dtype) in enumerate(itertools.product([1, 2, 4], dtypes)):
        x, dy = (random(3 * cols + offset, dtype=dtype)[offset:].view(3, cols) for _ in range(2))
        weight, bias = (random(cols + offset, dtype=dtype)[offset:] for _ in range(2))
        with cuda(turn):
            check(x, (cols,), weight, bias, dy)
    wide = random(3, 2 * cols, dtype=torch.float32)
    with cuda():
        check(wide[:, ::2], (cols,), weight.float(), bias.float(), wide[:, cols:])
        check(wide[:, :cols], (cols,), weight.float(), None, wide[:, 1::2])


def test_large_means_and_constant_rows():
    """The variance of centred values: a mean of 1000 costs no more than torch loses itself."""
    for turn, cols in enumerate([64, 1001, 2048, 16_400]):
        x = torch.randn(3, cols) + 1000
        x[1] = 5.0
        weight, bias, dy = torch.randn(cols), torch.randn(cols), torch.randn(3, cols)
        with cuda(turn):
            check(x, (cols,), weight, bias, dy, rounded_input=True)


def test_several_normalised_dimensions_and_no_elements():
    for turn, (lead, shape) in enumerate(
        [((), (5,)), ((2, 3), (4, 5)), ((0,), (7,)), ((2, 0), (8,)), ((4,), (1,))]
    ):
        x, dy = torch.randn(*lead, *shape), torch.randn(*lead, *shape)
        with cuda(turn):
            check(x, shape, torch.randn(shape), torch.randn(shape), dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_the_scheduler(dtype):
    """Sums are added in one order, whichever thread comes first and however often it gives way."""
    schedules = [{"schedule": name, "seed": 3} for name in SCHEDULES]
    for rows, cols in [(70, 64), (9, 1001), (9, 2048)]:
        x, dy = (random(rows, cols, dtype=dtype) for _ in range(2))
        weight, bias = torch.randn(cols), torch.randn(cols)
        found = []
        for options in [*schedules, {"schedule": "random", "preempt": 20, "seed": 4}]:
            with cuda(**options):
                found.append(results(layer_norm, (x, weight, bias), (cols,), dy))
        for other in found[1:]:
            for first, second in zip(found[0], other, strict=True):
                assert torch.equal(first, second)


def test_there_is_room_for_the_error_of_approximate_instructions():
    """rsqrt.approx of a GPU is another function than the executor's, within the same bound."""
    for seed, dtype in enumerate(DTYPES):
        with cuda(seed, jitter=True):
            check_rows(5, 64, dtype, dtype)
            check_rows(5, 1001, dtype, dtype)


def test_a_model_trains_as_in_float64():
    """Modules, autograd through several layers, gradients that add up over two steps."""
    torch.manual_seed(3)

    def model(norm: type[nn.LayerNorm], dtype: torch.dtype) -> nn.Sequential:
        layers = [nn.Linear(24, 40), norm(40), nn.GELU(), nn.Linear(40, 8), norm((8,), bias=False)]
        return nn.Sequential(*layers).to(dtype)

    start = model(nn.LayerNorm, torch.float64).state_dict()
    data = torch.randn(2, 10, 24, dtype=torch.float64)

    def gradients(norm: type[nn.LayerNorm], dtype: torch.dtype) -> list[Tensor]:
        trained = model(norm, dtype)
        trained.load_state_dict(start)
        for batch in data.to(dtype):
            trained(batch).pow(3).sum().backward()
        return [parameter.grad for parameter in trained.parameters()]

    exact = gradients(nn.LayerNorm, torch.float64)
    torchs = gradients(nn.LayerNorm, torch.float32)
    with cuda(turn=1) as session:
        ours = gradients(LayerNorm, torch.float32)
    names = [name for name, _ in model(nn.LayerNorm, torch.float32).named_parameters()]
    assert_as_exact_as_torch(ours, torchs, exact, names)
    kernels = [launch.name.partition("<")[0].rpartition("::")[2] for launch in session.launches]
    assert kernels.count("forward_rows_kernel") == kernels.count("backward_rows_kernel") == 4


def test_gradients_of_gradients():
    """The second derivative is the reference's, from what the first saved."""
    x = torch.randn(3, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)

    def second(function, *leaves: Tensor) -> tuple[Tensor, ...]:
        y = function(leaves[0], (16,), leaves[1])
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    exact = second(F.layer_norm, *(t.detach().double().requires_grad_() for t in (x, weight)))
    torchs = second(F.layer_norm, x, weight)
    with cuda():
        ours = second(layer_norm, x, weight)
    assert_as_exact_as_torch(ours, torchs, exact, ["x", "weight"])
