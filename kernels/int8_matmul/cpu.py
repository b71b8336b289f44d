"""Int8 matmul on CPUs in C++ SIMD (csrc/int8_matmul/cpu.cpp): checks, allocation, one call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _native
from kernels._native import DTYPE_CODES, dtype_refusal
from kernels.int8_matmul.checks import ACTIVATION_CODES

MODES = {"raw": 0, "int8": 1, "dynamic": 2, "static": 3, "weight_only": 4}  # of cpu.h

backward = None


def unsupported(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    out_dtype: torch.dtype,
) -> str | None:
    if isinstance(_native.cpu, str):
        return _native.cpu
    if not x.is_cpu:
        return f"x is on {x.device.type}, not on the CPU"
    if x.dtype not in DTYPE_CODES and x.dtype != torch.int8:
        return dtype_refusal("x", x)
    if out_dtype not in DTYPE_CODES and out_dtype != torch.int32:
        return f"out_dtype is {out_dtype}; accepted are float32, bfloat16 and float16"
    if bias is not None and bias.dtype not in DTYPE_CODES:
        return dtype_refusal("bias", bias)
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor]:
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)
    if bias is not None:
        bias = bias.contiguous()
    _native.cpu.int8_matmul_forward(
        *(x, weight, x_scale, weight_scale, bias, ACTIVATION_CODES[activation], MODES[mode], y)
    )
    return (y,)
