"""Cross-entropy's CUDA kernels from the PTX that nvcc makes of them: numbers against float64, and
nothing for the executor to report.

By default from the PTX of one architecture; all dtypes on all of them under all schedulers are
`-m sweep`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import ptx
from kernels import dispatch
from kernels.cross_entropy import cross_entropy, cuda
from ptx import build
from ptx.executor import readable
from tests.ptx.conftest import ARCHS, DEFAULT_ARCHS, SCHEDULES
from tests.ptx.cross_entropy_cases import (
    DTYPES,
    EVERYTHING,
    PLAIN,
    SOFT,
    Options,
    check,
    make_logits,
)
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

SOURCE = build.CSRC / "cross_entropy" / "module_cuda.cu"
PAIRS = list(itertools.product(DEFAULT_ARCHS["cross_entropy"], DTYPES))
EVERY_PAIR = [
    pytest.param(arch, dtype, marks=[] if (arch, dtype) in PAIRS else pytest.mark.sweep)
    for arch, dtype in itertools.product(ARCHS, DTYPES)
]
on_every_pair = pytest.mark.parametrize(("arch", "dtype"), EVERY_PAIR, ids=str)
TILE_BYTES = 5120  # of the longest rows that come in tiles


@contextmanager
def session(arch: str, turn: int = 0, **options: object) -> Iterator[ptx.Session]:
    """One multiprocessor, so that blocks walk over several tiles and rows."""
    schedule = SCHEDULES[turn % len(SCHEDULES)]
    options = {"schedule": schedule, "seed": turn, "multiprocessors": 1} | options
    with ptx.run(arch, **options) as found:
        yield found


@on_every_pair
def test_short_rows(arch, dtype):
    """Every number of lanes, rows that fill no pass or several tiles, every residue of a vector."""
    sizes = [(3, 1), (700, 1), (300, 3), (33, 8), (70, 9), (40, 16), (35, 17), (150, 33), (9, 64)]
    sizes += [(70, classes) for classes in range(65, 82, 3)] + [(9, 129), (9, 255), (5, 1001)]
    for turn, (rows, classes) in enumerate(sizes):
        with session(arch, turn) as found:
            check(cuda, make_logits(rows, classes, dtype), (PLAIN, EVERYTHING)[turn % 2])
        names = {launch.name.partition("<")[0].rpartition("::")[2] for launch in found.launches}
        assert names == {"forward_tile_kernel", "backward_tile_kernel"}


@on_every_pair
def test_long_rows(arch, dtype):
    """Both sides of the switch to a warp per row, every residue of a sector, 1 to 8 warps."""
    switch = TILE_BYTES // dtype.itemsize
    step = 4096 // dtype.itemsize
    lengths = [
        *range(switch - 1, switch + 19, 1 + 16 // dtype.itemsize // 4),
        2 * step,
        2 * step + 5,
        4 * step + 1,
        4 * step + 16,
    ]
    for turn, classes in enumerate(lengths):
        with session(arch, turn, multiprocessors=1 + turn % 2):
            check(cuda, make_logits(2 + turn % 3, classes, dtype), (PLAIN, EVERYTHING)[turn % 2])


@on_every_pair
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_that_blocks_share(arch, dtype, rows):
    """Few rows are cut into parts; a target and the best class lie in each of them."""
    for turn, classes in enumerate((8192, 12_301)):
        logits = make_logits(rows, classes, dtype)
        target = (torch.arange(rows) * 4099 + turn * 4096) % classes
        logits[torch.arange(rows), (target + 4096) % classes] = 40 if dtype != torch.float16 else 30
        options = (EVERYTHING, PLAIN)[turn % 2]
        with session(arch, turn, multiprocessors=2) as found:
            check(cuda, logits, options, target)
        merged = any("merge_parts_kernel" in launch.name for launch in found.launches)
        assert merged == (rows < 6)


@on_every_pair
@pytest.mark.parametrize("classes", [37, 2611])
def test_probabilities(arch, dtype, classes):
    classes = classes if classes < 100 or dtype != torch.float32 else 1301
    for turn, soft_dtype in enumerate({torch.float32, dtype}):
        options = Options(0.1, 1e-3, weighted=True, dlse=True, probabilities=soft_dtype)
        with session(arch, turn):
            check(cuda, make_logits(5, classes, dtype), options)
            check(cuda, make_logits(5, classes, dtype), Options(probabilities=soft_dtype))


OPTIONS = [
    Options(label_smoothing=0.2, stats=False),
    Options(label_smoothing=0.2, weighted=True),
    Options(weighted=True, dlse=True, stats=False),
    Options(z_loss=1e-2),
    Options(softcap=4.0, dlse=True),
    Options(logit_scale=-0.5),
    Options(logit_scale=2.0, softcap=20.0, label_smoothing=0.1),
    Options(ignore_index=3, dlse=True),
    Options(dlse=True),
    SOFT,
]


@pytest.mark.parametrize("classes", [67, 1299])
def test_every_option(classes):
    for turn, options in enumerate(OPTIONS):
        arch, dtype = PAIRS[turn % len(PAIRS)]
        length = classes if classes < 100 or dtype == torch.float32 else 2 * classes
        with session(arch, turn):
            check(cuda, make_logits(6, length, dtype), options)
            check(cuda, make_logits(6, length, dtype), Options(inplace=True, dlse=turn % 2 == 0))


@pytest.mark.parametrize(("arch", "dtype"), PAIRS, ids=str)
def test_rows_with_gaps_and_odd_starts(arch, dtype):
    """Strided rows, also in place, and views that start off a boundary, are taken as they lie."""
    for turn, (classes, gap, offset) in enumerate(
        [(65, 3, 0), (64, 64, 1), (70, 0, 1), (2600, 5, 3), (2600, 0, 4), (40, 0, 8)]
    ):
        wide = make_logits(5, classes + gap, dtype).flatten()
        memory = torch.cat([torch.full((offset,), torch.nan, dtype=dtype), wide])
        for inplace in (False, True):
            view = memory.clone()[offset:].view(5, classes + gap)[:, :classes]
            with session(arch, turn):
                check(cuda, view, Options(inplace=inplace, dlse=True))


def test_one_gradient_for_all_rows_and_one_row_of_logits():
    """Stride 0: an expanded scalar as dlosses, and rows that are one and the same."""
    for turn, (arch, dtype) in enumerate(PAIRS):
        for classes in (10, 3000):
            logits = make_logits(1, classes, dtype)
            target = torch.tensor([0, 3, classes - 1])
            arguments = PLAIN.arguments(target, None)
            with session(arch, turn):
                losses, lse, *_ = cuda.forward(logits.expand(3, -1), *arguments)
                spread = cuda.backward(
                    torch.full((1,), 0.25).expand(3),
                    None,
                    logits.expand(3, -1),
                    *arguments,
                    lse,
                    (True, False),
                    False,
                )[0]
            leaf = logits.double().requires_grad_()
            exact = F.cross_entropy(leaf.expand(3, -1), target, reduction="none")
            (gradient,) = torch.autograd.grad(exact.sum() / 4, leaf)
            torch.testing.assert_close(losses.double(), exact.detach(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                spread.double().sum(0, keepdim=True),
                gradient,
                rtol=0,
                atol=2 * torch.finfo(dtype).eps,
            )


@pytest.mark.parametrize("classes", [21, 2600])
def test_targets_out_of_range_are_nan_and_ignored_rows_are_zero(classes):
    for turn, (arch, dtype) in enumerate(PAIRS):
        logits = make_logits(6, classes, dtype)
        logits[4, 5] = torch.nan
        target = torch.tensor([classes, 1, -1, 2**40, -100, 0])
        arguments = PLAIN.arguments(target, None)
        with session(arch, turn):
            losses, lse, log_prob, _ = cuda.forward(logits, *arguments)
            dinput, _ = cuda.backward(
                torch.ones(6), None, logits, *arguments, lse, (True, False), False
            )
        wrong = torch.tensor([True, False, True, True, False, False])
        assert torch.equal(losses.isnan(), wrong)
        assert torch.equal(log_prob.isnan(), wrong)
        assert torch.equal(dinput.isnan(), wrong[:, None].expand_as(dinput))
        assert torch.equal(lse[0].isnan(), torch.arange(6) == 4)
        assert losses[4] == log_prob[4] == 0
        assert not dinput[4].any()


@pytest.mark.parametrize("classes", [20, 2600])
def test_infinite_and_nan_logits_behave_as_torch(classes):
    for turn, (arch, dtype) in enumerate(PAIRS):
        logits = make_logits(7, classes, dtype)
        logits[0, :-1] = -torch.inf
        logits[1, 3] = -torch.inf  # the target
        logits[2, 4] = torch.inf
        logits[3, classes - 1] = torch.nan
        logits[4] = -torch.inf
        logits[5, ::2] = -torch.inf
        target = torch.tensor([classes - 1, 3, 4, 5, 6, 1, 7])
        arguments = PLAIN.arguments(target, None)
        with session(arch, turn):
            losses, lse, _, best = cuda.forward(logits, *arguments)
            dinput, _ = cuda.backward(
                torch.ones(7), None, logits, *arguments, lse, (True, False), False
            )
        leaf = logits.float().requires_grad_()
        want = F.cross_entropy(leaf, target, reduction="none")
        torch.testing.assert_close(losses, want.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
        (gradient,) = torch.autograd.grad(want.sum(), leaf)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(dinput.float(), gradient, rtol=eps, atol=1e-6, equal_nan=True)
        assert torch.equal(best, logits.argmax(1))


def test_the_first_of_equal_classes_is_the_best():
    for turn, (arch, dtype) in enumerate(PAIRS):
        for classes in (30, 3000, 16_500):
            logits = torch.zeros(3, classes, dtype=dtype)
            logits[0, classes // 2 :] = 1
            logits[1, 0] = -0.0
            logits[2, 7::11] = 2
            with session(arch, turn):
                best = cuda.forward(
                    logits, *PLAIN.arguments(torch.zeros(3, dtype=torch.int64), None)
                )[3]
            assert best.tolist() == [classes // 2, 0, 7]


def test_far_from_zero():
    """A mean of 1000 costs no digits of the probabilities, and sure rows none of their losses."""
    for turn, classes in enumerate((50, 1300)):
        logits = torch.randn(4, classes) + 1000
        sure = make_logits(4, classes, torch.float32) - 900
        target = torch.arange(4)
        sure[target, target] = sure.amax(1) + 12
        with session("sm_80", turn):
            check(cuda, logits, Options(label_smoothing=0.1))
            check(cuda, sure, PLAIN, target)


def results(function, logits, weight, target, reduction) -> list[torch.Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, weight, reduction=reduction, label_smoothing=0.1)
    incoming = torch.linspace(0.3, 0.9, loss.numel()).reshape(loss.shape).to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaf, incoming)
    return [loss.detach(), gradient]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_public_function(reduction):
    """Against F.cross_entropy in float64, with autograd, class weights and ignored rows."""
    for turn, (arch, dtype) in enumerate(PAIRS):
        logits, weight = make_logits(24, 33, dtype), 0.5 + torch.rand(33)
        target = torch.randint(0, 33, (24,))
        target[5] = target[11] = -100
        with session(arch, turn), dispatch.use("cuda"):
            found = results(cross_entropy, logits, weight.to(dtype), target, reduction)
        torchs = results(F.cross_entropy, logits, weight.to(dtype), target, reduction)
        exact = results(
            F.cross_entropy, logits.double(), weight.to(dtype).double(), target, reduction
        )
        assert_as_exact_as_torch(found, torchs, exact, ("loss", "gradient"))


def test_no_rows():
    with session("sm_80") as found:
        losses, lse, log_prob, best = cuda.forward(
            torch.empty(0, 5), *PLAIN.arguments(torch.empty(0, dtype=torch.int64), None)
        )
        dinput, _ = cuda.backward(
            torch.empty(0),
            None,
            torch.empty(0, 5),
            *PLAIN.arguments(torch.empty(0, dtype=torch.int64), None),
            lse,
            (True, False),
            False,
        )
    assert [tuple(t.shape) for t in (losses, lse, log_prob, best)] == [(0,), (2, 0), (0,), (0,)]
    assert dinput.shape == (0, 5)
    assert not found.launches


def test_no_bit_depends_on_the_scheduler():
    logits = {
        size: make_logits(*size, torch.float32) for size in [(70, 65), (3, 1301), (1, 16_391)]
    }
    for size, x in logits.items():
        target = torch.arange(size[0]) % size[1]
        found = []
        for options in [*({"schedule": name} for name in SCHEDULES), {"preempt": 20}]:
            with session("sm_80", seed=3, **options):
                arguments = EVERYTHING.arguments(target, None)
                losses, lse, *_ = cuda.forward(x, *arguments)
                found.append((losses, lse))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_there_is_room_for_the_error_of_approximate_instructions():
    """ex2.approx of a GPU is another function than the executor's, within the same bound. Without
    softcap: CUDA's tanhf is right to a unit in the last place on GPUs, but not with any such bound.
    """
    with session("sm_80", jitter=True, seed=5):
        check(cuda, make_logits(5, 65, torch.float32), Options(0.1, 1e-3, weighted=True, dlse=True))
        check(cuda, make_logits(5, 1301, torch.float32), PLAIN)


@pytest.mark.sweep
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("arch", "dtype"), list(itertools.product(ARCHS, DTYPES)), ids=str)
def test_everything_with_everything(arch, dtype, schedule):
    for classes in (1, 2, 31, 32, 33, 63, 100, 511, 2047, 2559, 2565, 5003, 9001):
        for options in (*OPTIONS, PLAIN, EVERYTHING, Options(inplace=True)):
            with session(arch, schedule=schedule, seed=classes):
                check(cuda, make_logits(5, classes, dtype), options)


def test_every_kernel_is_among_those_above():
    kernels = {
        readable(name).partition("<")[0].rpartition("::")[2].split("(")[0]
        for name in build.kernel_names(SOURCE, "sm_80")
    }
    assert kernels == {
        "forward_tile_kernel",
        "forward_rows_kernel",
        "merge_parts_kernel",
        "backward_tile_kernel",
        "backward_rows_kernel",
        "mass_kernel",
    }
