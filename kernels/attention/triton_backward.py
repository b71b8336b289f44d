"""Gradients of attention in Triton, without atomics: fixed order, the same bits in every run.

First delta, the part of a row's gradient that all its scores share.  Then dk and dv: a program owns
a block of keys and walks over the queries that see it, for every query head of its key head.  Then
dq: a program owns a block of queries, as in the forward.  Plain blocks, edges and global positions
are told apart as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.attention import triton_dkv, triton_dq
from kernels.attention.pattern import Pattern, Scaling, empty_like_heads
from kernels.attention.triton_launch import NUMBERS, Call, prepare, strides
from kernels.attention.triton_scores import LOG2_E, head_side, load_rows

DELTA_BLOCK_M, DELTA_WARPS = 32, 4


@triton.jit(do_not_specialize=NUMBERS)
def _delta_kernel(
    out_ptr,  # [B, H, Tq, Dv]
    dout_ptr,  # [B, H, Tq, Dv]
    lse_ptr,  # [B, H, Tq]
    dlse_ptr,  # [B, H, Tq], strided
    sinks_ptr,  # [H]
    delta_ptr,  # [B, H, Tq]
    dsinks_ptr,  # [B, blocks, H]: shares
    stride_ob, stride_oh, stride_om, stride_dob, stride_doh, stride_dom,  # in units of VEC
    stride_db, stride_dh, stride_dm, heads, rows_q, value_dim, blocks,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """delta = sum of dout * out, less dlse."""
    block, number = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = (number // heads).to(tl.int64), number % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < rows_q
    strides_o, strides_do = (stride_ob, stride_oh, stride_om), (stride_dob, stride_doh, stride_dom)
    out_side = head_side(out_ptr, strides_o, b, h, 0, value_dim, BLOCK_DV, VEC)
    dout_side = head_side(dout_ptr, strides_do, b, h, 0, value_dim, BLOCK_DV, VEC)
    out = load_rows(out_side, 0, rows, valid, WHOLE, True).to(tl.float32)
    delta = tl.sum(out * load_rows(dout_side, 0, rows, valid, WHOLE, True).to(tl.float32), 1)
    if dlse_ptr is not None:
        dlse_ptr += b * stride_db + h.to(tl.int64) * stride_dh
        delta -= tl.load(dlse_ptr + rows.to(tl.int64) * stride_dm, mask=valid, other=0.0)
    own = (b * heads + h) * rows_q + rows
    tl.store(delta_ptr + own, delta, mask=valid)
    if sinks_ptr is not None:
        lse = tl.load(lse_ptr + own, mask=valid, other=float("inf"))
        sink = tl.load(sinks_ptr + h).to(tl.float32)
        weight = tl.where(lse == float("-inf"), 0.0, tl.exp2((sink - lse) * LOG2_E))
        tl.store(dsinks_ptr + (b * blocks + block) * heads + h, tl.sum(-weight * delta, 0))


def _delta(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], call: Call
) -> tuple[Tensor, Tensor | None]:
    """delta [B, H, Tq] and, of sinks, their gradient in float32."""
    out, dout, lse, dlse, sinks = tensors
    batch, heads, rows_q, _ = out.shape
    blocks = triton.cdiv(rows_q, DELTA_BLOCK_M)
    delta = torch.empty_like(lse)
    shares = None if sinks is None else lse.new_empty((batch * blocks, heads))
    names = [f"stride_{tensor}{dim}" for tensor in ("o", "do") for dim in "bhm"]
    names += ["heads", "rows_q", "value_dim", "VEC", "BLOCK_DV"]
    _delta_kernel[(batch * blocks * heads,)](
        out,
        dout,
        lse,
        dlse,
        sinks,
        delta,
        shares,
        **strides("d", dlse, "bhm"),
        **{name: call.arguments[name] for name in names},
        blocks=blocks,
        WHOLE=call.arguments["BLOCK_DV"] == out.shape[3],
        BLOCK_M=DELTA_BLOCK_M,
        num_warps=DELTA_WARPS,
        **_triton.LAUNCH,
    )
    return delta, None if shares is None else shares.sum(0)


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
    pattern: Pattern,
    scaling: Scaling,
    out: Tensor,
    lse: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dquery, dkey, dvalue, None (for the mask) and dsinks; None where not asked for."""
    with_dquery, with_dkey, with_dvalue, _, with_dsinks = output_mask
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    dq, dk, dv = (empty_like_heads(x, x.shape[3]) for x in (query, key, value))
    tensors = {"q": query, "k": key, "v": value, "o": out, "do": dout, "dq": dq, "dk": dk, "dv": dv}
    dsinks = None
    with _triton.device_of(query):
        call = prepare(
            tensors, mask, alibi_slopes, global_mask, seed, cu_seqlens_q, cu_seqlens_k,
            pattern, scaling,
        )  # fmt: skip
        delta, dsinks = _delta((out, dout, lse, dlse, sinks if with_dsinks else None), call)
        inputs = query, key, value, dout, lse, delta
        if with_dkey or with_dvalue:
            rows, heads = pattern.max_seqlen_k, key.shape[1]
            pointers = *inputs, dk, dv
            call.launch(triton_dkv.dkv_kernel, pointers, triton_dkv.TILES, rows, heads, "BLOCK_N")
        if with_dquery:
            rows, heads = pattern.max_seqlen_q, query.shape[1]
            call.launch(triton_dq.dq_kernel, (*inputs, dq), triton_dq.TILES, rows, heads, "BLOCK_M")
    return (
        dq if with_dquery else None,
        dk if with_dkey else None,
        dv if with_dvalue else None,
        None,
        None if dsinks is None or sinks is None else dsinks.to(sinks.dtype),
    )
