"""dk and dv in Triton: a program owns a block of keys and walks over the queries that see it.

It does so for every query head of its key head, so their sum needs no memory and no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.attention.triton_launch import NUMBERS
from kernels.attention.triton_scores import (
    LOG2_E,
    both,
    head_side,
    kept,
    load_rows,
    products,
    row_statistics,
    store_rows,
    weights,
)
from kernels.attention.triton_walk import FAR, global_rank, own_block, seen, sequence, walk

# As in triton.py.
TILES = {
    "sm_80": (
        (2, 64, 1, 32, 128, 8, 2, 0),  # 64 queries spill 64 bytes
        (2, 64, 0, 16, 64, 4, 1, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 64, 64, 8, 2, 0),  # 128 keys spill 112 bytes
        (2, 128, 0, 32, 64, 8, 1, 0),
        (2, 256, 0, 16, 32, 8, 1, 0),  # dk and dv alone take 64 registers; with 4 warps 128
        (4, 64, 0, 16, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 16, 32, 8, 1, 32),
        (4, 256, 0, 16, 16, 8, 1, 32),  # 32 keys spill 8 bytes and more
    ),
    "sm_86": (
        (2, 64, 1, 32, 128, 8, 2, 0),  # 64 queries spill 64 bytes
        (2, 64, 0, 16, 64, 4, 1, 0),  # masks, tanh and Philox take registers
        (2, 128, 0, 32, 64, 8, 1, 0),  # 171 registers, 56 KiB
        (2, 256, 0, 16, 32, 8, 1, 0),  # dk and dv alone take 64 registers; with 4 warps 128
        (4, 64, 0, 16, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 16, 32, 8, 1, 32),
        (4, 256, 1, 16, 32, 8, 1, 32),
        (4, 256, 0, 16, 16, 8, 1, 32),  # with features 32 keys spill 8 to 88 bytes
    ),
    "sm_90": (
        (2, 64, 1, 32, 128, 8, 2, 0),  # two warp groups of 64 keys; 64 queries spill 88 bytes
        (2, 64, 0, 16, 64, 4, 1, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 32, 128, 8, 1, 0),  # a second stage spills 16 bytes
        (2, 128, 0, 32, 64, 8, 1, 0),
        (2, 256, 0, 16, 32, 8, 1, 0),  # dk and dv alone take 64 registers; with 4 warps 128
        (4, 64, 0, 32, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 16, 32, 8, 1, 32),
        (4, 256, 1, 16, 32, 8, 1, 32),
        (4, 256, 0, 16, 16, 8, 1, 32),  # with features 32 keys spill 8 to 88 bytes
    ),
    "sm_100": (
        (2, 64, 1, 32, 128, 8, 2, 0),  # two warp groups of 64 keys; 64 queries spill 88 bytes
        (2, 64, 0, 16, 64, 4, 1, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 32, 128, 8, 1, 0),  # a second stage spills 16 bytes
        (2, 128, 0, 32, 64, 8, 1, 0),
        (2, 256, 0, 16, 32, 8, 1, 0),  # dk and dv alone take 64 registers; with 4 warps 128
        (4, 64, 0, 32, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 16, 32, 8, 1, 32),
        (4, 256, 1, 16, 32, 8, 1, 32),
        (4, 256, 0, 16, 16, 8, 1, 32),  # with features 32 keys spill 8 to 88 bytes
    ),
    "gfx942": (
        (2, 64, 1, 32, 64, 4, 1, 0),  # 64 queries take 288 registers: one wave of a SIMD, not two
        (2, 64, 0, 16, 64, 4, 1, 0),
        (2, 128, 0, 32, 64, 4, 1, 0),
        (2, 256, 0, 16, 32, 4, 1, 0),
        (4, 128, 0, 16, 32, 4, 1, 32),
        (4, 256, 0, 16, 32, 4, 1, 32),
    ),
    "interpreter": (
        (4, 16, 0, 32, 32, 4, 1, 0),  # few positions walk through every loop
        (4, 256, 0, 32, 16, 4, 1, 16),
    ),
}


@triton.jit
def _add_queries(
    state,  # dk [BLOCK_N, BLOCK_D], dv [BLOCK_N, BLOCK_DV]
    fixed,
    mask_ptr,
    slope,
    seed,
    first_row,
    rows,  # of the block: see walk
    rows_valid,  # None in a plain block
    listed,
    SCORES: tl.constexpr,
    GLOBALS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries; tiles are [keys, queries], so that p and ds are left operands."""
    dk, dv = state
    own_k, own_v, sides, pointers, sight, features, dropout = fixed
    first_key, keys, keys_valid = own_k[2], own_k[3], own_k[4]
    q = load_rows(sides[0], first_row, rows, rows_valid, WHOLE, WIDE)
    dout = load_rows(sides[1], first_row, rows, rows_valid, WHOLE, WIDE)
    q_block, dout_block = (q, sides[0], first_row, rows), (dout, sides[1], first_row, rows)
    i, j = rows[None, :], keys[:, None]
    visible = None
    if rows_valid is not None:
        visible = seen(i, j, sight, listed, GLOBALS) & rows_valid[None, :]
    lse, rest, delta = row_statistics(pointers[0], pointers[1], rows, rows_valid)
    rest = rest[None, :] if q.dtype == tl.float32 else None
    p, growth = weights(
        products(own_k, q_block, rows_valid, WHOLE, WIDE, SLICE, PRECISION),
        lse[None, :], rest, i, j, both(keys_valid, rows_valid), visible, mask_ptr, slope, features,
        SCORES,
    )  # fmt: skip
    dp = products(own_v, dout_block, rows_valid, WHOLE, WIDE, SLICE, PRECISION)
    dropped = p
    number, threshold, keep_factor = dropout
    if seed is not None:
        keep = kept(seed, (number, threshold), rows, keys, first_key, GLOBALS, True)
        dropped = tl.where(keep, p * keep_factor, 0.0)
        dp = tl.where(keep, dp * keep_factor, 0.0)
    dv = tl.dot(dropped.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :]) * growth
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NUMBERS)
def dkv_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, Hkv, Tk, D]
    v_ptr,  # [B, Hkv, Tk, Dv]
    dout_ptr,  # [B, H, Tq, Dv]
    lse_ptr,  # [B, H, Tq]
    delta_ptr,  # [B, H, Tq]
    dk_ptr,  # [B, Hkv, Tk, D]
    dv_ptr,  # [B, Hkv, Tk, Dv]
    mask_ptr,  # [B, H, Tq, Tk]
    slopes_ptr,  # [B, H]
    seed_ptr,  # [1]
    list_ptr, rank_ptr,  # [B, Tk], [B, Tk + 1]: see list_globals_kernel
    cu_q_ptr, cu_k_ptr,  # [N + 1]
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,  # in units of VEC
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_sb, stride_sh,
    heads, group, rows_q, rows_k, head_dim, value_dim, blocks, programs, lower_right, left, right,
    future, global_tokens, scale, cap, softmax_scale, threshold, keep_factor,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WHOLE: tl.constexpr,
    SCORES: tl.constexpr, GLOBALS: tl.constexpr, WIDE: tl.constexpr, SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = (blocks + program % programs) % programs  # keys at global positions take longest
    number, kv_heads = program // programs, heads // group
    b, h_kv = (number // kv_heads).to(tl.int64), number % kv_heads
    batch, first_q, first_k, length_q, length_k, offset = sequence(
        b, cu_q_ptr, cu_k_ptr, rows_q, rows_k, lower_right
    )
    if rank_ptr is not None:  # here, as functions return no None before Triton 3.7
        list_ptr += b * rows_k
        rank_ptr += b * (rows_k + 1)
    keys, keys_valid, stored, first, last, listed = own_block(
        block, blocks, 0, length_k, list_ptr, rank_ptr, global_tokens, length_k, BLOCK_N, GLOBALS
    )
    if first > last:
        return
    entry, count = 0, 0
    if GLOBALS:
        left = tl.where(listed, FAR, left)
        right = tl.where(listed, future, right)
        reach = tl.minimum(tl.maximum(first - future, 0), length_k)
        entry = global_rank(rank_ptr, reach, global_tokens, length_k)
        count = global_rank(rank_ptr, length_k, global_tokens, length_k)

    strides_q, strides_do = (stride_qb, stride_qh, stride_qm), (stride_dob, stride_doh, stride_dom)
    strides_k, strides_v = (stride_kb, stride_kh, stride_kn), (stride_vb, stride_vh, stride_vn)
    k_side = head_side(k_ptr, strides_k, batch, h_kv, first_k, head_dim, BLOCK_D, VEC)
    v_side = head_side(v_ptr, strides_v, batch, h_kv, first_k, value_dim, BLOCK_DV, VEC)
    first_key = block * BLOCK_N
    k = load_rows(k_side, first_key, keys, keys_valid, WHOLE, WIDE)
    v = load_rows(v_side, first_key, keys, keys_valid, WHOLE, WIDE)
    own_k, own_v = (
        (k, k_side, first_key, keys, keys_valid),
        (v, v_side, first_key, keys, keys_valid),
    )
    seed = seed_ptr
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    features = offset, scale, cap, stride_mask_m, stride_mask_n
    sight = offset, left, right, future
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(group):
        h = h_kv * group + member
        q_side = head_side(q_ptr, strides_q, batch, h, first_q, head_dim, BLOCK_D, VEC)
        dout_side = head_side(dout_ptr, strides_do, batch, h, first_q, value_dim, BLOCK_DV, VEC)
        slope, own_mask_ptr = slopes_ptr, mask_ptr
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + b * stride_sb + h * stride_sh) * LOG2_E
        if mask_ptr is not None:
            own_mask_ptr = mask_ptr + b * stride_mask_b + h.to(tl.int64) * stride_mask_h
        own = (batch * heads + h.to(tl.int64)) * rows_q + first_q
        dropout = (b * heads + h).to(tl.int32), threshold, keep_factor
        fixed = (
            own_k, own_v, (q_side, dout_side), (lse_ptr + own, delta_ptr + own), sight,
            features, dropout,
        )  # fmt: skip
        dk, dv = walk(
            _add_queries, (dk, dv), fixed, own_mask_ptr, slope, seed,
            (first - offset, last - offset), (right, left), length_q, listed, (entry, count),
            list_ptr, offset, BLOCK_M, SCORES, GLOBALS, WHOLE, WIDE, SLICE, PRECISION,
        )  # fmt: skip
    strides_dk = stride_dkb, stride_dkh, stride_dkn
    strides_dv = stride_dvb, stride_dvh, stride_dvn
    dk_side = head_side(dk_ptr, strides_dk, batch, h_kv, first_k, head_dim, BLOCK_D, VEC)
    dv_side = head_side(dv_ptr, strides_dv, batch, h_kv, first_k, value_dim, BLOCK_DV, VEC)
    store_rows(dk_side, first_key, keys, stored, dk * softmax_scale, WHOLE, WIDE)
    store_rows(dv_side, first_key, keys, stored, dv, WHOLE, WIDE)
