"""Gradients of linear + cross-entropy in Triton: logits are computed again, a tile at a time.

One kernel, launched for each gradient.  A program owns a block of rows (for dinput) or of classes
(for dlinear_weight and dlinear_bias) and walks over a part of the others: a tile of logits, its
gradient, and that gradient's product with the other matrix, added in float32 to what the program
owns, features a block at a time.  Parts are added up in order; no atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.cross_entropy import triton_linear_plan as linear_plan
from kernels.cross_entropy import triton_plan as plan
from kernels.cross_entropy import triton_row as row_code
from kernels.cross_entropy.chunks import Problem
from kernels.cross_entropy.triton_linear_plan import prepared
from kernels.cross_entropy.triton_linear_product import product

NUMBERS = [*plan.NUMBERS, "dlosses_stride", "dlse_stride", "classes", "features"]
NUMBERS += ["stride_owned", "stride_other", "part_blocks", "parts"]


@triton.jit
def _tile_gradient(
    raw,  # [BLOCK_M, BLOCK_N] products
    row,  # [rows of the tile] int64, along the axis that CLASSES_OWNED says, as `column`
    column,
    mask_row,
    mask_column,
    tensors,  # dlosses, dlse, bias, target, weight, lse, mass
    numbers,
    CLASSES_OWNED: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """The gradient of a tile's products, 0 outside of the matrix."""
    dlosses_ptr, dlse_ptr, bias_ptr, target_ptr, weight_ptr, lse_ptr, mass_ptr = tensors
    dlosses_stride, dlse_stride, rows, classes, ignore_index = numbers[0]
    on, off, z_loss, softcap, logit_scale = numbers[1]
    lse, rest, slope, g, less, target, zero = row_code.factors(
        row, mask_row, dlosses_ptr, dlse_ptr, target_ptr, weight_ptr, lse_ptr, mass_ptr,
        dlosses_stride, dlse_stride, rows, classes, ignore_index, on, off, z_loss,
        False, SHARED, HAS_WEIGHT, HAS_DLSE, 1,
    )  # fmt: skip
    zero = zero | (mask_row == 0)
    AXIS: tl.constexpr = 0 if CLASSES_OWNED else 1
    column = tl.expand_dims(column, 1 - AXIS)
    mask_column = tl.expand_dims(mask_column, 1 - AXIS)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + column, mask=mask_column, other=0.0).to(tl.float32)
    share = 0.0
    if SHARED:
        share = row_code.shares_of(
            0.0, weight_ptr, column, mask_column, mask_column, on, off, False, HAS_WEIGHT
        )
    dx = row_code.gradient(
        raw, share, column == tl.expand_dims(target, AXIS), tl.expand_dims(lse, AXIS),
        tl.expand_dims(rest, AXIS), tl.expand_dims(slope, AXIS), tl.expand_dims(g, AXIS),
        tl.expand_dims(less, AXIS), softcap, logit_scale, SHARED, SOFTCAP,
    )  # fmt: skip
    return tl.where(tl.expand_dims(zero, AXIS) | (mask_column == 0), 0.0, dx)


@triton.jit(do_not_specialize=NUMBERS)
def _linear_gradient_kernel(
    owned_ptr,  # [owned, features]: input, or linear_weight with CLASSES_OWNED
    other_ptr,  # [others, features]
    dlosses_ptr,  # [rows]
    dlse_ptr,  # [rows]
    bias_ptr,  # [classes]
    target_ptr,  # [rows]
    weight_ptr,  # [classes]
    lse_ptr,  # [2, rows]
    mass_ptr,  # [1]: the sum of weight
    sums_ptr,  # [parts, owned, features] float32
    bias_sums_ptr,  # [parts, classes] float32
    dlosses_stride,
    dlse_stride,
    rows,
    classes,
    features,  # these three in units of VEC
    stride_owned,
    stride_other,
    part_blocks,
    ignore_index,
    on,
    off,
    z_loss,
    softcap,
    logit_scale,
    CLASSES_OWNED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    features, stride_owned, stride_other = features * VEC, stride_owned * VEC, stride_other * VEC
    owned_count, other_count = rows, classes
    if CLASSES_OWNED:
        owned_count, other_count = classes, rows
    owned = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_owned = owned < owned_count
    part = tl.program_id(1).to(tl.int64)
    # Past the end the last one is read, and counts for nothing.
    owned_row = tl.minimum(owned, owned_count - 1)
    sums = sums_ptr + (part * owned_count + owned_row)[:, None] * features
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    tensors = dlosses_ptr, dlse_ptr, bias_ptr, target_ptr, weight_ptr, lse_ptr, mass_ptr
    numbers = (dlosses_stride, dlse_stride, rows, classes, ignore_index), (
        on, off, z_loss, softcap, logit_scale,
    )  # fmt: skip
    bias_sum = tl.zeros([BLOCK_M], tl.float32)
    first_block = part * part_blocks
    last_block = tl.minimum(first_block + part_blocks, tl.cdiv(other_count, BLOCK_N))
    for block in range(first_block, last_block):
        other = block * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_other = other < other_count
        other_row = tl.minimum(other, other_count - 1).to(tl.int64)
        raw = product(
            owned_ptr, other_ptr, owned_row, other_row, stride_owned, stride_other, features,
            BLOCK_M, BLOCK_N, BLOCK_K, WHOLE, PRECISION,
        )  # fmt: skip
        if CLASSES_OWNED:
            dlogits = _tile_gradient(
                raw, other_row, owned_row, mask_other, mask_owned, tensors, numbers,
                True, SHARED, HAS_WEIGHT, SOFTCAP, HAS_DLSE,
            )  # fmt: skip
            bias_sum += tl.sum(dlogits, 1)
        else:
            dlogits = _tile_gradient(
                raw, owned_row, other_row, mask_owned, mask_other, tensors, numbers,
                False, SHARED, HAS_WEIGHT, SOFTCAP, HAS_DLSE,
            )  # fmt: skip
        dlogits = dlogits.to(other_ptr.dtype.element_ty)
        places = other_ptr + other_row[:, None] * stride_other + offs_k
        again = block > first_block
        for first_k in range(0, features, BLOCK_K):
            mask_k = offs_k < features - first_k
            values = tl.load(places + first_k, mask=mask_k, other=0.0)
            mask = mask_owned[:, None] & mask_k
            acc = tl.load(sums + first_k + offs_k, mask=mask & again, other=0.0)
            acc = tl.dot(dlogits, values, acc, input_precision=PRECISION)
            tl.store(sums + first_k + offs_k, acc, mask=mask)
        tl.debug_barrier()  # before other threads read what these have stored
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + part * classes + owned, bias_sum, mask=mask_owned)


def backward(
    problem: Problem,
    dlosses: Tensor,  # [N], any stride
    dlse: Tensor | None,
    lse: Tensor,  # [2, N]
    mask: tuple[bool, ...],  # of input, linear_weight, linear_bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dinput, dlinear_weight and dlinear_bias in their dtypes; None where not asked for."""
    problem = prepared(problem)
    dinput = dweight = dbias = None
    dlosses, lse = dlosses.to(torch.float32), lse.contiguous()
    dlse = None if dlse is None else dlse.to(torch.float32)
    with _triton.device_of(problem.input):
        if mask[0]:
            dinput, _ = _sums(problem, dlosses, dlse, lse, classes_owned=False, with_bias=False)
        with_bias = mask[2] and problem.linear_bias is not None
        if mask[1] or with_bias:
            dweight, dbias = _sums(problem, dlosses, dlse, lse, True, with_bias)
    return dinput, dweight if mask[1] else None, dbias


def _sums(
    problem: Problem,
    dlosses: Tensor,
    dlse: Tensor | None,
    lse: Tensor,
    classes_owned: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of input, or those of linear_weight and linear_bias."""
    x, w, options = problem.input, problem.linear_weight, problem.options
    owned, other = (w, x) if classes_owned else (x, w)
    features, classes = x.shape[1], w.shape[0]
    weight = plan.contiguous_weight(problem.weight)
    tile = linear_plan.tile(linear_plan.GRADIENT, problem, plain=dlse is None)
    # No more parts than make the sums as large as the other matrix.
    most = max(1, other.shape[0] // owned.shape[0])
    split = linear_plan.split(
        x, owned.shape[0], other.shape[0], tile["BLOCK_M"], tile["BLOCK_N"], most
    )
    sums = torch.empty(split.parts, *owned.shape, dtype=torch.float32, device=x.device)
    bias_sums = sums.new_empty(split.parts, classes) if with_bias else None
    flags = plan.flags(problem.target, weight, options.label_smoothing, options.softcap)
    del flags["PROBABILITIES"]
    total = weight.sum() if weight is not None and options.label_smoothing else None
    vec = _triton.vector(math.gcd(features, owned.stride(0), other.stride(0)))
    _linear_gradient_kernel[(split.blocks, split.parts)](
        owned, other, dlosses, dlse, problem.linear_bias, problem.target, weight, lse, total,
        sums, bias_sums,
        dlosses.stride(0), 0 if dlse is None else dlse.stride(0),
        x.shape[0], classes, features // vec, owned.stride(0) // vec, other.stride(0) // vec,
        split.part_blocks, *plan.numbers(classes, *options[:-1]),
        CLASSES_OWNED=classes_owned,
        VEC=vec,
        WHOLE=features % tile["BLOCK_K"] == 0,
        PRECISION=linear_plan.precision(x),
        HAS_DLSE=dlse is not None,
        **flags,
        **tile,
        **_triton.LAUNCH,
    )  # fmt: skip
    whole = sums[0] if split.parts == 1 else sums.sum(0)
    bias = None if bias_sums is None else bias_sums.sum(0).to(x.dtype)
    return whole.to(x.dtype), bias
