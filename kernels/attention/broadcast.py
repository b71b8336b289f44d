"""Shapes of scaled_dot_product_attention: anything that broadcasts, brought to four dimensions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.attention.arguments import check_device, with_unit_stride

NAME = "scaled_dot_product_attention"


def _broadcast(shapes: list[tuple[int, ...]], what: str) -> tuple[int, ...]:
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        listed = ", ".join(str(list(shape)) for shape in shapes)
        raise RuntimeError(f"{NAME}: {what} do not broadcast: {listed}") from None


def lead_shape(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, ...]:
    """The dimensions of the output before the last two: batch dimensions and query heads."""
    shapes = [tuple(x.shape[:-2]) for x in (query, key, value)]
    if not enable_gqa:
        return _broadcast(shapes, "the leading dimensions of query, key and value")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 3:
            raise RuntimeError(
                f"{NAME}: enable_gqa needs a dimension of heads, but {name} has shape "
                f"{list(tensor.shape)}"
            )
    heads = query.shape[-3]
    for name, tensor in (("key", key), ("value", value)):
        if not tensor.shape[-3] or heads % tensor.shape[-3]:
            raise RuntimeError(
                f"{NAME}: the heads of {name} ({tensor.shape[-3]}) must divide those of query "
                f"({heads}) with enable_gqa=True"
            )
    shapes = [shape[:-1] for shape in shapes]
    return (*_broadcast(shapes, "the batch dimensions of query, key and value"), heads)


def to_four_dims(x: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """[..., heads or less, T, D] -> [B, heads, T, D] with last stride 1; a view if possible."""
    x = with_unit_stride(x)
    length, size = x.shape[-2:]
    if x.shape != (*batch, heads, length, size):
        x = x.expand(*batch, heads, length, size)
    if len(batch) == 1:
        return x
    return x.reshape(math.prod(batch), heads, length, size)


def key_value_heads(key: Tensor, value: Tensor, heads: int, enable_gqa: bool) -> int:
    """How many heads of keys and values the backends get: those that differ."""
    found = [1 if x.dim() < 3 else x.shape[-3] for x in (key, value)]
    if found[0] == found[1] and (enable_gqa or found[0] == 1):
        return found[0]
    return heads


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """With enable_gqa and key heads unlike value heads both are repeated, as PyTorch does."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], -3)


def mask_of(
    attn_mask: Any, query: Tensor, lead: tuple[int, ...], length_q: int, length_k: int
) -> Tensor:
    """[B, H, Tq, Tk], expanded; last stride 0 or 1."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"{NAME}: attn_mask must be a Tensor, not {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(
            f"{NAME}: attn_mask is {attn_mask.dtype}; accepted are bool, float32 and query's dtype "
            f"{query.dtype}"
        )
    check_device(NAME, "attn_mask", attn_mask, query)
    full = (*lead, length_q, length_k)
    shape = tuple(attn_mask.shape)
    missing = len(full) - len(shape)
    fits = len(shape) >= 2 and missing >= 0
    if not fits or any(n not in (1, m) for n, m in zip(shape, full[missing:], strict=True)):
        raise RuntimeError(
            f"{NAME}: attn_mask must be broadcastable to {list(full)}, but has shape {list(shape)}"
        )
    if attn_mask.stride(-1) not in (0, 1):
        attn_mask = attn_mask.contiguous()
    return _flat(attn_mask.expand(full), lead, 2)


def global_mask_of(global_mask: Any, query: Tensor, lead: tuple[int, ...], length_k: int) -> Tensor:
    """bool [B, Tk] of a mask of shape (*batch, Tk) or one that broadcasts to it."""
    if not isinstance(global_mask, Tensor):
        raise TypeError(f"{NAME}: global_mask must be a Tensor, not {type(global_mask).__name__}")
    if global_mask.dtype != torch.bool:
        raise TypeError(f"{NAME}: global_mask must be bool, but is {global_mask.dtype}")
    check_device(NAME, "global_mask", global_mask, query)
    full = (*lead[:-1], length_k) if len(lead) > 1 else (1, length_k)
    shape = tuple(global_mask.shape)
    missing = len(full) - len(shape)
    if (
        not shape
        or missing < 0
        or shape[-1] != length_k
        or any(n not in (1, m) for n, m in zip(shape, full[missing:], strict=True))
    ):
        raise ValueError(
            f"{NAME}: global_mask must have shape {list(full)}, one entry a key, but has shape "
            f"{list(shape)}"
        )
    return global_mask.expand(full).reshape(math.prod(full[:-1]), length_k)


def _flat(x: Tensor, lead: tuple[int, ...], kept: int) -> Tensor:
    """[*lead, ...] -> [B, H, ...], where lead is all batch dimensions and the heads."""
    tail = x.shape[-kept:]
    if len(lead) == 2:
        return x
    if len(lead) < 2:
        return x[(None,) * (2 - len(lead))]
    return x.reshape(math.prod(lead[:-1]), lead[-1], *tail)
