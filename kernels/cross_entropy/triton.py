"""Cross-entropy in Triton: every row is read once, maximum and sum kept in step.

A program holds a tile of whole short rows.  Longer rows have a program each, and where there are
few, several, whose parts a second kernel merges in their order.  Such rows are read in aligned
vectors wherever they start, the few elements before and after by themselves; the running maximum is
each thread's own.  Gradients are in triton_backward.py, the maths in README.md.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.cross_entropy import triton_plan as plan
from kernels.cross_entropy import triton_row as row_code
from kernels.cross_entropy.triton_backward import backward
from kernels.cross_entropy.triton_merge import merge
from kernels.cross_entropy.triton_span import load_tile

__all__ = ["backward", "forward", "unsupported"]


@triton.jit(do_not_specialize=[*plan.NUMBERS, "n_vec", "stride_vec"])
def _forward_tile_kernel(
    x_ptr,  # [rows, classes]
    target_ptr,  # [rows], or [rows, classes] with PROBABILITIES
    weight_ptr,  # [classes]
    losses_ptr,  # [rows]
    lse_ptr,  # [2, rows]
    log_prob_ptr,  # [rows]
    best_ptr,  # [rows]
    rows,
    n_vec,
    stride_vec,
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
    STATS: tl.constexpr,
):
    classes = n_vec * VEC  # the product shows Triton that rows start on a vector boundary
    tile = tl.program_id(0)
    row = tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < rows
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = mask_m[:, None] & (column < classes)  # [BLOCK_M, BLOCK_N]
    raw = load_tile(x_ptr, tile, rows, classes, stride_vec * VEC, BLOCK_M, BLOCK_N, SPAN)
    x = tl.where(mask, row_code.logits(raw, softcap, logit_scale, SOFTCAP), float("-inf"))
    top = tl.max(x, 1)
    base = row_code.base_of(top)
    total = tl.sum(tl.exp(x - base[:, None]), 1)
    target = row  # this and the next four are not read unless they are set below
    logit, cost, mass, best = top, top, top, top
    if not PROBABILITIES:
        target = row_code.of_rows(target_ptr, row, mask_m, SPREAD)
        logit = tl.sum(tl.where(column == target[:, None], x, 0.0), 1)
    if SHARED:
        q = raw
        if PROBABILITIES:
            q = load_tile(target_ptr, tile, rows, classes, classes, BLOCK_M, BLOCK_N, SPAN)
        share = row_code.shares_of(
            q, weight_ptr, column, mask, column < classes, on, off, PROBABILITIES, HAS_WEIGHT
        )
        mass = tl.sum(share, 1)
        cost = tl.sum(tl.where(mask, share * (base[:, None] - x), 0.0), 1)
    if STATS:
        key = row_code.keys(raw, mask, logit_scale)
        found = tl.where(key == tl.max(key, 1)[:, None], column, row_code.NO_COLUMN)
        best = tl.min(found, 1)
    row_code.finish(
        row,
        mask_m,
        top,
        total,
        cost,
        mass,
        logit,
        best,
        target,
        weight_ptr,
        losses_ptr,
        lse_ptr,
        log_prob_ptr,
        best_ptr,
        rows,
        classes,
        ignore_index,
        on,
        z_loss,
        PROBABILITIES,
        SHARED,
        HAS_WEIGHT,
        STATS,
        SPREAD,
    )


@triton.jit(do_not_specialize=[*plan.NUMBERS, "classes", "stride", "part_classes", "parts"])
def _forward_rows_kernel(
    x_ptr,  # [rows, classes]
    target_ptr,  # [rows], or [rows, classes] with PROBABILITIES
    weight_ptr,  # [classes]
    states_ptr,  # [2, rows, parts, 2] float32: (top, total), (cost, mass)
    ranks_ptr,  # [rows, parts, 2] int32: key and column of the best
    rows,
    classes,
    stride,
    part_classes,
    parts,
    ignore_index,
    on,
    off,
    z_loss,
    softcap,
    logit_scale,
    VEC: tl.constexpr,
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * part_classes
    count = tl.minimum(part_classes, classes - begin)
    start = row * stride + begin
    first, head, body = row_code.pieces(start, count, VEC)
    q_start = row * classes + begin

    # The ends of the row make the first state; the threads' own follow.
    end_column, end_mask = row_code.ends(head, body, count, VEC)
    end_raw = tl.load(x_ptr + start + end_column, mask=end_mask, other=0.0)
    end_x = tl.where(
        end_mask, row_code.logits(end_raw, softcap, logit_scale, SOFTCAP), float("-inf")
    )
    end_top = tl.max(end_x, 0)
    end_base = row_code.base_of(end_top)
    end_total = tl.sum(tl.exp(end_x - end_base), 0)
    end_cost, end_mass = 0.0, 0.0
    if SHARED:
        end_share = row_code.shares(
            target_ptr,
            q_start + end_column,
            weight_ptr,
            begin + end_column,
            end_mask,
            on,
            off,
            PROBABILITIES,
            HAS_WEIGHT,
        )
        end_mass = tl.sum(end_share, 0)
        end_cost = tl.sum(tl.where(end_mask, end_share * (end_base - end_x), 0.0), 0)
    if STATS:
        end_keys = row_code.keys(end_raw, end_mask, logit_scale)
        end_key = tl.max(end_keys, 0)
        end_best = tl.min(tl.where(end_keys == end_key, end_column, row_code.NO_COLUMN), 0)

    top = tl.full([THREADS], float("-inf"), tl.float32)
    total = tl.zeros([THREADS], tl.float32)
    cost = tl.zeros([THREADS], tl.float32)
    mass = tl.zeros([THREADS], tl.float32)
    best_key = tl.full([THREADS], row_code.NO_KEY, tl.int32)
    best = tl.full([THREADS], row_code.NO_COLUMN, tl.int32)
    step = row_code.vectors(UNROLL, THREADS, VEC)  # [UNROLL, THREADS, VEC]
    for block in range(0, body, UNROLL * THREADS * VEC):
        place = block + step
        mask = place < body
        raw = tl.load(x_ptr + first + place, mask=mask, other=0.0)
        x = tl.where(mask, row_code.logits(raw, softcap, logit_scale, SOFTCAP), float("-inf"))
        before, base_before = top, row_code.base_of(top)
        top = tl.maximum(top, tl.max(tl.max(x, 2), 0))
        base = row_code.base_of(top)
        terms = tl.exp(x - base[None, :, None])
        total = total * tl.exp(before - base) + tl.sum(tl.sum(terms, 2), 0)
        if SHARED:
            column = head + place
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
            terms = tl.where(mask, share * (base[None, :, None] - x), 0.0)
            cost += mass * (base - base_before) + tl.sum(tl.sum(terms, 2), 0)
            mass += tl.sum(tl.sum(share, 2), 0)
        if STATS:
            key = row_code.keys(raw, mask, logit_scale)
            block_key = tl.max(tl.max(key, 2), 0)
            found = tl.where(key == block_key[None, :, None], head + place, row_code.NO_COLUMN)
            better = block_key > best_key  # not where equal: the first counts
            best = tl.where(better, tl.min(tl.min(found, 2), 0), best)
            best_key = tl.maximum(best_key, block_key)

    all_top = tl.maximum(tl.max(top, 0), end_top)
    base = row_code.base_of(all_top)
    all_total = tl.sum(total * tl.exp(top - base), 0) + end_total * tl.exp(end_top - base)
    place = (row * parts + tl.program_id(1)) * 2
    tl.store(states_ptr + place, all_top)
    tl.store(states_ptr + place + 1, all_total)
    if SHARED:
        end_cost += end_mass * (base - end_base)
        all_cost = tl.sum(cost + mass * (base - row_code.base_of(top)), 0) + end_cost
        place_of_costs = place + rows.to(tl.int64) * parts * 2
        tl.store(states_ptr + place_of_costs, all_cost)
        tl.store(states_ptr + place_of_costs + 1, tl.sum(mass, 0) + end_mass)
    if STATS:
        all_key = tl.maximum(tl.max(best_key, 0), end_key)
        all_best = tl.min(tl.where(best_key == all_key, best, row_code.NO_COLUMN), 0)
        all_best = tl.minimum(all_best, tl.where(end_key == all_key, end_best, row_code.NO_COLUMN))
        tl.store(ranks_ptr + place, all_key)
        tl.store(ranks_ptr + place + 1, begin + all_best)


def unsupported(input: Tensor, target: Tensor, weight: Tensor | None, *_: object) -> str | None:
    """None where these kernels accept the call, else one sentence saying why not."""
    reason = _triton.unsupported(_forward_tile_kernel, input, target, weight)
    return reason or plan.refusal(input, target)


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """losses [N], lse [2, N], and with `stats` log_prob [N] (indices only) and best [N]."""
    rows, classes = input.shape
    probabilities = target.is_floating_point()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=input.device)

    losses, lse = new(rows), new(2, rows)
    log_prob = new(rows) if stats and not probabilities else None
    best = new(rows, dtype=torch.int64) if stats else None
    results = losses, lse, log_prob, best
    if rows == 0:
        return results
    target, weight = target.contiguous(), plan.contiguous_weight(weight)
    numbers = plan.numbers(classes, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    flags = plan.flags(target, weight, label_smoothing, softcap) | {"STATS": stats}
    stride = input.stride(0)
    with _triton.device_of(input):
        tile = plan.tile(input, stride)
        if tile is not None:
            _forward_tile_kernel[(triton.cdiv(rows, tile.block_m),)](
                input,
                target,
                weight,
                *results,
                rows,
                classes // tile.vec,
                stride // tile.vec,
                *numbers,
                **flags,
                **tile.constants(),
                **_triton.LAUNCH,
            )
            return results
        sweep = plan.sweep(input)
        states = new(2, rows, sweep.parts, 2)
        ranks = new(rows, sweep.parts, 2, dtype=torch.int32) if stats else None
        _forward_rows_kernel[(rows, sweep.parts)](
            input,
            target,
            weight,
            states,
            ranks,
            rows,
            classes,
            stride,
            sweep.part_classes,
            sweep.parts,
            *numbers,
            **flags,
            **sweep.constants(),
            **_triton.LAUNCH,
        )
        merge(input, target, weight, states, ranks, results, classes, stride, numbers, flags)
    return results
