"""The Triton layer norm's compiled code on the executor: values, gradients, and no report at all.

How lengths are swept: a kernel is compiled anew for each power of two that holds a row (BLOCK_N),
each number of elements per vector (VEC: 1, 2, 4 or 8, by the length's factors of two) and each set
of dtypes.  Within one such kernel only masks depend on the length.  So every residue mod 64 is run
where rows are held (65 to 128) and where they are swept (16385 to 16448), and each BLOCK_N runs at
its first length, its last and the one before: both sides of every switch.  Dtypes, architectures
and schedulers take turns over these.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import ptx
from kernels import dispatch
from kernels.layer_norm import layer_norm
from tests.layer_norm.test_layer_norm import check
from tests.ptx.layer_norm_sums import SHORTEST, check_sums

pytest.importorskip("triton")
from kernels.layer_norm import triton as forward_module
from kernels.layer_norm import triton_backward as backward_module

ARCHS = ("sm_80", "sm_90a")
SCHEDULES = ("round_robin", "reverse", "random")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TURNS = list(zip(itertools.cycle(ARCHS), itertools.cycle(SCHEDULES), range(6)))


def run(
    arch: str,
    schedule: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
) -> set[str]:
    """Checks y and all gradients of one call; the names of the kernels it launched.

    One multiprocessor: the persistent programs are few and walk over several tiles.
    """
    x, dy = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype)
    weight = torch.randn(cols).to(weight_dtype or dtype)
    bias = torch.randn(cols).to(bias_dtype or weight_dtype or dtype)
    options = {"schedule": schedule, "seed": cols, "multiprocessors": 1}
    with ptx.run(arch, **options) as session, dispatch.use("triton"):
        check(x, (cols,), weight, bias, dy)
        if cols >= SHORTEST:
            check_sums(rows, cols, dtype, weight_dtype or dtype)
    return {launch.name for launch in session.launches}


@pytest.fixture
def fused_from_few_rows(monkeypatch):
    """dx and the sums in one kernel, as for many rows, at the cost of few."""
    monkeypatch.setattr(backward_module, "_fused", lambda rows, cols: cols <= 8192)


# ---- every residue mod 64


@pytest.mark.parametrize("vec", [1, 2, 4, 8])
@pytest.mark.parametrize(("arch", "dtype"), [("sm_80", DTYPES[0]), ("sm_90a", DTYPES[2])], ids=str)
def test_every_length_of_rows_that_are_held(arch, dtype, vec):
    lengths = [cols for cols in range(65, 129) if min(cols & -cols, 8) == vec]
    for cols, schedule in zip(lengths, itertools.cycle(SCHEDULES)):
        names = run(arch, schedule, 150, cols, dtype)
        assert names == {"_forward_kernel", "_backward_kernel", "_sum_shares_kernel"}


@pytest.mark.parametrize("vec", [1, 2, 4, 8])
def test_every_length_of_rows_that_are_swept(vec):
    arch, dtype = ARCHS[vec > 2], DTYPES[vec % 3]
    lengths = [cols for cols in range(16385, 16449) if min(cols & -cols, 8) == vec]
    for cols, schedule in zip(lengths, itertools.cycle(SCHEDULES)):
        names = run(arch, schedule, 1, cols, dtype)
        assert names == {"_forward_long_kernel", "_backward_long_kernel", "_sum_rows_kernel"}


# ---- both sides of every switch


@pytest.mark.parametrize("tier", range(len(forward_module.TILES)))
def test_around_every_switch_of_tiles(fused_from_few_rows, tier):
    last = forward_module.TILES[tier][0]
    arch, dtype = ARCHS[tier % 2], DTYPES[tier % 3]
    rows = 150 if last <= 128 else 19 if last <= 1024 else 9
    for cols, schedule in zip((last // 2 + 1, last - 1, last), SCHEDULES, strict=True):
        run(arch, schedule, rows, cols, dtype)


@pytest.mark.parametrize("arch", ARCHS)
def test_dx_alone_and_sums_alone(arch):
    """Few rows: two kernels.  Without dx: sums over shares of the rows."""
    for (rows, cols), schedule in zip([(3, 192), (3, 1000), (2, 16384)], SCHEDULES, strict=True):
        names = run(arch, schedule, rows, cols, torch.bfloat16)
        assert names == {"_forward_kernel", "_backward_kernel", "_sum_rows_kernel"}
    x, dy = torch.randn(200, 40), torch.randn(200, 40)
    weight = torch.randn(40, requires_grad=True)
    with ptx.run(arch, multiprocessors=1) as session, dispatch.use("triton"):
        (dweight,) = torch.autograd.grad(layer_norm(x, (40,), weight), weight, dy)
    exact = torch.nn.functional.layer_norm(x.double(), (40,))
    torch.testing.assert_close(dweight.double(), (exact * dy).sum(0), rtol=1e-5, atol=1e-5)
    names = [launch.name for launch in session.launches]
    assert names == ["_forward_kernel", "_sum_rows_kernel", "_sum_shares_kernel"]


# ---- dtypes and absent parameters

MIXES = [
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.float16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_mixed_dtypes(mix):
    turn = TURNS[MIXES.index(mix)]
    run(*turn[:2], 33, 72, *mix)


@pytest.mark.parametrize(("with_weight", "with_bias"), [(1, 0), (0, 1), (0, 0)])
def test_absent_parameters(with_weight, with_bias):
    arch, schedule, _ = TURNS[2 * with_weight + with_bias]
    x, dy = torch.randn(33, 72).bfloat16(), torch.randn(33, 72).bfloat16()
    weight, bias = torch.randn(72).bfloat16(), torch.randn(72).bfloat16()
    with ptx.run(arch, schedule=schedule), dispatch.use("triton"):
        check(x, (72,), weight if with_weight else None, bias if with_bias else None, dy)
