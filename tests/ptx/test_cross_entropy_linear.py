"""Linear + cross-entropy without logits, Triton, on the executor: numbers, gradients, no report.

Tiles are 128 by 64 to 256, features 32 or 64 at a time.  The sizes leave a remainder in each
of the three, or fill them; few multiprocessors make one part of all classes, many cut them up.
A kernel is compiled anew for each dtype, set of options and vector length of the features.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import ptx
from kernels import dispatch
from kernels.cross_entropy import linear_cross_entropy
from tests.cross_entropy.linear_cases import EVERYTHING, PLAIN, Case, check, make_problem
from tests.ptx.conftest import SCHEDULES
from tests.tolerance import assert_as_exact_as_torch

pytest.importorskip("triton")
from kernels.cross_entropy import triton_linear

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

ALL_OPTIONS = Case(EVERYTHING, bias=True, weighted=True, dlse=True)
SIZES = [(70, 140, 72), (131, 97, 136), (3, 300, 8)]  # rows, classes, features


def run(arch: str, dtype: torch.dtype, case: Case, sizes: list[tuple[int, int, int]]) -> None:
    for turn, size in enumerate(sizes):
        options = {"schedule": SCHEDULES[turn % 3], "seed": turn, "multiprocessors": 1 + turn % 2}
        with ptx.run(arch, **options):
            check(triton_linear, make_problem(*size, dtype, case), case)


@pytest.mark.parametrize(
    ("arch", "dtype", "case"),
    [
        ("sm_80", torch.bfloat16, ALL_OPTIONS),
        ("sm_90a", torch.float16, Case()),  # warp group instructions
    ],
    ids=str,
)
def test_ragged_sizes(arch, dtype, case):
    run(arch, dtype, case, SIZES)


def test_every_class_of_a_tile_and_logits_of_any_size():
    """Where the last class is each of a thread's; both formulas of tanh; a best class that is the
    smallest; targets out of range."""
    scaled = ALL_OPTIONS.options._replace(logit_scale=-4.0)
    with ptx.run("sm_80", multiprocessors=1):
        for classes in (*range(65, 97), 128):
            case = Case(scaled if classes % 2 else EVERYTHING, bias=True, weighted=True, dlse=True)
            rows = 131 if classes in (65, 95, 128) else 3
            problem = make_problem(rows, classes, 8, torch.bfloat16, case)
            if classes == 128:
                problem.target[:100], problem.target[100] = -1, classes
            check(triton_linear, problem, case)


def test_the_public_function():
    x, w = torch.randn(70, 72).bfloat16(), (torch.randn(140, 72) / 8).bfloat16()
    target = torch.randint(0, 140, (70,))
    target[5] = -100

    def results(function, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, w)]
        loss = function(*leaves, target)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def stored(x, w, target):
        return F.cross_entropy(F.linear(x, w), target)

    with ptx.run("sm_80") as session, dispatch.use("triton"):
        found = results(linear_cross_entropy, torch.bfloat16)
    names = {launch.name for launch in session.launches}
    assert names == {"_linear_forward_kernel", "merge_kernel", "_linear_gradient_kernel"}
    torchs, exact = results(stored, torch.bfloat16), results(stored, torch.float64)
    assert_as_exact_as_torch(found, torchs, exact, ("loss", "dinput", "dlinear_weight"))


CASES = [
    Case(),
    ALL_OPTIONS,
    Case(bias=True),
    Case(PLAIN._replace(label_smoothing=0.2)),
    Case(PLAIN._replace(softcap=3.0)),
    Case(PLAIN._replace(stats=True, ignore_index=7)),
    Case(PLAIN._replace(z_loss=1e-2), weighted=True),
    Case(dlse=True),
]


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*itertools.product(("sm_80", "sm_90a"), (torch.bfloat16, torch.float16))],
    ids=str,
)
def test_everything_with_everything(arch, dtype, case):
    exact = [(128, 256, 128), (64, 64, 64), (129, 257, 65), (1, 1, 1), (200, 33, 44)]
    run(arch, dtype, case, SIZES + exact)
