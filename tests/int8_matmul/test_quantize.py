"""quantize, dequantize and layer_norm_quantize: the rule to the bit, and every option of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import _accuracy
from kernels.int8_matmul import Quantized, dequantize, layer_norm_quantize, quantize
from tests.int8_matmul import oracle

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1), (3, 7), (2, 16), (5, 129), (33, 257), (2, 4100)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return (
        a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())
    )


def assert_follows_the_rule(x: Tensor, got: Quantized) -> None:
    values, scale = oracle.quantize_rows(x.reshape(-1, x.shape[-1]))
    assert torch.equal(got.values, values.view(x.shape))
    assert same_bits(got.scale, scale.view(*x.shape[:-1], 1))
    assert got.zero_point is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_to_the_bit(implementation, size, dtype):
    x = (torch.randn(size) * torch.logspace(-6, 4, size[0])[:, None]).to(dtype)
    assert_follows_the_rule(x, quantize(x))


@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-126, 2.0**-121, 2.0**-120, 1e-30, 3e38])
def test_rows_of_any_size(implementation, size):
    x = size * torch.stack([torch.linspace(-1, 1, 37), torch.full((37,), 1.0), torch.zeros(37)])
    assert_follows_the_rule(x, quantize(x))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [0, 5, 127, 130])
def test_rows_that_are_not_finite(implementation, position, poison):
    x = torch.randn(3, 131)
    x[1, position] = poison
    got = quantize(x)
    assert_follows_the_rule(x, got)
    assert got.scale[1].isnan().all()
    assert dequantize(got)[1].isnan().all()


def test_ties_go_to_even(implementation):
    x = torch.cat((torch.arange(-126.5, 127), torch.tensor([127.0]))).repeat(2, 1)
    got = quantize(x)
    assert got.scale.tolist() == [[1.0], [1.0]]
    assert torch.equal(got.values, x.round().to(torch.int8))


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0), (2, 3, 0), (7,), (2, 1, 3, 5)], ids=str)
def test_shapes(implementation, shape):
    x = torch.randn(shape)
    got = quantize(x)
    assert got.values.shape == x.shape
    assert got.scale.shape == (*shape[:-1], 1)
    if not x.numel():
        assert (got.scale == 1).all()
    else:
        assert_follows_the_rule(x, got)


def test_strides(implementation):
    x = torch.randn(6, 50)
    for view in (x[::2], x[:, 3:], x[:, ::2], x.t(), x[:1].expand(4, 50), x[None].transpose(0, 1)):
        before = view.clone()
        assert_follows_the_rule(view, quantize(view))
        assert torch.equal(view, before)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_any_values(row):
    x = torch.tensor([row, row[::-1]])
    assert_follows_the_rule(x, quantize(x))


def steps_from(x: Tensor, quantized: Quantized) -> Tensor:
    """How far each value is from x, in steps of its scale."""
    values, scale, zero_point = quantized
    return ((dequantize(quantized, torch.float64) - x.double()) / scale.double()).abs()


def test_columns_and_tensors():
    x = torch.randn(6, 9)
    columns = quantize(x, 0)
    assert columns.scale.shape == (1, 9)
    assert torch.equal(columns.values.t(), quantize(x.t()).values)
    assert torch.equal(columns.scale.t(), quantize(x.t()).scale)
    whole = quantize(x, None)
    assert whole.scale.shape == ()
    assert torch.equal(whole.values.flatten(), quantize(x.flatten()).values)
    assert quantize(torch.randn(2, 3, 4), 1).scale.shape == (2, 1, 4)
    assert torch.equal(quantize(x, -2).values, columns.values)
    assert quantize(torch.tensor(3.0), None).values.item() == 127
    assert all(q.values.is_contiguous() for q in (columns, whole))


def test_groups():
    x = torch.randn(5, 2, 12)
    got = quantize(x, group_size=4)
    rows = quantize(x.reshape(5, 2, 3, 4))
    assert got.scale.shape == (5, 2, 3)
    assert torch.equal(got.values, rows.values.view(x.shape))
    assert torch.equal(got.scale, rows.scale[..., 0])
    assert torch.equal(dequantize(got), dequantize(rows).view(x.shape))
    assert torch.equal(dequantize(quantize(x, group_size=1)).sign(), x.sign())


@pytest.mark.parametrize("axis", [-1, 0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_between_the_least_and_the_largest(dtype, axis):
    """All positive: 256 values instead of 128 are in use, and the error is half of it."""
    x = (torch.rand(8, 50) + torch.arange(8)[:, None]).to(dtype)
    got = quantize(x, axis, symmetric=False)
    assert got.zero_point is not None
    assert got.zero_point.dtype == torch.int32
    assert got.zero_point.shape == got.scale.shape
    assert steps_from(x, got).max() <= 0.51
    symmetric = quantize(x, axis)
    assert (got.scale / symmetric.scale).max() < 0.51


def test_zero_is_itself_between_the_least_and_the_largest():
    x = torch.tensor([[0.0, 3.0, 1.0], [-5.0, -1.0, 0.0], [-1.0, 0.0, 7.0], [0.0, 0.0, 0.0]])
    assert torch.equal(dequantize(quantize(x, symmetric=False))[x == 0], torch.zeros(6))
    extremes = torch.tensor([[-3e38, 3e38], [torch.nan, 1.0], [torch.inf, 0.0], [1e-40, 0.0]])
    got = dequantize(quantize(extremes, symmetric=False))
    assert got[0].isfinite().all()
    assert got[1:3].isnan().all()
    assert got[3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_other_dtypes(scale_dtype, symmetric):
    """Values are rounded by the scale as it is kept, so they are right to half a step of it."""
    x = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    got = quantize(x, symmetric=symmetric, scale_dtype=scale_dtype)
    assert got.scale.dtype == scale_dtype
    inside = got.values.abs() < 127  # the largest may be clamped by a scale that was rounded down
    assert steps_from(x, got)[inside].max() <= 0.51
    assert steps_from(x, got).max() <= 1.1
    extremes = torch.tensor([[1e-9, -1e-9], [1e30, -1e30], [0.0, 0.0]])
    assert dequantize(quantize(extremes, scale_dtype=scale_dtype)).isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dequantize_rounds_once(dtype):
    quantized = quantize(torch.randn(5, 40))
    want = quantized.values.double() * quantized.scale.double()
    got = dequantize(quantized, dtype)
    assert got.dtype == dtype
    wide = want if dtype == torch.float64 else want.float()
    assert torch.equal(got, wide.to(dtype))


def test_out_is_written_and_returned():
    x = torch.randn(4, 6)
    out = Quantized(torch.empty(4, 6, dtype=torch.int8), torch.empty(4, 1))
    assert quantize(x, out=out) is out
    assert torch.equal(out.values, quantize(x).values)
    assert torch.equal(out.scale, quantize(x).scale)


def test_of_a_parameter_there_is_no_gradient():
    got = quantize(torch.randn(3, 4, requires_grad=True))
    assert not got.values.requires_grad
    assert not got.scale.requires_grad


X = torch.randn(3, 6)
INT8 = X.to(torch.int8)
REFUSED = {
    "x not a tensor": (lambda: quantize([1.0]), TypeError, "x must be a Tensor, not list"),
    "x int": (lambda: quantize(X.int()), TypeError, "x is torch.int32; accepted: float32"),
    "x complex": (lambda: quantize(X.cfloat()), TypeError, "x is torch.complex64"),
    "axis": (lambda: quantize(X, 2), ValueError, "axis is 2, but x has 2 dim"),
    "axis type": (lambda: quantize(X, "0"), TypeError, "axis must be an int or None"),
    "0-dim": (lambda: quantize(torch.tensor(1.0)), ValueError, "axis is -1, but x has 0 dim"),
    "group_size": (lambda: quantize(X, group_size=4), ValueError, "group_size must divide"),
    "group_size 0": (lambda: quantize(X, group_size=0), ValueError, "group_size must divide"),
    "group axis": (lambda: quantize(X, 0, group_size=3), ValueError, "axis=-1 only"),
    "symmetric": (lambda: quantize(X, symmetric=1), TypeError, "symmetric must be a bool"),
    "scale_dtype": (
        lambda: quantize(X, scale_dtype=torch.int8),
        TypeError,
        "scale_dtype is torch.int8",
    ),
    "out": (lambda: quantize(X, out=(INT8, X)), TypeError, "out must be a Quantized"),
    "out shape": (
        lambda: quantize(X, out=Quantized(INT8, X[:, 0])),
        ValueError,
        r"out.scale must be torch.float32 of shape \[3, 1\], but is torch.float32 of shape \[3\]",
    ),
    "dequantize": (lambda: dequantize(X), TypeError, "quantized must be a Quantized"),
    "dequantize dtype": (lambda: dequantize(quantize(X), torch.int32), TypeError, "dtype is torch"),
    "values": (lambda: dequantize(Quantized(X, X)), TypeError, "quantized.values is torch.float32"),
    "scale": (
        lambda: dequantize(Quantized(INT8, X[:, :4])),
        ValueError,
        r"quantized.scale of shape \[3, 4\] does not fit quantized.values of shape \[3, 6\]",
    ),
    "zero_point": (
        lambda: dequantize(Quantized(INT8, X[:, :1], torch.zeros(3).int())),
        ValueError,
        "zero_point must have the shape",
    ),
    "ln input": (lambda: layer_norm_quantize(INT8, 6), TypeError, "input is torch.int8"),
    "ln shape": (
        lambda: layer_norm_quantize(X, 5),
        ValueError,
        r"expects input of shape \[\*, 5\]",
    ),
    "ln two": (lambda: layer_norm_quantize(X, (3, 6)), ValueError, "last size of input alone"),
    "ln weight": (lambda: layer_norm_quantize(X, 6, X), ValueError, "weight must have shape"),
    "ln bias": (lambda: layer_norm_quantize(X, 6, None, 1.0), TypeError, "bias must be a Tensor"),
    "ln eps": (lambda: layer_norm_quantize(X, 6, eps="1"), TypeError, "eps must be a float"),
    "ln device": (
        lambda: layer_norm_quantize(X, 6, X[0].to("meta")),
        RuntimeError,
        "weight is on meta",
    ),
    "ln gradient": (
        lambda: layer_norm_quantize(X.clone().requires_grad_(), 6),
        RuntimeError,
        "has no gradient",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_errors_name_the_argument(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [*SIZES[1:], (4, 3, 30)], ids=str)
@pytest.mark.parametrize("parameters", ["none", "both"])
def test_layer_norm_quantize(implementation, parameters, size, dtype):
    """Half a step of the scale, and the layer norm's own error, from float64's layer norm."""
    x = (torch.randn(size) + 3 * torch.randn(*size[:-1], 1)).to(dtype)
    weight = None if parameters == "none" else torch.rand(size[-1]) + 0.5
    bias = None if parameters == "none" else torch.randn(size[-1]).bfloat16()
    got = layer_norm_quantize(x, size[-1], weight, bias)
    wide = [p if p is None else p.double() for p in (weight, bias)]
    want = F.layer_norm(x.double(), size[-1:], *wide)
    norm = F.layer_norm(x.float(), size[-1:], *(p if p is None else p.float() for p in wide))
    largest = want.abs().amax(-1, keepdim=True)
    slack = _accuracy.allowed(_accuracy.error(norm, want), torch.float32)
    assert got.scale.shape == (*size[:-1], 1)
    assert ((got.scale.double() * 127 / largest - 1).abs() <= slack).all()
    distance = (got.values.double() - want * 127 / largest).abs()
    assert distance.max().item() <= 0.5 + 2 * 127 * slack


def test_layer_norm_quantize_of_extremes(implementation):
    x = torch.randn(6, 33)
    x[1, 4], x[2, 0], x[3] = torch.nan, torch.inf, 2.5
    got = layer_norm_quantize(x, (33,))
    assert got.scale[:, 0].isnan().tolist() == [False, True, True, False, False, False]
    assert (got.values[1:4] == 0).all()
    assert got.scale[3] == 1  # equal values have no deviation: a row of zeros
    assert layer_norm_quantize(torch.randn(0, 5), 5).values.shape == (0, 5)
    large = layer_norm_quantize(1000 + torch.randn(4, 65), 65, eps=1e-3)
    assert (large.values.abs().amax(1) == 127).all()
