"""Decoding in CUDA C++ (csrc/attention/cuda_decode.cuh): checks, allocation, one call.

Lengths beyond the cache count as the cache's: a GPU's numbers are not waited for to be checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _gpu, _native
from kernels._gpu import address
from kernels._native import DTYPE_CODES, dtype_refusal
from kernels.attention.cuda import FAR, MAX_HEAD_DIM, _heads
from kernels.attention.pattern import Pattern, Scaling, empty_like_heads

backward = None

WARPS = 4  # of a block, at most: each leaves a part of the result
# Codes of csrc/attention/cuda_decode.cuh for caches of another dtype than the queries'.
SAME, CACHE_CODES = 0, {torch.int8: 1, torch.bfloat16: 2, torch.float16: 3}


def unsupported(query: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> str | None:
    if isinstance(_native.cuda, str):
        return _native.cuda
    reason = _gpu.unsupported(query)
    if reason is not None:
        return reason
    if query.dtype not in DTYPE_CODES:
        return dtype_refusal("query", query)
    head_dim = max(query.shape[-1], v_cache.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}; accepted are 1 to {MAX_HEAD_DIM}"
    widens = query.dtype == torch.float32 and k_cache.dtype in CACHE_CODES
    if k_cache.dtype not in (query.dtype, torch.int8) and not widens:
        return f"the cache is {k_cache.dtype}; accepted are {query.dtype} and torch.int8"
    return None


def _scale(scale: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if scale is None else (address(scale), *scale.stride())


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
    """out [B, H, Tq, Dv] in query's dtype and layout; lse float32 [B, H, Tq]."""
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    batch, heads, queries, _ = query.shape
    kv_heads, rows = k_cache.shape[1:3]
    keys = rows if block_table is None else rows * block_table.shape[1]
    lengths = lengths.to(torch.int32)
    if block_table is not None:
        block_table = block_table.to(torch.int32)
        block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()

    out = empty_like_heads(query, v_cache.shape[-1])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    # fp32 sums over the keys of one warp of one split
    splits = _native.cuda.attention_decode_splits(
        batch * kv_heads, keys, _gpu.multiprocessors(query)
    )
    parts = torch.empty(
        (splits * WARPS, lse.numel() * (out.shape[3] + 1)), dtype=torch.float32, device=query.device
    )
    part_out = address(parts)
    part_lse = part_out + splits * WARPS * out.numel() * parts.element_size()
    limit = 0 if pattern.causal else FAR
    _native.cuda.attention_decode(
        DTYPE_CODES[query.dtype],
        SAME if k_cache.dtype == query.dtype else CACHE_CODES[k_cache.dtype],
        *_heads(query),
        *_heads(k_cache),
        *_heads(v_cache),
        *_heads(out),
        address(lengths),
        address(block_table),
        0 if block_table is None else block_table.stride(0),
        k_cache.shape[0],
        rows,
        keys,
        *_scale(k_scale),
        *_scale(v_scale),
        address(alibi_slopes),
        *((0, 0) if alibi_slopes is None else alibi_slopes.stride()),
        address(sinks),
        batch,
        heads,
        heads // kv_heads,
        queries,
        -min(pattern.left, FAR) if pattern.left >= 0 else -FAR,
        min(pattern.right, limit) if pattern.right >= 0 else limit,
        limit,
        min(pattern.global_tokens, FAR) if pattern.windowed else 0,
        scaling.scale,
        scaling.softcap,
        splits,
        part_out,
        part_lse,
        address(lse),
        _gpu.device_index(query),
        _gpu.stream(query),
    )
    return out, lse
