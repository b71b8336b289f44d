"""dq in Triton: a program owns a block of queries and walks over the keys it sees."""

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
        (2, 64, 1, 64, 64, 4, 2, 0),  # 214 registers: 2 blocks
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 64, 32, 4, 1, 0),
        (2, 128, 0, 64, 32, 8, 1, 0),
        (2, 256, 0, 64, 32, 8, 1, 0),
        (4, 64, 0, 32, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "sm_86": (
        (2, 64, 1, 64, 64, 4, 2, 0),  # 214 registers: 2 blocks
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 1, 64, 32, 4, 1, 0),
        (2, 128, 0, 64, 32, 8, 1, 0),
        (2, 256, 0, 64, 32, 8, 1, 0),
        (4, 64, 0, 16, 32, 4, 1, 0),  # tf32x3 holds every operand twice in registers
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "sm_90": (
        (2, 128, 1, 128, 64, 8, 2, 0),  # two warp groups; 183 and 253 registers
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 0, 64, 32, 8, 1, 0),
        (2, 256, 0, 64, 32, 8, 2, 0),  # 64 keys spill
        (4, 64, 1, 128, 32, 8, 2, 0),  # 64 keys spill 8 bytes
        (4, 64, 0, 32, 32, 4, 1, 0),
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "sm_100": (
        (2, 128, 1, 128, 64, 8, 2, 0),  # two warp groups; 183 and 253 registers
        (2, 64, 0, 64, 32, 4, 2, 0),  # masks, tanh and Philox take registers
        (2, 128, 0, 64, 32, 8, 1, 0),
        (2, 256, 0, 32, 32, 8, 2, 0),  # 64 queries spill from Triton 3.8 on
        (4, 64, 0, 16, 32, 4, 1, 0),  # 32 queries spill 48 bytes
        (4, 128, 0, 32, 32, 8, 1, 32),
        (4, 256, 0, 16, 32, 8, 1, 32),
    ),
    "gfx942": (
        (2, 64, 1, 64, 64, 4, 1, 0),
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
def _add_keys(
    dq,  # [BLOCK_M, BLOCK_D]
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
    """One block of keys."""
    queries, douts, statistics, k_side, v_side, sight, features, dropout = fixed
    rows, rows_valid = queries[3], queries[4]
    k = load_rows(k_side, first_key, keys, keys_valid, WHOLE, WIDE)
    v = load_rows(v_side, first_key, keys, keys_valid, WHOLE, WIDE)
    k_block, v_block = (k, k_side, first_key, keys), (v, v_side, first_key, keys)
    i, j = rows[:, None], keys[None, :]
    visible = None
    if keys_valid is not None:
        visible = seen(i, j, sight, listed, GLOBALS) & keys_valid[None, :]
    lse, rest, delta = statistics
    rest = rest if k.dtype == tl.float32 else None
    p, growth = weights(
        products(queries, k_block, keys_valid, WHOLE, WIDE, SLICE, PRECISION), lse, rest, i, j,
        both(rows_valid, keys_valid), visible, mask_ptr, slope, features, SCORES,
    )  # fmt: skip
    dp = products(douts, v_block, keys_valid, WHOLE, WIDE, SLICE, PRECISION)
    number, threshold, keep_factor = dropout
    if seed is not None:
        keep = kept(seed, (number, threshold), rows, keys, first_key, GLOBALS, False)
        dp = tl.where(keep, dp * keep_factor, 0.0)
    ds = p * (dp - delta) * growth
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=NUMBERS)
def dq_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr,  # [B, Hkv, Tk, D]
    v_ptr,  # [B, Hkv, Tk, Dv]
    dout_ptr,  # [B, H, Tq, Dv]
    lse_ptr,  # [B, H, Tq]
    delta_ptr,  # [B, H, Tq]
    dq_ptr,  # [B, H, Tq, D]
    mask_ptr,  # [B, H, Tq, Tk]
    slopes_ptr,  # [B, H]
    seed_ptr,  # [1]
    list_ptr, rank_ptr,  # [B, Tk], [B, Tk + 1]: see list_globals_kernel
    cu_q_ptr, cu_k_ptr,  # [N + 1]
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,  # in units of VEC
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dqb, stride_dqh, stride_dqm,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_sb, stride_sh,
    heads, group, rows_q, rows_k, head_dim, value_dim, blocks, programs, lower_right, left, right,
    future, global_tokens, scale, cap, softmax_scale, threshold, keep_factor,
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
    strides_v, strides_do = (stride_vb, stride_vh, stride_vn), (stride_dob, stride_doh, stride_dom)
    q_side = head_side(q_ptr, strides_q, batch, h, first_q, head_dim, BLOCK_D, VEC)
    k_side = head_side(k_ptr, strides_k, batch, h // group, first_k, head_dim, BLOCK_D, VEC)
    v_side = head_side(v_ptr, strides_v, batch, h // group, first_k, value_dim, BLOCK_DV, VEC)
    dout_side = head_side(dout_ptr, strides_do, batch, h, first_q, value_dim, BLOCK_DV, VEC)
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
    dout = load_rows(dout_side, block * BLOCK_M, rows, rows_valid, WHOLE, WIDE)
    queries = q, q_side, block * BLOCK_M, rows, rows_valid
    douts = dout, dout_side, block * BLOCK_M, rows, rows_valid
    own = (batch * heads + h.to(tl.int64)) * rows_q + first_q
    lse, rest, delta = row_statistics(lse_ptr + own, delta_ptr + own, rows, rows_valid)
    statistics = lse[:, None], rest[:, None], delta[:, None]
    sight, dropout = (offset, left, right, future), (number, threshold, keep_factor)
    fixed = (
        queries, douts, statistics, k_side, v_side, sight, features, dropout
    )  # fmt: skip
    dq = walk(
        _add_keys, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), fixed, mask_ptr, slope, seed,
        (first, last), (left, right),
        length_k, listed, (0, count), list_ptr, 0,
        BLOCK_N, SCORES, GLOBALS, WHOLE, WIDE, SLICE, PRECISION,
    )  # fmt: skip

    strides_dq = stride_dqb, stride_dqh, stride_dqm
    dq_side = head_side(dq_ptr, strides_dq, batch, h, first_q, head_dim, BLOCK_D, VEC)
    store_rows(dq_side, block * BLOCK_M, rows, stored, dq * softmax_scale, WHOLE, WIDE)
