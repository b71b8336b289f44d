"""Calls of the Triton attention kernels as the backends get them, checked against float64.

The values wanted are the reference's in float64, and errors may be twice those of the reference in
the kernels' own dtype: it computes in float32 and rounds once, which is the strictest yardstick.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention import triton as backend
from kernels.attention.decode import reference as decode_reference
from kernels.attention.decode import triton as decode
from kernels.attention.pattern import Pattern, Scaling
from tests.tolerance import assert_as_exact_as_torch

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dmask", "dsinks")
SEED = 0x0123456789ABCDEF  # both halves of the key differ from 0


@dataclass(frozen=True)
class Call:
    """Sizes and features; query, key and value come from the random generator."""

    length_q: int
    length_k: int
    dims: tuple[int, int] = (16, 16)
    heads: tuple[int, int] = (2, 1)
    batch: int = 1
    causal: bool = False
    lower_right: bool = False
    window: tuple[int, int] = (-1, -1)
    global_tokens: int = 0
    global_share: float = 0.0
    mask: torch.dtype | None = None
    alibi: bool = False
    sinks: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    scale: float | None = None
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # of packed sequences
    heads_last: bool = False  # [B, T, H, D] in memory

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        """query, key, value and dout."""
        (heads, kv_heads), (head_dim, value_dim) = self.heads, self.dims
        shapes = [
            (self.batch, heads, self.length_q, head_dim),
            (self.batch, kv_heads, self.length_k, head_dim),
            (self.batch, kv_heads, self.length_k, value_dim),
            (self.batch, heads, self.length_q, value_dim),
        ]
        if self.heads_last:
            return [torch.randn(b, t, h, d).to(dtype).transpose(1, 2) for b, h, t, d in shapes]
        return [torch.randn(shape).to(dtype) for shape in shapes]

    def arguments(self, dtype: torch.dtype) -> tuple:
        """What follows query, key and value; sinks in `dtype`."""
        heads = self.heads[0]
        mask = slopes = sinks = marked = cu_q = cu_k = seed = None
        longest, sequences = (self.length_q, self.length_k), self.batch
        if self.mask is torch.bool:
            mask = torch.rand(self.batch, 1, self.length_q, self.length_k) < 0.7
        elif self.mask is not None:
            mask = torch.randn(1, heads, self.length_q, self.length_k).to(self.mask)
        if mask is not None:
            mask = mask.expand(self.batch, heads, -1, -1)
        if self.lengths is not None:
            cu_q, cu_k = (torch.tensor((0, *n)).cumsum(0).int() for n in self.lengths)
            longest, sequences = (max(self.lengths[0]), max(self.lengths[1])), len(self.lengths[0])
        if self.alibi:
            slopes = torch.rand(sequences, heads)
        if self.sinks:
            sinks = torch.randn(heads).to(dtype)
        if self.global_share:
            marked = torch.rand(self.batch, self.length_k) < self.global_share
        if self.dropout_p:
            seed = torch.tensor([SEED])
        pattern = Pattern(
            int(self.causal), int(self.lower_right), *self.window, self.global_tokens, *longest
        )
        scale = self.dims[0] ** -0.5 if self.scale is None else self.scale
        scaling = Scaling(scale, self.softcap, self.dropout_p)
        return mask, slopes, sinks, marked, seed, cu_q, cu_k, pattern, scaling


def _results(module, tensors, dlse, arguments) -> list[Tensor | None]:
    query, key, value, dout = tensors
    call = query, key, value, *arguments
    out, lse = module.forward(*call)
    wanted = True, True, True, False, arguments[2] is not None
    return [out, lse, *module.backward(dout, dlse, *call, out, lse, wanted)]


def check(call: Call, dtype: torch.dtype) -> list[Tensor | None]:
    """out, lse and all gradients are as exact as the rule of tests.tolerance asks."""
    tensors, arguments = call.tensors(dtype), call.arguments(dtype)
    dlse = torch.randn(call.batch, call.heads[0], call.length_q)
    assert backend.unsupported(*tensors[:3], *arguments) is None
    ours = _results(backend, tensors, dlse, arguments)
    theirs = _results(reference, tensors, dlse, arguments)
    exact = _results(reference, [x.double() for x in tensors], dlse.double(), arguments)
    for tensor, like in zip(ours[2:5], tensors, strict=False):
        assert tensor.dtype == dtype
        assert (tensor.stride(1) < tensor.stride(2)) == (like.stride(1) < like.stride(2))
    terms = [0.0] * len(NAMES)
    if call.sinks:  # a sum whose terms cancel
        shared = (tensors[3].double() * exact[0]).sum(-1) - dlse
        seen_by_sink = (arguments[2].double()[:, None] - exact[1]).exp() * shared.abs()
        terms[-1] = seen_by_sink.sum((0, 2)).max().item()
    assert_as_exact_as_torch(ours, theirs, exact, NAMES, terms)
    return ours


@dataclass(frozen=True)
class Decode:
    """A call against a cache; `lengths` are those of the sequences."""

    capacity: int
    lengths: tuple[int, ...]
    queries: int = 1
    dims: tuple[int, int] = (16, 16)
    heads: tuple[int, int] = (4, 2)
    page_size: int = 0  # 0: no pages
    cache: torch.dtype | None = None  # None: the query's
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    global_tokens: int = 0
    softcap: float = 0.0
    features: tuple[str, ...] = field(default=())  # of "alibi", "sinks"


def check_decode(call: Decode, dtype: torch.dtype) -> None:
    """out and lse as in `check`."""
    (heads, kv_heads), (head_dim, value_dim) = call.heads, call.dims
    batch, cache_dtype = len(call.lengths), call.cache or dtype
    shape, table, capacity = (batch, kv_heads, call.capacity), None, call.capacity
    if call.page_size:
        pages = -(-call.capacity // call.page_size)
        order = torch.randperm(batch * pages + 3)[: batch * pages]
        table, capacity = order.view(batch, pages).int(), pages * call.page_size
        shape = (len(order) + 3, kv_heads, call.page_size)
    scales = None, None
    if cache_dtype == torch.int8:
        k_cache, v_cache = (
            torch.randint(-127, 128, (*shape, n), dtype=torch.int8) for n in (head_dim, value_dim)
        )
        scales = torch.rand(shape) / 60, torch.rand(shape) / 60
    else:
        k_cache, v_cache = (torch.randn(*shape, n).to(cache_dtype) for n in (head_dim, value_dim))
    query = torch.randn(batch, heads, call.queries, head_dim).to(dtype)
    arguments = (
        torch.tensor(call.lengths, dtype=torch.int32),
        table,
        *scales,
        torch.rand(batch, heads) if "alibi" in call.features else None,
        torch.randn(heads) if "sinks" in call.features else None,
        Pattern(int(call.causal), 1, *call.window, call.global_tokens, call.queries, capacity),
        Scaling(head_dim**-0.5, call.softcap, 0.0),
    )
    assert decode.unsupported(query, k_cache, v_cache, *arguments) is None
    ours = decode.forward(query, k_cache, v_cache, *arguments)
    theirs = decode_reference.forward(query, k_cache, v_cache, *arguments)
    exact_caches = [x if x.dtype == torch.int8 else x.double() for x in (k_cache, v_cache)]
    exact = decode_reference.forward(query.double(), *exact_caches, *arguments)
    assert_as_exact_as_torch(ours, theirs, exact, NAMES[:2])
