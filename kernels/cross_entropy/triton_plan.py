"""How the Triton kernels of cross-entropy are launched: which kernel, tiles, parts, constants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import _triton

MAX_CLASSES = 2**30  # columns are 32-bit numbers inside a row
TILE_CLASSES = 1024  # longer rows are swept
SWEEP_ELEMENTS = 16  # of a thread and a step
WARP_CLASSES = 2048  # of a swept row, for each of up to 8 warps
PART_STEPS = 2  # the least that a program takes of a row which several share
ROW_PROGRAMS = 2  # of swept rows, that a multiprocessor holds at least
MAX_PARTS = 1024

# (largest classes, BLOCK_M, num_warps): up to 32 logits per thread, and no fewer threads than rows.
TILES = (
    (32, 32, 1),
    (64, 16, 1),
    (128, 8, 1),
    (256, 4, 1),
    (512, 4, 2),
    (TILE_CLASSES, 4, 4),
)
# Rows that are moved as one span: 16 logits per thread, as changing places takes registers; several
# warps, which make it go through shared memory; and 8 rows, so that spans start with a vector.
SPANS = (
    (32, 64, 2),
    (64, 32, 4),
    (128, 16, 4),
    (256, 8, 4),
    (512, 8, 8),
    (TILE_CLASSES, 8, 8),  # 16 warps leave a thread 128 registers, and 64 bytes spill
)
SECTOR = 32  # bytes: the unit in which global memory moves

# Arguments that are no reason to compile again.
NUMBERS = ("rows", "ignore_index", "on", "off", "z_loss", "softcap", "logit_scale")


@dataclass(frozen=True)
class Tile:
    """Whole rows in registers: BLOCK_M of them, loaded by vectors of `vec` elements.

    With `span` rows lie one after the other and are moved as one span of memory.
    """

    vec: int
    block_m: int
    block_n: int
    num_warps: int
    span: bool
    spread: int  # threads for each row

    def constants(self) -> dict[str, int]:
        return {
            "VEC": self.vec,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "SPAN": self.span,
            "SPREAD": self.spread,
            "num_warps": self.num_warps,
        }


@dataclass(frozen=True)
class Sweep:
    """Rows of which a program takes `part_classes` columns, a step at a time."""

    vec: int
    unroll: int
    threads: int
    num_warps: int
    parts: int
    part_classes: int

    def constants(self) -> dict[str, int]:
        return {
            "VEC": self.vec,
            "UNROLL": self.unroll,
            "THREADS": self.threads,
            "num_warps": self.num_warps,
        }


def refusal(input: Tensor, target: Tensor) -> str | None:
    if input.shape[1] > MAX_CLASSES:
        return f"input has {input.shape[1]} classes, more than {MAX_CLASSES}"
    if target.requires_grad:
        return "target requires a gradient"
    if target.is_floating_point() and target.dtype not in (input.dtype, torch.float32):
        return f"target is {target.dtype}; accepted are int64, float32 and input's {input.dtype}"
    return None


def contiguous_weight(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.to(torch.float32).contiguous()


def tile(input: Tensor, *strides: int) -> Tile | None:
    """The tile for short rows, whose starts are `strides` elements apart; None for long ones."""
    classes = input.shape[1]
    if classes > TILE_CLASSES:
        return None
    block_n = triton.next_power_of_2(classes)
    partial = classes != block_n and classes * input.element_size() % SECTOR != 0
    span = partial and all(stride == classes for stride in strides)
    if span:
        vec = 1
        block_m, num_warps = next(row[1:] for row in SPANS if classes <= row[0])
    else:
        vec = _triton.vector(math.gcd(classes, *strides))
        block_m, num_warps = _triton.tile(TILES, input, classes, vec)
    spread = max(1, num_warps * _triton.warp_size(input) // block_m)
    return Tile(vec, block_m, block_n, num_warps, span, spread)


def sweep(input: Tensor) -> Sweep:
    rows, classes = input.shape
    num_warps = min(8, max(1, triton.next_power_of_2(classes) // WARP_CLASSES))
    threads = num_warps * _triton.warp_size(input)
    vec = 16 // input.element_size()
    step = threads * SWEEP_ELEMENTS
    wanted = triton.cdiv(ROW_PROGRAMS * _triton.multiprocessors(input), rows)
    most = max(1, min(MAX_PARTS, classes // (PART_STEPS * step)))
    part_classes = triton.cdiv(triton.cdiv(classes, min(wanted, most)), step) * step
    parts = triton.cdiv(classes, part_classes)
    return Sweep(vec, SWEEP_ELEMENTS // vec, threads, num_warps, parts, part_classes)


def numbers(
    classes: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> tuple[float, ...]:
    """ignore_index, on, off, z_loss, softcap, logit_scale."""
    on, off = 1 - label_smoothing, label_smoothing / classes
    return ignore_index, on, off, z_loss, softcap, logit_scale


def flags(
    target: Tensor, weight: Tensor | None, label_smoothing: float, softcap: float
) -> dict[str, Any]:
    probabilities = target.is_floating_point()
    return {
        "PROBABILITIES": probabilities,
        "SHARED": probabilities or label_smoothing != 0,
        "HAS_WEIGHT": weight is not None,
        "SOFTCAP": softcap != 0,
    }
