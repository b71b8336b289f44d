"""torch.compile's own Triton kernels on the executor, and the time model that ranks kernels."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F

import ptx
from ptx import model, occupancy
from ptx.gpu import A100, B200, H100, gpu_of
from tests.tolerance import assert_as_exact_as_torch

triton = pytest.importorskip("triton")
from tests.ptx import driver_kernels as kernels  # noqa: E402


def compiled_layer_norm(arch, x, weight, bias, dy):
    """The launches of forward and backward, and y and all gradients."""
    from ptx import inductor  # torch's compiler: seconds for every process that collects tests

    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    with ptx.run(arch) as session, inductor.installed(session):
        y = torch.compile(lambda *t: F.layer_norm(t[0], weight.shape, *t[1:]), dynamic=False)(
            *leaves
        )
        return session.launches, [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_compiled_layer_norm(arch):
    x, dy = (torch.randn(37, 1024).bfloat16() for _ in range(2))
    weight, bias = torch.randn(1024).bfloat16(), torch.randn(1024).bfloat16()
    launches, got = compiled_layer_norm(arch, x, weight, bias, dy)

    def by_torch(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = F.layer_norm(leaves[0], weight.shape, *leaves[1:])
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    names = ["y", "dx", "dweight", "dbias"]
    assert_as_exact_as_torch(got, by_torch(x.dtype), by_torch(torch.float64), names)
    assert len(launches) >= 2
    assert all(launch.name.startswith("triton_") for launch in launches)
    # As on a GPU it loads vectors: inputs are known to be aligned.
    assert re.search(r"ld\.global(\.\w+|::\w+)*\.v[24]\.b32", launches[0].ptx.read_text())


def test_what_was_replaced_in_inductor_is_put_back():
    from torch._inductor.runtime import hints, triton_heuristics

    from ptx import inductor

    before = vars(hints.DeviceProperties)["create"], triton_heuristics.CachingAutotuner.bench
    with ptx.run("sm_80") as session, inductor.installed(session):
        assert vars(hints.DeviceProperties)["create"] is not before[0]
    assert vars(hints.DeviceProperties)["create"] is before[0]
    assert triton_heuristics.CachingAutotuner.bench is before[1]


@pytest.fixture(scope="module")
def launch():
    n = 1 << 16
    with ptx.run("sm_80", machine_code=True) as session:
        x, out = torch.randn(n), torch.empty(n)
        kernels.add[(n // 1024,)](x, x, out, n, BLOCK=1024)
    return session.launches[0]


def test_the_model_finds_what_bounds_a_copy(launch):
    on_a100, on_h100 = (model.estimate(launch, gpu, launch.code) for gpu in (A100, H100))
    assert model.START_US < on_h100.microseconds < on_a100.microseconds
    slow_dram = dataclasses.replace(A100.speed, dram_bytes_per_us=1e3)
    slow = model.estimate(launch, dataclasses.replace(A100, speed=slow_dram), launch.code)
    assert slow.bound == "dram"
    moved = launch.least_bytes / (1e3 * model.DRAM_SHARE)
    assert slow.microseconds == pytest.approx(moved + model.START_US, rel=0.01)


def test_the_model_refuses_what_it_cannot_tell(launch):
    with pytest.raises(ValueError, match="B200 is not modelled"):
        model.estimate(launch, B200, launch.code)
    part = dataclasses.replace(launch, counts={**launch.counts, "blocks_run": 3})
    with pytest.raises(ValueError, match="3 of 64 blocks"):
        model.estimate(part, A100, launch.code)
    assert model.table([["add", 1.0]], ["kernel", "µs"]).startswith("model, not measured\n")


def test_code_that_ptxas_made(launch):
    assert launch.code.registers > 0
    assert launch.code.stack == 0
    assert launch.code.opcodes["LDG"] >= 2
    assert launch.code.opcodes["STG"] >= 1


def test_gpus_are_found_by_architecture():
    assert gpu_of("sm_80") is A100
    assert gpu_of("sm_90a") is H100
    with pytest.raises(ValueError, match=r"sm_75.*sm_80 \(A100\)"):
        gpu_of("sm_75")
    # 130 registers leave room for 3 blocks of 128 threads, 128 registers for 4.
    assert [occupancy.blocks("90a", 128, count, 40960) for count in (128, 130)] == [4, 3]
    assert occupancy.blocks("80", 1024, 64, 0) == 1
    assert occupancy.blocks("90a", 32, 16, 100 * 1024) == 2
