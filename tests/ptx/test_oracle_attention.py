"""Triton's causal attention on the executor: chained matrix products, forward and backward.

Triton is a production compiler: numbers must be right, and any report would be a false alarm.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import ptx
from tests.tolerance import assert_as_exact_as_torch

triton = pytest.importorskip("triton")
from tests.ptx import oracle_kernels as kernels  # noqa: E402

SCHEDULES = ("round_robin", "reverse", "random")
HEADS, D, BLOCK = 2, 64, 64
SOFTMAX_SCALE = D**-0.5
SCALE = SOFTMAX_SCALE * math.log2(math.e)  # the kernels take powers of two
TILES = {"D": D, "BLOCK_M": BLOCK, "BLOCK_N": BLOCK}


def by_torch(tensors, do, dtype) -> list[torch.Tensor]:
    """o, dq, dk, dv computed in `dtype`."""
    q, k, v = (t.to(dtype).requires_grad_() for t in tensors)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), do.to(dtype))]


def by_triton(q, k, v, do) -> list[torch.Tensor]:
    T = q.shape[1]
    grid = (triton.cdiv(T, BLOCK), HEADS)
    o, dq, dk, dv = (torch.empty_like(q) for _ in range(4))
    lse, delta = torch.empty(HEADS, T), torch.empty(HEADS, T)
    kernels.attention_forward[grid](q, k, v, o, lse, T, SCALE, **TILES, num_stages=2)
    rows = HEADS * T
    kernels.attention_delta[(triton.cdiv(rows, 64),)](o, do, delta, rows, D=D, BLOCK_M=64)
    kernels.attention_backward_dkv[grid](
        q, k, v, do, lse, delta, dk, dv, T, SCALE, SOFTMAX_SCALE, **TILES, num_stages=2
    )
    kernels.attention_backward_dq[grid](
        q, k, v, do, lse, delta, dq, T, SCALE, SOFTMAX_SCALE, **TILES, num_stages=2
    )
    return [o, dq, dk, dv]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("sm_80", torch.bfloat16),
        ("sm_90a", torch.float16),
        pytest.param("sm_80", torch.float16, marks=pytest.mark.sweep),
        pytest.param("sm_90a", torch.bfloat16, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_forward_and_backward(arch, dtype):
    # One query, a tile, one more than it, and two and a ragged one.
    for T, schedule in zip((1, 64, 65, 200), itertools.cycle(SCHEDULES)):
        q, k, v, do = (torch.randn(HEADS, T, D).to(dtype) for _ in range(4))
        with ptx.run(arch, schedule=schedule):
            got = by_triton(q, k, v, do)
        exact = by_torch((q, k, v), do, torch.float64)
        # Of a row with one key, dq and dk are differences of equal numbers: measure by the terms.
        terms = [0.0, *[(do.abs().max() * v.abs().max()).item()] * 2, 0.0]
        names = [f"{name} T={T}" for name in ("o", "dq", "dk", "dv")]
        assert_as_exact_as_torch(got, by_torch((q, k, v), do, dtype), exact, names, terms)


@pytest.mark.parametrize(("block_m", "warp_specialize"), [(64, False), (128, True)])
def test_forward_with_descriptors(block_m, warp_specialize):
    """By TMA; and with one warp group that copies and two that multiply half of the rows each."""
    for T, schedule in zip((128, 256, 384), SCHEDULES, strict=True):
        q, k, v = (torch.randn(HEADS, T, D, dtype=torch.bfloat16) for _ in range(3))
        o = torch.empty_like(q)
        tiles = {**TILES, "BLOCK_M": block_m, "WARP_SPECIALIZE": warp_specialize}
        with ptx.run("sm_90a", schedule=schedule):
            kernels.attention_forward_descriptors[(T // block_m, HEADS)](
                q, k, v, o, HEADS * T, T, SCALE, **tiles, num_stages=2
            )
        exact = by_torch((q, k, v), q, torch.float64)[:1]
        assert_as_exact_as_torch([o], by_torch((q, k, v), q, q.dtype)[:1], exact, [f"o T={T}"])
