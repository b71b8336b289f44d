"""The Triton layer norm's compiled code on the executor: values, gradients, and no report at all.

How lengths are swept: a kernel is compiled anew for each power of two that holds a row (BLOCK_N),
each number of elements per vector (VEC: 1, 2, 4 or 8, by the length's factors of two) and each set
of dtypes.  Within one such kernel only masks depend on the length.  So every residue mod 64 is run
where rows are held (65 to 128), some where they are swept (16385 to 16448), and each BLOCK_N runs
at its first and last lengths: both sides of every switch.  Each BLOCK_N has one architecture and
one set of dtypes (triton_setting) and runs with vectors or without, in turns (in_turn).  All of
them, and each residue of swept rows, run under the marker `sweep`; schedulers take turns.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import ptx
from kernels import dispatch
from kernels.layer_norm import layer_norm
from tests.layer_norm.test_layer_norm import check
from tests.ptx.conftest import SCHEDULES
from tests.ptx.layer_norm_cases import (
    BF16,
    FP16,
    FP32,
    TRITON_ARCHS,
    TRITON_DTYPES,
    check_sharp,
    in_turn,
    swept_setting,
    triton_setting,
)

pytest.importorskip("triton")
from kernels.layer_norm import triton as forward_module
from kernels.layer_norm import triton_backward as backward_module

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

Setting = tuple[str, torch.dtype, torch.dtype]
SETTINGS = list(itertools.product(TRITON_ARCHS, (BF16, FP16, FP32), (BF16, FP16, FP32)))


def run(
    schedule: str,
    rows: int,
    cols: int,
    setting: Setting | None = None,
    bias_dtype: torch.dtype | None = None,
) -> set[str]:
    """Checks y and all gradients of one call; the names of the kernels it launched.

    Two multiprocessors: the persistent programs are few and walk over several tiles.
    """
    arch, dtype, parameter_dtype = setting or triton_setting(cols)
    x, dy = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
    weight = torch.randn(cols).to(parameter_dtype)
    bias = torch.randn(cols).to(bias_dtype or parameter_dtype)
    options = {"schedule": schedule, "seed": cols, "multiprocessors": 2}
    with ptx.run(arch, **options) as session, dispatch.use("triton"):
        check(x, (cols,), weight, bias, dy)
        if bias_dtype is None:
            check_sharp(rows, cols, dtype, parameter_dtype)
    return {launch.name for launch in session.launches}


@pytest.fixture
def fused_from_few_rows(monkeypatch):
    """dx and the sums in one kernel, as for many rows, at the cost of few."""
    fused = backward_module._fused  # which also asks whether such rows fit, by Triton's version
    monkeypatch.setattr(backward_module, "_fused", lambda rows, cols: fused(rows + cols, cols))


# ---- every residue mod 64

SWEPT = range(16385, 16449)


def of_vector(lengths: range, vec: int) -> list[int]:
    """Those whose longest vector is of `vec` elements."""
    return [cols for cols in lengths if min(cols & -cols, 8) == vec]


@pytest.mark.parametrize(
    ("setting", "vec"),
    [
        *itertools.product([triton_setting(128)], [1, 2, 4, 8]),
        pytest.param(("sm_90a", FP32, FP32), 1, marks=pytest.mark.sweep),
        pytest.param(("sm_90a", FP32, FP32), 8, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_every_length_of_rows_that_are_held(setting, vec):
    for cols, schedule in zip(of_vector(range(65, 129), vec), itertools.cycle(SCHEDULES)):
        names = run(schedule, 100, cols, setting)
        assert names == {"_forward_kernel", "_backward_kernel", "_sum_shares_kernel"}


def run_swept(vec: int, chosen: list[int]) -> None:
    for cols, schedule in zip(chosen, itertools.cycle(SCHEDULES)):
        names = run(schedule, 1, cols, swept_setting(vec))
        assert names == {"_forward_long_kernel", "_backward_long_kernel", "_sum_rows_kernel"}


@pytest.mark.parametrize("vec", [1, 2, 4, 8])
def test_lengths_of_rows_that_are_swept(vec):
    """Every residue mod 8, and both ends of the residues mod 64."""
    run_swept(vec, of_vector(SWEPT, vec)[::7])


@pytest.mark.sweep
@pytest.mark.parametrize("vec", [1, 2, 4, 8])
def test_every_length_of_rows_that_are_swept(vec):
    run_swept(vec, of_vector(SWEPT, vec))


# ---- both sides of every switch

LAST = [last for last, *_ in forward_module.TILES]


def test_every_tile_has_its_setting():
    assert [8 << tile for tile in range(len(TRITON_DTYPES) - 1)] == LAST


def ends(last: int) -> list[int]:
    """The first and the last length of a tile, without vectors and with."""
    return sorted({last // 2 + 1, last - 1, last // 2 + min(8, last // 2), last})


def run_around(last: int, lengths: list[int], setting: Setting | None = None) -> None:
    rows = 19200 // last if last <= 128 else 19 if last <= 1024 else 9  # more than a tile's
    for cols, schedule in zip(lengths, itertools.cycle(SCHEDULES)):
        run(schedule, rows, cols, setting)


@pytest.mark.parametrize("last", LAST)
def test_around_every_switch_of_tiles(fused_from_few_rows, last):
    """Of lengths with vectors and without, or of those of the two that are in turn."""
    run_around(last, [cols for cols in ends(last) if in_turn(cols)])


@pytest.mark.sweep
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("last", LAST)
def test_around_every_switch_in_every_setting(fused_from_few_rows, last, setting):
    run_around(last, ends(last), setting)


def test_dx_alone():
    """Few rows: two kernels."""
    for (rows, cols), schedule in zip([(3, 192), (3, 1000), (2, 16384)], SCHEDULES, strict=True):
        names = run(schedule, rows, cols)
        assert names == {"_forward_kernel", "_backward_kernel", "_sum_rows_kernel"}


@pytest.mark.parametrize("arch", ["sm_90a", pytest.param("sm_80", marks=pytest.mark.sweep)])
def test_sums_alone(arch):
    """Without dx: sums over shares of the rows."""
    x, dy = torch.randn(200, 40), torch.randn(200, 40)
    weight = torch.randn(40, requires_grad=True)
    with ptx.run(arch, multiprocessors=1) as session, dispatch.use("triton"):
        (dweight,) = torch.autograd.grad(layer_norm(x, (40,), weight), weight, dy)
    exact = torch.nn.functional.layer_norm(x.double(), (40,))
    torch.testing.assert_close(dweight.double(), (exact * dy).sum(0), rtol=1e-5, atol=1e-5)
    names = [launch.name for launch in session.launches]
    assert names == ["_forward_kernel", "_sum_rows_kernel", "_sum_shares_kernel"]


# ---- dtypes and absent parameters


@pytest.mark.parametrize(
    ("setting", "bias_dtype"),
    [
        (("sm_90a", FP32, BF16), FP16),
        pytest.param(("sm_80", FP16, FP32), BF16, marks=pytest.mark.sweep),
        pytest.param(("sm_80", BF16, FP32), FP32, marks=pytest.mark.sweep),
        pytest.param(("sm_90a", BF16, FP16), BF16, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_mixed_dtypes(setting, bias_dtype):
    run("reverse", 33, 72, setting, bias_dtype)


@pytest.mark.parametrize(
    ("with_weight", "with_bias", "schedule"),
    [(1, 0, "random"), (0, 1, "reverse"), (0, 0, "round_robin")],
)
def test_absent_parameters(with_weight, with_bias, schedule):
    arch, dtype, _ = triton_setting(72)
    x, dy = torch.randn(33, 72).to(dtype), torch.randn(33, 72).to(dtype)
    weight, bias = torch.randn(72).to(dtype), torch.randn(72).to(dtype)
    with ptx.run(arch, schedule=schedule), dispatch.use("triton"):
        check(x, (72,), weight if with_weight else None, bias if with_bias else None, dy)
