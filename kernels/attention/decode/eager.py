"""Attention against a cache by PyTorch's own ops: one sequence after the other, only its keys.

Reads the lengths, which on a GPU waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.attention import eager
from kernels.attention.decode.reference import dense
from kernels.attention.pattern import Pattern, empty_like_heads
from kernels.attention.reference import wide_dtype

backward = None


def unsupported(*_: object) -> str | None:
    return None


def _keys(
    cache: Tensor, scale: Tensor | None, pages: Tensor | None, number: int, length: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The part of a cache, its scales and its table that holds the keys of one sequence."""
    if pages is None:
        one = slice(number, number + 1)
        return cache[one, :, :length], None if scale is None else scale[one, :, :length], None
    return cache, scale, pages[number : number + 1, : -(-length // cache.shape[2])]


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
    pattern = Pattern(*pattern)
    if query.shape[2] == 1:
        pattern = pattern._replace(causal=0)  # the last position sees no future anyway
    dtype = query.dtype if k_cache.dtype == query.dtype else wide_dtype(query)
    out = empty_like_heads(query, v_cache.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=wide_dtype(query))
    for number, length in enumerate(lengths.tolist()):
        one = slice(number, number + 1)
        length = min(length, pattern.max_seqlen_k)
        key, value = (
            dense(*_keys(cache, scale, block_table, number, length), dtype)[:, :, :length]
            for cache, scale in ((k_cache, k_scale), (v_cache, v_scale))
        )
        out[one], lse[one] = eager.forward(
            query[one].to(dtype),
            key,
            value,
            None,
            None if alibi_slopes is None else alibi_slopes[one],
            sinks,
            None,
            None,
            None,
            None,
            pattern._replace(max_seqlen_k=length),
            scaling,
        )
    return out, lse
