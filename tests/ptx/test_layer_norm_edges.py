"""Where a kernel's parts meet: partial tiles of rows and of shares, each dtype of the parameters in
each kernel, gradients that are not asked for, and means so large that one pass would not do.

Inputs are chosen so that a single element, row or share that is lost or doubled shows; most of
these cases were survivors of the mutation test (ptx/mutate.py).
"""

from __future__ import annotations

import itertools

import pytest
import torch

import ptx
from kernels import dispatch
from kernels.layer_norm import reference
from tests.ptx.layer_norm_cases import (
    BF16,
    CUDA_ARCH,
    DTYPES,
    EPS,
    FP32,
    compiled_in_turn,
    cuda_in_turn,
    swept_setting,
    triton_setting,
)
from tests.ptx.test_layer_norm_sharp import check

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# One for each of cuda's kernels, with vectors and without, and for each of its shapes.
COLUMNS = [72, 255, 504, 511, 520, 1000, 1024, 2040, 2039, 16392, 16385]
EACH_VECTOR = (torch.bfloat16, torch.float32)  # of 8 elements and of 4
EACH_KERNEL = [
    pytest.param(cols, dtype, marks=[pytest.mark.sweep] * (not cuda_in_turn(dtype, cols)))
    for cols, dtype in itertools.product(COLUMNS, EACH_VECTOR)
]
# Of Triton's kernels one for each number of elements per vector, compiled for swept rows anyway.
# The sums are of dtype float32 or, once, of x's.
VECTORS = [(vec, *swept_setting(vec)) for vec in (1, 2, 4, 8)]
VECTORS += [
    (4, *swept_setting(4)[:2], torch.bfloat16),
    pytest.param(2, *swept_setting(2)[:2], torch.bfloat16, marks=pytest.mark.sweep),
]
EACH_GRADIENT = [(True, False, False), (False, True, False), (False, False, True)]
# Rows of these lengths have means that float32 rounds, and a variance that only the second pass
# over the row gets right. Enough of both that each element of a tile matters in some row.
NEARLY_CONSTANT = [(72, 72), (70, 65), (36, 256), (36, 255), (20, 1000), (20, 1001)]
NEARLY_CONSTANT += [(9, 2040), (9, 2047)]


@pytest.mark.parametrize(("cols", "dtype"), EACH_KERNEL, ids=str)
def test_cuda_parameters_of_every_dtype(cols, dtype):
    """Each dtype once as the weight's and once as the bias's; other pairs in each kernel."""
    turn = COLUMNS.index(cols) + EACH_VECTOR.index(dtype)
    for at, weights in enumerate(DTYPES):
        biases = DTYPES[(at + turn) % len(DTYPES)]
        check("cuda", CUDA_ARCH, 2, cols, dtype, weights, biases)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", EACH_VECTOR, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_cuda_every_pair_of_the_parameters_dtypes(cols, dtype):
    for weights, biases in itertools.product(DTYPES, repeat=2):
        check("cuda", CUDA_ARCH, 2, cols, dtype, weights, biases)


@pytest.mark.parametrize(("cols", "dtype"), EACH_KERNEL, ids=str)
def test_cuda_each_gradient_alone(cols, dtype):
    for wanted, parameters in itertools.product(EACH_GRADIENT, (FP32, BF16)):
        check("cuda", CUDA_ARCH, 9, cols, dtype, parameters, wanted=wanted)


@pytest.mark.parametrize(("cols", "dtype"), EACH_KERNEL, ids=str)
def test_cuda_absent_parameters(cols, dtype):
    cases = [(True, False, each) for each in DTYPES] + [(False, True, each) for each in DTYPES]
    for weight, bias, parameters in [*cases, (False, False, torch.float32)]:
        options = {"present": (weight, bias), "wanted": (True, weight, bias)}
        check("cuda", CUDA_ARCH, 2, cols, dtype, parameters, **options)


def test_cuda_every_number_of_threads_and_of_chunks_of_a_row():
    for cols in (*range(2, 32), 40, 72, 136, *range(33, 512, 32)):
        check("cuda", CUDA_ARCH, 9, cols, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_cuda_rows_that_end_with_each_column_of_a_thread(parameters):
    """Blocks of 64, 96 and 288 threads, in which a thread reads 16 or 32 parameters."""
    for cols in (*range(513, 1024, 64), *range(1032, 1536, 96), *range(8200, 9216, 288)):
        check("cuda", CUDA_ARCH, 4, cols, torch.bfloat16, parameters)


def shifted(rows: int, cols: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of one value each, about 1000, but for one element that is a unit or two larger.

    The unit is that of the dtype's last place.
    """
    x = (1000 + 8 * torch.arange(rows)).to(dtype)[:, None].repeat(1, cols)
    at = torch.arange(rows)[:, None] * 37 % cols
    return x.scatter(1, at, (x * (1 + torch.finfo(dtype).eps)).gather(1, at))


def check_nearly_constant(
    backend: str, arch: str, x: torch.Tensor, parameters: torch.dtype, held: bool = False
) -> None:
    """With `held`, of a kernel that subtracts the mean in two parts: right to the last place.

    In others the mean is rounded before it is subtracted.
    """
    rows, cols = x.shape
    weight, bias = torch.ones(cols, dtype=parameters), torch.zeros(cols, dtype=parameters)
    with ptx.run(arch, multiprocessors=1):
        module = dispatch.load("layer_norm", backend)
        y, statistics = module.forward(x, (cols,), weight, bias, EPS)
    mean, rstd = reference.row_statistics(x.double(), (cols,), EPS).view(2, rows, 1)
    exact_y = (x.double() - mean) * rstd
    epsilon = torch.finfo(torch.float32).eps
    rounding = epsilon * mean * (epsilon if held else 1)
    for found, exact, allowed in (
        (statistics[:rows, None], mean, epsilon * mean),
        (statistics[rows:, None], rstd, (1e-6 + (rounding * rstd) ** 2) * rstd),
        (y, exact_y, (torch.finfo(x.dtype).eps + 4 * epsilon) * exact_y.abs() + rounding * rstd),
    ):
        assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(
    ("rows", "cols", "dtype"),
    [
        pytest.param(*shape, dtype, marks=[pytest.mark.sweep] * (not cuda_in_turn(dtype, shape[1])))
        for shape in [*NEARLY_CONSTANT, (3, 16385), (3, 16392)]
        for dtype in DTYPES
    ],
    ids=str,
)
def test_cuda_rows_of_nearly_equal_values(rows, cols, dtype):
    """The variance is 1e-10 of the squared mean."""
    check_nearly_constant("cuda", CUDA_ARCH, shifted(rows, cols, dtype), dtype)


@pytest.mark.parametrize(("rows", "cols"), compiled_in_turn(NEARLY_CONSTANT))
def test_triton_rows_of_nearly_equal_values(rows, cols):
    pytest.importorskip("triton")
    arch, dtype, parameters = triton_setting(cols)
    check_nearly_constant("triton", arch, shifted(rows, cols, dtype), parameters, held=True)


@pytest.mark.parametrize("vec", [1, 2, 4, 8])
def test_swept_rows_of_nearly_equal_values(vec):
    pytest.importorskip("triton")
    arch, dtype, parameters = swept_setting(vec)
    for cols in (16384 + vec, 20480 + vec):
        x = shifted(3, cols, torch.bfloat16).to(dtype)
        check_nearly_constant("triton", arch, x, parameters)


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high + 1, shape).float()


def check_whole_sums(
    backend: str, arch: str, rows: int, cols: int, dtypes: list[torch.dtype], multiprocessors: int
) -> None:
    """dweight and dbias without dx; sums of whole numbers are exact in any order.

    `dtypes`: of x, weight, and bias.
    """
    dtype, weights, biases = dtypes
    x, dy = integers(-3, 3, rows, cols).to(dtype), integers(-1, 1, rows, cols).to(dtype)
    mean, rstd = integers(-2, 2, rows), 2 ** integers(-1, 1, rows)
    weight, bias = torch.ones(cols, dtype=weights), torch.ones(cols, dtype=biases)
    xhat = (x.float() - mean[:, None]) * rstd[:, None]
    module = dispatch.load("layer_norm", backend)
    exact = (dy.float() * xhat).sum(0).to(weights), dy.float().sum(0).to(biases)
    for wanted in ((False, True, True), (False, True, False), (False, False, True)):
        with ptx.run(arch, multiprocessors=multiprocessors):
            statistics = torch.cat((mean, rstd))
            found = module.backward(dy, x, (cols,), weight, bias, statistics, wanted)
        for total, right, asked in zip(found[1:], exact, wanted[1:], strict=True):
            assert total is None if not asked else torch.equal(total, right)


@pytest.mark.parametrize(
    "dtype", [*EACH_VECTOR, pytest.param(torch.float16, marks=pytest.mark.sweep)], ids=str
)
def test_cuda_sums_any_number_of_rows(dtype):
    """A block has 256 columns, which may end at each of a thread's; each of its eight warps takes
    two rows at a time; from 65 rows on there are several partial sums to add."""
    for turn, rows in enumerate((*range(1, 35), 65, 130, 200)):
        for cols in (248, 264, 519):
            check_whole_sums("cuda", CUDA_ARCH, rows, cols, [dtype, *mixed(turn)], 2)
    for turn, cols in enumerate((*range(31, 256, 32), *range(20, 256, 32))):
        check_whole_sums("cuda", CUDA_ARCH, 9, cols, [dtype, *mixed(turn)], 2)


def mixed(turn: int) -> tuple[torch.dtype, torch.dtype]:
    """Of weight and bias."""
    return DTYPES[turn % 3], DTYPES[turn // 3 % 3]


def test_cuda_adds_any_number_of_partial_sums():
    """64 rows each. 32 warps take them in turn, four at a time."""
    for turn, partials in enumerate((2, 3, 4, 5, 7, 9, 17, 31, 33, 64, 100, 128, 129, 160, 165)):
        dtypes = [torch.bfloat16, *mixed(turn)]
        check_whole_sums("cuda", CUDA_ARCH, 64 * partials, 33, dtypes, partials)


@pytest.mark.parametrize(
    ("vec", "out"),
    [
        *itertools.product((1, 2, 4, 8), [BF16]),
        (8, FP32),
        *(pytest.param(vec, FP32, marks=pytest.mark.sweep) for vec in (1, 2, 4)),
    ],
    ids=str,
)
def test_triton_adds_any_number_of_shares(vec, out):
    """Sums of whole numbers are exact: 32 shares make a tile, and any of them may be the last.

    By default in the setting of rows of up to 128, whose kernels are compiled anyway."""
    pytest.importorskip("triton")
    from kernels.layer_norm import triton_backward

    for cols in (64 + vec, 128 - vec):
        for count in (2, 3, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 60, 64, 70):
            shares = integers(-4, 4, 2, count, cols).unbind()
            totals = [torch.full((cols,), torch.nan, dtype=out) for _ in shares]
            with ptx.run(triton_setting(128)[0]):
                triton_backward._launch_sum_shares(count, cols, shares, *totals)
            for total, each in zip(totals, shares, strict=True):
                assert torch.equal(total, each.sum(0).to(out))


@pytest.mark.parametrize(("vec", "arch", "dtype", "out"), VECTORS)
def test_triton_sums_any_number_of_rows(vec, arch, dtype, out):
    """As above; 32 rows make a tile, and from 128 on there are several shares of them."""
    pytest.importorskip("triton")
    from kernels.layer_norm import triton_backward

    for cols in (64 + vec, 128 - vec):
        for rows in (*range(1, 34), 64, 70, 150, 260):
            x, dy = integers(-3, 3, rows, cols).to(dtype), integers(-2, 2, rows, cols).to(dtype)
            mean, rstd = integers(-2, 2, rows), 2 ** integers(-1, 1, rows)
            totals = [torch.full((cols,), torch.nan, dtype=out) for _ in range(2)]
            with ptx.run(arch, multiprocessors=2):
                inputs = dy, x, torch.cat((mean, rstd))
                triton_backward._launch_sums(rows, cols, inputs, *totals)
            xhat = (x.float() - mean[:, None]) * rstd[:, None]
            assert torch.equal(totals[0], (dy.float() * xhat).sum(0).to(out))
            assert torch.equal(totals[1], dy.float().sum(0).to(out))
