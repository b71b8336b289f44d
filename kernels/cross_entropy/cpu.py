"""Cross-entropy on CPUs in C++ SIMD (csrc/cross_entropy/cpu.cpp): checks, allocation, one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import _native
from kernels._native import DTYPE_CODES, dtype_refusal


def unsupported(input: Tensor, target: Tensor, *_: object) -> str | None:
    if isinstance(_native.cpu, str):
        return _native.cpu
    if not input.is_cpu:
        return f"input is on {input.device.type}, not on the CPU"
    if input.dtype not in DTYPE_CODES:
        return dtype_refusal("input", input)
    if target.requires_grad:
        return "target requires a gradient, which only eager computes"
    return None


def _call(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> tuple[Any, ...]:
    """What both entry points take first: csrc/cross_entropy/module_cpu.cpp, make_call."""
    indices = not target.is_floating_point()
    return (
        input,
        *input.shape,
        input.stride(0),
        target if indices else None,
        None if indices else target,
        None if weight is None else weight.float().contiguous(),
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
    )


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
    rows = input.shape[0]
    losses = input.new_empty(rows, dtype=torch.float32)
    lse = input.new_empty((2, rows), dtype=torch.float32)
    log_prob = torch.empty_like(losses) if stats and not target.is_floating_point() else None
    best = input.new_empty(rows, dtype=torch.int64) if stats else None
    if rows:
        call = _call(
            input,
            target.contiguous(),
            weight,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
        )
        _native.cpu.cross_entropy_forward(*call, losses, lse, log_prob, best)
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
) -> tuple[Tensor | None, Tensor | None]:
    if not output_mask[0]:
        return None, None
    dinput = input if inplace else torch.empty_like(input, memory_format=torch.contiguous_format)
    if input.shape[0]:
        call = _call(
            input,
            target.contiguous(),
            weight,
            ignore_index,
            label_smoothing,
            z_loss,
            softcap,
            logit_scale,
        )
        if dlse is not None:
            dlse = dlse.contiguous()
        _native.cpu.cross_entropy_backward(
            dlosses, dlosses.stride(0), dlse, *call, lse, dinput, dinput.stride(0)
        )
    return dinput, None
