"""Layer norm on CPUs in C++ SIMD (csrc/layer_norm/cpu.cpp): checks, allocation, one native call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _native
from kernels._native import DTYPE_CODES, dtype_refusal

_CPU = torch.device("cpu")  # said outright: torch.device(...) as a context changes the default


def unsupported(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *_: object,
) -> str | None:
    if isinstance(_native.cpu, str):
        return _native.cpu
    if not x.is_cpu:
        return f"input is on {x.device.type}, not on the CPU"
    if x.dtype not in DTYPE_CODES:
        return dtype_refusal("input", x)
    if weight is not None and weight.dtype not in DTYPE_CODES:
        return dtype_refusal("weight", weight)
    if bias is not None and bias.dtype not in DTYPE_CODES:
        return dtype_refusal("bias", bias)
    return None


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = x.contiguous()
    y = torch.empty_like(x)
    elements, cols = x.numel(), math.prod(normalized_shape)
    mean = rstd = None
    mean_address = rstd_address = weight_address = bias_address = weight_code = bias_code = 0
    if statistics:
        leading = x.dim() - len(normalized_shape)
        # One dimension as an int: a shape takes 2 µs longer to parse.
        size = x.shape[0] if leading == 1 else x.shape[:leading]
        mean = torch.empty(size, dtype=torch.float32, device=_CPU)
        rstd = torch.empty_like(mean)
        mean_address, rstd_address = mean.data_ptr(), rstd.data_ptr()
    if weight is not None:
        weight = weight.contiguous()
        weight_address, weight_code = weight.data_ptr(), DTYPE_CODES[weight.dtype]
    if bias is not None:
        bias = bias.contiguous()
        bias_address, bias_code = bias.data_ptr(), DTYPE_CODES[bias.dtype]
    if elements:
        _native.cpu.layer_norm_forward(
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            elements // cols,
            cols,
            weight_address,
            weight_code,
            bias_address,
            bias_code,
            eps,
            y.data_ptr(),
            mean_address,
            rstd_address,
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
    weight_address = weight_code = bias_code = 0
    dx = torch.empty_like(x) if output_mask[0] else None
    new = torch.empty_like if x.numel() else torch.zeros_like  # no rows add up to 0
    dweight = dbias = None
    if weight is not None:
        weight = weight.contiguous()
        weight_address, weight_code = weight.data_ptr(), DTYPE_CODES[weight.dtype]
        if output_mask[1]:
            dweight = new(weight)
    if output_mask[2] and bias is not None:
        dbias = new(bias, memory_format=torch.contiguous_format)
        bias_code = DTYPE_CODES[bias.dtype]
    elements, cols = x.numel(), math.prod(normalized_shape)
    if elements:
        _native.cpu.layer_norm_backward(
            dy.data_ptr(),
            x.data_ptr(),
            DTYPE_CODES[x.dtype],
            elements // cols,
            cols,
            weight_address,
            weight_code,
            mean.data_ptr(),
            rstd.data_ptr(),
            0 if dx is None else dx.data_ptr(),
            0 if dweight is None else dweight.data_ptr(),
            0 if dbias is None else dbias.data_ptr(),
            bias_code,
        )
    return dx, dweight, dbias
