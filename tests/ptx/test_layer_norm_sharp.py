"""The sharpest inputs (layer_norm_cases.py) in the shapes where an element is easily lost, for the
layer norm's cuda and triton kernels: rows enough that a kernel's threads go round, each number of
rows of a tile, each place where a swept row may end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import ptx
from kernels import dispatch
from kernels.layer_norm import reference
from tests.ptx.layer_norm_cases import (
    CUDA_ARCH,
    DTYPES,
    EPS,
    check_sharp,
    compiled_in_turn,
    cuda_in_turn,
    in_turn,
    swept_setting,
    triton_setting,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# With 128-bit vectors and without: each number of columns per thread or tile, and swept rows. Rows
# enough that the threads of the one multiprocessor go round more than once.
SHAPES = [(300, 72), (300, 65), (70, 256), (70, 255), (40, 512), (40, 511), (40, 1024), (40, 1001)]
SHAPES += [(9, 2048), (9, 2047), (5, 8192), (5, 8191), (5, 16384), (4, 16392), (4, 16385)]
# Swept rows that end in each 512 columns of a step, which is where each access of a thread ends.
TAILS = [16384 + 512 * step for step in range(1, 8)]
TRITON_ARCHS = {torch.bfloat16: "sm_80", torch.float16: "sm_80", torch.float32: "sm_90a"}


def check(backend: str, arch: str, *sizes_and_dtypes: Any, **options: Any) -> None:
    """`check_sharp` on so few multiprocessors that blocks, or programs, go round."""
    with ptx.run(arch, multiprocessors=2 if backend == "triton" else 1), dispatch.use(backend):
        check_sharp(*sizes_and_dtypes, **options)


@pytest.mark.parametrize(
    ("rows", "cols", "dtype"),
    [
        pytest.param(*shape, dtype, marks=[pytest.mark.sweep] * (not cuda_in_turn(dtype, shape[1])))
        for shape in SHAPES
        for dtype in DTYPES
    ],
    ids=str,
)
def test_cuda(rows, cols, dtype):
    check("cuda", CUDA_ARCH, rows, cols, dtype, torch.float32)


@pytest.mark.parametrize(("rows", "cols"), compiled_in_turn(SHAPES))
def test_triton(rows, cols):
    pytest.importorskip("triton")
    arch, dtype, parameters = triton_setting(cols)
    check("triton", arch, rows, cols, dtype, parameters)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", TRITON_ARCHS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_triton_in_every_dtype(rows, cols, dtype):
    """Parameters of another dtype make another kernel: both."""
    pytest.importorskip("triton")
    for parameters in {torch.float32, dtype}:
        check("triton", TRITON_ARCHS[dtype], rows, cols, dtype, parameters)


@pytest.mark.parametrize("cols", [72, 65])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("cuda", torch.bfloat16),
        ("cuda", torch.float32),
        ("triton", torch.bfloat16),
        pytest.param("triton", torch.float32, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_every_number_of_rows_of_a_tile(backend, dtype, cols):
    """A block of cuda's and a tile of Triton's holds up to 32 rows: where the last one ends."""
    if backend == "triton":
        pytest.importorskip("triton")
    arch = CUDA_ARCH if backend == "cuda" else TRITON_ARCHS[dtype]
    for rows in range(1, 34):
        check(backend, arch, rows, cols, dtype, dtype)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_cuda_column_sums(rows):
    """Either gradient alone and both, stored in every pair of dtypes, whatever of the last columns'
    tile there is; of few rows some threads have none, of many several."""
    pairs = itertools.product(DTYPES, repeat=2)
    wanted = [(False, True, True), (False, True, False), (False, False, True)]
    for turn, (parameters, asked) in enumerate(itertools.product(pairs, wanted)):
        cols = (2048, 2056, 2304)[(turn + turn // 3) % 3]
        check("cuda", CUDA_ARCH, rows, cols, torch.bfloat16, *parameters, wanted=asked)


@pytest.mark.parametrize(
    ("dtype", "rest"),
    [
        (torch.bfloat16, 1),
        (torch.bfloat16, 8),
        (torch.float32, 8),
        pytest.param(torch.float32, 1, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_cuda_rows_that_end_anywhere_in_a_step(dtype, rest):
    for cols in TAILS:
        check("cuda", CUDA_ARCH, 2, cols + rest, dtype, dtype)


@pytest.mark.parametrize(
    ("vec", "tails"),
    [
        (1, TAILS),
        (2, TAILS[::2]),
        (4, TAILS[1::2]),
        (8, TAILS),
        pytest.param(2, TAILS[1::2], marks=pytest.mark.sweep),
        pytest.param(4, TAILS[::2], marks=pytest.mark.sweep),
    ],
)
def test_triton_rows_that_end_anywhere_in_a_step(vec, tails):
    pytest.importorskip("triton")
    arch, dtype, parameters = swept_setting(vec)
    for cols in tails:
        check("triton", arch, 3, cols + vec, dtype, parameters)  # two programs: one has two rows


# Sums of 16-bit values are exact here, so float32 is what shows it: by default where a kernel of
# that dtype is compiled for the other tests anyway.
EQUAL = [("cuda", CUDA_ARCH, *shape) for shape in SHAPES]
EQUAL += [
    pytest.param(
        "triton",
        arch,
        *shape,
        marks=[pytest.mark.sweep] * (not default),
    )
    for shape in SHAPES
    for arch, dtype, _ in [triton_setting(shape[1])]
    for default in [dtype == torch.float32 and in_turn(shape[1])]
]


@pytest.mark.parametrize(("backend", "arch", "rows", "cols"), EQUAL)
def test_rows_of_equal_values_have_no_variance(backend, arch, rows, cols):
    """What rounding took from the first mean is put right: rstd shows the rest 300 times larger."""
    if backend == "triton":
        pytest.importorskip("triton")
    x = (torch.rand(rows, 1) + 100).expand(rows, cols).contiguous()
    module = dispatch.load("layer_norm", backend)
    with ptx.run(arch, multiprocessors=1):
        y, statistics = module.forward(x, (cols,), torch.ones(cols), torch.zeros(cols), EPS)
    assert y.abs().max() <= 1e-2  # 4 units in the last place of the mean
    # The mean is right to two units in its last place, 1.5e-5, and rstd is what that leaves.
    exact = reference.row_statistics(x.double(), (cols,), EPS)
    assert (statistics[:rows] - x[:, 0]).abs().max() <= 2e-5
    assert (statistics - exact.view_as(statistics)).abs().max() <= 5e-3
