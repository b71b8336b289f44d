"""Gradient of cross-entropy in Triton: every row is read once and its gradient written once.

With K the sum of a row's shares, g = dlosses and h = dlse,
    dx'_c = (g (K + 2 z_loss lse) + h) softmax_c - g k_c.
Tiles of short rows and parts of long ones as in triton.py; K of probabilities takes a reading of
them beforehand.  The gradient may go where the row was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.cross_entropy import triton_plan as plan
from kernels.cross_entropy import triton_row as row_code
from kernels.cross_entropy.triton_mass import row_mass
from kernels.cross_entropy.triton_span import load_tile, store_tile

_NUMBERS = (*plan.NUMBERS, "dlosses_stride", "dlse_stride")


@triton.jit(do_not_specialize=[*_NUMBERS, "n_vec", "stride_vec", "out_stride_vec"])
def _backward_tile_kernel(
    dlosses_ptr,  # [rows]
    dlse_ptr,  # [rows]
    x_ptr,  # [rows, classes]
    target_ptr,  # [rows], or [rows, classes] with PROBABILITIES
    weight_ptr,  # [classes]
    lse_ptr,  # [2, rows]
    mass_ptr,  # [rows] with PROBABILITIES, or [1]: the sum of weight
    dx_ptr,  # [rows, classes]
    dlosses_stride,
    dlse_stride,
    rows,
    n_vec,
    stride_vec,
    out_stride_vec,
    ignore_index,
    on,
    off,
    z_loss,
    softcap,
    logit_scale,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    SPREAD: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    classes = n_vec * VEC  # the product shows Triton that rows start on a vector boundary
    tile = tl.program_id(0)
    row = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < rows
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = mask_m[:, None] & (column < classes)  # [BLOCK_M, BLOCK_N]
    raw = load_tile(x_ptr, tile, rows, classes, stride_vec * VEC, BLOCK_M, BLOCK_N, SPAN)
    lse, rest, slope, g, less, target, zero = row_code.factors(
        row,
        mask_m,
        dlosses_ptr,
        dlse_ptr,
        target_ptr,
        weight_ptr,
        lse_ptr,
        mass_ptr,
        dlosses_stride,
        dlse_stride,
        rows,
        classes,
        ignore_index,
        on,
        off,
        z_loss,
        PROBABILITIES,
        SHARED,
        HAS_WEIGHT,
        HAS_DLSE,
        SPREAD,
    )
    share = raw
    if SHARED:
        q = raw
        if PROBABILITIES:
            q = load_tile(target_ptr, tile, rows, classes, classes, BLOCK_M, BLOCK_N, SPAN)
        share = row_code.shares_of(
            q, weight_ptr, column, mask, column < classes, on, off, PROBABILITIES, HAS_WEIGHT
        )
    dx = row_code.gradient(
        raw,
        share,
        column == target[:, None],
        lse[:, None],
        rest[:, None],
        slope[:, None],
        g[:, None],
        less[:, None],
        softcap,
        logit_scale,
        SHARED,
        SOFTCAP,
    )
    dx = tl.where(zero[:, None], 0.0, dx)
    store_tile(dx_ptr, dx, tile, rows, classes, out_stride_vec * VEC, BLOCK_M, BLOCK_N, SPAN)


@triton.jit(do_not_specialize=[*_NUMBERS, "classes", "stride", "out_stride", "part_classes"])
def _backward_rows_kernel(
    dlosses_ptr,  # [rows]
    dlse_ptr,  # [rows]
    x_ptr,  # [rows, classes]
    target_ptr,  # [rows], or [rows, classes] with PROBABILITIES
    weight_ptr,  # [classes]
    lse_ptr,  # [2, rows]
    mass_ptr,  # [rows] with PROBABILITIES, or [1]: the sum of weight
    dx_ptr,  # [rows, classes]
    dlosses_stride,
    dlse_stride,
    rows,
    classes,
    stride,
    out_stride,
    part_classes,
    ignore_index,
    on,
    off,
    z_loss,
    softcap,
    logit_scale,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIKE: tl.constexpr,  # rows of dx are as far apart as those of x
    PROBABILITIES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part_classes
    count = tl.minimum(part_classes, classes - begin)
    start = row * stride + begin
    first, head, body = row_code.pieces(start, count, VEC)
    out = row * out_stride + begin
    first_out = out + head
    if ALIKE:
        out, first_out = start, first
    q_start = row * classes + begin
    lse, rest, slope, g, less, target, zero = row_code.factors(
        row,
        row < rows,
        dlosses_ptr,
        dlse_ptr,
        target_ptr,
        weight_ptr,
        lse_ptr,
        mass_ptr,
        dlosses_stride,
        dlse_stride,
        rows,
        classes,
        ignore_index,
        on,
        off,
        z_loss,
        PROBABILITIES,
        SHARED,
        HAS_WEIGHT,
        HAS_DLSE,
        1,
    )
    target -= begin
    end, end_mask = row_code.ends(head, body, count, VEC)
    end_raw = tl.load(x_ptr + start + end, mask=end_mask & (zero == 0), other=0.0)
    end_share = end_raw
    if SHARED:
        end_share = row_code.shares(
            target_ptr,
            q_start + end,
            weight_ptr,
            begin + end,
            end_mask,
            on,
            off,
            PROBABILITIES,
            HAS_WEIGHT,
        )
    end_dx = row_code.gradient(
        end_raw,
        end_share,
        end == target,
        lse,
        rest,
        slope,
        g,
        less,
        softcap,
        logit_scale,
        SHARED,
        SOFTCAP,
    )
    tl.store(dx_ptr + out + end, tl.where(zero, 0.0, end_dx), mask=end_mask)
    if zero:  # the logits of an ignored row need not be read
        for block in range(0, body, BLOCK):
            place = block + tl.arange(0, BLOCK)
            tl.store(dx_ptr + first_out + place, tl.zeros([BLOCK], tl.float32), mask=place < body)
    else:
        for block in range(0, body, BLOCK):
            place = block + tl.arange(0, BLOCK)
            mask = place < body
            column = head + place
            raw = tl.load(x_ptr + first + place, mask=mask, other=0.0)
            share = raw
            if SHARED:
                share = row_code.shares(
                    target_ptr,
                    q_start + column,
                    weight_ptr,
                    begin + column,
                    mask,
                    on,
                    off,
                    PROBABILITIES,
                    HAS_WEIGHT,
                )
            dx = row_code.gradient(
                raw,
                share,
                column == target,
                lse,
                rest,
                slope,
                g,
                less,
                softcap,
                logit_scale,
                SHARED,
                SOFTCAP,
            )
            tl.store(dx_ptr + first_out + place, dx, mask=mask)


def backward(
    dlosses: Tensor,
    dlse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    stats: bool,
    lse: Tensor,
    output_mask: Sequence[bool],
    inplace: bool,
) -> tuple[Tensor | None, None]:
    """dinput [N, C] in input's dtype, or input itself; targets that need a gradient are refused."""
    if not output_mask[0]:
        return None, None
    rows, classes = input.shape
    dinput = input
    if not inplace:
        dinput = torch.empty((rows, classes), dtype=input.dtype, device=input.device)
    if rows == 0:
        return dinput, None
    target, weight, lse = target.contiguous(), plan.contiguous_weight(weight), lse.contiguous()
    dlosses = dlosses.to(torch.float32)
    dlse = None if dlse is None else dlse.to(torch.float32)
    numbers = plan.numbers(classes, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    flags = plan.flags(target, weight, label_smoothing, softcap) | {"HAS_DLSE": dlse is not None}
    stride, out_stride = input.stride(0), dinput.stride(0)
    strides = dlosses.stride(0), 0 if dlse is None else dlse.stride(0)
    with _triton.device_of(input):
        mass = None
        if flags["PROBABILITIES"]:
            mass = row_mass(target, weight, *numbers[1:3])
        elif weight is not None and label_smoothing:
            mass = weight.sum()
        tensors = dlosses, dlse, input, target, weight, lse, mass, dinput
        tile = plan.tile(input, stride, out_stride)
        if tile is not None:
            _backward_tile_kernel[(triton.cdiv(rows, tile.block_m),)](
                *tensors,
                *strides,
                rows,
                classes // tile.vec,
                stride // tile.vec,
                out_stride // tile.vec,
                *numbers,
                **flags,
                **tile.constants(),
                **_triton.LAUNCH,
            )
            return dinput, None
        sweep = plan.sweep(input)
        _backward_rows_kernel[(rows, sweep.parts)](
            *tensors,
            *strides,
            rows,
            classes,
            stride,
            out_stride,
            sweep.part_classes,
            *numbers,
            **flags,
            VEC=sweep.vec,
            BLOCK=sweep.threads * plan.SWEEP_ELEMENTS,
            ALIKE=stride == out_stride,
            num_warps=sweep.num_warps,
            **_triton.LAUNCH,
        )
    return dinput, None
