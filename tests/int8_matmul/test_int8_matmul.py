"""Products of every implementation against the definition: sizes, strides, modes, extremes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import dispatch
from kernels.int8_matmul import Quantized, int8_linear, int8_matmul, quantize
from tests.int8_matmul import oracle
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("dynamic", "static", "weight_only")
SIZES = [
    (1, 1, 1),
    (1, 65, 200),  # one row: the path of decoding
    (4, 9, 1),  # nothing to sum
    (3, 5, 7),  # all smaller than any vector
    (4, 48, 64),  # all full
    (17, 33, 129),  # one more than vectors and blocks
    (70, 67, 131),  # several blocks of rows
]


def whole(*shape: int) -> Tensor:
    """int8 over the whole range."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def check(y, x, weight, weight_scale, bias, activation, mode, x_scale=None):
    """`y` against the formula in float64, no worse than twice float32's error and a rounding."""
    call = x, weight, weight_scale, bias, activation, mode
    want = oracle.linear(*call, torch.float64, x_scale)
    theirs = oracle.linear(*call, torch.float32, x_scale).to(y.dtype)
    assert y.is_contiguous()
    assert_as_exact_as_torch([y], [theirs], [want], ["y"])


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_integer_sums(implementation, m, n, k):
    a, b = whole(m, k), whole(n, k)
    got = int8_matmul(a, b.t())
    assert got.dtype == torch.int32
    assert torch.equal(got.long(), oracle.sums(a, b))


@pytest.mark.parametrize("values", [(127, 127), (-127, 127), (-128, 127)], ids=str)
@pytest.mark.parametrize("k", [1 << 17, 4097])
def test_sums_do_not_overflow(implementation, k, values):
    """The largest sums there are: pairs of products exceed 16 bits, sums of four exceed 2^24."""
    a = torch.full((3, k), values[0], dtype=torch.int8)
    b = torch.full((5, k), values[1], dtype=torch.int8)
    assert torch.equal(int8_matmul(a, b.t()).long(), oracle.sums(a, b))


def test_largest_sum_of_minus_128(implementation):
    a = torch.full((2, (1 << 17) - 1), -128, dtype=torch.int8)
    assert int8_matmul(a, a.t()).unique().tolist() == [((1 << 17) - 1) << 14]


def test_sums_beyond_2_to_24_are_rounded_once(implementation):
    """An int32 sum becomes a float by rounding to the nearest, whatever it was summed from."""
    k = 1 << 11
    a = torch.full((1, k), 127, dtype=torch.int8)
    b = torch.full((4, k), 127, dtype=torch.int8)
    b[1, :3], b[2, :1], b[3, :7] = 1, 126, 3
    one = torch.ones(())
    got = int8_matmul(a, b.t(), one, one)
    assert torch.equal(got.double(), oracle.sums(a, b).float().double())


STRIDES = {
    "b from [N, K]": lambda b: b,
    "b from [K, N]": lambda b: b.t().contiguous().t(),
    "every other row": lambda b: torch.stack((b, b), 1).flatten(0, 1)[::2],
    "every other column": lambda b: torch.stack((b, b), 2).flatten(1)[:, ::2],
    "a window": lambda b: torch.nn.functional.pad(b, (3, 2, 1, 1))[1:-1, 3:-2],
    "a window of the transpose": lambda b: torch.nn.functional.pad(b.t(), (3, 2, 1, 1))[
        1:-1, 3:-2
    ].t(),
    "expanded": lambda b: b[:1].expand(b.shape),
}


@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("m", [1, 20])
def test_strides(implementation, m, strides, transpose_b):
    a, b = STRIDES[strides](whole(m, 37)), STRIDES[strides](whole(29, 37))
    before = a.clone(), b.clone()
    got = int8_matmul(a, b if transpose_b else b.t(), transpose_b=transpose_b)
    assert torch.equal(got.long(), oracle.sums(a, b))
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_modes(implementation, m, n, k, dtype, mode):
    x, weight = torch.randn(m, k).to(dtype), quantize(torch.randn(n, k))
    bias = torch.randn(n).to(dtype)
    x_scale = torch.tensor([0.02]) if mode == "static" else None  # clamps what exceeds 2.5
    got = int8_linear(x, weight, bias, mode, x_scale=x_scale)
    if mode == "static":
        assert torch.equal(int8_linear(x, weight, bias, mode, x_scale=0.02), got)
    assert got.dtype == dtype
    check(got, x, weight.values, weight.scale[:, 0], bias, None, mode, x_scale)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_activations_and_result_dtypes(implementation, out_dtype, mode, activation):
    x, weight = torch.randn(9, 40), quantize(torch.randn(21, 40))
    bias = torch.randn(21).bfloat16()
    got = int8_linear(x, weight, bias, mode, activation, out_dtype=out_dtype)
    assert got.dtype == out_dtype
    check(got, x, weight.values, weight.scale[:, 0], bias, activation, mode)


@pytest.mark.parametrize("a_scale", [(1, 1), (6,), (6, 1), (2, 3), (2, 3, 1)], ids=str)
@pytest.mark.parametrize("b_scale", [(), (11,), (1, 11)], ids=str)
def test_forms_of_scales(implementation, a_scale, b_scale):
    a, b = whole(2, 3, 19), whole(11, 19)
    scales = 0.1 + torch.rand(a_scale), 0.1 + torch.rand(b_scale)
    got = int8_matmul(a, b.t(), *scales, bias=torch.ones(11), out_dtype=torch.bfloat16)
    assert got.shape == (2, 3, 11)
    rows = scales[0].flatten().expand(6)
    call = a.flatten(0, 1), b, scales[1].flatten(), torch.ones(11), None, "int8"
    check(got.flatten(0, 1), *call, rows)


def test_scales_of_other_dtypes_are_their_values(implementation):
    a, b = whole(4, 19), whole(11, 19)
    scales = torch.rand(4).half(), torch.rand(11).bfloat16()
    want = int8_matmul(a, b.t(), *(scale.float() for scale in scales))
    assert torch.equal(int8_matmul(a, b.t(), *scales), want)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (0, 40), (2, 0, 40)], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_leading_dimensions(implementation, shape, mode):
    x, weight = torch.randn(shape), quantize(torch.randn(21, 40))
    got = int8_linear(x, weight, None, mode)
    assert got.shape == (*shape[:-1], 21)
    rows = x.reshape(-1, 40)
    if len(rows):
        y = got.reshape(-1, 21)
        check(y, rows, weight.values, weight.scale[:, 0], None, None, mode)
    assert int8_matmul(whole(*shape), weight.values.t()).shape == got.shape


def test_nothing_to_sum_gives_the_bias(implementation):
    weight = quantize(torch.randn(3, 0))
    bias = torch.tensor([-1.0, 0.0, 2.0])
    for mode in ("dynamic", "weight_only"):
        got = int8_linear(torch.randn(2, 0), weight, bias, mode, "relu")
        assert torch.equal(got, bias.relu().expand(2, 3))
    assert torch.equal(int8_matmul(whole(2, 0), whole(0, 3)), torch.zeros(2, 3).int())
    assert int8_linear(torch.randn(2, 5), quantize(torch.randn(0, 5))).shape == (2, 0)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_row_that_is_not_finite_is_nan(implementation, activation, poison, mode):
    x = torch.randn(5, 70)
    x[1, 69] = x[3, 0] = poison
    x_scale = torch.tensor([0.05]) if mode == "static" else None
    got = int8_linear(
        x, quantize(torch.randn(9, 70)), torch.ones(9), mode, activation, x_scale=x_scale
    )
    assert got.isnan().all(1).tolist() == [False, True, False, True, False]
    assert got[::2].isfinite().all()


@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-126, 2.0**-121, 2.0**-119, 3e38])
def test_rows_of_any_size(implementation, size):
    """Zeros, subnormal numbers, those around the limit below which rows are zeros, the largest."""
    x = size * torch.linspace(-1, 1, 40).repeat(3, 1)
    weight = quantize(torch.eye(40)[:9])
    got = int8_linear(x, weight)
    check(got, x, weight.values, weight.scale[:, 0], None, None, "dynamic")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 80), st.integers(1, 150)),
    transposed=st.booleans(),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
    one_scale=st.booleans(),
)
def test_any_size(sizes, transposed, mode, dtype, with_bias, one_scale):
    m, n, k = sizes
    x = torch.randn(m, k + 3).to(dtype)[:, 2 : k + 2]
    weight = quantize(torch.randn(n, k), None if one_scale else -1)
    values = weight.values.t().contiguous().t() if transposed else weight.values
    bias = torch.randn(n).to(dtype) if with_bias else None
    x_scale = torch.tensor(0.03) if mode == "static" else None
    got = int8_linear(x, Quantized(values, weight.scale), bias, mode, "relu", x_scale=x_scale)
    scale = None if x_scale is None else x_scale.reshape(1)
    check(got, x, values, weight.scale.reshape(-1), bias, "relu", mode, scale)


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_follows_the_layer_norm(implementation, mode):
    """int8 rows and their scales from elsewhere give what the values stand for."""
    rows, weight = quantize(torch.randn(2, 3, 40)), quantize(torch.randn(9, 40))
    if mode != "dynamic":
        with pytest.raises(ValueError, match="x has its own scale"):
            int8_linear(rows, weight, None, mode)
        return
    got = int8_linear(rows, weight, None, mode, out_dtype=torch.bfloat16)
    call = rows.values.flatten(0, 1), weight.values, weight.scale[:, 0], None, None, "int8"
    check(got.flatten(0, 1), *call, rows.scale.flatten())


@pytest.mark.parametrize("k", [256, 2048])
def test_error_of_both_sides_in_int8_is_small(implementation, k):
    """W8A8, a scale per row and per column, normal values: at most 1.2 % of the result."""
    x, weight = torch.randn(64, k), torch.randn(256, k)
    want = x.double() @ weight.double().t()
    got = int8_linear(x, quantize(weight))
    assert ((got - want).norm() / want.norm()).item() < 0.012


def test_the_number_of_threads_does_not_show(implementation):
    x, weight, threads = torch.randn(37, 300), quantize(torch.randn(130, 300)), []
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            threads.append(int8_linear(x, weight, None, "dynamic"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(threads[0], threads[1])
    assert torch.equal(threads[0], threads[2])


def test_eager_is_exact_where_int_mm_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with dispatch.use("eager"):
        odd = torch.full((2, 2047), 127, dtype=torch.int8)  # an odd sum above 2^24 is no float32
        for a, b in ((whole(5, 3000), whole(7, 3000)), (odd, odd), (odd - 255, odd)):
            assert torch.equal(int8_matmul(a, b.t()).long(), oracle.sums(a, b))
