"""A tile of the product of two matrices' rows, in Triton: features are looped over."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    a_ptr,
    b_ptr,
    row_a,  # [BLOCK_A] int64
    row_b,  # [BLOCK_B] int64
    stride_a,
    stride_b,
    features,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,  # features is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
):
    """Products of rows of a and of b, [BLOCK_A, BLOCK_B]."""
    offs_k = tl.arange(0, BLOCK_K)
    a_place = a_ptr + row_a[:, None] * stride_a + offs_k[None, :]
    b_place = b_ptr + row_b[None, :] * stride_b + offs_k[:, None]
    acc = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for first_k in range(0, features, BLOCK_K):
        if WHOLE:
            a, b = tl.load(a_place + first_k), tl.load(b_place + first_k)
        else:
            mask_k = offs_k < features - first_k
            a = tl.load(a_place + first_k, mask=mask_k[None, :], other=0.0)
            b = tl.load(b_place + first_k, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
