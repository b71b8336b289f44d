"""The layer norm's cuda and triton kernels on inputs whose results tell of every single element
(check_sharp), in the shapes where an element is easily lost: rows enough that a kernel's threads go
round, each number of rows of a tile, each place where a swept row may end."""

from __future__ import annotations

import pytest
import torch

import ptx
from kernels import dispatch
from kernels.layer_norm import reference
from tests.ptx.conftest import ARCHS
from tests.ptx.layer_norm_cases import (
    BF16,
    CUDA_ARCHS,
    EPS,
    FP32,
    TRITON_ARCHS,
    check_sharp,
    triton_setting,
)

# With 128-bit vectors and without: each number of columns per thread or tile, and swept rows. Rows
# enough that the threads of the one multiprocessor go round more than once.
SHAPES = [(300, 72), (300, 65), (70, 256), (70, 255), (40, 512), (40, 511), (40, 1024), (40, 1001)]
SHAPES += [(9, 2048), (9, 2047), (5, 8192), (5, 8191), (5, 16384), (4, 16392), (4, 16385)]
# Swept rows that end in each 512 columns of a step, which is where each access of a thread ends.
TAILS = [16384 + 512 * step + rest for step in range(1, 8) for rest in (1, 8)]


def check(
    backend: str,
    arch: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype = FP32,
) -> None:
    with ptx.run(arch, multiprocessors=1), dispatch.use(backend):
        check_sharp(rows, cols, dtype, parameter_dtype)


@pytest.mark.parametrize("dtype", CUDA_ARCHS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_cuda(rows, cols, dtype):
    check("cuda", CUDA_ARCHS[dtype], rows, cols, dtype)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_triton(rows, cols):
    pytest.importorskip("triton")
    arch, *dtypes = triton_setting(cols)
    check("triton", arch, rows, cols, *dtypes)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", CUDA_ARCHS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_dtype_and_architecture(backend, rows, cols, dtype):
    """Parameters of another dtype make another kernel of Triton's: both."""
    for arch in ARCHS if backend == "cuda" else TRITON_ARCHS:
        for parameters in {FP32, dtype}:
            check(backend, arch, rows, cols, dtype, parameters)


@pytest.mark.parametrize("cols", [72, 65])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("cuda", BF16), ("cuda", FP32), ("triton", BF16)], ids=str
)
def test_every_number_of_rows_of_a_tile(backend, dtype, cols):
    """A block of cuda's and a tile of Triton's holds up to 32 rows: where the last one ends."""
    arch = CUDA_ARCHS[dtype]
    if backend == "triton":
        pytest.importorskip("triton")
        arch, *dtypes = triton_setting(cols)
        assert dtypes == [dtype, dtype]
    for rows in range(1, 34):
        check(backend, arch, rows, cols, dtype, dtype)


@pytest.mark.parametrize(
    ("backend", "dtype"), [("cuda", BF16), ("cuda", FP32), ("triton", FP32)], ids=str
)
def test_swept_rows_that_end_anywhere_in_a_step(backend, dtype):
    arch = CUDA_ARCHS[dtype]
    if backend == "triton":
        pytest.importorskip("triton")
        arch, *dtypes = triton_setting(TAILS[0])
        assert dtypes == [dtype, dtype]
    for cols in TAILS:
        check(backend, arch, 2, cols, dtype, dtype)


# Triton only where the kernels for float32 are there by default, and all under `sweep`.
EQUAL = [("cuda", rows, cols) for rows, cols in SHAPES]
EQUAL += [
    pytest.param(
        "triton", rows, cols, marks=pytest.mark.sweep if triton_setting(cols)[1] != FP32 else ()
    )
    for rows, cols in SHAPES
]


@pytest.mark.parametrize(("backend", "rows", "cols"), EQUAL)
def test_rows_of_equal_values_have_no_variance(backend, rows, cols):
    """What rounding took from the first mean is put right: rstd shows the rest 300 times larger."""
    arch = CUDA_ARCHS[FP32]
    if backend == "triton":
        pytest.importorskip("triton")
        arch = triton_setting(cols)[0]
    x = (torch.rand(rows, 1) + 100).expand(rows, cols).contiguous()
    module = dispatch.load("layer_norm", backend)
    with ptx.run(arch, multiprocessors=1):
        y, statistics = module.forward(x, (cols,), torch.ones(cols), torch.zeros(cols), EPS)
    # The mean is right to two units in its last place, 1.5e-5, and rstd is what that leaves.
    right = reference.row_statistics(x.double(), (cols,), EPS)
    errors = (statistics - right).abs().view(2, rows).amax(1)
    assert errors[0] <= 2e-5
    assert errors[1] <= 5e-3
    assert y.abs().max() <= 1e-2  # 4 units in the last place of the mean
