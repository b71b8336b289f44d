"""Int8 matmul where one instruction is easily lost: every kernel's ends and epilogues, for CUDA.

Found by the mutation test (ptx/mutate.py). A kernel is unrolled: each of its copies of a load, a
bound or a store needs a row that ends there, a largest number that lies there, a dtype, an
activation. All of it runs in kernels that test_int8_matmul_cuda.py has compiled.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import ptx
from kernels.int8_matmul import cuda
from kernels.int8_matmul.rows import cuda as rows_cuda
from tests.ptx.conftest import spread
from tests.ptx.int8_cases import (
    ACTIVATIONS,
    FLOATS,
    Options,
    arguments,
    check_call,
    check_rows,
    check_rows_of_bias,
)

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

FP32, BF16, FP16 = FLOATS
BIASES = (None, *FLOATS)
# Of rows that end in each of the eight numbers of each vector that a thread keeps.
ENDS = [256 * chunk + 128 + end for chunk in range(4) for end in range(1, 9)]

# ---- epilogues

# Rows, depth, multiprocessors and mode that end in this kernel, after that one.
EPILOGUES = {
    "gemv, integers": (2, 16, 1, "int8"),
    "gemv, floats": (2, 16, 1, "weight_only"),
    "tiles of 64": (9, 16, 100, "int8"),
    "tiles of 128": (9, 16, 1, "int8"),
    "weight only": (9, 16, 100, "weight_only"),
    "parts": (9, 1024, 16, "int8"),
    "parts, weight only": (9, 1024, 16, "weight_only"),
}


@pytest.mark.parametrize("path", EPILOGUES)
def test_epilogues(path):
    """Each number of neighbours at a row's end with each dtype of bias and of y; every activation
    of small numbers and large ones."""
    m, k, multiprocessors, mode = EPILOGUES[path]
    for n, turn in itertools.product(range(20, 24), range(4)):
        options = Options(
            mode,
            BF16,
            FLOATS[(turn + n) % 3],
            BIASES[turn],
            ACTIVATIONS[(turn + n) % 4],
            per_tensor=turn == n % 4 == 2,
        )
        given = arguments(m, n, k, options)
        x, x_scale, bias = given[0], given[2], given[4]
        (x if x_scale is None else x_scale)[::2] /= 32
        if bias is not None:
            bias[::3] /= 32
        with ptx.run("sm_80", multiprocessors=multiprocessors):
            check_call(cuda, given)
    for n in range(20, 24) if mode == "int8" else ():
        with ptx.run("sm_80", multiprocessors=multiprocessors):
            check_call(cuda, arguments(m, n, k, Options("raw")))


def test_factors_that_start_anywhere():
    """Scales and a bias of which four are no vector."""
    for m, mode in itertools.product((2, 9), ("int8", "weight_only")):
        given = [*arguments(m, 20, 16, Options(mode, bias=FP32))]
        for at in (3, 4):
            given[at] = torch.cat([torch.full((1,), 99.0), given[at]])[1:]
        with ptx.run("sm_80", multiprocessors=100):
            check_call(cuda, tuple(given))


def test_every_number_of_parts():
    """They are added by a loop unrolled by 4; tiles of 128 have two at most."""
    for parts, mode in itertools.product((3, 5, 6, 7), ("int8", "weight_only")):
        with ptx.run("sm_80", multiprocessors=16) as session:
            check_call(cuda, arguments(9, 5, 512 * parts, Options(mode)))
        assert session.launches[0].grid[1] == parts
    with ptx.run("sm_80", multiprocessors=1) as session:
        check_call(cuda, arguments(70, 69, 1024, Options("int8")))
    assert session.launches[0].grid[:2] == (1, 2)


# ---- ends of the depth


def test_copies_end_anywhere():
    """Matrices off 16-byte boundaries, in words and in bytes; weights by columns."""
    for k, stride in itertools.product(range(33, 49), (52, 53)):
        options = Options(gap=stride - k)
        with ptx.run("sm_80", multiprocessors=100):
            check_call(cuda, arguments(9, 5, k, options))
    for n, stride in itertools.product(range(65, 81), (84, 85)):
        options = Options(n_contiguous=True, gap=stride - n)
        with ptx.run("sm_80", multiprocessors=100):
            check_call(cuda, arguments(2, n, n - 12, options))


FEW = [("int8", BF16), *itertools.product(("dynamic", "static", "weight_only"), FLOATS)]


@pytest.mark.parametrize(("mode", "dtype"), FEW, ids=str)
def test_few_rows_end_anywhere(mode, dtype):
    """Depths around a step, their last 16 bytes in every state, next to numbers that are not x's;
    floats are quantised in the same launch."""
    m = 1 if dtype == FP32 else 2
    depths = [1, 2, 3, 5, 1023, 1024, 1025, 1537, *range(509, 517)]
    if dtype == BF16 and mode != "dynamic":
        depths += range(497, 530)  # the weight's 16 bytes, too
    for turn, k in enumerate(depths):
        given = [*arguments(m, 16, k, Options(mode, dtype, gap=(16, 3)[turn % 2]))]
        x = given[0]
        if mode == "static":
            given[2] = torch.tensor([0.01])  # most numbers are beyond 127, on either side
        elif mode == "dynamic":
            x[-1, 7 * turn % k] = -20
        with ptx.run("sm_80", multiprocessors=1) as session:
            check_call(cuda, tuple(given))
        assert len(session.launches) == 1


def test_static_scales_clip_everywhere():
    """In each of a thread's numbers, on either side; rows end in each, next to whole vectors."""
    for k in (20485, *ENDS):
        given = [*arguments(9, 3, k, Options("static"))]
        given[2] = torch.tensor([0.01])
        with ptx.run("sm_80", multiprocessors=100):
            check_call(cuda, tuple(given))


# ---- rows as int8


def test_rows_end_anywhere():
    """In each of the numbers that a thread keeps: with rows on 16-byte boundaries and off them."""
    for turn, cols in enumerate([*ENDS, *range(20481, 20489)]):
        x = torch.randn(2 if cols > 1024 else 3, cols).bfloat16()
        x[0, -1] = x[1, cols // 8 * 8 - 8] = -9  # a sweep of its own looks for the largest
        for gap in (8 + -cols % 8, 1) if cols <= 1024 else (8 + -cols % 8,):
            with ptx.run("sm_80"):
                check_rows(rows_cuda, spread(x, gap, 8 * (turn % 2)))


@pytest.mark.parametrize("chunk", [0, 1, 40], ids=str)
def test_normalized_rows_end_anywhere(chunk):
    """As above, with weights and biases in every dtype; rows of chunk 40 are swept."""
    for end, turn in itertools.product(range(1, 9), range(3)):
        cols = 256 * chunk + 128 * (chunk < 2) + end
        x = (torch.randn(2, cols) * 5 + 3).bfloat16()
        x[0, -1] = x[1, cols // 8 * 8 - 8] = -60  # a sweep of its own looks for the largest
        weight, bias = torch.randn(cols + 1), torch.randn(cols + 1)
        weight, bias = weight.to(FLOATS[turn]), bias.to(FLOATS[turn - 1])
        for first in range(2 if end == 8 else 1):  # parameters off 16-byte boundaries, too
            given = weight[first : cols + first], bias[first : cols + first]
            with ptx.run("sm_80"):
                check_rows(rows_cuda, spread(x, 8 + -cols % 8, 0), *given, normalized=True)


def spiked(rows: int, cols: int, chunks: int, threads: int) -> torch.Tensor:
    """Row r has its largest number in lane r or warp r, the rows together in each of the numbers
    that a thread keeps; it is negative, so -127."""
    x = torch.rand(rows, cols).bfloat16()
    for row in range(rows):
        thread = row if threads == 32 else 32 * row + 7 * row % 32
        column = (row % chunks * threads + thread) * 8 + row // chunks % 8
        x[row, column] = -30
    return x


def test_the_largest_number_may_be_anywhere():
    with ptx.run("sm_80", multiprocessors=1):
        check_rows(rows_cuda, spiked(32, 1024, 4, 32))
        check_rows(rows_cuda, spiked(32, 512, 2, 32), normalized=True)
        check_rows(rows_cuda, spiked(20, 20480, 4, 640))
        check_rows(rows_cuda, spiked(20, 10240, 2, 640), normalized=True)


def test_short_rows_keep_to_themselves():
    """Several to a warp, each of another size than the rows around it."""
    for cols in (8, 9, 16, 17, 33, 65, 129):
        x = (torch.randn(40, cols) * 4.0 ** torch.randint(-6, 6, (40, 1))).bfloat16()
        with ptx.run("sm_80", multiprocessors=1):
            check_rows(rows_cuda, x)
            check_rows(rows_cuda, x, normalized=True)


@pytest.mark.parametrize("cols", [140, 10248])
def test_normalized_rows_that_are_their_bias(cols):
    with ptx.run("sm_80"):
        check_rows_of_bias(rows_cuda, torch.randn(3, cols).bfloat16(), FP32)
