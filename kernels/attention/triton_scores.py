"""What the Triton attention kernels compute of a tile: products, scores, weights, dropout.

`i` and `j` are a tile's query and key numbers, shaped to broadcast, so every helper serves tiles of
[queries, keys] and of [keys, queries].  Scores are powers of two: natural ones times log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_REST = tl.constexpr(1.92596298909109e-8)  # what rounding LOG2_E to float32 leaves
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def head_side(ptr, strides, batch, head, first, width, BLOCK_D: tl.constexpr, VEC: tl.constexpr):
    """One head's rows, for load_rows: (pointer, stride of a row, offsets in a row, width).

    Strides and width come in units of VEC: the products show Triton where vectors may begin.
    """
    stride_b, stride_h, stride_t = strides
    start = batch * stride_b + tl.cast(head, tl.int64) * stride_h + first * stride_t
    return ptr + start * VEC, stride_t * VEC, tl.arange(0, BLOCK_D), width * VEC


@triton.jit
def _row_pointers(side, start, rows, WIDE: tl.constexpr):
    """Of `rows`, which lie in the block that begins at row `start`; WIDE: anywhere.

    The offsets within a block stay the same from block to block and fit 32 bits, so that a loop
    over blocks needs one 64-bit pointer and not one for each vector.
    """
    ptr, stride, offs_d, width = side
    if WIDE:
        ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    else:
        ptr += tl.cast(start, tl.int64) * stride
        ptrs = ptr + ((rows - start)[:, None] * stride + offs_d[None, :])
    return ptrs


@triton.jit
def load_rows(side, start, rows, valid, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros past its width, and in rows that are not `valid`.

    `valid` is None where all rows are; WHOLE: the width is BLOCK_D.
    """
    ptrs = _row_pointers(side, start, rows, WIDE)
    if valid is not None and WHOLE:
        tile = tl.load(ptrs, mask=valid[:, None], other=0.0)
    elif valid is not None:
        tile = tl.load(ptrs, mask=valid[:, None] & (side[2] < side[3])[None, :], other=0.0)
    elif WHOLE:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(side[2] < side[3])[None, :], other=0.0)
    return tile


@triton.jit
def columns(side, first, COUNT: tl.constexpr):
    """A side's columns from `first` on, as a side."""
    return side[0] + first, side[1], tl.arange(0, COUNT), side[3] - first


@triton.jit
def store_rows(side, start, rows, valid, tile, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """Writes [rows, BLOCK_D] of one head in the dtype of its pointer, but for rows not valid."""
    inside = valid[:, None] if WHOLE else valid[:, None] & (side[2] < side[3])[None, :]
    ptrs = _row_pointers(side, start, rows, WIDE)
    tl.store(ptrs, tile.to(side[0].dtype.element_ty), mask=inside)


@triton.jit
def products(
    own,  # of own rows: (what load_rows gave, side, start, rows, valid)
    other,  # of other rows: the same but for `valid`
    other_valid,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[own rows, other rows]: each times each.

    SLICE: loads that many columns of both at a time, where whole operands do not fit the registers;
    whole rows that nothing else needs are then never loaded.
    """
    if SLICE == 0:
        product = tl.dot(own[0], tl.trans(other[0]), input_precision=PRECISION)
    else:
        WIDTH: tl.constexpr = own[0].shape[1]
        COUNT: tl.constexpr = SLICE if SLICE < WIDTH else WIDTH
        product = tl.zeros([own[3].shape[0], other[3].shape[0]], tl.float32)
        for column in range(0, WIDTH, COUNT):
            left = load_rows(columns(own[1], column, COUNT), own[2], own[3], own[4], WHOLE, WIDE)
            right = load_rows(
                columns(other[1], column, COUNT), other[2], other[3], other_valid, WHOLE, WIDE
            )
            product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    return product


@triton.jit
def both(rows_valid, columns_valid):
    """Where a tile lies inside the tensors; None stands for all of a side, not of both."""
    if rows_valid is None:
        inside = columns_valid[None, :]
    elif columns_valid is None:
        inside = rows_valid[:, None]
    else:
        inside = rows_valid[:, None] & columns_valid[None, :]
    return inside


@triton.jit
def tanh(x):
    """To two units in the last place; 1 - 2 / (exp(2 x) + 1) loses digits where x is small."""
    square = x * x
    # (tanh(x) / x - 1) / x**2 for |x| < 0.6, least squares at Chebyshev points
    series = -0.006276390049606562 * square + 0.021116215735673904
    series = series * square - 0.053875137120485306
    series = series * square + 0.13332924246788025
    series = series * square - 0.3333333134651184
    small = x + x * square * series
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.36, small, tl.where(x < 0.0, -large, large))


@triton.jit
def scores(qk, i, j, valid, visible, mask_ptr, slope, features, SOFTCAP: tl.constexpr):
    """(scores, how fast they grow with qk): the second over scale, 1 without a softcap.

    `valid`: where the tile lies inside the tensors; `visible`: None in a plain block.
    """
    # A query's position is i + offset.  The scale is over the cap where there is one; scale, cap
    # and slope are times log2(e); the mask is the head's.
    offset, scale, cap, stride_mask_m, stride_mask_n = features
    s = qk * scale
    growth = 1.0
    if SOFTCAP:
        capped = tanh(s)
        s = capped * cap
        growth = 1.0 - capped * capped
    if slope is not None:
        s -= slope * tl.abs(j - i - offset).to(tl.float32)
    if mask_ptr is not None:
        ptrs = mask_ptr + i.to(tl.int64) * stride_mask_m + j * stride_mask_n
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(ptrs, mask=valid, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(ptrs, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    return s, growth


@triton.jit
def kept(seed, dropout, rows, keys, first_key, GATHERED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which weights [BLOCK_M, BLOCK_N] dropout keeps: those with 16 random bits >= threshold.

    One call of Philox4x32-10 serves the keys 32 a + 8 n + 2 t + {0, 1}: word n, its low half for
    the even key.  Unless GATHERED the keys follow on `first_key`, and where that is a multiple of
    32 no call is made twice.  TRANSPOSED: [BLOCK_N, BLOCK_M].
    """
    number, threshold = dropout
    BLOCK_M: tl.constexpr = rows.shape[0]
    BLOCK_N: tl.constexpr = keys.shape[0]
    i, head, zero = rows.to(tl.uint32)[:, None], number.to(tl.uint32), (number * 0).to(tl.uint32)
    if GATHERED or BLOCK_N % 32 != 0:
        call = ((keys >> 5) * 4 + ((keys >> 1) & 3)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, i, call, head, zero)
        word = ((keys >> 3) & 3)[None, :]
        bits = tl.where(word < 2, tl.where(word < 1, w0, w1), tl.where(word < 3, w2, w3))
        bits = (bits >> ((keys & 1) * 16).to(tl.uint32)[None, :]) & 0xFFFF
        keep = bits >= threshold
    else:
        call = (first_key // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, i, call, head, zero)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., x, y] is word 2 x + y
        halves = tl.join(words & 0xFFFF, words >> 16) >= threshold
        halves = tl.reshape(halves, (BLOCK_M, BLOCK_N // 32, 4, 4, 2))  # a, t, n, even and odd
        keep = tl.reshape(tl.permute(halves, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))
    return tl.trans(keep) if TRANSPOSED else keep


@triton.jit
def weights(
    qk,  # products of queries and keys
    lse,  # of the queries, as powers of two
    lse_rest,  # or None: see row_statistics
    i,
    j,
    valid,
    visible,
    mask_ptr,
    slope,
    features,
    SCORES: tl.constexpr,
):
    """(p before dropout, how fast scores grow with the scaled products)."""
    growth = 1.0
    if SCORES == 0 and visible is None:
        s = tl.fma(qk, features[1], -lse)
    else:
        s, growth = scores(qk, i, j, valid, visible, mask_ptr, slope, features, SCORES == 2)
        s -= lse
    if lse_rest is not None:
        s -= lse_rest
    return tl.exp2(s), growth


@triton.jit
def row_statistics(lse_ptr, delta_ptr, rows, valid):
    """lse as a power of two, what its rounding leaves, and delta.

    Rows that are not `valid` (None: all are) weigh 0.  In float32 gradients the rounding of
    lse times log2(e) would show.
    """
    if valid is None:
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
    else:
        lse = tl.load(lse_ptr + rows, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=valid, other=0.0)
    # A row that saw nothing has scores of -inf only: any finite lse gives it weights of 0.
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    power = lse * LOG2_E
    rest = tl.fma(lse, LOG2_E, -power) + lse * LOG2_E_REST
    return power, tl.where(lse == float("inf"), 0.0, rest), delta
