"""The sharpest inputs (layer_norm_cases.py) in the shapes where an element is easily lost, for the
layer norm's cuda and triton kernels: rows enough that a kernel's threads go round, each number of
rows of a tile, each place where a swept row may end, and parameters that are absent or whose
gradients are not asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import ptx
from kernels import dispatch
from kernels.layer_norm import reference
from tests.ptx.layer_norm_cases import CUDA_ARCHS, EPS, balanced_signs

# With 128-bit vectors and without: each number of columns per thread or tile, and swept rows. Rows
# enough that the threads of the one multiprocessor go round more than once.
SHAPES = [(300, 72), (300, 65), (70, 256), (70, 255), (40, 512), (40, 511), (40, 1024), (40, 1001)]
SHAPES += [(9, 2048), (9, 2047), (5, 8192), (5, 8191), (5, 16384), (4, 16392), (4, 16385)]
# Swept rows that end in each 512 columns of a step, which is where each access of a thread ends.
TAILS = [16384 + 512 * step for step in range(1, 8)]
# Of Triton's kernels one for each number of elements per vector, as in test_layer_norm_triton.py.
VECTORS = [(1, "sm_80", torch.float16), (2, "sm_80", torch.float32)]
VECTORS += [(4, "sm_90a", torch.float16), (8, "sm_90a", torch.float32)]
TRITON_ARCHS = {torch.bfloat16: "sm_80", torch.float16: "sm_80", torch.float32: "sm_90a"}


def powers_of_two(cols: int) -> torch.Tensor:
    """Weights by which every dtype divides without rounding; few are the same as the next."""
    return 2.0 ** torch.randint(-1, 2, (cols,)) * torch.randn(cols).sign()


def check(
    backend: str,
    arch: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    parameters: torch.dtype = torch.float32,
    wanted: tuple[bool, bool, bool] = (True, True, True),
    present: tuple[bool, bool] = (True, True),  # weight and bias
    biases: torch.dtype | None = None,  # where not as the weights
) -> None:
    signs = balanced_signs(rows, cols)
    weight = (powers_of_two(cols) if present[0] else torch.ones(cols)).to(parameters)
    bias = (torch.randint(-3, 4, (cols,)) * present[1]).to(biases or parameters)
    given = [
        tensor if there else None for tensor, there in zip((weight, bias), present, strict=True)
    ]
    x, dy = (3 + signs).to(dtype), ((2 + 3 * signs) / weight.float()).to(dtype)
    module = dispatch.load("layer_norm", backend)
    with ptx.run(arch, multiprocessors=1):
        y, statistics = module.forward(x, (cols,), *given, EPS)
        gradients = module.backward(dy, x, (cols,), *given, statistics, wanted)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact_y = F.layer_norm(leaves[0], (cols,), leaves[1], leaves[2], EPS)
    exact = torch.autograd.grad(exact_y, leaves, dy.double())
    exact_statistics = reference.row_statistics(x.double(), (cols,), EPS)

    assert_near(statistics, exact_statistics, 1e-6)
    assert_near(y, exact_y.detach(), 5 * (2e-6 + torch.finfo(dtype).eps))
    assert [gradient is not None for gradient in gradients] == list(wanted)
    for name, found, right, size in zip(
        ("dx", "dweight", "dbias"), gradients, exact, (5, 10 * rows, 10 * rows), strict=True
    ):
        if found is None:
            continue
        # dx is the small rest of terms of size 5, rounded once more to its own dtype.
        rounding = torch.finfo(found.dtype).eps * right.abs().max().item()
        assert_near(found, right, 2e-6 * size + rounding, name)


def assert_near(found: torch.Tensor, right: torch.Tensor, tolerance: float, name: str = "") -> None:
    error = (found.double().reshape(right.shape) - right).abs().max().item()
    assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.2e}"


@pytest.mark.parametrize("dtype", CUDA_ARCHS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_cuda(rows, cols, dtype):
    check("cuda", CUDA_ARCHS[dtype], rows, cols, dtype)


@pytest.mark.parametrize("dtype", TRITON_ARCHS, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_triton(rows, cols, dtype):
    """Parameters of another dtype make another kernel: both."""
    pytest.importorskip("triton")
    for parameters in {torch.float32, dtype}:
        check("triton", TRITON_ARCHS[dtype], rows, cols, dtype, parameters)


@pytest.mark.parametrize("cols", [72, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_every_number_of_rows_of_a_tile(backend, dtype, cols):
    """A block of cuda's and a tile of Triton's holds up to 32 rows: where the last one ends."""
    if backend == "triton":
        pytest.importorskip("triton")
    arch = (CUDA_ARCHS if backend == "cuda" else TRITON_ARCHS)[dtype]
    for rows in range(1, 34):
        check(backend, arch, rows, cols, dtype, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_rows_that_end_anywhere_in_a_step(dtype):
    for cols in TAILS:
        for rest in (1, 8):
            check("cuda", CUDA_ARCHS[dtype], 2, cols + rest, dtype, dtype)


@pytest.mark.parametrize(("vec", "arch", "dtype"), VECTORS)
def test_triton_rows_that_end_anywhere_in_a_step(vec, arch, dtype):
    pytest.importorskip("triton")
    for cols in TAILS:
        check("triton", arch, 2, cols + vec, dtype, dtype)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_rows_of_equal_values_have_no_variance(backend, rows, cols):
    """What rounding took from the first mean is put right: rstd shows the rest 300 times larger."""
    if backend == "triton":
        pytest.importorskip("triton")
    x = (torch.rand(rows, 1) + 100).expand(rows, cols).contiguous()
    module = dispatch.load("layer_norm", backend)
    arch = (CUDA_ARCHS if backend == "cuda" else TRITON_ARCHS)[x.dtype]
    with ptx.run(arch, multiprocessors=1):
        y, statistics = module.forward(x, (cols,), torch.ones(cols), torch.zeros(cols), EPS)
    assert_near(y, torch.zeros_like(x).double(), 1e-2)  # 4 units in the last place of the mean
    # The mean is right to two units in its last place, 1.5e-5, and rstd is what that leaves.
    assert_near(statistics[:rows], x[:, 0].double(), 2e-5)
    assert_near(statistics, reference.row_statistics(x.double(), (cols,), EPS), 5e-3)
