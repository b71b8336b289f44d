"""Cross-entropy's Triton kernels on the executor: numbers against float64, and no report at all.

A kernel is compiled anew for each dtype, set of options and size of tile, so by default each of the
few combinations below has sizes of its own to sweep; the rest is `-m sweep`.  Rows of up to 1024
classes are tiles (BLOCK_N: the next power of two), those of odd lengths moved as spans; longer
ones are swept by 1 to 8 warps in steps, the elements before and after their vectors by themselves.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import ptx
from kernels import dispatch
from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from ptx import counters
from tests.ptx.conftest import SCHEDULES
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

pytest.importorskip("triton")
from kernels.cross_entropy import triton as backend

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

ARCHS = ("sm_80", "sm_90a")
ALL = list(itertools.product(ARCHS, DTYPES))


def run(arch: str, turn: int, rows: int, classes: int, dtype: torch.dtype, options: Options):
    """Checks one call; the names of the kernels it launched."""
    schedule = SCHEDULES[turn % len(SCHEDULES)]
    with ptx.run(arch, schedule=schedule, seed=turn, multiprocessors=1) as session:
        check(backend, make_logits(rows, classes, dtype), options)
    return {launch.name for launch in session.launches}


TILES = [
    ("sm_80", torch.float32, [*range(65, 128, 4)], PLAIN),  # spans
    ("sm_80", torch.bfloat16, [513, 777, 1023], SOFT),  # spans of two dtypes
    (
        "sm_90a",
        torch.bfloat16,
        [*range(72, 129, 8)],
        EVERYTHING,
    ),  # spans and whole sectors
]


@pytest.mark.parametrize(("arch", "dtype", "lengths", "options"), TILES, ids=str)
def test_tiles(arch, dtype, lengths, options):
    for turn, classes in enumerate(lengths):
        names = run(arch, turn, 3 + 5 * turn, classes, dtype, options)
        assert names - {"_mass_kernel"} == {"_forward_tile_kernel", "_backward_tile_kernel"}


SWEEPS = [
    ("sm_80", torch.bfloat16, [*range(1025, 1063, 3), 2048], PLAIN),  # one warp
    ("sm_90a", torch.float32, [*range(1025, 1044, 2), 2047], EVERYTHING),
    ("sm_90a", torch.float16, [1025, 1300, 2001], SOFT),
]


@pytest.mark.parametrize(("arch", "dtype", "lengths", "options"), SWEEPS, ids=str)
def test_sweeps(arch, dtype, lengths, options):
    for turn, classes in enumerate(lengths):
        names = run(arch, turn, 3 + turn % 4, classes, dtype, options)
        expected = {"_forward_rows_kernel", "merge_kernel", "_backward_rows_kernel"}
        assert names - {"_mass_kernel"} == expected
        assert ("_mass_kernel" in names) == (options.probabilities is not None)


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_programs_share(rows):
    """Parts of 8 warps; a target and the best class lie in each of them."""
    for turn, classes in enumerate((20_481, 16_384)):
        logits = make_logits(rows, classes, torch.float32)
        target = (torch.arange(rows) * 8191 + turn * 4096) % classes
        logits[torch.arange(rows), (target + 4096) % classes] = 40.0
        with ptx.run("sm_90a", schedule="random", seed=turn, multiprocessors=2) as session:
            check(backend, logits, PLAIN, target)
        launch = next(one for one in session.launches if one.name == "_backward_rows_kernel")
        assert launch.grid[:2] == (rows, 2)


def test_views_and_gradients_in_place():
    """Strided rows and those that start off a boundary, in the kernels of the sweeps above."""
    for turn, (gap, offset) in enumerate([(3, 0), (8, 0), (0, 1), (5, 3)]):
        for classes in (69, 1035):  # a tile, and swept
            wide = make_logits(3, classes + gap, torch.bfloat16).flatten()
            memory = torch.cat([torch.full((offset,), torch.nan).bfloat16(), wide])
            view = memory[offset:].view(3, classes + gap)[:, :classes]
            for inplace in (False, True):
                with ptx.run("sm_80", schedule=SCHEDULES[turn % 3], seed=turn, multiprocessors=1):
                    check(backend, view, Options(inplace=inplace))


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, 301), (torch.bfloat16, 303)])
def test_short_rows_move_few_bytes(dtype, rows):
    """Rows of any length, each tile after the other, and what of them the last tile has."""
    for turn, classes in enumerate((77, 69, 65)):
        with ptx.run("sm_80", schedule=SCHEDULES[turn], multiprocessors=1) as session:
            check(backend, make_logits(rows + turn, classes, dtype), Options(stats=False))
        forward, backward = session.launches
        assert counters.moved_over_least([forward]) <= 1.05
        assert counters.moved_over_least([forward, backward]) <= 1.05


@pytest.mark.parametrize(
    ("classes", "dtype", "arch"), [(69, torch.float32, "sm_80"), (1042, torch.bfloat16, "sm_80")]
)
def test_wrong_targets_ignored_rows_and_infinities(classes, dtype, arch):
    logits = make_logits(10, classes, dtype)
    logits[4, 5] = torch.nan
    logits[6, :-1] = -torch.inf
    logits[7, 4] = torch.inf
    logits[8] = -torch.inf
    logits[9, ::2] = -torch.inf
    target = torch.tensor([classes, 1, -1, 2**40, -100, 0, classes - 1, 4, 6, 1])
    arguments = PLAIN.arguments(target, None)
    with ptx.run(arch, multiprocessors=1):
        losses, lse, log_prob, best = backend.forward(logits, *arguments)
        dinput, _ = backend.backward(
            torch.ones(10), None, logits, *arguments, lse, (True, False), False
        )
    wrong = torch.tensor([True, False, True, True] + 6 * [False])
    assert losses[wrong].isnan().all()
    assert log_prob[wrong].isnan().all()
    assert dinput[wrong].isnan().all()
    leaf = logits[~wrong].float().requires_grad_()
    want = F.cross_entropy(leaf, target[~wrong], reduction="none")
    (gradient,) = torch.autograd.grad(want.sum(), leaf)
    gradient[target[~wrong] == -100] = 0
    torch.testing.assert_close(losses[~wrong], want.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        dinput[~wrong].float(), gradient, rtol=eps, atol=1e-6, equal_nan=True
    )
    assert torch.equal(best, logits.argmax(1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_public_function(reduction):
    logits = make_logits(24, 72, torch.bfloat16)
    target = torch.randint(0, 72, (24,))
    target[5] = target[11] = -100

    def results(function, x):
        leaf = x.detach().requires_grad_()
        loss = function(leaf, target, reduction=reduction)
        incoming = torch.linspace(0.3, 0.9, loss.numel()).reshape(loss.shape).to(loss.dtype)
        (gradient,) = torch.autograd.grad(loss, leaf, incoming)
        return [loss.detach(), gradient]

    with ptx.run("sm_90a"), dispatch.use("triton"):
        found = results(cross_entropy, logits)
    torchs, exact = results(F.cross_entropy, logits), results(F.cross_entropy, logits.double())
    assert_as_exact_as_torch(found, torchs, exact, ("loss", "gradient"))


def test_checked_mode_raises_where_a_gpu_says_nan():
    x, w, target = (
        make_logits(24, 72, torch.bfloat16),
        torch.randn(72, 72).bfloat16(),
        torch.arange(24),
    )
    target[7] = 72
    with ptx.run("sm_90a") as session, dispatch.use("triton"):
        assert cross_entropy(x, target, reduction="none").isnan().nonzero().tolist() == [[7]]
        launches = len(session.launches)
        with dispatch.checked():
            with pytest.raises(IndexError, match="target 72 at position 7 is out of range"):
                cross_entropy(x, target)
            with pytest.raises(IndexError, match="target 72 at position 7 is out of range"):
                linear_cross_entropy(x, w, target)
        assert len(session.launches) == launches


OPTIONS = [
    PLAIN,
    EVERYTHING,
    SOFT,
    Options(stats=False),
    Options(label_smoothing=0.2),
    Options(label_smoothing=0.2, weighted=True),
    Options(weighted=True, dlse=True),
    Options(z_loss=1e-2, ignore_index=3),
    Options(softcap=4.0, logit_scale=-0.5),
    Options(inplace=True),
]


@pytest.mark.sweep
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("arch", "dtype"), ALL, ids=str)
def test_everything_with_everything(arch, dtype, options):
    lengths = [1, 2, 3, 7, 8, 9, 16, 31, 33, 64, 100, 200, 255, 256, 257, 1000, 1024]
    lengths += [1025, 2049, 4100, 8200]
    for turn, classes in enumerate(lengths):
        run(arch, turn, 5, classes, dtype, options)
