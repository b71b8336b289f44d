"""Layer norm on CPUs in C++ SIMD (csrc/layer_norm/cpu.cpp): checks, allocation, one native call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _native
from kernels._native import DTYPE_CODES, dtype_refusal


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
) -> tuple[Tensor, Tensor | None]:
    x = x.contiguous()
    y = torch.empty_like(x)
    cols = math.prod(normalized_shape)
    rows = x.numel() // cols if cols else math.prod(x.shape[: x.dim() - len(normalized_shape)])
    kept = x.new_empty(2 * rows, dtype=torch.float32) if statistics else None
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    if rows and cols:
        _native.cpu.layer_norm_forward(x, rows, cols, weight, bias, eps, y, kept)
    return y, kept


def backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x = x.contiguous()
    cols = math.prod(normalized_shape)
    rows = x.numel() // cols if cols else 0
    new = torch.empty_like if rows else torch.zeros_like  # no rows add up to 0
    with_dx, with_dweight, with_dbias = output_mask
    dx = torch.empty_like(x) if with_dx else None
    dweight = dbias = None
    if weight is not None:
        weight = weight.contiguous()
        if with_dweight:
            dweight = new(weight)
    if with_dbias and bias is not None:
        dbias = new(bias.contiguous())
    if rows:
        _native.cpu.layer_norm_backward(
            dy.contiguous(), x, rows, cols, weight, statistics, dx, dweight, dbias
        )
    return dx, dweight, dbias
