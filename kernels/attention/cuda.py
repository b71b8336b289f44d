"""Attention in CUDA C++ (csrc/attention/cuda.cuh): checks, allocation, one call each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import _gpu, _native
from kernels._gpu import address
from kernels._native import DTYPE_CODES, dtype_refusal
from kernels.attention.pattern import (
    Pattern,
    Scaling,
    dropout_factor,
    dropout_threshold,
    empty_like_heads,
)

MAX_HEAD_DIM = 256
FAR = 1 << 30  # kFar of csrc/attention/cuda_problem.cuh: no two positions are further apart
MASK_NONE, MASK_BOOL, MASK_FLOAT32, MASK_SAME_DTYPE = range(4)
ABSENT = (0, 0, 0, 0, 0)  # in place of _heads of a tensor that is not wanted


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *_: object,
) -> str | None:
    if isinstance(_native.cuda, str):
        return _native.cuda
    reason = _gpu.unsupported(query)
    if reason is not None:
        return reason
    if query.dtype not in DTYPE_CODES:
        return dtype_refusal("query", query)
    head_dim = max(query.shape[-1], value.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {head_dim}; accepted are 1 to {MAX_HEAD_DIM}"
    length = max(query.shape[2], key.shape[2])
    if length >= FAR:
        return f"a sequence has {length} positions; accepted are fewer than {FAR}"
    if mask is not None:
        if mask.requires_grad:
            return "mask requires a gradient"
        if mask.dtype not in (torch.bool, torch.float32, query.dtype):
            return f"mask is {mask.dtype}; accepted are bool, float32 and {query.dtype}"
    return None


def _strides(tensor: Tensor) -> list[int]:
    """In elements; those of dimensions of one element say nothing and become 0."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


def _heads(tensor: Tensor | None) -> tuple[int, ...]:
    if tensor is None:
        return ABSENT
    return (address(tensor), *_strides(tensor)[:3], tensor.shape[3])


def _global_positions(global_mask: Tensor, global_tokens: int, keys: int) -> tuple[Tensor, Tensor]:
    """int32 [B, keys]: the global positions in order, and int32 [B]: how many there are."""
    batches = global_mask.shape[0]
    positions = torch.empty((batches, keys), dtype=torch.int32, device=global_mask.device)
    count = torch.empty(batches, dtype=torch.int32, device=global_mask.device)
    _native.cuda.attention_globals(
        address(global_mask),
        *global_mask.stride(),
        batches,
        keys,
        global_tokens,
        address(positions),
        address(count),
        _gpu.device_index(global_mask),
        _gpu.stream(global_mask),
    )
    return positions, count


class _Problem:
    """The arguments that forward and backward share, in the order of csrc/attention/module_cuda.cu.

    Keeps the tensors that it makes for the call.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        alibi_slopes: Tensor | None,
        sinks: Tensor | None,
        global_mask: Tensor | None,
        seed: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        pattern: Pattern,
        scaling: Scaling,
    ) -> None:
        self.query, self.key, self.mask, self.seed = query, key, mask, seed
        self.alibi_slopes, self.pattern, self.scaling = alibi_slopes, pattern, scaling
        self.cu_seqlens_q, self.cu_seqlens_k = cu_seqlens_q, cu_seqlens_k
        self.sinks = None if sinks is None else sinks.detach().float().contiguous()
        self.global_tokens = pattern.global_tokens if pattern.windowed else 0
        self.global_mask = global_mask if pattern.windowed else None
        self.positions: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.global_mask is not None:
            self.positions = _global_positions(self.global_mask, self.global_tokens, key.shape[2])

    def flat(self) -> list[int | float]:
        pattern, scaling = self.pattern, self.scaling
        batches = self.query.shape[0]
        if self.cu_seqlens_q is not None:
            batches = self.cu_seqlens_q.numel() - 1
        limit = 0 if pattern.causal else FAR
        return [
            DTYPE_CODES[self.query.dtype],
            batches,
            self.query.shape[1],
            self.query.shape[1] // self.key.shape[1],
            pattern.max_seqlen_q,
            pattern.max_seqlen_k,
            self.query.shape[2],
            address(self.cu_seqlens_q),
            address(self.cu_seqlens_k),
            -min(pattern.left, FAR) if pattern.left >= 0 else -FAR,
            min(pattern.right, limit) if pattern.right >= 0 else limit,
            limit,
            pattern.lower_right,
            min(self.global_tokens, FAR),
            address(self.global_mask),
            *((0, 0) if self.global_mask is None else self.global_mask.stride()),
            *map(address, self.positions),
            *self._mask(),
            address(self.alibi_slopes),
            *((0, 0) if self.alibi_slopes is None else self.alibi_slopes.stride()),
            address(self.sinks),
            scaling.scale,
            scaling.softcap,
            address(self.seed),
            dropout_threshold(scaling.dropout_p),
            dropout_factor(scaling.dropout_p),
        ]

    def _mask(self) -> tuple[int, ...]:
        if self.mask is None:
            return (0, MASK_NONE, 0, 0, 0, 0)
        kind = {torch.bool: MASK_BOOL, torch.float32: MASK_FLOAT32}.get(self.mask.dtype)
        return (
            address(self.mask),
            MASK_SAME_DTYPE if kind is None else kind,
            *self.mask.stride(),
        )


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
    """out [B, H, Tq, Dv] in query's dtype and layout; lse float32 [B, H, Tq]."""
    problem = _Problem(
        query,
        key,
        mask,
        alibi_slopes,
        sinks,
        global_mask,
        seed,
        cu_seqlens_q,
        cu_seqlens_k,
        Pattern(*pattern),
        Scaling(*scaling),
    )
    out = empty_like_heads(query, value.shape[-1])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _native.cuda.attention_forward(
        *problem.flat(),
        *_heads(query),
        *_heads(key),
        *_heads(value),
        *_heads(out),
        address(lse),
        _gpu.device_index(query),
        _gpu.stream(query),
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients asked for, in the dtypes and layouts of their inputs; never one of the mask."""
    problem = _Problem(
        query,
        key,
        mask,
        alibi_slopes,
        sinks,
        global_mask,
        seed,
        cu_seqlens_q,
        cu_seqlens_k,
        Pattern(*pattern),
        Scaling(*scaling),
    )
    dquery, dkey, dvalue = (
        empty_like_heads(like, like.shape[-1]) if wanted else None
        for like, wanted in zip((query, key, value), output_mask, strict=False)
    )
    dsinks = None
    if output_mask[4] and problem.sinks is not None:
        dsinks = torch.empty_like(problem.sinks)
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    _native.cuda.attention_backward(
        *problem.flat(),
        *_heads(query),
        *_heads(key),
        *_heads(value),
        *_heads(dout),
        *_heads(dquery),
        *_heads(dkey),
        *_heads(dvalue),
        *_heads(out),
        address(lse),
        address(dlse),
        address(delta),
        address(dsinks),
        lse.shape[0],
        _gpu.device_index(query),
        _gpu.stream(query),
    )
    if dsinks is not None and sinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return dquery, dkey, dvalue, None, dsinks
