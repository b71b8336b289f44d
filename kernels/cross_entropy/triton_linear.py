"""Linear + cross-entropy in Triton, without logits in memory.

A program owns a block of rows and walks over the blocks of a part of the classes: logits of a block
are one product of tiles, of which the running maximum, sums and the target's logit are kept.  The
parts are merged in order by triton_merge.py.  Gradients are in triton_linear_backward.py.
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
from kernels.cross_entropy.triton_linear_backward import backward
from kernels.cross_entropy.triton_linear_plan import prepared, unsupported
from kernels.cross_entropy.triton_linear_product import product
from kernels.cross_entropy.triton_merge import merge

__all__ = ["backward", "forward", "unsupported"]

NUMBERS = [*plan.NUMBERS, "classes", "features", "stride_x", "stride_w", "part_blocks", "parts"]


@triton.jit(do_not_specialize=NUMBERS)
def _linear_forward_kernel(
    x_ptr,  # [rows, features]
    w_ptr,  # [classes, features]
    bias_ptr,  # [classes]
    target_ptr,  # [rows]
    weight_ptr,  # [classes]
    states_ptr,  # [2, rows, parts, 2] float32: (top, total), (cost, mass)
    ranks_ptr,  # [rows, parts, 2] int32: key and column of the best
    picked_ptr,  # [rows] float32: the target's logit
    rows,
    classes,
    features,  # these three in units of VEC
    stride_x,
    stride_w,
    part_blocks,  # blocks of classes in a part
    parts,
    ignore_index,
    on,
    off,
    z_loss,
    softcap,
    logit_scale,
    VEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
):
    features, stride_x, stride_w = features * VEC, stride_x * VEC, stride_w * VEC
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < rows
    row_x = tl.minimum(row, rows - 1)  # rows and classes past the end are read as the last one
    target = tl.load(target_ptr + row_x)
    begin = tl.program_id(1) * part_blocks * BLOCK_N
    end = tl.minimum(begin + part_blocks * BLOCK_N, classes)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    cost = tl.zeros([BLOCK_M], tl.float32)
    logit = tl.zeros([BLOCK_M], tl.float32)
    mass = tl.sum(tl.zeros([BLOCK_N], tl.float32), 0)
    best_key = tl.full([BLOCK_M], row_code.NO_KEY, tl.int32)
    best = tl.full([BLOCK_M], row_code.NO_COLUMN, tl.int32)
    for block in range(begin, end, BLOCK_N):
        column = block + tl.arange(0, BLOCK_N)
        mask_n = column < classes
        row_w = tl.minimum(column, classes - 1).to(tl.int64)
        raw = product(
            x_ptr, w_ptr, row_x, row_w, stride_x, stride_w, features,
            BLOCK_M, BLOCK_N, BLOCK_K, WHOLE, PRECISION,
        )  # fmt: skip
        if bias_ptr is not None:
            raw += tl.load(bias_ptr + row_w).to(tl.float32)[None, :]
        x = row_code.logits(raw, softcap, logit_scale, SOFTCAP)
        x = tl.where(mask_n[None, :], x, float("-inf"))
        before, base_before = top, row_code.base_of(top)
        top = tl.maximum(top, tl.max(x, 1))
        base = row_code.base_of(top)
        total = total * tl.exp(before - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        logit += tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)
        if SHARED:
            share = row_code.shares_of(
                0.0, weight_ptr, column, mask_n, mask_n, 0.0, off, False, HAS_WEIGHT
            )
            terms = tl.where(mask_n[None, :], share[None, :] * (base[:, None] - x), 0.0)
            cost += mass * (base - base_before) + tl.sum(terms, 1)
            mass += tl.sum(share, 0)
        if STATS:
            key = row_code.keys(raw, mask_n[None, :], logit_scale)
            block_key = tl.max(key, 1)
            found = tl.where(key == block_key[:, None], column[None, :], row_code.NO_COLUMN)
            best = tl.where(block_key > best_key, tl.min(found, 1), best)  # the first of equals
            best_key = tl.maximum(best_key, block_key)
    place = (row * parts + tl.program_id(1)) * 2
    tl.store(states_ptr + place, top, mask=mask_m)
    tl.store(states_ptr + place + 1, total, mask=mask_m)
    # One part has the target, or none.
    tl.store(picked_ptr + row, logit, mask=mask_m & (target >= begin) & (target < end))
    if SHARED:
        place_of_costs = place + rows.to(tl.int64) * parts * 2
        tl.store(states_ptr + place_of_costs, cost, mask=mask_m)
        tl.store(states_ptr + place_of_costs + 1, mass + cost * 0, mask=mask_m)
    if STATS:
        tl.store(ranks_ptr + place, best_key, mask=mask_m)
        tl.store(ranks_ptr + place + 1, best, mask=mask_m)


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """losses [N], lse [2, N], and with stats log_prob [N] and best [N]."""
    problem = prepared(problem)
    x, w, target = problem.input, problem.linear_weight, problem.target
    (rows, features), classes, options = x.shape, w.shape[0], problem.options

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    losses, lse = new(rows), new(2, rows)
    log_prob = new(rows) if options.stats else None
    best = new(rows, dtype=torch.int64) if options.stats else None
    results = losses, lse, log_prob, best
    if rows == 0:
        return results
    weight = plan.contiguous_weight(problem.weight)
    numbers = plan.numbers(classes, *options[:-1])
    flags = plan.flags(target, weight, options.label_smoothing, options.softcap)
    flags |= {"STATS": options.stats}
    with _triton.device_of(x):
        tile = linear_plan.tile(linear_plan.FORWARD, problem, plain=True)
        split = linear_plan.split(x, rows, classes, tile["BLOCK_M"], tile["BLOCK_N"])
        states = new(2, rows, split.parts, 2)
        ranks = new(rows, split.parts, 2, dtype=torch.int32) if options.stats else None
        picked = new(rows)
        vec = _triton.vector(math.gcd(features, x.stride(0), w.stride(0)))
        kernel_flags = {name: value for name, value in flags.items() if name != "PROBABILITIES"}
        _linear_forward_kernel[(split.blocks, split.parts)](
            x, w, problem.linear_bias, target, weight, states, ranks, picked,
            rows, classes, features // vec, x.stride(0) // vec, w.stride(0) // vec,
            split.part_blocks, split.parts, *numbers,
            VEC=vec,
            WHOLE=features % tile["BLOCK_K"] == 0,
            PRECISION=linear_plan.precision(x),
            **kernel_flags,
            **tile,
            **_triton.LAUNCH,
        )  # fmt: skip
        merge(picked, target, weight, states, ranks, results, classes, 0, numbers, flags)
    return results
