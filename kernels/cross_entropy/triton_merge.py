"""What the parts of long rows amount to, in Triton: a program takes a block of [rows, parts]."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.cross_entropy import triton_plan as plan
from kernels.cross_entropy import triton_row as row_code

MERGED_STATES = 128  # of a program, with 4 warps


@triton.jit(do_not_specialize=[*plan.NUMBERS, "classes", "stride", "parts"])
def merge_kernel(
    x_ptr,  # [rows, classes], or with PICKED [rows]: the targets' x'
    target_ptr,  # [rows]
    weight_ptr,  # [classes]
    states_ptr,  # [2, rows, parts, 2] float32, (top, total), (cost, mass)
    ranks_ptr,  # [rows, parts, 2] int32
    losses_ptr,  # [rows]
    lse_ptr,  # [2, rows]
    log_prob_ptr,  # [rows]
    best_ptr,  # [rows]
    rows,
    classes,
    stride,
    parts,
    ignore_index,
    on,
    off,
    z_loss,
    softcap,
    logit_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    STATS: tl.constexpr,
    PICKED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < rows
    part = tl.arange(0, BLOCK_PARTS)[None, :]
    mask = mask_m[:, None] & (part < parts)  # [BLOCK_M, BLOCK_PARTS]
    place = (row[:, None] * parts + part) * 2
    tops = tl.load(states_ptr + place, mask=mask, other=float("-inf"))
    totals = tl.load(states_ptr + place + 1, mask=mask, other=0.0)
    top = tl.max(tops, 1)
    base = row_code.base_of(top)[:, None]
    total = tl.sum(totals * tl.exp(tops - base), 1)
    target = row  # this and the next four are not read unless they are set below
    logit, cost, mass, best = top, top, top, top
    if not PROBABILITIES:
        target = tl.load(target_ptr + row, mask=mask_m, other=-1)
        there = (target >= 0) & (target < classes) & (target != ignore_index)
        if PICKED:
            logit = tl.load(x_ptr + row, mask=there, other=0.0)
        else:
            raw = tl.load(x_ptr + row * stride + target, mask=there, other=0.0)
            logit = row_code.logits(raw, softcap, logit_scale, SOFTCAP)
    if SHARED:
        place_of_costs = place + rows.to(tl.int64) * parts * 2
        costs = tl.load(states_ptr + place_of_costs, mask=mask, other=0.0)
        masses = tl.load(states_ptr + place_of_costs + 1, mask=mask, other=0.0)
        cost = tl.sum(costs + masses * (base - row_code.base_of(tops)), 1)
        mass = tl.sum(masses, 1)
    if STATS:
        key = tl.load(ranks_ptr + place, mask=mask, other=row_code.NO_KEY)
        column = tl.load(ranks_ptr + place + 1, mask=mask, other=row_code.NO_COLUMN)
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
        1,
    )


def merge(
    x: Tensor,  # [rows, classes], or [rows]: the targets' logits
    target: Tensor,
    weight: Tensor | None,
    states: Tensor,
    ranks: Tensor | None,
    results: tuple[Tensor | None, ...],
    classes: int,
    stride: int,
    numbers: tuple[float, ...],
    flags: dict[str, Any],
) -> None:
    """Fills losses, lse, log_prob and best, the `results` of a forward, from the parts' states."""
    _, rows, parts, _ = states.shape
    block_parts = triton.next_power_of_2(parts)
    block_m = max(1, MERGED_STATES // block_parts)
    merge_kernel[(triton.cdiv(rows, block_m),)](
        x,
        target,
        weight,
        states,
        ranks,
        *results,
        rows,
        classes,
        stride,
        parts,
        *numbers,
        **flags,
        PICKED=x.dim() == 1,
        BLOCK_M=block_m,
        BLOCK_PARTS=block_parts,
        num_warps=4,
        **_triton.LAUNCH,
    )
