"""Attention calls for the executor: inputs, what float64 and torch's ops make of them, and checks.

The yardstick is attention written out in torch's ops in the dtype of the inputs, with torch's
autograd for the gradients; the oracle is the same in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.attention import pattern as geometry
from kernels.attention.pattern import Pattern, Scaling
from tests.tolerance import assert_as_exact_as_torch

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dsinks")


@dataclass
class Case:
    """One normalised call; what is not given is absent."""

    query: Tensor  # [B, H, Tq, D]
    key: Tensor  # [B, Hkv, Tk, D]
    value: Tensor  # [B, Hkv, Tk, Dv]
    pattern: Pattern
    scaling: Scaling
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    global_mask: Tensor | None = None
    seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    dlse: Tensor | None = None
    dout: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (*self.query.shape[:3], self.value.shape[3])
        self.dout = torch.randn(shape).to(self.query.dtype)

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.query,
            self.key,
            self.value,
            self.mask,
            self.alibi_slopes,
            self.sinks,
            self.global_mask,
            self.seed,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            tuple(self.pattern),
            tuple(self.scaling),
        )


def heads(*shape: int, dtype: torch.dtype, layout: str = "bhtd") -> Tensor:
    """Random [B, H, T, D], its memory in another order or with padding between rows."""
    b, h, t, d = shape
    if layout == "bthd":
        return torch.randn(b, t, h, d).to(dtype).transpose(1, 2)
    if layout == "padded":  # rows on 16-byte boundaries whatever D is
        return torch.randn(b, h, t, (d + 15) // 8 * 8).to(dtype)[..., :d]
    if layout == "odd":  # no row on one
        return torch.randn(b, h, t, d // 8 * 8 + 9).to(dtype)[..., 1 : d + 1]
    return torch.randn(b, h, t, d).to(dtype)


def case(
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int | None = None,
    shape: tuple[int, int, int] = (1, 1, 1),
    layout: str = "bhtd",
    causal: bool = False,
    lower_right: bool = False,
    window: tuple[int, int] = (-1, -1),
    global_tokens: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    **extras: Any,
) -> Case:
    """`shape` is (batch, heads, key heads)."""
    batch, query_heads, kv_heads = shape
    numbers = (causal, lower_right, *window, global_tokens, queries, keys)
    if dropout_p:
        extras["seed"] = torch.tensor([0x1234_5678_9ABC + queries])
    return Case(
        heads(batch, query_heads, queries, head_dim, dtype=dtype, layout=layout),
        heads(batch, kv_heads, keys, head_dim, dtype=dtype, layout=layout),
        heads(batch, kv_heads, keys, value_dim or head_dim, dtype=dtype, layout=layout),
        Pattern(*map(int, numbers)),
        Scaling(head_dim**-0.5 if scale is None else scale, softcap, dropout_p),
        **extras,
    )


def packed(
    lengths: list[tuple[int, int]], head_dim: int, dtype: torch.dtype, **options: Any
) -> Case:
    """Sequences of these lengths (queries, keys) one after the other."""
    q_lengths, k_lengths = zip(*lengths, strict=True)
    ends_q, ends_k = (
        torch.tensor([0, *part]).cumsum(0).to(torch.int32) for part in (q_lengths, k_lengths)
    )
    made = case(sum(q_lengths), sum(k_lengths), head_dim, dtype, **options)
    made.cu_seqlens_q, made.cu_seqlens_k = ends_q, ends_k
    made.pattern = made.pattern._replace(max_seqlen_q=max(q_lengths), max_seqlen_k=max(k_lengths))
    return made


def for_every_head(each: Case, leaves: list[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = leaves[:3]
    assert query is not None
    assert key is not None
    assert value is not None
    n = query.shape[1]
    return query, *(x.repeat_interleave(n // x.shape[1], 1) for x in (key, value))  # type: ignore


def weights(each: Case, leaves: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """p before dropout and lse of torch's ops, in the leaves' dtype: query, key, value, sinks."""
    query, key, _ = for_every_head(each, leaves)
    sinks = leaves[3]
    pattern, scaling = each.pattern, each.scaling
    lengths = query.shape[2], key.shape[2]
    grid = geometry_of(each)
    s = query @ key.transpose(-2, -1) * scaling.scale
    if scaling.softcap:
        s = scaling.softcap * torch.tanh(s / scaling.softcap)
    if each.alibi_slopes is not None:
        slopes = each.alibi_slopes.to(s.dtype)
        if grid.sequence is None:
            slopes = slopes[..., None, None]
        else:
            slopes = slopes[grid.sequence].t()[None, ..., None]
        s = s - slopes * (grid.key - grid.position[:, None]).abs()
    if each.mask is not None and each.mask.dtype != torch.bool:
        s = s + each.mask.to(s.dtype)
    elif each.mask is not None:
        s = s.masked_fill(~each.mask, -torch.inf)
    seen = geometry.visible(pattern, grid, each.global_mask)
    if seen is not None:
        s = s.masked_fill(~seen, -torch.inf)
    wide = s if s.dtype == torch.float64 else s.float()
    if sinks is not None:
        sink = sinks.to(wide.dtype)[:, None, None].expand(*s.shape[:3], 1)
        wide = torch.cat((wide, sink), -1)
    lse = wide.logsumexp(-1) if wide.shape[-1] else wide.new_full(s.shape[:3], -torch.inf)
    empty = lse == -torch.inf
    p = (wide - lse.masked_fill(empty, 0)[..., None]).exp()[..., : lengths[1]].to(s.dtype)
    return p, lse


def geometry_of(each: Case) -> geometry.Grid:
    lengths = each.query.shape[2], each.key.shape[2]
    if each.cu_seqlens_q is None:
        return geometry.grid(each.pattern, *lengths, each.query.device)
    return geometry.packed_grid(each.pattern, *lengths, each.cu_seqlens_q, each.cu_seqlens_k)


def attend(each: Case, leaves: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """out and lse."""
    p, lse = weights(each, leaves)
    query, _, value = for_every_head(each, leaves)
    batch, n, grid = *query.shape[:2], geometry_of(each)
    pattern, scaling = each.pattern, each.scaling
    if each.seed is not None:
        keep = geometry.keep_mask(each.seed, grid, batch, n, pattern, scaling.dropout_p)
        p = p * keep * geometry.dropout_factor(scaling.dropout_p)
    return p @ value, lse


def by_torch(each: Case, dtype: torch.dtype) -> list[Tensor | None]:
    leaves = [
        None if x is None else x.detach().to(dtype).requires_grad_()
        for x in (each.query, each.key, each.value, each.sinks)
    ]
    out, lse = attend(each, leaves)
    finite = torch.isfinite(lse)
    total = (out * each.dout.to(dtype)).sum()
    if each.dlse is not None:
        total = total + torch.where(finite, lse * each.dlse, 0.0).sum()
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [out.detach(), lse.detach(), *found, *[None] * (4 - len(found))]


def by_backend(backend: Any, each: Case) -> list[Tensor | None]:
    out, lse = backend.forward(*each.arguments())
    wanted = [True, True, True, False, each.sinks is not None]
    dquery, dkey, dvalue, _, dsinks = backend.backward(
        each.dout, each.dlse, *each.arguments(), out, lse, wanted
    )
    return [out, lse, dquery, dkey, dvalue, dsinks]


def terms(each: Case) -> list[float]:
    """Sizes of the sums of absolute terms that the float32 gradients of query and key are.

    The gradient of a score is p (dp - delta).  Of a query that sees one key that is the difference
    of two equal sums: where there may be nothing else, dp is measured by its terms.
    """
    if each.query.dtype != torch.float32 or not each.key.shape[2]:
        return [0.0] * len(NAMES)
    leaves = [
        None if x is None else x.detach().double()
        for x in (each.query, each.key, each.value, each.sinks)
    ]
    p, _ = weights(each, leaves)
    query, key, value = for_every_head(each, leaves)
    dout = each.dout.double()
    if each.key.shape[2] == 1 or each.cu_seqlens_k is not None:
        dout, value = dout.abs(), value.abs()
    dp = (dout @ value.transpose(-2, -1)).abs() / (1 - each.scaling.dropout_p)
    ds = each.scaling.scale * p * (dp + (p * dp).sum(-1, keepdim=True))
    dquery, dkey = (ds @ key.abs()).max().item(), (ds.transpose(-2, -1) @ query.abs()).max().item()
    return [0.0, 1.0, dquery, dkey, 0.0, 0.0]


def check(backend: Any, each: Case, label: str = "") -> None:
    got = by_backend(backend, each)
    yardstick, exact = by_torch(each, each.query.dtype), by_torch(each, torch.float64)
    names = [f"{name} {label}" for name in NAMES]
    assert_as_exact_as_torch(got, yardstick, exact, names, terms(each))
