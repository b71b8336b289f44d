"""Int8 matmul in CUDA C++ (csrc/int8_matmul/cuda.cuh): checks, allocation, one call."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import _gpu, _native
from kernels._gpu import address
from kernels._native import DTYPE_CODES, dtype_refusal
from kernels.int8_matmul.checks import ACTIVATION_CODES

backward = None

# Codes of csrc/int8_matmul/cuda.cuh and cuda_epilogue.cuh.
MODES = {"raw": 0, "int8": 0, "dynamic": 1, "static": 2, "weight_only": 3}
OUTPUTS = DTYPE_CODES | {torch.int32: 3}
MAX_SIZE = 2**31 - 2**14  # of m, n and k: tiles and slices are counted in 32 bits


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
    if isinstance(_native.cuda, str):
        return _native.cuda
    reason = _gpu.unsupported(x)
    if reason is not None:
        return reason
    if mode not in ("raw", "int8") and x.dtype not in DTYPE_CODES:
        return dtype_refusal("input", x)
    if bias is not None and bias.dtype not in DTYPE_CODES:
        return dtype_refusal("bias", bias)
    if out_dtype not in OUTPUTS:
        return f"out_dtype is {out_dtype}; accepted are float32, bfloat16, float16 and int32"
    if max(*x.shape, *weight.shape) > MAX_SIZE:
        return f"a size exceeds {MAX_SIZE}"
    return None


def _scale(scale: Tensor | None) -> tuple[int, int]:
    """Address, and the step from one scale to the next."""
    return address(scale), int(scale is not None and scale.numel() > 1)


def _aligned(matrix: Tensor, stride: int) -> bool:
    """May its rows be read 16 bytes at a time?"""
    return (address(matrix) | stride * matrix.element_size()) % 16 == 0


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
    """y [M, N] in out_dtype."""
    (rows, depth), columns = x.shape, weight.shape[0]
    n_contiguous = weight.stride(1) != 1 and depth > 1
    weight_stride = weight.stride(int(n_contiguous))
    bias = None if bias is None else bias.contiguous()
    multiprocessors = _gpu.multiprocessors(x)
    shape = (
        MODES[mode],
        x.stride(0),
        DTYPE_CODES.get(x.dtype, 0),
        _aligned(x, x.stride(0) if rows > 1 else 0),
        weight_stride,
        _aligned(weight, weight_stride),
        n_contiguous,
        depth,
        rows,
        columns,
    )
    y = torch.empty((rows, columns), dtype=out_dtype, device=x.device)
    size = _native.cuda.int8_matmul_workspace(*shape, multiprocessors)
    workspace = torch.empty(size, dtype=torch.uint8, device=x.device) if size else None
    _native.cuda.int8_matmul_forward(
        *shape,
        address(x),
        address(weight),
        *_scale(x_scale),
        *_scale(weight_scale),
        address(bias),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        ACTIVATION_CODES[activation],
        OUTPUTS[out_dtype],
        address(y),
        address(workspace),
        multiprocessors,
        _gpu.device_index(x),
        _gpu.stream(x),
    )
    return (y,)
