"""Attention on CPUs in C++ SIMD (csrc/attention/cpu*.cpp): checks, allocation, one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _native
from kernels._native import DTYPE_CODES, dtype_refusal
from kernels.attention.pattern import empty_like_heads

MAX_HEAD_DIM = 256  # kMaxHeadDim of csrc/attention/cpu.h
MAX_LENGTH = 2**30 - 1  # positions are 32-bit numbers, and so are their differences

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, None, Tensor | None]


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *_: object,
) -> str | None:
    if isinstance(_native.cpu, str):
        return _native.cpu
    if not query.is_cpu:
        return f"query is on {query.device.type}, not on the CPU"
    if query.dtype not in DTYPE_CODES:
        return dtype_refusal("query", query)
    if query.shape[3] > MAX_HEAD_DIM or value.shape[3] > MAX_HEAD_DIM:
        largest = max(query.shape[3], value.shape[3])
        return f"head dimension {largest} exceeds {MAX_HEAD_DIM}"
    if query.shape[2] > MAX_LENGTH or key.shape[2] > MAX_LENGTH:
        return f"{max(query.shape[2], key.shape[2])} positions exceed {MAX_LENGTH}"
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return "mask requires a gradient, which this backend does not compute"
    return None


def _native_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    global_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pattern: Sequence[int],
    scaling: Sequence[float],
) -> tuple[object, ...]:
    sequences = query.shape[0]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        sequences = cu_seqlens_q.shape[0] - 1
    if sinks is not None:
        sinks = sinks.detach().to(torch.float32).contiguous()
    if global_mask is not None:
        global_mask = global_mask.contiguous()
    tensors = query, key, value, mask, alibi_slopes, sinks, global_mask, seed
    return (*tensors, cu_seqlens_q, cu_seqlens_k, sequences, *pattern[:5], *scaling)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    global_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pattern: Sequence[int],
    scaling: Sequence[float],
) -> tuple[Tensor, Tensor]:
    out = empty_like_heads(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    tensors = query, key, value, mask, alibi_slopes, sinks, global_mask, seed
    call = _native_arguments(*tensors, cu_seqlens_q, cu_seqlens_k, pattern, scaling)
    _native.cpu.attention_forward(*call, out, lse)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    global_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pattern: Sequence[int],
    scaling: Sequence[float],
    out: Tensor,
    lse: Tensor,
    output_mask: Sequence[bool],
) -> Gradients:
    with_dquery, with_dkey, with_dvalue, _, with_dsinks = output_mask
    dquery = empty_like_heads(query, query.shape[3]) if with_dquery else None
    dkey = empty_like_heads(key, key.shape[3]) if with_dkey else None
    dvalue = empty_like_heads(value, value.shape[3]) if with_dvalue else None
    dsinks = torch.empty_like(lse[0, :, 0]) if with_dsinks and sinks is not None else None
    delta = torch.empty_like(lse)
    tensors = query, key, value, mask, alibi_slopes, sinks, global_mask, seed
    call = _native_arguments(*tensors, cu_seqlens_q, cu_seqlens_k, pattern, scaling)
    _native.cpu.attention_backward(
        *call, out, lse.contiguous(), dout, dlse, dquery, dkey, dvalue, dsinks, delta
    )
    if dsinks is not None and sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return dquery, dkey, dvalue, None, dsinks
