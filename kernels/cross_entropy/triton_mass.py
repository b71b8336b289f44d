"""What the shares of each row of probabilities add up to, in Triton: a program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import _triton
from kernels.cross_entropy import triton_plan as plan
from kernels.cross_entropy import triton_row as row_code


@triton.jit(do_not_specialize=["classes", "on", "off"])
def _mass_kernel(
    q_ptr,  # [rows, classes]
    weight_ptr,  # [classes]
    mass_ptr,  # [rows]: sums of w_c (on q_c + off)
    classes,
    on,
    off,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * classes
    first, head, body = row_code.pieces(start, classes, VEC)
    end, end_mask = row_code.ends(head, body, classes, VEC)
    end_share = row_code.shares(
        q_ptr, start + end, weight_ptr, end, end_mask, on, off, True, HAS_WEIGHT
    )
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(0, body, BLOCK):
        place = block + tl.arange(0, BLOCK)
        mask = place < body
        sums += row_code.shares(
            q_ptr, first + place, weight_ptr, head + place, mask, on, off, True, HAS_WEIGHT
        )
    tl.store(mass_ptr + row, tl.sum(end_share, 0) + tl.sum(sums, 0))


def row_mass(target: Tensor, weight: Tensor | None, on: float, off: float) -> Tensor:
    """[N]: what the shares of each row of probabilities add up to."""
    rows, classes = target.shape
    mass = torch.empty(rows, dtype=torch.float32, device=target.device)
    sweep = plan.sweep(target)
    _mass_kernel[(rows,)](
        target,
        weight,
        mass,
        classes,
        on,
        off,
        VEC=sweep.vec,
        BLOCK=sweep.threads * plan.SWEEP_ELEMENTS,
        HAS_WEIGHT=weight is not None,
        num_warps=sweep.num_warps,
        **_triton.LAUNCH,
    )
    return mass
