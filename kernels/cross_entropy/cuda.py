"""Cross-entropy in CUDA C++ (csrc/cross_entropy/cuda.cuh): allocation, one call each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import _gpu, _native
from kernels._gpu import address
from kernels._native import DTYPE_CODES, dtype_refusal

MAX_CLASSES = 2**30  # columns are 32-bit numbers inside a row
STATE_FLOATS = 8  # RowState of csrc/cross_entropy/cuda_row.cuh


def refusal(input: Tensor, target: Tensor, weight: Tensor | None) -> str | None:
    """Why no GPU backend takes these tensors; None where one may."""
    reason = _gpu.unsupported(input)
    if reason is not None:
        return reason
    if input.dtype not in DTYPE_CODES:
        return dtype_refusal("input", input)
    if input.shape[1] > MAX_CLASSES:
        return f"input has {input.shape[1]} classes, more than {MAX_CLASSES}"
    if target.requires_grad:
        return "target requires a gradient"
    if target.is_floating_point() and target.dtype not in (input.dtype, torch.float32):
        return f"target is {target.dtype}; accepted are int64, float32 and input's {input.dtype}"
    return None


def unsupported(input: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> str | None:
    if isinstance(_native.cuda, str):
        return _native.cuda
    return refusal(input, target, weight)


def _problem(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> tuple[Any, ...]:
    """Problem of csrc/cross_entropy/cuda_row.cuh; tensors are contiguous but for input's rows."""
    probabilities = target.is_floating_point()
    return (
        address(input),
        0 if probabilities else address(target),
        address(target) if probabilities else 0,
        address(weight),
        input.shape[0],
        input.stride(0),
        input.shape[1],
        ignore_index,
        target.dtype == torch.float32,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
    )


def contiguous_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(torch.float32).contiguous()


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """losses [N], lse [2, N], and with `stats` log_prob [N] (indices only) and best [N]."""
    rows, classes = input.shape
    target, weight = target.contiguous(), contiguous_weight(weight)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=input.device)

    losses, lse = new(rows), new(2, rows)
    log_prob = new(rows) if stats and not target.is_floating_point() else None
    best = new(rows, dtype=torch.int64) if stats else None
    code, multiprocessors = DTYPE_CODES[input.dtype], _gpu.multiprocessors(input)
    count = _native.cuda.cross_entropy_forward_parts(
        rows, classes, input.stride(0), code, multiprocessors
    )
    parts = new(rows, count, STATE_FLOATS) if count > 1 else None
    _native.cuda.cross_entropy_forward(
        *_problem(
            input, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale
        ),
        address(losses),
        address(lse),
        address(log_prob),
        address(best),
        address(parts),
        code,
        multiprocessors,
        _gpu.device_index(input),
        _gpu.stream(input),
    )
    return losses, lse, log_prob, best


def backward(
    dlosses: Tensor,
    dlse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    stats: bool,
    lse: Tensor,
    output_mask: Sequence[bool],
    inplace: bool,
) -> tuple[Tensor | None, None]:
    """dinput [N, C] in input's dtype, or input itself; targets that need a gradient are refused."""
    if not output_mask[0]:
        return None, None
    rows, classes = input.shape
    target, weight, lse = target.contiguous(), contiguous_weight(weight), lse.contiguous()
    dlosses = dlosses.to(torch.float32)
    dlse = None if dlse is None else dlse.to(torch.float32)
    new = torch.empty
    dinput = input if inplace else new((rows, classes), dtype=input.dtype, device=input.device)
    total = mass = None  # what the shares of the classes add up to
    if target.is_floating_point():
        mass = new(rows, dtype=torch.float32, device=input.device)
    elif weight is not None and label_smoothing:
        total = weight.sum()
    _native.cuda.cross_entropy_backward(
        address(dlosses),
        dlosses.stride(0),
        address(dlse),
        0 if dlse is None else dlse.stride(0),
        *_problem(
            input, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale
        ),
        address(lse),
        address(total),
        address(mass),
        address(dinput),
        dinput.stride(0),
        DTYPE_CODES[input.dtype],
        _gpu.multiprocessors(input),
        _gpu.device_index(input),
        _gpu.stream(input),
    )
    return dinput, None
