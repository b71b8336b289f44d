"""Attention by PyTorch's own ops, which take every device and dtype: the last resort.

On CPUs a plain call is aten's flash attention with its lse and its backward.  Everything else is
the reference's formula for a block of queries at a time, against the keys that they can see, so
that no more than SCORES scores are in memory at once (or those of one query a head).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.pattern import Grid, Pattern, Scaling, empty_like_heads, grid, laid_out_like
from kernels.attention.reference import Extras, Gradients, for_every_head, sum_heads

SCORES = 1 << 24  # 64 MiB in float32, of which a block needs a few


def unsupported(*_: object) -> str | None:
    return None


class _Block(NamedTuple):
    """Some queries of one sequence, the keys they can see, and where both stand."""

    rows: slice
    keys: slice
    grid: Grid


def _is_plain(
    query: Tensor, key: Tensor, value: Tensor, extras: Extras, pattern: Pattern, scaling: Scaling
) -> bool:
    """Whether aten's flash attention for CPUs computes the call; it scales what it has hidden."""
    corner = not pattern.causal or not pattern.lower_right or query.shape[2] == key.shape[2]
    return (
        query.is_cpu
        and all(extra is None for extra in extras)
        and not pattern.windowed
        and corner
        and not scaling.softcap
        and scaling.scale > 0
        and query.shape[3] == value.shape[3]
        and key.shape[2] > 0
    )


def _blocks(
    query: Tensor,
    key: Tensor,
    extras: Extras,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    pattern: Pattern,
) -> Iterator[_Block]:
    """All queries; reads cu_seqlens, which on a GPU waits for it."""
    length_q, length_k = query.shape[2], key.shape[2]
    if cu_q is None or cu_k is None:
        yield from _blocks_of_sequence(query, (0, length_q), (0, length_k), extras, pattern, None)
        return
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    for number in range(len(starts_q) - 1):
        rows, keys = starts_q[number : number + 2], starts_k[number : number + 2]
        yield from _blocks_of_sequence(query, rows, keys, extras, pattern, number)


def _blocks_of_sequence(
    query: Tensor,
    rows: Sequence[int],
    keys: Sequence[int],
    extras: Extras,
    pattern: Pattern,
    number: int | None,
) -> Iterator[_Block]:
    length_q, length_k = rows[1] - rows[0], keys[1] - keys[0]
    whole = grid(pattern, length_q, length_k, query.device)
    step = max(1, SCORES // max(1, query.shape[0] * query.shape[1] * length_k))
    for first in range(0, length_q, step):
        last = min(first + step, length_q) - 1
        low, high = _keys_seen(pattern, first, last, length_q, length_k, extras.global_mask)
        query_places, key_places = slice(first, last + 1), slice(low, high)
        sequence = None if number is None else torch.full_like(whole.query[query_places], number)
        part = Grid(
            whole.query[query_places],
            whole.position[query_places],
            whole.key[key_places],
            length_k,
            sequence,
        )
        yield _Block(
            slice(rows[0] + first, rows[0] + last + 1), slice(keys[0] + low, keys[0] + high), part
        )


def _keys_seen(
    pattern: Pattern,
    first: int,
    last: int,
    length_q: int,
    length_k: int,
    global_mask: Tensor | None,
) -> tuple[int, int]:
    """The range of keys outside of which queries first ... last see nothing."""
    offset = length_k - length_q if pattern.lower_right else 0
    low, high = 0, length_k
    if pattern.causal:
        high = last + offset + 1
    if global_mask is None and not pattern.global_tokens:
        if pattern.left >= 0:
            low = first + offset - pattern.left
        if pattern.right >= 0:
            high = min(high, last + offset + pattern.right + 1)
    high = max(0, min(high, length_k))
    return max(0, min(low, high)), high


def _part(extras: Extras, block: _Block) -> Extras:
    if extras.mask is None:
        return extras
    return extras._replace(mask=extras.mask[:, :, block.rows, block.keys])


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
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    extras = Extras(mask, alibi_slopes, sinks, global_mask, seed)
    heads = query.shape[1]
    if cu_seqlens_q is None and _is_plain(query, key, value, extras, pattern, scaling):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            for_every_head(key, heads),
            for_every_head(value, heads),
            0.0,
            bool(pattern.causal),
            scale=scaling.scale,
        )
        return laid_out_like(out, query), lse.contiguous()
    out = empty_like_heads(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=reference.wide_dtype(query))
    for block in _blocks(query, key, extras, cu_seqlens_q, cu_seqlens_k, pattern):
        out[:, :, block.rows], lse[:, :, block.rows] = reference.attend(
            query[:, :, block.rows],
            key[:, :, block.keys],
            value[:, :, block.keys],
            _part(extras, block),
            block.grid,
            pattern,
            scaling,
        )
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
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    extras = Extras(mask, alibi_slopes, sinks, global_mask, seed)
    inputs = query, key, value, mask, sinks
    if (
        dlse is None
        and cu_seqlens_q is None
        and _is_plain(query, key, value, extras, pattern, scaling)
    ):
        found = _flash_backward(dout, query, key, value, out, lse, pattern, scaling)
        dquery, dkey, dvalue = (
            gradient if wanted else None
            for gradient, wanted in zip(found, output_mask[:3], strict=True)
        )
        return reference.finished((dquery, dkey, dvalue, None, None), inputs)
    kind = reference.wide_dtype(query)
    sums = tuple(
        torch.zeros(x.shape, dtype=kind, device=x.device) if x is not None and wanted else None
        for x, wanted in zip(inputs, output_mask, strict=True)
    )
    for block in _blocks(query, key, extras, cu_seqlens_q, cu_seqlens_k, pattern):
        rows, keys = block.rows, block.keys
        added = reference.gradients(
            dout[:, :, rows],
            None if dlse is None else dlse[:, :, rows],
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            _part(extras, block),
            block.grid,
            pattern,
            scaling,
            out[:, :, rows],
            lse[:, :, rows],
            output_mask,
        )
        every = slice(None)
        of_rows, of_keys = (every, every, rows), (every, every, keys)
        places: tuple[Any, ...] = of_rows, of_keys, of_keys, (every, every, rows, keys), every
        for total, part, place in zip(sums, added, places, strict=True):
            if total is not None and part is not None:
                total[place] += part
    return reference.finished(sums, inputs)


def _flash_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: Pattern,
    scaling: Scaling,
) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads = query.shape[1], key.shape[1]
    dquery, dkey, dvalue = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout,
        query,
        for_every_head(key, heads),
        for_every_head(value, heads),
        out,
        lse,
        0.0,
        bool(pattern.causal),
        scale=scaling.scale,
    )
    return dquery, sum_heads(dkey, kv_heads), sum_heads(dvalue, kv_heads)
