"""Attention against a cache in Triton: a program takes some queries and a share of the keys.

The queries of all heads that read one key head are rows of one tile, so the cache is read once for
them.  Each share writes its part of the output and its sum; a second kernel combines the parts in
the order of the keys.  Little is computed per key, so every block of keys carries the mask.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.attention.pattern import Pattern, Scaling, empty_like_heads
from kernels.attention.triton_launch import LARGEST_DIM, reaches, score_numbers, strides, vector
from kernels.attention.triton_scores import LN_2, LOG2_E, scores

backward = None

KEYS_PER_SHARE = 256  # fewer and the parts cost more than the keys
MOST_SHARES = 128
MOST_ROWS = 64  # queries of a program
WARPS, STAGES = 4, 2
BLOCK_N = {64: 64, 128: 64, 256: 32}  # by the width of rows: two blocks of K and V fit 64 KiB
COMBINE_WARPS = 1

NUMBERS = [f"stride_{tensor}{dim}" for tensor in "qo" for dim in "bhm"] + ["stride_os"]
NUMBERS += [f"stride_{tensor}{dim}" for tensor in ("k", "v", "ks", "vs") for dim in "bhn"]
NUMBERS += ["stride_sb", "stride_sh", "stride_tb", "heads", "group", "queries", "capacity"]
NUMBERS += ["page_size", "head_dim", "value_dim", "shares", "left", "right", "future"]
NUMBERS += ["global_tokens", "scale", "cap"]


@triton.jit
def _load_keys(ptr, stride_t, pages, slots, width, valid, BLOCK_D: tl.constexpr):
    """[keys, BLOCK_D]; `pages` are the offsets of the keys' pages, `slots` their places there."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + (pages + slots.to(tl.int64) * stride_t)[:, None] + offs_d[None, :]
    return tl.load(ptrs, mask=valid[:, None] & (offs_d < width)[None, :], other=0)


@triton.jit(do_not_specialize=NUMBERS)
def _share_kernel(
    q_ptr,  # [B, H, Tq, D]
    k_ptr, v_ptr,  # [B, Hkv, S, .] or [pages, Hkv, page_size, .]
    lengths_ptr,  # [B]
    table_ptr,  # [B, max_pages], or None
    k_scale_ptr, v_scale_ptr,  # the cache's shape without its last dimension, or None
    slopes_ptr,  # [B, H]
    sinks_ptr,  # [H]
    out_ptr,  # [shares, B, H, Tq, Dv]
    lse_ptr,  # [shares, B, H, Tq]
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,  # in units of VEC
    stride_vb, stride_vh, stride_vn, stride_os, stride_ob, stride_oh, stride_om,
    stride_ksb, stride_ksh, stride_ksn, stride_vsb, stride_vsh, stride_vsn,
    stride_sb, stride_sh, stride_tb, heads, group, queries, capacity, page_size,
    head_dim, value_dim, shares, left, right, future, global_tokens, scale, cap,
    VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0) % shares
    tile = tl.program_id(0) // shares
    tiles = tl.cdiv(group * queries, BLOCK_M)
    h_kv = (tile // tiles) % (heads // group)
    b = (tile // tiles // (heads // group)).to(tl.int64)
    row = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = row < group * queries
    h, i = h_kv * group + row // queries, row % queries  # [BLOCK_M]
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity)
    offset = length - queries  # a query's position is i + offset

    # Keys that any query may see: blocks of global positions before the window, then the window's.
    low = tl.maximum(offset - left, 0)
    high = tl.minimum(length + right, length)
    low = tl.where((offset < global_tokens) & (length > 0), 0, low)
    high = tl.where(offset < global_tokens, length, tl.maximum(high, 0))
    begin = low // BLOCK_N
    first_blocks = tl.minimum(tl.cdiv(tl.minimum(global_tokens, length), BLOCK_N), begin)
    steps = first_blocks + tl.maximum(tl.cdiv(high, BLOCK_N) - begin, 0)
    per_share = tl.cdiv(steps, shares)

    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_rows = b * stride_qb + h.to(tl.int64) * stride_qh + i.to(tl.int64) * stride_qm
    q_inside = row_valid[:, None] & (offs_d < head_dim * VEC)[None, :]
    q = tl.load(q_ptr + (q_rows * VEC)[:, None] + offs_d[None, :], mask=q_inside, other=0.0)
    if WIDE:
        q = q.to(tl.float32)
    slope = slopes_ptr
    if slopes_ptr is not None:
        ptrs = slopes_ptr + b * stride_sb + h * stride_sh
        slope = tl.load(ptrs, mask=row_valid, other=0.0)[:, None] * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + h, mask=row_valid, other=0.0).to(tl.float32) * LOG2_E
        m_i = tl.where(share == 0, sink, m_i)
        l_i = tl.where(m_i == float("-inf"), 0.0, 1.0)
    for step in range(share * per_share, tl.minimum((share + 1) * per_share, steps)):
        block = tl.where(step < first_blocks, step, begin + step - first_blocks)
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys_valid = keys < length
        page, slot = b + keys * 0, keys
        if table_ptr is not None:
            page = tl.load(table_ptr + b * stride_tb + keys // page_size, mask=keys_valid, other=0)
            slot = keys % page_size
        page = page.to(tl.int64)
        offs_page = (page * stride_kb + h_kv.to(tl.int64) * stride_kh) * VEC
        k = _load_keys(k_ptr, stride_kn * VEC, offs_page, slot, head_dim * VEC, keys_valid, BLOCK_D)
        qk = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        if k_scale_ptr is not None:
            ptrs = k_scale_ptr + page * stride_ksb + h_kv * stride_ksh + slot * stride_ksn
            qk *= tl.load(ptrs, mask=keys_valid, other=0.0)[None, :]
        distance = keys[None, :] - offset - i[:, None]
        position = i + offset
        near = (distance >= -left) & (distance <= right) | (keys < global_tokens)[None, :]
        near |= ((position >= 0) & (position < global_tokens))[:, None]
        visible = near & (distance <= future) & keys_valid[None, :]
        features = offset, scale, cap, 0, 0
        s, _ = scores(
            qk, i[:, None], keys[None, :], visible, visible, None, slope, features, SOFTCAP
        )
        m_new = tl.maximum(m_i, tl.max(s, 1))
        finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(m_i - finite)
        l_i = l_i * shrink + tl.sum(p, 1)
        m_i = m_new
        offs_page = (page * stride_vb + h_kv.to(tl.int64) * stride_vh) * VEC
        v = _load_keys(
            v_ptr, stride_vn * VEC, offs_page, slot, value_dim * VEC, keys_valid, BLOCK_DV
        )
        if v_scale_ptr is not None:
            ptrs = v_scale_ptr + page * stride_vsb + h_kv * stride_vsh + slot * stride_vsn
            v = v.to(tl.float32) * tl.load(ptrs, mask=keys_valid, other=0.0)[:, None]
        acc *= shrink[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)

    acc /= tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    out_rows = share * tl.cast(stride_os, tl.int64) + b * stride_ob
    out_rows += h.to(tl.int64) * stride_oh + i.to(tl.int64) * stride_om
    ptrs = out_ptr + out_rows[:, None] + offs_dv[None, :]
    inside = row_valid[:, None] & (offs_dv < value_dim * VEC)[None, :]
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)
    batches = tl.num_programs(0) // shares // tiles // (heads // group)
    ptrs = lse_ptr + ((share * batches + b) * heads + h) * queries + i
    tl.store(ptrs, (m_i + tl.log2(l_i)) * LN_2, mask=row_valid)


@triton.jit(do_not_specialize=["stride_ob", "stride_oh", "stride_om", "heads", "queries", "shares"])
def _combine_kernel(
    part_ptr,  # [shares, B, H, Tq, Dv]
    part_lse_ptr,  # [shares, B, H, Tq]
    out_ptr,  # [B, H, Tq, Dv]
    lse_ptr,  # [B, H, Tq]
    stride_ob,
    stride_oh,
    stride_om,
    heads,
    queries,
    value_dim,
    shares,
    BLOCK_S: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    share, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    ptrs = part_lse_ptr + share.to(tl.int64) * rows + row
    parts = tl.load(ptrs, mask=share < shares, other=float("-inf")) * LOG2_E
    largest = tl.max(parts, 0)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(parts - finite), 0)
    lse = finite + tl.log2(total)  # -inf where nothing was seen
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for number in range(shares):
        place = number * rows + row
        weight = tl.exp2(tl.load(part_lse_ptr + place) * LOG2_E - finite)
        part = tl.load(part_ptr + place * value_dim + offs_d, mask=offs_d < value_dim, other=0.0)
        acc += weight * part
    acc /= tl.where(total == 0.0, 1.0, total)
    b, h, i = row // queries // heads, row // queries % heads, row % queries
    ptrs = out_ptr + b * stride_ob + h * stride_oh + i * stride_om + offs_d
    tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=offs_d < value_dim)
    tl.store(lse_ptr + row, lse * LN_2)


def unsupported(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    pattern: Pattern,
    scaling: Scaling,
) -> str | None:
    """None where these kernels accept the call, else one sentence saying why not."""
    if query.shape[3] > LARGEST_DIM or v_cache.shape[3] > LARGEST_DIM:
        return f"head dimensions above {LARGEST_DIM} do not fit shared memory"
    if k_cache.dtype not in (*_triton.DTYPES, torch.int8):
        return f"a cache of {k_cache.dtype} is not one of float32, bfloat16, float16, int8"
    return _triton.unsupported(_combine_kernel, query, k_cache, sinks)


def _shares(query: Tensor, tiles: int, capacity: int) -> int:
    """Into how many parts the keys are split: as many as keep the device busy."""
    wanted = triton.cdiv(_triton.wave(query, WARPS), tiles)
    return max(1, min(wanted, triton.cdiv(capacity, KEYS_PER_SHARE), MOST_SHARES))


def forward(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    pattern: Pattern,
    scaling: Scaling,
) -> tuple[Tensor, Tensor]:
    """out [B, H, Tq, Dv] in query's dtype; lse [B, H, Tq], float32 natural logarithms."""
    pattern, scaling = Pattern(*pattern), Scaling(*scaling)
    batch, heads, queries, head_dim = query.shape
    kv_heads, value_dim = k_cache.shape[1], v_cache.shape[3]
    group = heads // kv_heads
    out = empty_like_heads(query, value_dim)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    block_m = min(MOST_ROWS, max(16, triton.next_power_of_2(group * queries)))
    tiles = batch * kv_heads * triton.cdiv(group * queries, block_m)
    shares = _shares(query, tiles, pattern.max_seqlen_k)
    parts, part_lse = out[None], lse
    if shares > 1:
        parts = lse.new_empty((shares, *out.shape))
        part_lse = lse.new_empty((shares, *lse.shape))
    wide = k_cache.dtype not in (query.dtype, torch.int8)
    vec = vector((query, k_cache, v_cache), 16 if k_cache.dtype == torch.int8 else 8)
    block_d, block_dv = (max(16, triton.next_power_of_2(n)) for n in (head_dim, value_dim))
    float32 = wide or query.dtype == torch.float32
    numbers: dict[str, Any] = {
        **strides("q", query, "bhm", vec),
        **strides("k", k_cache, "bhn", vec),
        **strides("v", v_cache, "bhn", vec),
        **strides("o", parts, "sbhm"),
        **strides("ks", k_scale, "bhn"),
        **strides("vs", v_scale, "bhn"),
        **strides("s", alibi_slopes, "bh"),
        **strides("t", block_table, "b"),
        **reaches(pattern),
        **score_numbers(None, None, scaling),
        "heads": heads,
        "group": group,
        "queries": queries,
        "capacity": pattern.max_seqlen_k,
        "page_size": k_cache.shape[2],
        "head_dim": head_dim // vec,
        "value_dim": value_dim // vec,
        "shares": shares,
        "VEC": vec,
        "BLOCK_M": block_m,
        "BLOCK_N": next(n for width, n in BLOCK_N.items() if max(block_d, block_dv) <= width),
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "WIDE": wide,
        "PRECISION": _triton.float32_dot(query) if float32 else "ieee",
    }
    numbers["SOFTCAP"] = numbers["SCORES"] == 2
    sinks = None if sinks is None else sinks.contiguous()
    optional = block_table, k_scale, v_scale, alibi_slopes, sinks
    tensors = query, k_cache, v_cache, lengths, *optional, parts, part_lse
    with _triton.device_of(query):
        named = {name: numbers[name] for name in _share_kernel.arg_names[len(tensors) :]}
        options = {"num_warps": WARPS, "num_stages": STAGES, **_triton.LAUNCH}
        _share_kernel[(tiles * shares,)](*tensors, **named, **options)
        if shares > 1:
            _combine_kernel[(math.prod(lse.shape),)](
                parts,
                part_lse,
                out,
                lse,
                *out.stride()[:3],
                heads,
                queries,
                value_dim,
                shares,
                BLOCK_S=triton.next_power_of_2(shares),
                BLOCK_DV=block_dv,
                num_warps=COMBINE_WARPS,
                **_triton.LAUNCH,
            )
    return out, lse
