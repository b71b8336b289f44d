"""Attention in Triton: a program owns a block of queries and walks over the blocks of keys it sees.

Blocks that every query sees whole come first and carry no mask; those on the diagonal, at the
window's edges and at the end follow, then the global positions outside the window, gathered from a
list.  Queries at global positions see everything: further programs own them, gathered likewise.
Gradients are in triton_backward.py, the maths in README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.attention.pattern import Pattern, Scaling, empty_like_heads
from kernels.attention.triton_backward import backward
from kernels.attention.triton_launch import NUMBERS, prepare, unsupported
from kernels.attention.triton_scores import (
    LN_2,
    LOG2_E,
    both,
    head_side,
    kept,
    load_rows,
    products,
    scores,
    store_rows,
)
from kernels.attention.triton_walk import FAR, global_rank, own_block, seen, sequence, walk

__all__ = ["backward", "forward", "unsupported"]


# Per architecture, first match wins: (largest bytes of an element, largest BLOCK_D, 1 where the row
# is for plain calls only, BLOCK_M, BLOCK_N, num_warps, num_stages, columns that `products` takes at
# a time, or 0: all).  Chosen by what the compilers report, not timed: the largest tile whose loops
# fit the registers.  float32 is multiplied as tf32x3, which holds every operand twice: from 128
# columns on only slices of it fit.
TILES = {
    "sm_80": (
        (2, 64, 1, 128, 64, 8, 3, 0),  # with 4 warps 24 bytes spill
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 128, 32, 4, 3, 0),  # the widest that fits: with 64 keys 16 to 64 bytes spill
        (2, 128, 0, 64, 32, 4, 1, 0),
        (2, 256, 0, 64, 32, 8, 1, 0),  # dropout's and the mask's registers beside acc's
        (4, 64, 0, 32, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "sm_86": (
        (2, 64, 1, 128, 64, 8, 3, 0),  # with 4 warps 24 bytes spill
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 0, 64, 32, 4, 2, 0),  # 64 keys spill 8 bytes; 36 KiB, so 2 blocks in 99
        (2, 256, 0, 64, 32, 8, 1, 0),  # dropout's and the mask's registers beside acc's
        (4, 64, 0, 32, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "sm_90": (
        (2, 64, 1, 128, 128, 8, 2, 0),  # two warp groups; one block at 255 registers
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 128, 64, 8, 3, 0),  # 128 keys spill 416 bytes; 3 stages fit 227 KiB
        (2, 128, 0, 64, 32, 4, 2, 0),
        (2, 256, 1, 128, 32, 8, 2, 0),  # 64 keys spill 112 bytes
        (2, 256, 0, 64, 32, 8, 1, 0),
        (4, 64, 1, 128, 32, 8, 2, 0),  # tf32x3 holds every operand twice: 64 keys spill
        (4, 64, 0, 32, 32, 4, 1, 0),
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "sm_100": (
        (2, 64, 1, 128, 64, 8, 3, 0),  # 128 keys spill 8 bytes from Triton 3.8 on
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 128, 64, 8, 3, 0),  # 128 keys spill 416 bytes; 3 stages fit 227 KiB
        (2, 128, 0, 64, 32, 4, 2, 0),
        (2, 256, 1, 128, 32, 8, 2, 0),  # 64 keys spill 112 bytes
        (2, 256, 0, 64, 32, 8, 1, 0),
        (4, 64, 0, 32, 32, 4, 1, 0),  # tf32x3 holds every operand twice: 128 queries spill
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "gfx942": (
        (2, 64, 1, 128, 64, 4, 1, 0),  # 64 KiB of LDS hold K and V of two blocks
        (2, 64, 0, 64, 32, 4, 1, 0),
        (2, 128, 1, 64, 64, 4, 1, 0),
        (2, 128, 0, 64, 32, 4, 1, 0),
        (2, 256, 0, 32, 32, 4, 1, 0),
        (4, 128, 0, 32, 32, 4, 1, 32),
        (4, 256, 0, 16, 32, 4, 1, 32),
    ),
    "interpreter": (
        (4, 16, 0, 32, 32, 4, 1, 0),  # few positions walk through every loop
        (4, 256, 0, 32, 32, 4, 1, 16),
    ),
}


@triton.jit
def _attend(
    state,  # acc [BLOCK_M, BLOCK_DV]; m, l [BLOCK_M]: largest score, sum of 2**(score - m)
    fixed,
    mask_ptr,
    slope,
    seed,
    first_key,
    keys,  # of the block: see walk
    keys_valid,  # None in a plain block
    listed,
    SCORES: tl.constexpr,
    GLOBALS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax (Milakov & Gimelshein, 2018): one block of keys."""
    acc, m_i, l_i = state
    queries, k_side, v_side, sight, features, dropout = fixed
    rows, rows_valid = queries[3], queries[4]
    k = load_rows(k_side, first_key, keys, keys_valid, WHOLE, WIDE)
    block = k, k_side, first_key, keys
    qk = products(queries, block, keys_valid, WHOLE, WIDE, SLICE, PRECISION)
    if SCORES == 0 and keys_valid is None:
        scale = features[1]
        m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
        p = tl.exp2(tl.fma(qk, scale, -m_new[:, None]))
        shrink = tl.exp2(m_i - m_new)
    else:
        valid = both(rows_valid, keys_valid)
        i, j = rows[:, None], keys[None, :]
        visible = None
        if keys_valid is not None:
            visible = seen(i, j, sight, listed, GLOBALS) & keys_valid[None, :]
        s, _ = scores(qk, i, j, valid, visible, mask_ptr, slope, features, SCORES == 2)
        m_new = tl.maximum(m_i, tl.max(s, 1))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)  # of a row that saw nothing yet
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(m_i - finite)
    l_i = l_i * shrink + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(kept(seed, dropout, rows, keys, first_key, GLOBALS, False), p, 0.0)
    v = load_rows(v_side, first_key, keys, keys_valid, WHOLE, WIDE)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_new, l_i


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, Hkv, Tk, D]
    v_ptr,  # [B, Hkv, Tk, Dv]
    out_ptr,  # [B, H, Tq, Dv]
    lse_ptr,  # [B, H, Tq]
    mask_ptr,  # [B, H, Tq, Tk]
    slopes_ptr,  # [B, H]
    sinks_ptr,  # [H]
    seed_ptr,  # [1]
    list_ptr, rank_ptr,  # [B, Tk], [B, Tk + 1]: see list_globals_kernel
    cu_q_ptr, cu_k_ptr,  # [N + 1]
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,  # in units of VEC
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_sb, stride_sh,
    heads, group, rows_q, rows_k, head_dim, value_dim, blocks, programs,
    lower_right, left, right, future, global_tokens, scale, cap, threshold, keep_factor,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE: tl.constexpr,
    SCORES: tl.constexpr, GLOBALS: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = programs - 1 - program % programs  # under a causal mask the longest come first
    number = program // programs  # of the sequence and head: b H + h
    b, h = (number // heads).to(tl.int64), number % heads
    batch, first_q, first_k, length_q, length_k, offset = sequence(
        b, cu_q_ptr, cu_k_ptr, rows_q, rows_k, lower_right
    )
    if rank_ptr is not None:  # here, as functions return no None before Triton 3.7
        list_ptr += b * rows_k
        rank_ptr += b * (rows_k + 1)
    rows, rows_valid, stored, first, last, listed = own_block(
        block, blocks, offset, length_q, list_ptr, rank_ptr, global_tokens, length_k,
        BLOCK_M, GLOBALS,
    )  # fmt: skip
    if first > last:
        return
    first, last = first + offset, last + offset  # positions
    count = 0
    if GLOBALS:
        left = tl.where(listed, FAR, left)
        right = tl.where(listed, future, right)
        reach = tl.minimum(tl.maximum(last + future + 1, 0), length_k)
        count = global_rank(rank_ptr, reach, global_tokens, length_k)

    strides_q, strides_k = (stride_qb, stride_qh, stride_qm), (stride_kb, stride_kh, stride_kn)
    strides_v, strides_o = (stride_vb, stride_vh, stride_vn), (stride_ob, stride_oh, stride_om)
    q_side = head_side(q_ptr, strides_q, batch, h, first_q, head_dim, BLOCK_D, VEC)
    k_side = head_side(k_ptr, strides_k, batch, h // group, first_k, head_dim, BLOCK_D, VEC)
    v_side = head_side(v_ptr, strides_v, batch, h // group, first_k, value_dim, BLOCK_DV, VEC)
    out_side = head_side(out_ptr, strides_o, batch, h, first_q, value_dim, BLOCK_DV, VEC)
    slope = slopes_ptr  # None or a number
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * stride_sb + h * stride_sh) * LOG2_E
    if mask_ptr is not None:
        mask_ptr += b * stride_mask_b + h.to(tl.int64) * stride_mask_h
    features = offset, scale, cap, stride_mask_m, stride_mask_n
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    q = load_rows(q_side, block * BLOCK_M, rows, rows_valid, WHOLE, WIDE)
    queries = q, q_side, block * BLOCK_M, rows, rows_valid
    sight = offset, left, right, future
    fixed = queries, k_side, v_side, sight, features, (number, threshold)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2_E
        m_i, l_i = l_i + sink, l_i + tl.where(sink == float("-inf"), 0.0, 1.0)
    acc, m_i, l_i = walk(
        _attend, (acc, m_i, l_i), fixed, mask_ptr, slope, seed, (first, last), (left, right),
        length_k, listed, (0, count), list_ptr, 0,
        BLOCK_N, SCORES, GLOBALS, WHOLE, WIDE, SLICE, PRECISION,
    )  # fmt: skip

    acc *= (keep_factor / tl.where(l_i == 0.0, 1.0, l_i))[:, None]
    store_rows(out_side, block * BLOCK_M, rows, stored, acc, WHOLE, WIDE)
    lse_ptr += (batch * heads + h) * rows_q + first_q
    lse = tl.where(l_i == 0.0, float("-inf"), tl.fma(m_i, LN_2, tl.log2(l_i) * LN_2))
    tl.store(lse_ptr + rows, lse, mask=stored)


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
    pattern: Pattern,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Tq, Dv] in query's dtype; lse [B, H, Tq], float32 natural logarithms."""
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    out = empty_like_heads(query, value.shape[3])
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    tensors = {"q": query, "k": key, "v": value, "o": out}
    with _triton.device_of(query):
        call = prepare(
            tensors, mask, alibi_slopes, global_mask, seed, cu_seqlens_q, cu_seqlens_k,
            pattern, scaling, sinks,
        )  # fmt: skip
        pointers = query, key, value, out, lse
        call.launch(
            _forward_kernel, pointers, TILES, pattern.max_seqlen_q, query.shape[1], "BLOCK_M"
        )
    return out, lse
