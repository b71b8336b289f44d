"""The planted kernels' families: how each kernel is called, and what it should compute."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ptx.executor import Launch
from tests.ptx.planted_bugs import launch


@dataclass(frozen=True)
class Result:
    launched: Launch
    error: float  # largest, over 1 + the size of the right value; nan where nothing was written
    tolerance: float

    @property
    def right(self) -> bool:
        return self.error <= self.tolerance


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return ((found.double() - right).abs() / (1 + right.abs())).max().item()


# ---- the families: how each kernel is called, and what it should compute -------------------------
def layer_norm(kernel: str, schedule: int, cols: int = 500) -> Result:
    x = torch.randn(6, cols, generator=torch.Generator().manual_seed(1))
    y = torch.full_like(x, math.nan)
    args = (y, x, cols)
    launched = launch(
        "layer_norm.cu",
        "sm_80",
        kernel,
        (6, 1, 1),
        (128, 1, 1),
        *args,
        unwritten=(y,),
        schedule=schedule,
    )
    return Result(launched, error(y, F.layer_norm(x.double(), (cols,))), 1e-5)


def gemm(kernel: str, schedule: int, M: int = 40, N: int = 63, K: int = 128) -> Result:
    generator = torch.Generator().manual_seed(2)
    if "s8" in kernel:
        shapes = (M, K), (N, K)
        a, b = (torch.randint(-128, 128, n, generator=generator).to(torch.int8) for n in shapes)
        c, row_bytes = torch.zeros(M, N, dtype=torch.int32), K
    else:
        a, b = (torch.randn(n, K, generator=generator).bfloat16() for n in (M, N))
        c, row_bytes = torch.full((M, N), math.nan), 2 * K
    grid = (-(-N // 64), -(-M // 64), 1)
    launched = launch(
        "gemm.cu",
        "sm_80",
        kernel,
        grid,
        (128, 1, 1),
        *(c, a, b, M, N, row_bytes),
        unwritten=(c,),
        schedule=schedule,
    )
    return Result(launched, error(c, a.double() @ b.double().t()), 1e-5)


def attention(kernel: str, schedule: int, length: int = 150) -> Result:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(length, 64, generator=generator).bfloat16() for _ in "qkv")
    o = torch.full_like(q, math.nan)
    launched = launch(
        "attention.cu",
        "sm_80",
        kernel,
        (-(-length // 64), 1, 1),
        (128, 1, 1),
        *(o, q, k, v, length, 0.125 * math.log2(math.e)),
        unwritten=(o,),
        schedule=schedule,
    )
    right = F.scaled_dot_product_attention(*(t.double()[None] for t in (q, k, v)), is_causal=True)
    return Result(launched, error(o, right[0]), 1e-2)


def thirds(*values: float) -> torch.Tensor:
    return torch.tensor(values).repeat_interleave(128)


T = torch.arange(128.0)
LOWER_HALF = torch.cat([torch.arange(16).bitwise_xor(8), torch.arange(16, 32)])
# kernel -> (blocks, threads, words of y, their values before (None: not written), words expected)
PAIRS = {
    "named_barrier_of_own_warps": (1, 128, None, torch.arange(128).bitwise_xor(32)),
    "named_barrier_of_other_warps": (1, 128, None, torch.arange(128).bitwise_xor(64)),
    "explicit_warp_synchrony": (1, 128, None, torch.arange(128).bitwise_xor(1)),
    "implicit_warp_synchrony": (1, 128, None, torch.arange(128).bitwise_xor(1)),
    "barrier_of_the_living": (1, 128, None, 63 - torch.arange(64)),
    "barrier_for_ever": (1, 128, None, 63 - torch.arange(64)),
    "mask_of_callers": (1, 32, None, LOWER_HALF),
    "mask_too_wide": (1, 32, None, LOWER_HALF),
    "inactive_lane": (1, 32, None, torch.arange(32)),
    "atomic_alone": (4, 128, 1.0, torch.tensor([513.0])),
    "atomic_and_plain": (1, 128, 1.0, torch.tensor([129.0])),
    "reads_own_block": (2, 128, 1.0, torch.full((512,), 2.0)),
    "reads_other_block": (2, 128, 1.0, torch.full((512,), 2.0)),
    "adds_to_own_row": (2, 128, 1.0, 1 + torch.arange(4).eq(1).repeat_interleave(128).float()),
    "adds_to_other_row": (2, 128, 1.0, torch.ones(512)),
    "shared_in_bounds": (1, 128, None, T),
    "shared_overrun": (1, 128, None, T),
    "initialised_write": (1, 128, None, torch.ones(128)),
    "uninitialised_read": (1, 128, None, torch.ones(128)),
    "local_in_bounds": (1, 128, None, T * (T % 8)),
    "local_overrun": (1, 128, None, T * (T % 8 + 1)),
    "read_only_load": (1, 128, 1.0, thirds(2.0, 1.0, 1.0)),
    "read_only_load_of_written": (1, 128, 1.0, thirds(2.0, 1.0, 2.0)),
}


def pairs(kernel: str, schedule: int) -> Result:
    blocks, threads, before, right = PAIRS[kernel]
    y = torch.full((right.numel(),), math.nan if before is None else before)
    launched = launch(
        "pairs.cu",
        "sm_80",
        kernel,
        (blocks, 1, 1),
        (threads, 1, 1),
        y,
        shared=threads * 4 if "shared" in kernel else 0,
        unwritten=(y,) if before is None else (),
        schedule=schedule,
    )
    return Result(launched, error(y, right.double()), 0.0)


def asynchronous(kernel: str, schedule: int) -> Result:
    generator = torch.Generator().manual_seed(4)
    if "wgmma" in kernel:
        x = torch.randn(2, 72, 16, generator=generator).bfloat16()
        right = sum(part[:64] @ part[64:].t() for part in x.double())
    elif "bulk" in kernel:
        x = torch.randn(128, generator=generator)
        right = 2 * x.double()
    else:
        x, right = torch.zeros(1), T.double() % 32
    y = torch.full(right.shape, math.nan)
    launched = launch(
        "asynchronous.cu",
        "sm_90a",
        kernel,
        (1, 1, 1),
        (128, 1, 1),
        *(y, x),
        unwritten=(y,),
        schedule=schedule,
    )
    return Result(launched, error(y, right), 1e-5)


FAMILIES = {
    "layer_norm": layer_norm,
    "gemm": gemm,
    "attention": attention,
    "pairs": pairs,
    "asynchronous": asynchronous,
}
