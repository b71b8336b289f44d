"""Matrix products with an int8 weight in Triton: a program owns a tile of y and loops over K.

Tiles come from memory by asynchronous copies and go through the tensor cores: int8 with int8 to
int32; bfloat16 and float16 with the weight converted to their dtype; float32 in three pieces of
bfloat16, which int8 is converted to exactly, so that no digit is lost.  Programs that follow each
other share tiles of both matrices in the L2 cache.  Where y has few tiles, several programs share
the K of one: each leaves its sum in a workspace, and a second kernel adds them in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP_M = tl.constexpr(8)  # tiles of rows that share a tile of the weight while it is in the cache
NUMBERS = ["rows", "cols", "depth", "stride_a", "stride_b", "stride_as", "stride_bs", "part_blocks"]


@triton.jit
def _activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.where(y < 0.0, 0.0, y)  # NaN stays
    if ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), without the cancellation near -1
        u = 0.7978845608028654 * (y + 0.044715 * y * y * y)
        return y / (1.0 + tl.exp(-2.0 * u))
    return y


@triton.jit
def _pieces(x):
    """float32 as the sum of three bfloat16, exactly: 8 bits of its 24 each."""
    finite = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) < 0x7F800000
    high = tl.where(finite, (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True), x)
    rest = tl.where(finite, x - high, 0.0)
    middle = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)


@triton.jit
def _finish(
    acc,  # [BLOCK_M, BLOCK_N]
    offs_m,  # [BLOCK_M] int64
    offs_n,  # [BLOCK_N]
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    y_ptr,
    rows,
    cols,
    stride_as,
    stride_bs,
    ACTIVATION: tl.constexpr,
):
    """Scales, bias and activation, and y of a tile; without scales `acc` itself."""
    mask_m, mask_n = offs_m < rows, offs_n < cols
    y = acc
    if b_scale_ptr is not None:
        scale = tl.load(b_scale_ptr + offs_n * stride_bs, mask=mask_n, other=0.0)[None, :]
        if a_scale_ptr is not None:
            of_rows = tl.load(a_scale_ptr + offs_m * stride_as, mask=mask_m, other=0.0)
            scale = scale * of_rows[:, None]
        y = acc.to(tl.float32) * scale
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        y = _activated(y, ACTIVATION)
    ptrs = y_ptr + offs_m[:, None] * cols + offs_n[None, :]
    tl.store(ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def _tile_of(rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, column) of this program's tile: GROUP_M tiles down, then one to the right."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    group, place = tl.program_id(0) // (GROUP_M * tiles_n), tl.program_id(0) % (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + place % height, place // height


@triton.jit(do_not_specialize=NUMBERS)
def product_kernel(
    a_ptr,  # [rows, depth] int8 or floats
    b_ptr,  # [cols, depth] int8
    a_scale_ptr,  # float32 [rows] or [1], or None
    b_scale_ptr,  # float32 [cols] or [1], or None: y is the sums
    bias_ptr,  # [cols], or None
    y_ptr,  # [rows, cols]; of shared tiles [parts, rows, cols], the sums
    rows,
    cols,  # in units of VEC_N
    depth,  # in units of VEC_K
    stride_a,  # of rows, in units of VEC_K
    stride_b,  # of the dimension that is not contiguous, in units of the other's vector
    stride_as,  # 1, or 0 where one scale serves all
    stride_bs,
    part_blocks,  # of BLOCK_K, for one program
    VEC_K: tl.constexpr,
    VEC_N: tl.constexpr,
    ALONG_K: tl.constexpr,  # the weight's depth is its contiguous dimension
    WHOLE_K: tl.constexpr,  # depth is a multiple of BLOCK_K
    WHOLE_N: tl.constexpr,  # cols is one of BLOCK_N
    SPLIT: tl.constexpr,  # float32 is multiplied in pieces of bfloat16
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The products show Triton that rows start on a vector boundary.
    cols, depth, stride_a = cols * VEC_N, depth * VEC_K, stride_a.to(tl.int64) * VEC_K
    stride_b = stride_b.to(tl.int64) * (VEC_K if ALONG_K else VEC_N)
    FLOAT: tl.constexpr = a_ptr.dtype.element_ty != tl.int8
    tile_m, tile_n = _tile_of(rows, cols, BLOCK_M, BLOCK_N)
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end are read as the last one, and their sums are not stored.
    a_row_ptr = a_ptr + tl.minimum(offs_m, rows - 1)[:, None] * stride_a
    if ALONG_K:
        b_row_ptr = b_ptr + tl.minimum(offs_n, cols - 1)[None, :] * stride_b
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32 if FLOAT else tl.int32)
    begin = tl.program_id(1) * part_blocks * BLOCK_K
    for first_k in range(begin, tl.minimum(begin + part_blocks * BLOCK_K, depth), BLOCK_K):
        k = first_k + offs_k
        inside = k < depth
        if WHOLE_K:
            a = tl.load(a_row_ptr + k[None, :])
        else:
            a = tl.load(a_row_ptr + k[None, :], mask=inside[None, :], other=0)
        if ALONG_K:
            if WHOLE_K:
                b = tl.load(b_row_ptr + k[:, None])
            else:
                b = tl.load(b_row_ptr + k[:, None], mask=inside[:, None], other=0)
        else:
            ptrs = b_ptr + k[:, None] * stride_b + offs_n[None, :]
            if WHOLE_K and WHOLE_N:
                b = tl.load(ptrs)
            else:
                b = tl.load(ptrs, mask=inside[:, None] & (offs_n < cols)[None, :], other=0)
        if SPLIT:
            high, middle, low = _pieces(a)
            b = b.to(tl.bfloat16)
            acc = tl.dot(low, b, acc)
            acc = tl.dot(middle, b, acc)
            acc = tl.dot(high, b, acc)
        elif FLOAT:
            acc = tl.dot(a, b.to(a.dtype), acc)
        else:
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    y_ptr += tl.program_id(1).to(tl.int64) * rows * cols
    _finish(
        acc, offs_m, offs_n, a_scale_ptr, b_scale_ptr, bias_ptr, y_ptr, rows, cols,
        stride_as, stride_bs, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "cols", "stride_as", "stride_bs", "parts"])
def combine_kernel(
    sums_ptr,  # [parts, rows, cols] int32 or float32
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    y_ptr,  # [rows, cols]
    rows,
    cols,  # in units of VEC_N
    stride_as,
    stride_bs,
    parts,
    VEC_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    cols = cols * VEC_N
    offs_m = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs = sums_ptr + offs_m[:, None] * cols + offs_n[None, :]
    mask = (offs_n < cols)[None, :]
    acc = tl.zeros([1, BLOCK_N], sums_ptr.dtype.element_ty)
    step = offs_m[:, None] * 0 + rows * tl.cast(cols, tl.int64)
    for _ in range(parts):
        acc += tl.load(ptrs, mask=mask, other=0)
        ptrs += step
    _finish(
        acc, offs_m, offs_n, a_scale_ptr, b_scale_ptr, bias_ptr, y_ptr, rows, cols,
        stride_as, stride_bs, ACTIVATION,
    )  # fmt: skip
