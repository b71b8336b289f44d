"""Triton kernels whose compiled code is known to be right: what the executor itself is judged by.

Nothing of the package is in here.  Triton is a production compiler, so a wrong number or a report
from one of these kernels is a fault of the executor.  Sizes are not specialised, so that one
compilation serves many.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "N"])
def matmul(
    a_ptr,  # [M, K]
    b_ptr,  # [K, N], any strides
    c_ptr,  # [M, N]
    M,
    N,
    K,
    stride_bk,
    stride_bn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * K + offs_k[None, :]
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    mask_m, mask_n = offs_m[:, None] < M, offs_n[None, :] < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, K, BLOCK_K):
        mask_k = start + offs_k < K
        a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_n & mask_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], acc, mask=mask_m & mask_n)


@triton.jit(do_not_specialize=["M", "N", "K"])
def matmul_device_descriptors(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    c_ptr,  # [M, N]
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    c_desc = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in tl.range(0, K, BLOCK_K, warp_specialize=WARP_SPECIALIZE):
        acc = tl.dot(a_desc.load([row, start]), b_desc.load([col, start]).T, acc, out_dtype=ACC)
    c_desc.store([row, col], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def matmul_host_descriptors(
    a_desc,  # [M, K]
    b_desc,  # [N, K]
    c_desc,  # [M, N]
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for start in range(0, K, BLOCK_K):
        acc = tl.dot(a_desc.load([row, start]), b_desc.load([col, start]).T, acc, out_dtype=ACC)
    c_desc.store([row, col], acc.to(c_desc.dtype))


@triton.jit(do_not_specialize=["rows", "cols"])
def softmax(
    x_ptr,  # [rows, cols]
    y_ptr,  # [rows, cols]
    rows,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m[:, None] < rows) & (offs_n[None, :] < cols)
        offs = offs_m[:, None] * cols + offs_n[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=float("-inf")).to(tl.float32)
        # A row past the end is all -inf: its maximum must not make a NaN of it.
        x_max = tl.where(offs_m < rows, tl.max(x, 1), 0.0)
        p = tl.exp(x - x_max[:, None])
        y = p / tl.maximum(tl.sum(p, 1), 1e-30)[:, None]
        tl.store(y_ptr + offs, y, mask=mask)


@triton.jit(do_not_specialize=["rows", "cols"])
def softmax_descriptors(
    x_ptr,  # [rows, cols]
    y_ptr,  # [rows, cols]
    rows,
    cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    x_desc = tl.make_tensor_descriptor(x_ptr, [rows, cols], [cols, 1], [BLOCK_M, BLOCK_N])
    y_desc = tl.make_tensor_descriptor(y_ptr, [rows, cols], [cols, 1], [BLOCK_M, BLOCK_N])
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        x = x_desc.load([tile * BLOCK_M, 0]).to(tl.float32)
        x = tl.where(tl.arange(0, BLOCK_N)[None, :] < cols, x, float("-inf"))
        p = tl.exp(x - tl.max(x, 1)[:, None])
        y = p / tl.sum(p, 1)[:, None]
        y_desc.store([tile * BLOCK_M, 0], y.to(y_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "scale"])
def attention_forward(
    q_ptr,  # [heads, T, D]
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,  # [heads, T], in powers of two
    T,
    scale,  # of the scores, times log2(e)
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start_m, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    base = head.to(tl.int64) * T * D
    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, D)
    offs_q = base + offs_m[:, None] * D + offs_d[None, :]
    q = tl.load(q_ptr + offs_q, mask=offs_m[:, None] < T, other=0.0)
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, tl.minimum(start_m + BLOCK_M, T), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_k = base + offs_n[None, :] * D + offs_d[:, None]
        k = tl.load(k_ptr + offs_k, mask=offs_n[None, :] < T, other=0.0)
        s = tl.dot(q, k) * scale
        s = tl.where((offs_n[None, :] <= offs_m[:, None]) & (offs_n[None, :] < T), s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        rescale = tl.exp2(m_i - m_new)
        l_i = l_i * rescale + tl.sum(p, 1)
        offs_v = base + offs_n[:, None] * D + offs_d[None, :]
        v = tl.load(v_ptr + offs_v, mask=offs_n[:, None] < T, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        m_i = m_new
    o = (acc / l_i[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + offs_q, o, mask=offs_m[:, None] < T)
    tl.store(lse_ptr + head * T + offs_m, m_i + tl.log2(l_i), mask=offs_m < T)


@triton.jit(do_not_specialize=["T", "scale"])
def attention_forward_descriptors(
    q_ptr,  # [heads * T, D]
    k_ptr,
    v_ptr,
    o_ptr,
    rows,  # heads * T
    T,  # a multiple of both blocks
    scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    q_desc = tl.make_tensor_descriptor(q_ptr, [rows, D], [D, 1], [BLOCK_M, D])
    k_desc = tl.make_tensor_descriptor(k_ptr, [rows, D], [D, 1], [BLOCK_N, D])
    v_desc = tl.make_tensor_descriptor(v_ptr, [rows, D], [D, 1], [BLOCK_N, D])
    o_desc = tl.make_tensor_descriptor(o_ptr, [rows, D], [D, 1], [BLOCK_M, D])
    start_m, base = tl.program_id(0) * BLOCK_M, tl.program_id(1) * T
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = q_desc.load([base + start_m, 0])
    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in tl.range(0, start_m + BLOCK_M, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k = k_desc.load([base + start_n, 0])
        s = tl.dot(q, k.T) * scale
        offs_n = start_n + tl.arange(0, BLOCK_N)
        s = tl.where(offs_n[None, :] <= offs_m[:, None], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        rescale = tl.exp2(m_i - m_new)
        l_i = l_i * rescale + tl.sum(p, 1)
        v = v_desc.load([base + start_n, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None])
        m_i = m_new
    o_desc.store([base + start_m, 0], (acc / l_i[:, None]).to(o_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def attention_delta(
    o_ptr,  # [rows, D]
    do_ptr,
    delta_ptr,  # [rows]
    rows,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs = offs_m[:, None] * D + tl.arange(0, D)[None, :]
    o = tl.load(o_ptr + offs, mask=offs_m[:, None] < rows, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + offs, mask=offs_m[:, None] < rows, other=0.0).to(tl.float32)
    tl.store(delta_ptr + offs_m, tl.sum(o * do, 1), mask=offs_m < rows)


@triton.jit(do_not_specialize=["T", "scale", "softmax_scale"])
def attention_backward_dkv(
    q_ptr,  # [heads, T, D]
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,  # [heads, T]
    delta_ptr,
    dk_ptr,
    dv_ptr,
    T,
    scale,
    softmax_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start_n, head = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    base = head.to(tl.int64) * T * D
    offs_n, offs_d = start_n + tl.arange(0, BLOCK_N), tl.arange(0, D)
    offs_k = base + offs_n[:, None] * D + offs_d[None, :]
    mask_n = offs_n[:, None] < T
    k = tl.load(k_ptr + offs_k, mask=mask_n, other=0.0)
    v = tl.load(v_ptr + offs_k, mask=mask_n, other=0.0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)
    for start_m in range(start_n // BLOCK_M * BLOCK_M, T, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < T
        offs_q = base + offs_m[:, None] * D + offs_d[None, :]
        q = tl.load(q_ptr + offs_q, mask=mask_m[:, None], other=0.0)
        do = tl.load(do_ptr + offs_q, mask=mask_m[:, None], other=0.0)
        lse = tl.load(lse_ptr + head * T + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + head * T + offs_m, mask=mask_m, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None, :])  # transposed: [BLOCK_N, BLOCK_M]
        p = tl.where((offs_m[None, :] >= offs_n[:, None]) & mask_m[None, :], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    tl.store(dk_ptr + offs_k, (dk * softmax_scale).to(dk_ptr.dtype.element_ty), mask=mask_n)
    tl.store(dv_ptr + offs_k, dv.to(dv_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["T", "scale", "softmax_scale"])
def attention_backward_dq(
    q_ptr,  # [heads, T, D]
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,  # [heads, T]
    delta_ptr,
    dq_ptr,
    T,
    scale,
    softmax_scale,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start_m, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    base = head.to(tl.int64) * T * D
    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, D)
    offs_q = base + offs_m[:, None] * D + offs_d[None, :]
    mask_m = offs_m < T
    q = tl.load(q_ptr + offs_q, mask=mask_m[:, None], other=0.0)
    do = tl.load(do_ptr + offs_q, mask=mask_m[:, None], other=0.0)
    lse = tl.load(lse_ptr + head * T + offs_m, mask=mask_m, other=0.0)
    delta = tl.load(delta_ptr + head * T + offs_m, mask=mask_m, other=0.0)
    dq = tl.zeros((BLOCK_M, D), tl.float32)
    for start_n in range(0, tl.minimum(start_m + BLOCK_M, T), BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_k = base + offs_n[:, None] * D + offs_d[None, :]
        k = tl.load(k_ptr + offs_k, mask=offs_n[:, None] < T, other=0.0)
        v = tl.load(v_ptr + offs_k, mask=offs_n[:, None] < T, other=0.0)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        p = tl.where((offs_n[None, :] <= offs_m[:, None]) & (offs_n[None, :] < T), p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    dq = (dq * softmax_scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offs_q, dq, mask=mask_m[:, None])
