"""Values of the Triton int8 matmul in Triton's interpreter, for TRITON_INTERPRET=1.

The interpreter must be on before the kernels are decorated, so this file runs in another process
(tests/test_triton_interpreter.py).
Tiles are small and programs planned as for a GPU with four multiprocessors.
"""

from __future__ import annotations

import pytest
import torch

from kernels.int8_matmul import triton as backend
from kernels.int8_matmul.rows import triton as rows_backend
from tests.ptx.int8_cases import ACTIVATIONS, Options, check, check_call, check_rows

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

FP32, FP16 = torch.float32, torch.float16
# One of each; ragged in all; K in blocks of 32, alone and shared by programs; rows that are copied.
SIZES = [(1, 1, 1), (5, 33, 40), (17, 20, 64), (33, 40, 36), (2, 9, 300), (20, 10, 37)]
OPTIONS = [
    Options("raw"),
    Options("int8", bias=FP32, activation="gelu", gap=3),
    Options("int8", bias=FP16, out_dtype=FP16, activation="relu", n_contiguous=True, gap=5),
    Options("int8", activation="gelu_tanh", per_tensor=True),
    Options("dynamic", FP16, bias=FP32),
    Options("static", FP32, out_dtype=FP16),
    Options("weight_only", FP32, bias=FP32),
    Options("weight_only", FP16, FP16, n_contiguous=True, activation="relu"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_products(options):
    for size in SIZES:
        check(backend, *size, options)


@pytest.mark.parametrize("shape", [(1, 1), (9, 7), (70, 64), (3, 1000), (1, 16500)])
def test_rows(shape):
    for dtype in (FP32, FP16):
        x = (torch.randn(shape) * 3).to(dtype)
        x[0, 0], x[0, -1] = 127, 0.5
        check_rows(rows_backend, x)
        weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1])
        check_rows(rows_backend, x + 2, weight, bias, normalized=True)
        check_rows(rows_backend, x + 2, None, None, normalized=True)


@pytest.mark.parametrize("cols", [76, 16500])
def test_normalised_rows_whose_mean_is_no_float32(cols):
    """Two neighbouring float32 in turns: their deviation is what rounding takes from the mean."""
    x = torch.full((2, cols), 10000.0)
    x[:, ::2] += 2.0**-10
    values, scales = rows_backend.forward(x, True, None, None, 1e-12)
    y = torch.nn.functional.layer_norm(x.double(), (cols,), eps=1e-12)
    assert torch.equal(values, torch.where(y > 0, 127, -127).to(torch.int8))
    torch.testing.assert_close(scales.double(), y.abs().amax(1) / 127, rtol=1e-6, atol=0)


def test_rows_of_zeros_and_of_what_is_not_finite():
    x = torch.randn(6, 40)
    x[0] = 0
    x[1, 3], x[2, 0], x[3, 39] = torch.nan, torch.inf, -torch.inf
    x[4] *= 2.0**-130
    check_rows(rows_backend, x)
    weight = torch.randint(-128, 128, (5, 40), dtype=torch.int8)
    for mode, x_scale in (("dynamic", None), ("static", torch.tensor([0.05]))):
        given = x, weight, x_scale, torch.ones(5), None, "none", mode, FP32
        y = check_call(backend, given)
        assert y.isnan().all(1).tolist() == [False, True, True, True, False, False]


def test_every_activation_where_it_bends():
    x = torch.arange(-120, 120).to(torch.int8)[:, None]
    scales = torch.tensor([0.05]), torch.ones(1)
    for activation in ACTIVATIONS:
        weight = torch.ones(1, 1, dtype=torch.int8)
        check_call(backend, (x, weight, *scales, None, activation, "int8", FP32))


def test_refused_in_the_interpreter():
    x, weight = torch.zeros(2, 8, dtype=torch.int8), torch.zeros(3, 8, dtype=torch.int8)
    scales = torch.ones(2), torch.ones(3)
    rest = scales[1], None, "none"
    bf16 = torch.bfloat16
    assert "bfloat16" in backend.unsupported(x, weight, *scales, None, "none", "int8", bf16)
    assert "bfloat16" in backend.unsupported(x.bfloat16(), weight, None, *rest, "dynamic", FP32)
    bias = torch.ones(3).bfloat16()
    assert "bfloat16" in backend.unsupported(x, weight, *scales, bias, "none", "int8", FP32)
    assert "bfloat16" in rows_backend.unsupported(torch.ones(2, 8).bfloat16(), False, None, None, 0)
