"""Int8 matmul's CPU backend, with every instruction set: exact sums, and float64 for the rest."""

from __future__ import annotations

import numpy
import pytest
import torch

from kernels.int8_matmul import cpu, reference
from tests.int8_matmul.cpu_cases import (
    DTYPES,
    LAYOUTS,
    arguments,
    bytes_of,
    check,
    exact_sums,
    instruction_set,
    needs_module,
    sums,
    weights,
)
from tests.tolerance import assert_as_exact_as_torch

__all__ = ["instruction_set"]  # a fixture

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), needs_module]

MODES = ("int8", "dynamic", "static", "weight_only")

# Rows of x: single ones in fours, twos and one; the largest number of single ones (4, 8, 16, 24)
# and one more; groups of 4, 8 and 16 with and without a rest, panels of 1 to 4 groups, a chunk of
# 16 groups and one more row.
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 18, 24, 25, 29, 32, 33, 40, 44, 48, 61, 64, 65, 80)
MANY_ROWS = (128, 144, 255, 256, 257, 272, 300)
# Outputs: less than a tile, each rest of 16 or so, one block of 96 and its neighbours, several.
COLS = (1, 2, 5, 6, 7, 8, 11, 12, 13, 15, 16, 17, 31, 33, 48, 90, 95, 96, 97, 101, 192, 200)
# Terms: rests of 4 and 2 in a step, of 8, 16 and 64 in a vector.
DEPTHS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 60, 61, 62, 63, 64, 65, 127, 129, 200)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_exact(instruction_set, layout):
    for i, rows in enumerate(ROWS + MANY_ROWS):
        for j in (0, 7, 14):  # each number of rows with three of columns and terms
            cols, depth = COLS[(i + j) % len(COLS)], DEPTHS[(3 * i + j) % len(DEPTHS)]
            x, weight = bytes_of(rows, depth + 2)[:, :depth], weights(cols, depth, layout)
            y = sums(x, weight)
            assert torch.equal(y, exact_sums(x, weight)), (rows, cols, depth)


@pytest.mark.parametrize("cols", [1, 5, 16, 17, 96, 101])
def test_every_rest_of_the_terms(instruction_set, cols):
    for i, depth in enumerate(DEPTHS):
        rows = (1, 3, 20, 33)[i % 4]
        for layout in LAYOUTS[:2]:
            x, weight = bytes_of(rows, depth), weights(cols, depth, layout)
            assert torch.equal(sums(x, weight), exact_sums(x, weight)), (rows, depth, layout)


# Pieces of 2048 and 4096 terms, a rest after them; the limit of the op.
@pytest.mark.parametrize("depth", [2048, 2049, 4095, 4097, 8200, 2**17])
@pytest.mark.parametrize("rows", [1, 4, 33])
def test_long_sums(instruction_set, rows, depth):
    for layout in LAYOUTS[:2]:
        x, weight = bytes_of(rows, depth), weights(3, depth, layout)
        assert torch.equal(sums(x, weight), exact_sums(x, weight)), layout


@pytest.mark.parametrize(
    ("a", "b"), [(127, 127), (-127, 127), (-128, 127), (127, -128), (-128, -128)]
)
@pytest.mark.parametrize("rows", [1, 33])
def test_the_largest_sums(instruction_set, rows, a, b):
    depth = 2**17 - 1 if a == b == -128 else 2**17
    x = torch.full((rows, depth), a, dtype=torch.int8)
    weight = torch.full((2, depth), b, dtype=torch.int8)
    assert (sums(x, weight) == a * b * depth).all()
    if a != b:  # 2 * 128 * 255 does not fit in int16, where vpmaddubsw would have it
        x[:, ::2] = b
        assert torch.equal(sums(x, weight), exact_sums(x, weight))


def test_sums_are_rounded_to_nearest(instruction_set):
    # Beyond 2^24 not every integer is a float.
    x, weight = bytes_of(20, 70_000).clamp(0), bytes_of(7, 70_000).clamp(0)
    one = torch.ones(1)
    y = cpu.forward(x, weight, one, one, None, "none", "int8", torch.float32)[0]
    want = x.long() @ weight.long().t()
    assert want.min() > 2**24
    assert torch.equal(y, want.float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes(instruction_set, mode, dtype):
    for layout in LAYOUTS:
        check(mode, dtype, (3, 21, 70), layout=layout)
        check(mode, dtype, (37, 101, 300), layout=layout)
    check(mode, dtype, (1, 200, 5000))  # several pieces of the terms
    check(mode, dtype, (70, 20, 5000))
    check(mode, dtype, (40, 30, 257), scales="one", bias=None)
    check(mode, dtype, (2, 30, 257), scales="one", bias=dtype, out_dtype=torch.float32)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("mode", ["int8", "dynamic", "weight_only"])
def test_activations_and_output_dtypes(instruction_set, mode, activation):
    for out_dtype in DTYPES:
        for shape in ((2, 37, 64), (33, 97, 64)):
            check(mode, torch.float32, shape, activation=activation, out_dtype=out_dtype)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_activations_everywhere(instruction_set, activation):
    """Each value by itself: near 0, in the tails, at the ends of the floats, NaN."""
    x = torch.cat([torch.linspace(-15, 15, 6001), torch.linspace(-0.01, 0.01, 999)])
    ends = torch.tensor([3e38, -3e38, 1e20, -1e20, 30.0, -30.0, 1e-40, -1e-40, 0.0])
    one, weight = torch.ones(1), torch.ones(1, 1, dtype=torch.int8)

    def ours(values):
        call = values[:, None], weight, None, one, None, activation, "weight_only", torch.float32
        return cpu.forward(*call)[0][:, 0]

    exact = reference.activate(x.double(), activation)
    torch_error = (reference.activate(x, activation) - exact).abs()
    error = (ours(x) - exact).abs()
    assert (error <= 2 * torch_error.max() + 1.2e-7 * x.abs()).all()
    want = reference.activate(ends.double(), activation)
    assert torch.allclose(ours(ends).double(), want, rtol=1e-6, atol=1e-30)
    assert ours(torch.tensor([torch.nan, torch.inf])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("rows", [3, 33])
def test_a_row_that_is_not_finite_is_nan(instruction_set, mode, rows):
    call = arguments(mode, torch.float32, (rows, 50, 130), activation="relu")
    x = call[0]
    clean = cpu.forward(*call)[0]
    x[0, 129], x[1, 64], x[2, 0] = torch.nan, torch.inf, -torch.inf
    y = cpu.forward(*call)[0]
    assert y[:3].isnan().all()
    assert torch.equal(y[3:], clean[3:])


def test_a_value_that_is_not_finite_is_used_as_it_is(instruction_set):
    for rows in (3, 33):
        call = arguments("weight_only", torch.float32, (rows, 50, 130))
        call[0][0, 5], call[0][1, 7], call[0][2, 8] = torch.nan, torch.inf, -torch.inf
        y, want = cpu.forward(*call)[0], reference.forward(*call)[0]
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isinf(), want.isinf())


def test_rows_of_any_size(instruction_set):
    for rows in (5, 40):
        call = arguments("dynamic", torch.float32, (rows, 20, 100), bias=None)
        x = call[0]
        x[0], x[1], x[2], x[3] = 0, x[1] * 1e-37, x[2] * 1e37, x[3] * 1e-20
        y, want = cpu.forward(*call)[0].double(), reference.forward(*call[:7], torch.float64)[0]
        assert (y[:2] == 0).all()  # 1e-37 is below 2^-120
        assert ((y - want).abs() <= 1e-6 * want.abs().amax(1, keepdim=True)).all()


def test_values_beyond_a_static_scale_are_clamped(instruction_set):
    x = torch.tensor([[1e30, -1e30, 0.26, -0.24, 0.25, 0.75]])  # the last two are ties
    weight = torch.eye(6, dtype=torch.int8)
    scale, one = torch.tensor([0.5]), torch.ones(1)
    y = cpu.forward(x, weight, scale, one, None, "none", "static", torch.float32)[0]
    assert torch.equal(y, torch.tensor([[63.5, -63.5, 0.5, 0.0, 0.0, 1.0]]))


def test_few_rows_of_weights_alone(instruction_set):
    """Rows that go through the bytes of fixed-point numbers, and those that must not."""
    for rows in (1, 2, 5, 6):
        for depth in (1, 63, 64, 1000):
            check("weight_only", torch.float32, (rows, 17, depth))
    for depth in (65_536, 65_537):  # the most terms that go through bytes, and one more
        check("weight_only", torch.float32, (2, 17, depth))
    for size in (1e-38, 1e-30, 1e-20, 1e20, 1e30):
        x, weight, one = torch.randn(3, 200) * size, weights(20, 200), torch.ones(1)
        call = x, weight, None, one, None, "none", "weight_only"
        ours, plain = (f(*call, torch.float32) for f in (cpu.forward, reference.forward))
        want = reference.forward(x.double(), *call[1:], torch.float64)
        assert_as_exact_as_torch(ours, plain, want, ("y",))


def test_a_value_far_above_the_others_hides_none(instruction_set):
    x, weight = torch.randn(2, 300), weights(40, 300)
    x[:, 7], weight[:, 7] = 1e25, 0  # it counts nowhere
    one = torch.ones(1)
    y = cpu.forward(x, weight, None, one, None, "none", "weight_only", torch.float32)[0]
    exact = x.double() @ weight.double().t()
    assert ((y - exact).abs() <= 1e-6 * exact.abs().amax()).all()


def test_large_outputs(instruction_set):
    # 4 MiB and more are written past the caches, where rows are whole cache lines.
    check("dynamic", torch.float32, (1100, 1024, 9))
    check("dynamic", torch.float32, (1100, 1001, 9))


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_the_number_of_threads_changes_nothing(instruction_set, mode):
    threads = torch.get_num_threads()
    try:
        for shape in ((1, 500, 2000), (20, 300, 1000), (200, 200, 700)):
            for layout in LAYOUTS[:2]:
                call = arguments(mode, torch.float32, shape, layout=layout)
                results = []
                for count in (1, 2, 3, 5):
                    torch.set_num_threads(count)
                    results.append(cpu.forward(*call)[0])
                assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(threads)


def test_x_is_made_ready_in_parts(instruction_set):
    # 300 rows of 2^15 terms are more than is kept ready at a time.
    call = arguments("dynamic", torch.float32, (300, 2, 2**15))
    y, want = cpu.forward(*call)[0], reference.forward(*call[:7], torch.float64)[0]
    assert (y - want).abs().max() < 1e-5 * want.abs().max()


def test_rows_more_than_4_gib_apart():
    far = 2**32 + 64
    memory = torch.from_numpy(numpy.empty(far + 200, numpy.int8))  # what is touched takes memory
    x, weight = memory.as_strided((2, 100), (far, 1)), memory.as_strided((2, 60), (far, 1), 120)
    x[:], weight[:] = bytes_of(2, 100), bytes_of(2, 60)
    one = torch.ones(1)
    assert torch.equal(sums(x[:, :60], weight), exact_sums(x[:, :60], weight))
    call = x[:, :60], weight.t().contiguous().t(), one, one, None, "none", "int8", torch.float32
    assert torch.equal(cpu.forward(*call)[0], exact_sums(x[:, :60], weight).float())


def test_refusals():
    call = arguments("dynamic", torch.float32, (2, 3, 4))
    assert cpu.unsupported(*call) is None
    double = (call[0].double(), *call[1:])
    assert "x is torch.float64" in str(cpu.unsupported(*double))
    assert "out_dtype is torch.float64" in str(cpu.unsupported(*call[:7], torch.float64))
    bias = (*call[:4], call[4].double(), *call[5:])
    assert "bias is torch.float64" in str(cpu.unsupported(*bias))
    meta = (call[0].to("meta"), *call[1:])
    assert "x is on meta" in str(cpu.unsupported(*meta))


@pytest.mark.sweep
def test_every_size(instruction_set):
    for rows in ROWS + MANY_ROWS:
        for cols in COLS:
            for depth in DEPTHS:
                for layout in LAYOUTS[:2]:
                    x, weight = bytes_of(rows, depth), weights(cols, depth, layout)
                    y = sums(x, weight)
                    assert torch.equal(y, exact_sums(x, weight)), (rows, cols, depth, layout)
