"""Attention in plain torch: the tests' oracle, the fake of the ops, and the second derivative.

Runs in any floating dtype; float64 stays float64, everything else is computed in float32.  All
[Tq, Tk] scores are in memory at once; the formulas below serve `eager`, too, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention.pattern import (
    Grid,
    Pattern,
    Scaling,
    dropout_factor,
    grid,
    keep_mask,
    laid_out_like,
    packed_grid,
    visible,
)

Gradients = tuple[Tensor | None, ...]  # of query, key, value, mask and sinks


class Extras(NamedTuple):
    """What may join the products of queries and keys."""

    mask: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    global_mask: Tensor | None
    seed: Tensor | None


def unsupported(*_: object) -> str | None:
    return None


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def for_every_head(x: Tensor, heads: int) -> Tensor:
    """[B, Hkv, Tk, D] -> [B, H, Tk, D]: each key head once for every query head it serves."""
    batch, kv_heads, length, size = x.shape
    if kv_heads == heads:
        return x
    return x[:, :, None].expand(batch, kv_heads, heads // kv_heads, length, size).flatten(1, 2)


def sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    """The transpose of for_every_head."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).sum(2)


def _scores(
    query: Tensor, key: Tensor, extras: Extras, grid: Grid, pattern: Pattern, scaling: Scaling
) -> tuple[Tensor, Tensor | None]:
    """s [B, H, Tq, Tk], -inf where a key is not seen; and the softcap's tanh."""
    s = (wide(query) @ for_every_head(wide(key), query.shape[1]).transpose(-2, -1)) * scaling.scale
    tanh = None
    if scaling.softcap:
        tanh = torch.tanh(s / scaling.softcap)
        s = scaling.softcap * tanh
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes.to(s.dtype)
        if grid.sequence is None:
            slopes = slopes[..., None, None]
        else:
            slopes = slopes[grid.sequence].t()[None, ..., None]  # [1, H, Tq, 1]
        s = s - slopes * (grid.key - grid.position[..., None]).abs()
    seen = visible(pattern, grid, extras.global_mask)
    if seen is not None:
        s = s.masked_fill(~seen, -torch.inf)
    if extras.mask is not None:
        if extras.mask.dtype == torch.bool:
            s = s.masked_fill(~extras.mask, -torch.inf)
        else:
            s = s + extras.mask.to(s.dtype)
    return s, tanh


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """p [B, H, Tq, Tk] and lse [B, H, Tq]; 0 and -inf, with gradients of 0, for a row of -inf."""
    length_k = s.shape[-1]
    if sinks is not None:
        sink = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
        s = torch.cat((s, sink), -1)
    elif s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -torch.inf)
    top = s.detach().amax(-1, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    terms = (s - top).exp()
    total = terms.sum(-1, keepdim=True)
    nothing = total == 0
    total = torch.where(nothing, 1.0, total)
    lse = torch.where(nothing, -torch.inf, top + total.log())
    return (terms / total)[..., :length_k], lse[..., 0]


def _finite(lse: Tensor) -> Tensor:
    """exp(s - lse) of a row that sees nothing is to be exp(-inf), not exp(-inf + inf)."""
    return torch.where(lse == -torch.inf, 0.0, lse)


def _kept(
    s: Tensor, seed: Tensor | None, grid: Grid, pattern: Pattern, scaling: Scaling
) -> Tensor | None:
    """What dropout multiplies every weight by."""
    if seed is None:
        return None
    keep = keep_mask(seed, grid, s.shape[0], s.shape[1], pattern, scaling.dropout_p)
    return keep.to(s.dtype) * dropout_factor(scaling.dropout_p)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    grid: Grid,
    pattern: Pattern,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Tq, Dv] and lse [B, H, Tq] of the queries in `grid`, both wide; differentiable."""
    s, _ = _scores(query, key, extras, grid, pattern, scaling)
    p, lse = _softmax(s, extras.sinks)
    kept = _kept(s, extras.seed, grid, pattern, scaling)
    if kept is not None:
        p = p * kept
    return p @ for_every_head(wide(value), query.shape[1]), lse


def gradients(
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    extras: Extras,
    grid: Grid,
    pattern: Pattern,
    scaling: Scaling,
    out: Tensor,
    lse: Tensor,
    output_mask: Sequence[bool],
) -> Gradients:
    """What the queries in `grid` add to each gradient, wide."""
    with_dquery, with_dkey, with_dvalue, with_dmask, with_dsinks = output_mask
    heads, kv_heads = query.shape[1], key.shape[1]
    s, tanh = _scores(query, key, extras, grid, pattern, scaling)
    finite = _finite(lse)
    p = (s - finite[..., None]).exp()
    kept = _kept(s, extras.seed, grid, pattern, scaling)
    dout = wide(dout)
    dp = dout @ for_every_head(wide(value), heads).transpose(-2, -1)
    if kept is not None:
        dp = dp * kept
    delta = (dout * wide(out)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = p * (dp - delta[..., None])
    dmask = ds if with_dmask else None
    if tanh is not None:
        ds = ds * (1 - tanh.square())
    ds = ds * scaling.scale
    dquery = dkey = dvalue = dsinks = None
    if with_dquery:
        dquery = ds @ for_every_head(wide(key), heads)
    if with_dkey:
        dkey = sum_heads(ds.transpose(-2, -1) @ wide(query), kv_heads)
    if with_dvalue:
        weights = p if kept is None else p * kept
        dvalue = sum_heads(weights.transpose(-2, -1) @ dout, kv_heads)
    if with_dsinks and extras.sinks is not None:
        sink = extras.sinks.to(s.dtype)[:, None]
        dsinks = -((sink - finite).exp() * delta).sum((0, 2))
    return dquery, dkey, dvalue, dmask, dsinks


def _whole_grid(
    query: Tensor, key: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, pattern: Pattern
) -> Grid:
    if cu_q is None or cu_k is None:
        return grid(pattern, query.shape[2], key.shape[2], query.device)
    return packed_grid(pattern, query.shape[2], key.shape[2], cu_q, cu_k)


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
    """out [B, H, Tq, Dv] and lse [B, H, Tq], the latter float32 (float64 where query is)."""
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    extras = Extras(mask, alibi_slopes, sinks, global_mask, seed)
    grid = _whole_grid(query, key, cu_seqlens_q, cu_seqlens_k, pattern)
    out, lse = attend(query, key, value, extras, grid, pattern, scaling)
    return laid_out_like(out, query), lse.contiguous()


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
    """The gradients that `output_mask` asks for, None for the others."""
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    extras = Extras(mask, alibi_slopes, sinks, global_mask, seed)
    grid = _whole_grid(query, key, cu_seqlens_q, cu_seqlens_k, pattern)
    found = gradients(
        dout, dlse, query, key, value, extras, grid, pattern, scaling, out, lse, output_mask
    )
    return finished(found, (query, key, value, mask, sinks))


def finished(found: Gradients, inputs: Sequence[Tensor | None]) -> Gradients:
    """Wide sums in the dtypes and layouts of what they are the gradients of."""
    dquery, dkey, dvalue, dmask, dsinks = found
    query, key, value, mask, sinks = inputs
    return (
        None if dquery is None or query is None else laid_out_like(dquery, query),
        None if dkey is None or key is None else laid_out_like(dkey, key),
        None if dvalue is None or value is None else laid_out_like(dvalue, value),
        None if dmask is None or mask is None else dmask.to(mask.dtype),
        None if dsinks is None or sinks is None else dsinks.to(sinks.dtype),
    )
