"""Attention over packed sequences: the rows of all sequences in one tensor, without padding."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from kernels.attention import arguments as checks
from kernels.attention.arguments import Call
from kernels.attention.op import run
from kernels.dispatch import is_readable

NAME = "varlen_attention"


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    global_tokens: int = 0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
    seed: int | Tensor | None = None,
) -> Any:
    """scaled_dot_product_attention within each of N sequences that lie one after the other.

    PyTorch's counterpart is torch.nn.attention.varlen.varlen_attn, for half precision on GPUs.

    Args:
        query: [total_q, H, D]; key: [total_k, Hkv, D]; value: [total_k, Hkv, Dv]; dtypes and
            strides as for scaled_dot_product_attention.  Hkv divides H.
        cu_seqlens_q, cu_seqlens_k: int32 (or int64) [N + 1] on query's device: sequence n has the
            rows cu_seqlens[n] ... cu_seqlens[n + 1] - 1; from 0 to total, never decreasing.  What
            is on the CPU is checked; on a GPU it is trusted, as looking would wait for the device,
            but for kernels.dispatch.checked.
        max_seqlen_q, max_seqlen_k: the longest sequence, or more.  None: on the CPU worked out, on
            a GPU the total, which is correct but starts idle blocks.
        alibi_slopes: (H,) or (N, H).
        All others: as for scaled_dot_product_attention; positions count within a sequence.

    Returns:
        out [total_q, H, Dv]; with return_lse (out, lse), lse [H, total_q] in float32.

    Raises:
        TypeError, RuntimeError, ValueError, NotImplementedError, before anything runs.
    """
    tensors = query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks
    if has_torch_function(tensors):
        return handle_torch_function(
            varlen_attention,
            tensors,
            *tensors[:5],
            max_seqlen_q,
            max_seqlen_k,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            window=window,
            global_tokens=global_tokens,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            causal_alignment=causal_alignment,
            return_lse=return_lse,
            seed=seed,
        )
    _check_shapes(query, key, value)
    query, key, value = checks.autocast(query, key, value)
    cu_q, longest_q = _sequences("q", cu_seqlens_q, max_seqlen_q, query)
    cu_k, longest_k = _sequences("k", cu_seqlens_k, max_seqlen_k, key)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"{NAME}: cu_seqlens_q and cu_seqlens_k must be of one length, "
            f"but have {cu_q.shape[0]} and {cu_k.shape[0]} entries"
        )
    pattern = checks.pattern_of(
        NAME, (longest_q, longest_k), is_causal, window, global_tokens, causal_alignment
    )
    scaling = checks.scaling_of(NAME, query.shape[2], scale, softcap, dropout_p)
    heads = query.shape[1]
    if alibi_slopes is not None:
        alibi_slopes = checks.alibi_of(NAME, alibi_slopes, cu_q.shape[0] - 1, heads, query)
    if sinks is not None:
        checks.check_sinks(NAME, sinks, heads, query)
    seed = checks.seed_of(NAME, seed, scaling[2], query)
    # [total, H, D] -> [1, H, total, D]
    query, key, value = (
        checks.with_unit_stride(x).transpose(0, 1)[None] for x in (query, key, value)
    )
    out, lse = run(
        Call(query, key, value, None, alibi_slopes, sinks, None, seed, cu_q, cu_k, pattern, scaling)
    )
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    checks.check_tensors(query, key, value, NAME, rank=3)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise RuntimeError(
                f"{NAME}: {name} must be [total, heads, size], but has shape {list(tensor.shape)}"
            )
    if key.shape[:2] != value.shape[:2]:
        raise RuntimeError(
            f"{NAME}: key and value must have one total length and one number of heads, but key "
            f"has shape {list(key.shape)} and value {list(value.shape)}"
        )
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads != heads and (not kv_heads or heads % kv_heads):
        raise RuntimeError(
            f"{NAME}: the heads of key and value ({kv_heads}) must divide those of query ({heads})"
        )


def _sequences(side: str, cu_seqlens: Any, max_seqlen: Any, rows: Tensor) -> tuple[Tensor, int]:
    """cu_seqlens as int32, and the length that no sequence exceeds."""
    name, total = f"cu_seqlens_{side}", rows.shape[0]
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{NAME}: {name} must be a Tensor, not {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{NAME}: {name} is {cu_seqlens.dtype}; accepted are int32 and int64")
    if cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
        raise ValueError(f"{NAME}: {name} must be [N + 1], but has shape {list(cu_seqlens.shape)}")
    checks.check_device(NAME, name, cu_seqlens, rows)
    if max_seqlen is not None:
        max_seqlen = checks.as_int(NAME, f"max_seqlen_{side}", max_seqlen, 0)
    longest = total
    if is_readable(cu_seqlens):
        longest = _check_values(name, cu_seqlens, total)
        if max_seqlen is not None and max_seqlen < longest:
            raise ValueError(
                f"{NAME}: max_seqlen_{side} is {max_seqlen}, but {name} has a sequence of {longest}"
            )
    return cu_seqlens.int().contiguous(), longest if max_seqlen is None else max_seqlen


def _check_values(name: str, cu_seqlens: Tensor, total: int) -> int:
    """The longest sequence."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total:
        raise ValueError(
            f"{NAME}: {name} must go from 0 to the number of rows, {total}, "
            f"but goes from {starts[0]} to {starts[-1]}"
        )
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if lengths and min(lengths) < 0:
        raise ValueError(
            f"{NAME}: {name} must not decrease, but entry {lengths.index(min(lengths)) + 1} is "
            f"{min(lengths)} from the one before"
        )
    return max(lengths, default=0)
