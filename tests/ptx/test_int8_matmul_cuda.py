"""Int8 matmul's CUDA kernels from the PTX that nvcc makes of them: numbers against float64, and
nothing for the executor to report.

All kernels run with one dtype on sm_80, those that differ by dtype with another as well. All dtypes
on all architectures under all schedulers are `-m sweep`: what takes the time is compiling.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch

import ptx
from kernels.int8_matmul import cuda
from kernels.int8_matmul.rows import cuda as rows_cuda
from tests.ptx.conftest import ARCHS, SCHEDULES, spread
from tests.ptx.int8_cases import (
    FLOATS,
    MODES,
    QUANTISED,
    Options,
    arguments,
    check,
    check_call,
    check_rows,
    make_int8,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def on_every_pair(*default: tuple[str, torch.dtype]) -> pytest.MarkDecorator:
    """Architectures and dtypes; those not in `default` under `sweep`."""
    pairs = [
        pytest.param(*pair, marks=[] if pair in default else pytest.mark.sweep)
        for pair in itertools.product(ARCHS, FLOATS)
    ]
    return pytest.mark.parametrize(("arch", "dtype"), pairs, ids=str)


FIRST, SECOND = ("sm_80", torch.bfloat16), ("sm_80", torch.float32)

# What a call has besides its sizes and its mode; each size meets another of these.
VARIANTS = (
    Options(),
    Options(bias=torch.float32, activation="relu", out_dtype=torch.bfloat16, n_contiguous=True),
    Options(bias=torch.bfloat16, activation="gelu", gap=16),
    Options(bias=torch.float16, out_dtype=torch.float16, per_tensor=True, gap=3),
    Options(activation="gelu_tanh", n_contiguous=True, gap=5, offset=1),
    Options(bias=torch.float32, per_tensor=True, out_dtype=torch.bfloat16, offset=8),
    Options(activation="relu", out_dtype=torch.float16, n_contiguous=True, offset=4),
)


def run(
    arch: str,
    dtype: torch.dtype,
    sizes: Iterable[tuple[int, int, int]],
    modes: Iterable[str] = MODES,
    multiprocessors: int = 1,
) -> set[str]:
    """Checks every size in a mode of its own and with a variant; the kernels that ran."""
    names = set()
    cycle = zip(itertools.cycle(modes), itertools.cycle(VARIANTS), strict=False)
    for turn, ((m, n, k), (mode, variant)) in enumerate(zip(sizes, cycle, strict=False)):
        schedule = SCHEDULES[turn % len(SCHEDULES)]
        with ptx.run(
            arch, schedule=schedule, seed=turn, multiprocessors=multiprocessors
        ) as session:
            check(cuda, m, n, k, replace(variant, mode=mode, dtype=dtype))
        names |= kernels_of(session)
    return names


def kernels_of(session: ptx.Session) -> set[str]:
    return {
        launch.name.partition("(")[0].rpartition("::")[2].partition("<")[0]
        for launch in session.launches
    }


@on_every_pair(FIRST)
def test_few_rows(arch, dtype):
    """1 to 8 rows, columns that fill no warp, depths around 16 bytes, steps and slices."""
    depths = (1, 5, 15, 16, 17, 31, 100, 496, 511, 512, 513, 530, 1023, 1024, 1040, 1111)
    sizes = [(1 + turn % 8, 1 + turn % 5, k) for turn, k in enumerate(depths)]
    # Slices: of 32768 bytes of int8, of 8192 numbers of fp32.
    sizes += [(8, 17, 1090), (8, 3, 4128), (8, 2, 4111), (2, 3, 4100), (8, 20, 1090)]
    names = run(arch, dtype, sizes)
    names |= run(arch, dtype, sizes[::-1], MODES[2:])
    assert names == {"gemv_kernel", "transpose_kernel", "quantize_rows_kernel"}


@on_every_pair(FIRST)
def test_one_launch_quantises_and_multiplies_where_that_reads_little(arch, dtype):
    """Every block reads x twice: half the weight at most, and 16 KiB."""
    row = 4 // dtype.itemsize  # rows of 4 bytes a column
    for turn, (m, n, k) in enumerate([(row, 64, 70), (row, 128, 1050), (1, 112, 3001)]):
        for mode in ("dynamic", "static"):
            with ptx.run(arch, schedule=SCHEDULES[turn], multiprocessors=1) as session:
                check(cuda, m, n, k, replace(VARIANTS[turn], mode=mode, dtype=dtype))
            assert "quantize_rows_kernel" not in kernels_of(session)
    for m, n, k in ((row + 1, 64, 70), (row, 60, 70), (1, 100, 8200)):
        with ptx.run(arch, multiprocessors=1) as session:
            check(cuda, m, n, k, Options(mode="dynamic", dtype=dtype))
        assert "quantize_rows_kernel" in kernels_of(session)


@on_every_pair(FIRST, SECOND)
def test_tiles(arch, dtype):
    """Residues of rows, columns and depth to the tiles, on both sides of a tile's end."""
    ends = (9, 16, 31, 33, 48, 63, 64, 65, 72, 80, 95, 100, 127, 129)
    depths = (1, 15, 16, 33, 47, 63, 64, 65, 80, 127, 128, 130, 191, 193, 260, 300, 321)
    sizes = [
        (m, ends[(turn * 5 + 3) % len(ends)] - 8 * (turn % 2), depths[turn * 4 % len(depths)])
        for turn, m in enumerate(ends * 2)
    ]
    names = run(arch, dtype, sizes, multiprocessors=100)
    assert names == {
        "gemm_kernel",
        "weight_only_kernel",
        "quantize_rows_kernel",
        "transpose_kernel",
        "realign_kernel",
    }


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHS)
def test_every_residue(arch):
    for mode in MODES:
        sizes = [(9 + r, 64 + (7 * r + 5) % 64, 64 + 5 * r % 64) for r in range(64)]
        run(arch, torch.bfloat16, sizes, [mode], multiprocessors=100)
        sizes = [(1 + r % 8, 1 + r, 512 + r) for r in range(32)]
        run(arch, torch.bfloat16, sizes, [mode])


@on_every_pair(FIRST)
def test_large_tiles(arch, dtype):
    """One multiprocessor has enough work for tiles of 128 rows and columns, in groups of 16."""
    sizes = [(128, 128, 64), (129, 140, 65), (250, 130, 200), (20, 260, 320)]
    assert "gemm_kernel" in run(arch, dtype, sizes, QUANTISED[::-1])
    run(arch, dtype, [(2060, 129, 16), (1100, 70, 32)], ["raw", "weight_only"])


@on_every_pair(FIRST)
def test_shared_columns(arch, dtype):
    """Blocks that share the depth: splits of equal size, a shorter last one, a last one of 1."""
    sizes = [(9, 20, 1024), (70, 61, 1090), (17, 65, 2100), (20, 30, 1537), (33, 2, 1620)]
    for modes in (MODES, MODES[2:], MODES[3:]):
        names = run(arch, dtype, sizes, modes, multiprocessors=16)
        assert "add_parts_kernel" in names


def test_rows_on_8_byte_boundaries():
    """Half of what a load of 16 bytes needs, by where a matrix starts and by its rows' gap."""
    for turn, (m, mode) in enumerate(itertools.product((3, 20), ("int8", "weight_only"))):
        for gap, offset in ((0, 8), (8, 0)):
            with ptx.run("sm_80", schedule=SCHEDULES[turn % 3]):
                check(cuda, m, 10, 64, Options(mode=mode, gap=gap, offset=offset))


@pytest.mark.parametrize("m", [2, 9])
def test_the_largest_sums_are_exact(m):
    """-128 times -128 and 127 times 127 along 2^17 - 1 columns; one more wraps, as in torch."""
    for k in (2**17 - 1, 2**17) if m == 2 else (2**17 - 1,):
        weight = torch.full((2, k), -128, dtype=torch.int8)
        weight[1] = 127
        x = torch.full((m, k), -128, dtype=torch.int8)
        x[1] = 127
        with ptx.run("sm_80", multiprocessors=8):
            check_call(cuda, (x, weight, None, None, None, "none", "raw", torch.int32))


@pytest.mark.parametrize("m", [7, 20])
def test_rows_that_are_no_numbers(m):
    """NaN and infinite rows give NaN, whatever else; rows of zeros and tiny ones the bias."""
    for mode in ("dynamic", "static", "weight_only"):
        options = Options(mode=mode, dtype=torch.float32, bias=torch.float32, activation="relu")
        given = arguments(m, 20, 300, options)
        x = given[0]
        x[0, 299], x[1, 7], x[2] = torch.nan, -torch.inf, 0
        x[3], x[4] = 2.0**-121, -(2.0**-120)
        if mode != "weight_only":
            x[5] *= 2.0**120
        with ptx.run("sm_80", multiprocessors=1):
            check_call(cuda, given)


def test_results_do_not_depend_on_the_order_of_threads():
    for m, mode in itertools.product((3, 20), ("dynamic", "weight_only")):
        given = arguments(m, 40, 1100, Options(mode=mode))
        found = []
        for schedule in SCHEDULES:
            with ptx.run("sm_80", schedule=schedule, multiprocessors=16):
                found.append(cuda.forward(*given)[0])
        assert all(torch.equal(found[0], other) for other in found[1:])


def test_16_bytes_a_lane_and_no_bank_conflicts():
    """Of the products: the weight, x and partial sums; epilogues read their factors, too."""
    calls = {
        "gemm_kernel": (130, 128, 256, "int8"),
        "weight_only_kernel": (64, 128, 512, "weight_only"),
        "gemv_kernel": (4, 64, 1024, "int8"),
        "add_parts_kernel": (20, 64, 1024, "int8"),
        "transpose_kernel": (20, 64, 1024, "int8"),
    }
    for kernel, (m, n, k, mode) in calls.items():
        options = Options(mode=mode, n_contiguous=kernel == "transpose_kernel")
        with ptx.run("sm_80", multiprocessors=4) as session:
            check(cuda, m, n, k, options)
        launch = next(one for one in session.launches if f"::{kernel}" in one.name)
        counts = launch.counts
        assert counts["shared_wavefronts"] == counts["shared_ideal_wavefronts"], kernel
        loads = [s for s in launch.sites if (s["space"], s["access"]) == ("global", "read")]
        wide = sum(s["bytes"] for s in loads if s["bytes_per_lane"] == 16)
        if kernel != "transpose_kernel":
            assert wide > 0.8 * sum(s["bytes"] for s in loads), kernel


@on_every_pair(FIRST)
def test_rows(arch, dtype):
    """Rows of part of a warp, of several warps, and longer than the registers of a block."""
    lengths = (1, 3, 8, 31, 130, 257, 1000, 1030, 1100, 2100, 10240, 10250, 20500)
    for turn, cols in enumerate(lengths):
        rows = 300 if cols < 8 else 3 + turn % 3
        x = (torch.randn(rows, cols) * 5 + 3).to(dtype)
        weight, bias = torch.randn(cols), torch.randn(cols).to(dtype)
        with ptx.run(arch, schedule=SCHEDULES[turn % 3], seed=turn):
            check_rows(rows_cuda, spread(x, turn % 4, turn % 3))
            check_rows(rows_cuda, spread(x, 8 * (turn % 2), 0), weight, bias, normalized=True)
            if turn % 4 == 2:
                check_rows(rows_cuda, spread(x, 1, 1), weight[:cols], normalized=True)
                check_rows(rows_cuda, x, None, bias, normalized=True, eps=0.1)


def test_rows_of_special_numbers():
    x = torch.randn(9, 40)
    x[0], x[1, 3], x[2, 39], x[3, 0] = 0, torch.nan, torch.inf, -torch.inf
    x[4], x[5], x[6] = x[4] * 2.0**-118, x[5] * 2.0**60, 2.0**-121
    x[7] += 1e4
    x[8] = 2.0**-120  # the smallest row that is not zeros
    with ptx.run("sm_80"):
        check_rows(rows_cuda, x)
        check_rows(rows_cuda, x, normalized=True)


def test_calls_that_are_refused():
    weight, scale = make_int8(4, 16), torch.ones(1)
    call = [torch.randn(2, 16), weight, None, scale, None, "none", "dynamic", torch.float32]

    def refusal(at: int, value: object) -> str | None:
        changed = [*call]
        changed[at] = value
        return cuda.unsupported(*changed)

    with ptx.run("sm_80"):
        assert cuda.unsupported(*call) is None
        assert refusal(0, call[0].double()) == (
            "input is torch.float64; accepted are float32, bfloat16 and float16"
        )
        assert refusal(4, torch.zeros(4).double()) == (
            "bias is torch.float64; accepted are float32, bfloat16 and float16"
        )
        assert "out_dtype is torch.float64" in str(refusal(7, torch.float64))
        wide = torch.empty(0, dtype=torch.int8).expand(2**31, 0)
        assert "exceeds" in str(refusal(1, wide))
        assert rows_cuda.unsupported(call[0], False, None, None, 0.0) is None
        assert rows_cuda.unsupported(call[0].double(), False, None, None, 0.0) == (
            "input is torch.float64; accepted are float32, bfloat16 and float16"
        )
