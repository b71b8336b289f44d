"""Rows as int8 on CPUs in C++ SIMD (csrc/int8_matmul/cpu_rows.cpp): checks, one native call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _native
from kernels._native import DTYPE_CODES, dtype_refusal

backward = None


def unsupported(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    if isinstance(_native.cpu, str):
        return _native.cpu
    if not x.is_cpu:
        return f"x is on {x.device.type}, not on the CPU"
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPE_CODES:
            return dtype_refusal(name, tensor)
    return None


def forward(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    values = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    if weight is not None:
        weight = weight.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    _native.cpu.int8_rows_forward(x, normalized, weight, bias, eps, values, scale)
    return values, scale
