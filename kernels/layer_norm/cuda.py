"""Layer norm in CUDA C++ (csrc/layer_norm/cuda.cuh): checks, allocation, one call each way."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _gpu, _native
from kernels._gpu import address
from kernels._native import DTYPE_CODES, dtype_refusal


def unsupported(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    *_: object,
) -> str | None:
    if isinstance(_native.cuda, str):
        return _native.cuda
    reason = _gpu.unsupported(x)
    if reason is not None:
        return reason
    for name, tensor in (("input", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPE_CODES:
            return dtype_refusal(name, tensor)
    return None


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPE_CODES[tensor.dtype]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _new(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)  # contiguous


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    """y in the shape and dtype of x; float32 [2 * rows]: the rows' means, then their rstds."""
    x, weight, bias = x.contiguous(), _contiguous(weight), _contiguous(bias)
    rows = math.prod(x.shape[: x.dim() - len(normalized_shape)])
    y = _new(x)
    kept = torch.empty(2 * rows, dtype=torch.float32, device=x.device)
    mean = address(kept)
    _native.cuda.layer_norm_forward(
        address(x),
        address(weight),
        address(bias),
        address(y),
        mean,
        mean + rows * kept.element_size(),
        rows,
        math.prod(normalized_shape),
        eps,
        DTYPE_CODES[x.dtype],
        _code(weight),
        _code(bias),
        _gpu.multiprocessors(x),
        _gpu.device_index(x),
        _gpu.stream(x),
    )
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
    """dx, dweight and dbias in the dtypes of x, weight and bias; None where not asked for."""
    rows, cols = statistics.numel() // 2, math.prod(normalized_shape)
    dx = _new(x) if output_mask[0] else None
    dweight = _new(weight) if output_mask[1] and weight is not None else None
    dbias = _new(bias) if output_mask[2] and bias is not None else None
    if rows == 0 or cols == 0:  # no rows add up to 0
        for gradient in (dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return dx, dweight, dbias

    dy, x = dy.contiguous(), x.contiguous()
    multiprocessors = _gpu.multiprocessors(x)
    weight = _contiguous(weight)
    gradients = (dweight is not None) + (dbias is not None)
    partials = None
    if gradients:
        count = _native.cuda.layer_norm_backward_partials(
            rows, cols, dx is not None, multiprocessors
        )
        if count > 1:  # fp32 sums of parts of the rows; a single part is the result
            shape = (gradients, count, cols)
            partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    mean = address(statistics)
    _native.cuda.layer_norm_backward(
        address(dy),
        address(x),
        address(weight),
        mean,
        mean + rows * statistics.element_size(),
        address(dx),
        address(dweight),
        address(dbias),
        address(partials),
        rows,
        cols,
        DTYPE_CODES[x.dtype],
        _code(weight),
        _code(bias),
        multiprocessors,
        _gpu.device_index(x),
        _gpu.stream(x),
    )
    return dx, dweight, dbias
