"""Attention against a cache in plain torch: the cache as dense float tensors, then the formula."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention.pattern import Grid, Pattern, Scaling, laid_out_like
from kernels.attention.reference import Extras, attend, wide_dtype

backward = None


def unsupported(*_: object) -> str | None:
    return None


def dense(
    cache: Tensor, scale: Tensor | None, block_table: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[B, Hkv, S, D] in `dtype`: pages put in a row, int8 times its scale."""
    if block_table is not None:
        pages = block_table.long().clamp(0, cache.shape[0] - 1)  # unused entries may be anything
        cache = cache[pages].transpose(1, 2).flatten(2, 3)
        scale = None if scale is None else scale[pages].transpose(1, 2).flatten(2, 3)
    cache = cache.to(dtype)
    return cache if scale is None else cache * scale[..., None].to(dtype)


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
    """out [B, H, Tq, Dv] and lse [B, H, Tq], the latter float32 (float64 where query is)."""
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    dtype = wide_dtype(query)
    key = dense(k_cache, k_scale, block_table, dtype)
    value = dense(v_cache, v_scale, block_table, dtype)
    rows = torch.arange(query.shape[2], device=query.device)
    columns = torch.arange(key.shape[2], device=query.device)
    length = lengths.long().clamp(max=key.shape[2])[:, None, None]  # [B, 1, 1]
    filled = columns < length[..., None]  # [B, 1, 1, S]
    grid = Grid(
        query=rows,
        position=rows + length - query.shape[2],
        key=columns,
        length_k=length[..., None],
        together=filled,
    )
    # What lies behind a sequence may be NaN, which times a weight of 0 is NaN.
    value = value.masked_fill(~filled.transpose(-2, -1), 0.0)
    extras = Extras(None, alibi_slopes, sinks, None, None)
    out, lse = attend(query, key, value, extras, grid, pattern, scaling)
    return laid_out_like(out, query), lse.contiguous()
