"""Triton's matrix products on the executor: mma.sync, wgmma, cp.async, TMA and warp specialisation.

Triton is a production compiler: numbers must be right, and any report would be a false alarm.
Sizes are ragged in every dimension, and each one runs under another scheduler.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import ptx
from tests.tolerance import assert_as_exact_as_torch

triton = pytest.importorskip("triton")
tl = triton.language
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from tests.ptx import oracle_kernels as kernels  # noqa: E402

ARCHS = ("sm_80", "sm_90a")
SCHEDULES = ("round_robin", "reverse", "random")
BLOCK = 64

# name -> dtype of the inputs, accumulator, dtype of the result, columns of a tile
KINDS = {
    "bf16": (torch.bfloat16, tl.float32, torch.bfloat16, 32),
    "fp16": (torch.float16, tl.float32, torch.float16, 32),
    "tf32": (torch.float32, tl.float32, torch.float32, 32),
    "s8": (torch.int8, tl.int32, torch.int32, 64),
    "fp8": (torch.float8_e4m3fn, tl.float32, torch.float32, 64),
}
# M, N, K: exactly one tile, one element past it or short of it, one row or column; with fewer and
# more steps than the pipeline has stages.
SIZES = [(64, 64, 128), (65, 63, 80), (1, 130, 16), (130, 1, 208)]
ODD_SIZES = [(64, 64, 65), (33, 70, 37)]  # nothing is aligned: loads of one element
# TMA wants rows of multiples of 16 bytes, whatever the element.
TMA_SIZES = [(64, 64, 128), (65, 68, 80), (1, 132, 16), (130, 4, 208)]


def inputs(kind: str, M: int, N: int, K: int):
    """A [M, K], B [N, K] and the empty C, all contiguous."""
    dtype, _, result, _ = KINDS[kind]
    if dtype == torch.int8:
        a, b = (torch.randint(-128, 128, (rows, K), dtype=dtype) for rows in (M, N))
    else:
        # Three bits of mantissa are exact in every format, tf32 and fp8 included.
        a, b = (torch.randn(r, K).to(torch.float8_e4m3fn).float().to(dtype) for r in (M, N))
    return a, b, torch.empty(M, N, dtype=result)


def check(kind: str, a, b, c) -> None:
    if c.dtype == torch.int32:
        assert torch.equal(c.long(), a.long() @ b.long().t())
        return
    exact = a.double() @ b.double().t()
    by_torch = (a.float() @ b.float().t()).to(c.dtype)
    assert_as_exact_as_torch([c], [by_torch], [exact], [f"{kind} {a.shape} {b.shape}"])


def grid(M: int, N: int) -> tuple[int, int]:
    return triton.cdiv(M, BLOCK), triton.cdiv(N, BLOCK)


def run_pointers(arch, kind, size, schedule, k_is_contiguous, **options) -> None:
    _, acc, _, block_k = KINDS[kind]
    M, N, K = size
    a, b, c = inputs(kind, M, N, K)
    b_given = b if k_is_contiguous else b.t().contiguous()
    strides = (1, K) if k_is_contiguous else (N, 1)
    with ptx.run(arch, schedule=schedule, **options):
        kernels.matmul[grid(M, N)](
            a, b_given, c, M, N, K, *strides, BLOCK, BLOCK, block_k, acc, num_stages=3
        )
    check(kind, a, b, c)


@pytest.mark.parametrize(
    ("arch", "kind"),
    [case for case in itertools.product(ARCHS, KINDS) if case != ("sm_80", "fp8")],  # has no fp8
)
def test_pointers(arch, kind):
    for size, schedule in zip(SIZES, itertools.cycle(SCHEDULES)):
        run_pointers(arch, kind, size, schedule, k_is_contiguous=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_odd_rows(arch):
    for size, schedule in zip(ODD_SIZES, itertools.cycle(SCHEDULES)):
        run_pointers(arch, "bf16", size, schedule, k_is_contiguous=True)


@pytest.mark.parametrize("arch", ARCHS)
def test_second_matrix_by_rows(arch):
    """Fragments through ldmatrix.trans on sm_80, a transposed wgmma operand on sm_90."""
    run_pointers(arch, "fp16", (65, 128, 80), "reverse", k_is_contiguous=False)


@pytest.mark.parametrize("options", [{"preempt": 3, "seed": 7}, {"async_early": True}])
@pytest.mark.parametrize("arch", ARCHS)
def test_other_interleavings(arch, options):
    run_pointers(arch, "bf16", (65, 63, 80), "random", k_is_contiguous=True, **options)


def run_device_descriptors(kind, size, schedule, block_m, warp_specialize) -> None:
    _, acc, _, block_k = KINDS[kind]
    M, N, K = size
    a, b, c = inputs(kind, M, N, K)
    c = c.float() if c.is_floating_point() else c
    with ptx.run("sm_90a", schedule=schedule):
        kernels.matmul_device_descriptors[triton.cdiv(M, block_m), triton.cdiv(N, BLOCK)](
            a, b, c, M, N, K, block_m, BLOCK, block_k, acc, warp_specialize, num_stages=3
        )
    check(kind, a, b, c)


@pytest.mark.parametrize("kind", ["bf16", "s8", "fp8"])
def test_descriptors_made_on_the_device(kind):
    for size, schedule in zip(TMA_SIZES, itertools.cycle(SCHEDULES)):
        run_device_descriptors(kind, size, schedule, BLOCK, warp_specialize=False)


def test_specialised_warps():
    """One warp group copies, two multiply half of the rows each: Triton splits 128 rows."""
    for size, schedule in zip(TMA_SIZES, itertools.cycle(SCHEDULES)):
        run_device_descriptors("bf16", size, schedule, 128, warp_specialize=True)


@pytest.mark.parametrize(
    ("arch", "kind"), [("sm_80", "bf16"), ("sm_90a", "bf16"), ("sm_90a", "tf32")]
)
def test_descriptors_made_on_the_host(arch, kind):
    _, acc, _, block_k = KINDS[kind]
    for (M, N, K), schedule in zip(TMA_SIZES, itertools.cycle(SCHEDULES)):
        a, b, c = inputs(kind, M, N, K)
        c = c.float()
        a_desc = TensorDescriptor.from_tensor(a, [BLOCK, block_k])
        b_desc = TensorDescriptor.from_tensor(b, [BLOCK, block_k])
        c_desc = TensorDescriptor.from_tensor(c, [BLOCK, BLOCK])
        with ptx.run(arch, schedule=schedule):
            kernels.matmul_host_descriptors[grid(M, N)](
                a_desc, b_desc, c_desc, K, BLOCK, BLOCK, block_k, acc, num_stages=3
            )
        check(kind, a, b, c)
