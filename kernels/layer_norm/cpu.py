"""Layer norm on CPUs in C++ SIMD (csrc/layer_norm/cpu.cpp): checks, allocation, one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _native

# The codes of csrc/common/cpu/dtype.h.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def unsupported(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *_: object,
) -> str | None:
    if isinstance(_native.cpu, str):
        return _native.cpu
    if x.device.type != "cpu":
        return f"input is on {x.device.type}, not on the CPU"
    for name, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in _CODES:
            return f"{name} is {tensor.dtype}; accepted are float32, bfloat16 and float16"
    return None


def _parameter(parameter: Tensor | None) -> tuple[Tensor | None, int, int]:
    """The parameter made contiguous (to be kept alive), its address (0: absent), its code."""
    if parameter is None:
        return None, 0, 0
    parameter = parameter.contiguous()
    return parameter, parameter.data_ptr(), _CODES[parameter.dtype]


def _rows_shape(x: Tensor, normalized_shape: Sequence[int]) -> torch.Size:
    return x.shape[: x.dim() - len(normalized_shape)]


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    weight, weight_address, weight_code = _parameter(weight)
    bias, bias_address, bias_code = _parameter(bias)
    y = torch.empty_like(x)
    mean = x.new_empty(_rows_shape(x, normalized_shape), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    elements = x.numel()
    if elements:
        rows = mean.numel()
        _native.cpu.layer_norm_forward(
            x.data_ptr(),
            _CODES[x.dtype],
            rows,
            elements // rows,
            weight_address,
            weight_code,
            bias_address,
            bias_code,
            eps,
            y.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
        )
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, dy = x.contiguous(), dy.contiguous()
    want_weight = output_mask[1] and weight is not None
    want_bias = output_mask[2] and bias is not None
    dx = torch.empty_like(x) if output_mask[0] else None
    # Sums are float32 whatever the parameter's dtype.
    new_sum = x.new_empty if x.numel() else x.new_zeros  # no rows add up to 0
    dweight = new_sum(tuple(normalized_shape), dtype=torch.float32) if want_weight else None
    dbias = new_sum(tuple(normalized_shape), dtype=torch.float32) if want_bias else None
    elements = x.numel()
    if elements:
        rows = mean.numel()
        held, weight_address, weight_code = _parameter(weight)
        _native.cpu.layer_norm_backward(
            dy.data_ptr(),
            x.data_ptr(),
            _CODES[x.dtype],
            rows,
            elements // rows,
            weight_address,
            weight_code,
            mean.data_ptr(),
            rstd.data_ptr(),
            0 if dx is None else dx.data_ptr(),
            0 if dweight is None else dweight.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
        )
    if weight is not None and dweight is not None:
        dweight = dweight.to(weight.dtype)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dx, dweight, dbias
