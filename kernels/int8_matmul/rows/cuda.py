"""Rows to int8 in CUDA C++ (csrc/int8_matmul/cuda_quantize.cuh): checks, allocation, one call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _gpu, _native
from kernels._gpu import address
from kernels._native import DTYPE_CODES, dtype_refusal
from kernels.int8_matmul.cuda import MAX_SIZE

backward = None


def unsupported(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    if isinstance(_native.cuda, str):
        return _native.cuda
    reason = _gpu.unsupported(x)
    if reason is not None:
        return reason
    for name, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPE_CODES:
            return dtype_refusal(name, tensor)
    if x.shape[1] > MAX_SIZE:
        return f"rows of {x.shape[1]} exceed {MAX_SIZE}"
    return None


def _parameter(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (address(tensor), DTYPE_CODES[tensor.dtype])


def forward(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """int8 [M, K]; float32 [M]: what the values of each row are to be multiplied by."""
    rows, cols = x.shape
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    values = torch.empty((rows, cols), dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    _native.cuda.int8_matmul_rows(
        address(x),
        x.stride(0),
        DTYPE_CODES[x.dtype],
        normalized,
        *_parameter(weight),
        *_parameter(bias),
        eps,
        address(values),
        address(scale),
        rows,
        cols,
        _gpu.multiprocessors(x),
        _gpu.device_index(x),
        _gpu.stream(x),
    )
    return values, scale
