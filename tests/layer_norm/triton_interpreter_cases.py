"""Values and gradients of the Triton layer norm in Triton's interpreter, for TRITON_INTERPRET=1.

The interpreter must be on before the kernels are decorated, so this file runs in another process
(tests/test_triton_interpreter.py).  Grids are those of a GPU with four multiprocessors.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer_norm import triton as backend
from kernels.layer_norm import triton_backward
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# One lane, powers of two and their neighbours, several tiles, one share and many, ragged ends,
# rows with and without vectors.
SIZES = [
    (1, (1,)),
    (33, (1,)),
    (3, (2,)),
    (33, (7,)),
    (3000, (7,)),
    (3, (63,)),
    (33, (64,)),
    (33, (65,)),
    (200, (128,)),
    (9, (1000,)),
    (3, (1001,)),
    (3, (6, 10)),
]
NAMES = ("y", "dx", "dweight", "dbias")
EPS = 1e-5


def torch_results(x, shape, weight, bias, dy, dtype=None) -> list[Tensor | None]:
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (x, weight, bias)
    ]
    y = F.layer_norm(leaves[0], shape, leaves[1], leaves[2], EPS)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(y, wanted, dy.to(y.dtype)))
    return [y.detach(), *(None if leaf is None else next(found) for leaf in leaves)]


def check(x, shape, weight, bias, dy) -> None:
    assert backend.unsupported(x, shape, weight, bias) is None
    y, statistics = backend.forward(x, shape, weight, bias, EPS)
    gradients = backend.backward(dy, x, shape, weight, bias, statistics, (True, True, True))
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    mean, rstd = statistics.view(2, -1)
    rows = x.double().reshape(len(mean), -1)
    exact_rstd = torch.rsqrt(rows.var(-1, correction=0) + EPS)
    torch.testing.assert_close(mean.double(), rows.mean(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-5, atol=0.0)
    slope = exact_rstd.max().item() * (1.0 if weight is None else weight.abs().max().item())
    size = dy.abs().max().item()
    assert_as_exact_as_torch(
        [y, *gradients],
        torch_results(x, shape, weight, bias, dy),
        torch_results(x, shape, weight, bias, dy, torch.float64),
        NAMES,
        [0.0, size * slope, size, size],
    )


def inputs(rows, shape, dtype, weight_dtype=None):
    weight = torch.randn(shape, dtype=weight_dtype or dtype)
    bias = torch.randn(shape, dtype=weight_dtype or dtype)
    return torch.randn(rows, *shape, dtype=dtype), weight, bias, torch.randn(rows, *shape).to(dtype)


DTYPES = itertools.cycle([torch.float32, torch.float16])  # by turns


@pytest.mark.parametrize(("size", "dtype"), zip(SIZES, DTYPES, strict=False))
def test_values_and_gradients(size, dtype):
    rows, shape = size
    x, weight, bias, dy = inputs(rows, shape, dtype)
    check(x, shape, weight, bias, dy)


@pytest.mark.parametrize(("rows", "cols"), [(1, 201), (5, 200)])
def test_long_rows(monkeypatch, rows, cols):
    for module in (backend, triton_backward):
        monkeypatch.setattr(module, "RESIDENT_COLS", 64)
        monkeypatch.setattr(module, "LONG_BLOCK_N", 64)
    monkeypatch.setattr(triton_backward, "FUSED_COLS", 64)
    x, weight, bias, dy = inputs(rows, (cols,), torch.float32)
    check(x, (cols,), weight, bias, dy)
    check(x, (cols,), None, bias, dy)
    check(x, (cols,), weight, None, dy)


@pytest.mark.parametrize("cols", [24, 200])
def test_rows_of_equal_values_have_no_variance(monkeypatch, cols):
    """The first mean carries its sum's rounding; uncorrected it shows 300 times enlarged."""
    monkeypatch.setattr(backend, "RESIDENT_COLS", 64)
    monkeypatch.setattr(backend, "LONG_BLOCK_N", 64)
    x = torch.randn(9, 1).expand(9, cols)
    y, statistics = backend.forward(x, (cols,), None, None, EPS)
    assert torch.equal(statistics[:9], x[:, 0])
    assert not y.any()


@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize(("with_weight", "with_bias"), [(1, 0), (0, 1), (0, 0)])
def test_optional_parameters(rows, with_weight, with_bias):
    x, weight, bias, dy = inputs(rows, (65,), torch.float32)
    check(x, (65,), weight if with_weight else None, bias if with_bias else None, dy)


@pytest.mark.parametrize("rows", [3, 33])
def test_parameters_of_another_dtype(rows):
    x, weight, bias, dy = inputs(rows, (72,), torch.float16, torch.float32)
    y, statistics = backend.forward(x, (72,), weight, bias.half(), EPS)
    dx, dweight, dbias = backend.backward(
        dy, x, (72,), weight, bias.half(), statistics, (True, True, True)
    )
    assert (y.dtype, dx.dtype) == (torch.float16, torch.float16)
    assert (dweight.dtype, dbias.dtype) == (torch.float32, torch.float16)
    check(x, (72,), weight, bias, dy)


@pytest.mark.parametrize("rows", [3, 33])
@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)))
def test_output_mask(rows, mask):
    x, weight, bias, dy = inputs(rows, (65,), torch.float32)
    _, statistics = backend.forward(x, (65,), weight, bias, EPS)
    every = backend.backward(dy, x, (65,), weight, bias, statistics, (True, True, True))
    some = backend.backward(dy, x, (65,), weight, bias, statistics, mask)
    for asked, one, other in zip(mask, some, every, strict=True):
        assert (one is not None) == asked
        if asked:  # another kernel may add in another order
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_non_contiguous():
    x, weight, bias, dy = inputs(24, (65,), torch.float32)
    weight = torch.stack([weight, weight], 1)[:, 0]
    check(x.reshape(4, 6, 65).transpose(0, 1), (65,), weight, bias, dy.reshape(6, 4, 65))
    check(x, (65,), weight, bias, torch.randn(65, 24).t())
    check(x, (65,), weight, bias, torch.randn(()).expand(24, 65))


def test_leading_dimensions():
    x, weight, bias, _ = inputs(12, (5, 3), torch.float32)
    _, statistics = backend.forward(x.reshape(4, 3, 5, 3), (5, 3), weight, bias, EPS)
    assert statistics.shape == (2 * 4 * 3,)
    _, statistics = backend.forward(x[0], (5, 3), weight, bias, EPS)
    assert statistics.shape == (2,)


@pytest.mark.parametrize("cols", [64, 1001])
def test_large_mean(cols):
    x, weight, bias, dy = inputs(9, (cols,), torch.float32)
    check(x + 1e3, (cols,), weight, bias, dy)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty(shape):
    cols = shape[1:]
    x, weight, bias = torch.randn(shape), torch.randn(cols), torch.randn(cols)
    y, statistics = backend.forward(x, cols, weight, bias, EPS)
    assert y.shape == x.shape
    assert statistics.shape == (2 * shape[0],)
    dx, dweight, dbias = backend.backward(x, x, cols, weight, bias, statistics, (True, True, True))
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros(cols))
    assert torch.equal(dbias, torch.zeros(cols))


def test_infinite_and_nan_rows_stay_alone():
    x, weight, bias, _ = inputs(9, (65,), torch.float32)
    x[2, 7], x[5, 64] = math.inf, math.nan
    y, _ = backend.forward(x, (65,), weight, bias, EPS)
    want = F.layer_norm(x, (65,), weight, bias, EPS)
    torch.testing.assert_close(y, want, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_refused_in_the_interpreter():
    x, weight, bias, _ = inputs(2, (8,), torch.float32)
    assert "bfloat16" in backend.unsupported(x.bfloat16(), (8,), weight, bias)
    assert "bfloat16" in backend.unsupported(x, (8,), weight.bfloat16(), bias)
    assert "float64" in backend.unsupported(x.double(), (8,), None, None)
