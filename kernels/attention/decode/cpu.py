"""Attention against a cache on CPUs in C++ SIMD (csrc/attention/cpu_decode.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _native
from kernels._native import DTYPE_CODES, dtype_refusal
from kernels.attention.cpu import MAX_HEAD_DIM, MAX_LENGTH
from kernels.attention.pattern import empty_like_heads

CACHE_DTYPES = (*DTYPE_CODES, torch.int8)

backward = None


def unsupported(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, *_: object
) -> str | None:
    if isinstance(_native.cpu, str):
        return _native.cpu
    if not query.is_cpu:
        return f"query is on {query.device.type}, not on the CPU"
    if query.dtype not in DTYPE_CODES:
        return dtype_refusal("query", query)
    if k_cache.dtype not in CACHE_DTYPES:
        return (
            f"k_cache is {k_cache.dtype}; accepted are float32, bfloat16, float16 and int8 caches"
        )
    if query.shape[3] > MAX_HEAD_DIM or v_cache.shape[3] > MAX_HEAD_DIM:
        largest = max(query.shape[3], v_cache.shape[3])
        return f"head dimension {largest} exceeds {MAX_HEAD_DIM}"
    if query.shape[2] > MAX_LENGTH or k_cache.shape[2] > MAX_LENGTH:
        return f"{max(query.shape[2], k_cache.shape[2])} positions exceed {MAX_LENGTH}"
    return None


def forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    pattern: Sequence[int],
    scaling: Sequence[float],
) -> tuple[Tensor, Tensor]:
    out = empty_like_heads(query, v_cache.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if sinks is not None:
        sinks = sinks.detach().to(torch.float32).contiguous()
    causal, _, left, right, global_tokens, *_ = pattern
    scale, softcap, _ = scaling
    tensors = query, k_cache, v_cache, lengths, block_table, k_scale, v_scale, alibi_slopes, sinks
    limits = causal, left, right, global_tokens, scale, softcap
    _native.cpu.attention_decode(*tensors, *limits, out, lse)
    return out, lse
