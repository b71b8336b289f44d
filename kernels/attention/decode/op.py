"""Attention against a cache for users: checks and dispatch.  Maths: kernels/attention/README.md."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from kernels.attention import arguments as checks
from kernels.attention.decode import reference
from kernels.dispatch import define, is_readable

NAME = "decode_attention"
CACHE_DTYPES = (*checks.DTYPES, torch.int8)

choose = define(
    "attention.decode",
    forward="(Tensor query, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table,"
    " Tensor? k_scale, Tensor? v_scale, Tensor? alibi_slopes, Tensor? sinks, SymInt[] pattern,"
    " float[] scaling) -> (Tensor out, Tensor lse)",
    backward=None,
)


class Call(NamedTuple):
    """What a backend's forward is called with; see pattern.py for the last two."""

    query: Tensor  # [B, H, Tq, D], last stride 1 as in the caches
    k_cache: Tensor  # [B, Hkv, S, D], paged [pages, Hkv, page_size, D]
    v_cache: Tensor  # the same with Dv
    lengths: Tensor  # int32 [B]
    block_table: Tensor | None  # int32 [B, max_pages]
    k_scale: Tensor | None  # float32, the cache's shape without its last dimension
    v_scale: Tensor | None
    alibi_slopes: Tensor | None  # float32 [B, H]
    sinks: Tensor | None  # [H]
    pattern: tuple[int, ...]
    scaling: tuple[float, float, float]


def decode_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    global_tokens: int = 0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of each sequence's newest positions against a cache; no PyTorch counterpart.

    The keys are split among threads or blocks and the parts combined in a fixed order ("flash
    decoding", https://pytorch.org/blog/flash-decoding/).

    Args:
        query: [B, H, Tq, D] of float32, bfloat16, float16 or float64: the last Tq positions of
            each sequence, whose keys are already in the cache.  Fused for Tq up to 16.
        k_cache, v_cache: [B, Hkv, S, D] and [B, Hkv, S, Dv], a float dtype or int8; Hkv divides H.
            With block_table [pages, Hkv, page_size, D]: key j of sequence b is
            k_cache[block_table[b, j // page_size], :, j % page_size].
        lengths: int32 (or int64) [B]: keys in each sequence.  On the CPU an error where it is more
            than the cache holds; on a GPU, which is not waited for, it is cut to that
            (kernels.dispatch.checked makes it an error there, too).
        block_table: None or int32 (or int64) [B, max_pages].
        k_scale, v_scale: with an int8 cache, float32 [B, Hkv, S] (paged: [pages, Hkv, page_size]):
            what each key and value vector is multiplied by.
        is_causal: query i of sequence b sees keys up to lengths[b] - Tq + i.
        All others: as for kernels.attention.scaled_dot_product_attention.

    Returns:
        out [B, H, Tq, Dv] in query's dtype; with return_lse (out, lse), lse [B, H, Tq] in float32.

    Raises:
        TypeError, RuntimeError, ValueError, NotImplementedError, before anything runs; RuntimeError
        where a gradient would be needed, which there is none of.
    """
    tensors = query, k_cache, v_cache, lengths, block_table, k_scale, v_scale, alibi_slopes, sinks
    if has_torch_function(tensors):
        return handle_torch_function(
            decode_attention,
            tensors,
            *tensors[:4],
            block_table=block_table,
            k_scale=k_scale,
            v_scale=v_scale,
            is_causal=is_causal,
            scale=scale,
            window=window,
            global_tokens=global_tokens,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
        )
    call = prepare(
        *tensors[:4],
        block_table,
        k_scale,
        v_scale,
        is_causal,
        scale,
        window,
        global_tokens,
        softcap,
        alibi_slopes,
        sinks,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{NAME}: has no gradient; call it under torch.no_grad(), or use "
            "scaled_dot_product_attention"
        )
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        out, lse = reference.forward(*call)
    elif call.query.is_meta:
        out, lse = reference.forward(*call)  # there are no lengths for eager to read
    elif 0 in call.query.shape or call.v_cache.shape[3] == 0:
        out, lse = reference.forward(*call)  # an empty result: no kernel needs to know
    else:
        out, lse = choose(*call).forward(*call)
    return (out, lse) if return_lse else out


def prepare(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: Any,
    global_tokens: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Call:
    """The call as backends take it; raises what is wrong."""
    _check_tensors(query, k_cache, v_cache, k_scale, v_scale)
    batch, heads, length_q, head_dim = query.shape
    lengths = _indices("lengths", lengths, (batch,), query)
    if block_table is None:
        if k_cache.shape[0] != batch:
            raise RuntimeError(
                f"{NAME}: k_cache must hold {batch} sequences as query does, but has shape "
                f"{list(k_cache.shape)}; a paged cache needs block_table"
            )
        capacity = k_cache.shape[2]
    else:
        block_table = _indices("block_table", block_table, (batch, None), query)
        capacity = block_table.shape[1] * k_cache.shape[2]
        if not k_cache.shape[2]:
            raise RuntimeError(f"{NAME}: the pages of k_cache hold no keys: {list(k_cache.shape)}")
    if is_readable(lengths):
        _check_values(lengths, block_table, k_cache, capacity)
    pattern = checks.pattern_of(
        NAME, (length_q, capacity), is_causal, window, global_tokens, "lower_right"
    )
    scaling = checks.scaling_of(NAME, head_dim, scale, softcap, 0.0)
    if alibi_slopes is not None:
        alibi_slopes = checks.alibi_of(NAME, alibi_slopes, batch, heads, query)
    if sinks is not None:
        checks.check_sinks(NAME, sinks, heads, query)
    query, k_cache, v_cache = (checks.with_unit_stride(x) for x in (query, k_cache, v_cache))
    tensors = query, k_cache, v_cache, lengths, block_table, k_scale, v_scale, alibi_slopes, sinks
    return Call(*tensors, pattern, scaling)


def backend_arguments(*arguments: Any, **keywords: Any) -> Call:
    """What backends are asked about a public call; for dispatch.explain."""
    call = inspect.signature(decode_attention).bind(*arguments, **keywords)
    call.apply_defaults()
    call.arguments.pop("return_lse")
    return prepare(**call.arguments)


def _check_tensors(query: Any, k_cache: Any, v_cache: Any, k_scale: Any, v_scale: Any) -> None:
    for name, tensor in (("query", query), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{NAME}: {name} must be a Tensor, not {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise RuntimeError(
                f"{NAME}: {name} must be 4-dimensional, but has shape {list(tensor.shape)}"
            )
        checks.check_device(NAME, name, tensor, query)
    if query.dtype not in checks.DTYPES:
        raise NotImplementedError(
            f"{NAME}: query is {query.dtype}; accepted are float32, bfloat16, float16, float64"
        )
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in CACHE_DTYPES:
        raise NotImplementedError(
            f"{NAME}: k_cache is {k_cache.dtype} and v_cache {v_cache.dtype}; accepted are both "
            "float32, bfloat16, float16, float64 or int8"
        )
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise RuntimeError(
            f"{NAME}: k_cache and v_cache may differ in their last size only, but have shapes "
            f"{list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    if query.shape[3] != k_cache.shape[3]:
        raise RuntimeError(
            f"{NAME}: query and k_cache must have one last size, but have shapes "
            f"{list(query.shape)} and {list(k_cache.shape)}"
        )
    heads, kv_heads = query.shape[1], k_cache.shape[1]
    if not kv_heads or heads % kv_heads:
        raise RuntimeError(
            f"{NAME}: the heads of the cache ({kv_heads}) must divide those of query ({heads})"
        )
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        _check_scale(name, scale, k_cache)


def _check_scale(name: str, scale: Any, cache: Tensor) -> None:
    if scale is None:
        if cache.dtype == torch.int8:
            raise ValueError(f"{NAME}: an int8 cache needs k_scale and v_scale, {name} is None")
        return
    if not isinstance(scale, Tensor):
        raise TypeError(f"{NAME}: {name} must be a Tensor or None, not {type(scale).__name__}")
    if cache.dtype != torch.int8:
        raise ValueError(f"{NAME}: {name} goes with an int8 cache, but this one is {cache.dtype}")
    if scale.shape != cache.shape[:3] or scale.dtype != torch.float32:
        raise ValueError(
            f"{NAME}: {name} must be float32 of shape {list(cache.shape[:3])}, "
            f"but is {scale.dtype} of shape {list(scale.shape)}"
        )
    checks.check_device(NAME, name, scale, cache)


def _indices(name: str, tensor: Any, shape: tuple[int | None, ...], query: Tensor) -> Tensor:
    """`tensor` as int32 with last stride 1; `shape` has None where any size will do."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{NAME}: {name} must be a Tensor, not {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{NAME}: {name} is {tensor.dtype}; accepted are int32 and int64")
    if tensor.dim() != len(shape) or any(
        n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ["max_pages" if n is None else n for n in shape]
        raise ValueError(f"{NAME}: {name} must be {wanted}, but has shape {list(tensor.shape)}")
    checks.check_device(NAME, name, tensor, query)
    return tensor.int().contiguous()


def _check_values(
    lengths: Tensor, block_table: Tensor | None, cache: Tensor, capacity: int
) -> None:
    values = lengths.tolist()
    least, most = min(values, default=0), max(values, default=0)
    if least < 0 or most > capacity:
        raise ValueError(
            f"{NAME}: lengths must be between 0 and the {capacity} keys that the cache holds, "
            f"but goes from {least} to {most}"
        )
    if block_table is None:
        return
    page_size, pages = cache.shape[2], cache.shape[0]
    used = torch.arange(block_table.shape[1], device=lengths.device) * page_size < lengths[:, None]
    wrong = used & ((block_table < 0) | (block_table >= pages))
    if bool(wrong.any()):
        sequence, place = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"{NAME}: block_table must name pages 0 ... {pages - 1} wherever lengths reaches, but "
            f"block_table[{sequence}, {place}] is {int(block_table[sequence, place])}"
        )
