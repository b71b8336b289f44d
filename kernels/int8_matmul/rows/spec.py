"""Layer norm to int8 as tests, bench and the command line see it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels._spec import Case, Direction, Inputs, Spec
from kernels.int8_matmul.quantized import Quantized, dequantize
from kernels.int8_matmul.rows.op import layer_norm_quantize
from kernels.int8_matmul.rows.reference import quantize_rows


def _quantize_in_two(input: Tensor, cols: int, weight: Tensor, bias: Tensor) -> Any:
    """F.layer_norm, then the rule of quantisation by PyTorch's ops."""
    values, scale = quantize_rows(F.layer_norm(input, (cols,), weight, bias))
    return Quantized(values, scale[:, None])


def _dequantized(input: Tensor, cols: int, weight: Tensor, bias: Tensor) -> Tensor:
    return dequantize(layer_norm_quantize(input, cols, weight, bias), input.dtype)


def _normalised(input: Tensor, cols: int, weight: Tensor, bias: Tensor) -> Tensor:
    """In float64 the layer norm itself: the error of a backend is that of quantisation, too."""
    if input.dtype == torch.float64:
        return F.layer_norm(input, (cols,), weight, bias)
    return dequantize(_quantize_in_two(input, cols, weight, bias), input.dtype)


def _case(rows: int, cols: int) -> Case:
    sizes = {"rows": rows, "cols": cols}
    return Case(f"{rows}x{cols}", sizes, directions=("forward",), compiled=False)


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """Rows of different means and scales, a weight around 1, a bias, all in `dtype`."""
    rows, cols = case.sizes["rows"], case.sizes["cols"]
    generator = torch.Generator().manual_seed(rows * 1_000_003 + cols)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(rows, cols) * (0.5 + torch.rand(rows, 1, generator=generator)) + normal(rows, 1)
    tensors = (x, 1 + 0.1 * normal(cols), normal(cols))
    x, weight, bias = (tensor.to(device=device, dtype=dtype) for tensor in tensors)
    return Inputs((x, cols, weight, bias), (), x)


def least_bytes(case: Case, dtype: torch.dtype, direction: Direction) -> int:
    """x in, a byte for each element out."""
    return case.sizes["rows"] * case.sizes["cols"] * (dtype.itemsize + 1)


SPEC = Spec(
    op="int8_matmul.rows",
    function=_dequantized,
    torch_function=_quantize_in_two,
    timed_function=layer_norm_quantize,
    yardstick=_normalised,
    make_inputs=make_inputs,
    gradient_names=(),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    accuracy_cases=(_case(64, 768), _case(37, 1001), _case(3, 40_000)),
    speed_cases=(_case(256, 2048), _case(4096, 1024)),
    least_bytes=least_bytes,
)
