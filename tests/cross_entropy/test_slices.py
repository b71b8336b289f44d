"""Linear + cross-entropy over slices of classes: values, odd rows, what goes there, memory."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kernels.cross_entropy import chunks, linear_cross_entropy, memory, slices
from tests.cross_entropy import linear_cases
from tests.cross_entropy.linear_cases import PLAIN, Case

# linear_cases.check asks a module as it asks Triton's.
SLICES = SimpleNamespace(
    unsupported=lambda problem: None,
    forward=lambda problem: slices.forward(problem, None, (False, False, False))[0],
    backward=slices.backward,
)
SCALED = PLAIN._replace(z_loss=1e-2, softcap=6.0, logit_scale=0.7, ignore_index=3)
CASES = [
    Case(),
    Case(bias=True, weighted=True),
    Case(SCALED, dlse=True),
    Case(SCALED, True, True, True),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(slices, "CLASSES", 16)
    monkeypatch.setattr(slices, "ROWS", 9)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (5, 16), (9, 17), (23, 50)])
def test_losses_and_gradients(rows, classes, dtype, case):
    linear_cases.check(SLICES, linear_cases.make_problem(rows, classes, 12, dtype, case), case)


@pytest.mark.parametrize("part", ["input", "weight", "bias"])
def test_each_gradient_alone(part):
    case = Case(bias=True)
    problem = linear_cases.make_problem(20, 40, 8, torch.bfloat16, case)
    _, lse = slices.forward(problem, None, (False,) * 3)[0][:2]
    dlosses = torch.rand(20)
    every = slices.backward(problem, dlosses, None, lse, (True, True, True))
    mask = tuple(name == part for name in ("input", "weight", "bias"))
    alone = slices.backward(problem, dlosses, None, lse, mask)
    for asked, one, other in zip(mask, alone, every, strict=True):
        assert torch.equal(one, other) if asked else one is None


def stored(x, w, target, **keywords):
    return F.cross_entropy(F.linear(x.float(), w.float()), target, **keywords)


@pytest.fixture
def taken(monkeypatch):
    """What is asked of slices, which several chunks of rows of bfloat16 go to."""
    monkeypatch.setattr(chunks, "WIDENED", frozenset({torch.bfloat16}))
    monkeypatch.setattr(chunks, "LOGITS_BYTES", 1)
    monkeypatch.setattr(chunks, "LEAST_ROWS", 7)
    answers = []
    takes = slices.takes
    monkeypatch.setattr(slices, "takes", lambda p: answers.append(takes(p)) or answers[-1])
    return answers


def test_infinite_and_nan_rows_are_as_torchs(taken):
    x, w = torch.randn(12, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    x[1], x[4, 2], x[6] = math.nan, math.inf, math.nan
    target = torch.randint(0, 40, (12,))
    target[6] = target[7] = -100
    for reduction in ("none", "sum"):
        leaves = [[t.clone().requires_grad_() for t in (x, w)] for _ in range(2)]
        got = linear_cross_entropy(*leaves[0], target, reduction=reduction)
        want = stored(*leaves[1], target, reduction=reduction)
        torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02, equal_nan=True)
        (dx,) = torch.autograd.grad(got.sum(), leaves[0][:1])
        (exact,) = torch.autograd.grad(want.sum(), leaves[1][:1])
        assert not dx[6:8].any()  # ignored
        exact[6:8] = 0  # where PyTorch lets a NaN through
        torch.testing.assert_close(dx.isnan(), exact.isnan())
    assert all(taken)


def test_everything_is_ignored(taken):
    x, w = (torch.randn(n, 8).bfloat16().requires_grad_() for n in (12, 40))
    loss = linear_cross_entropy(x, w, torch.full((12,), -100))
    assert loss.isnan()
    assert not any(g.any() for g in torch.autograd.grad(loss, (x, w), torch.zeros_like(loss)))
    assert all(taken)


def test_what_goes_over_chunks_of_rows(taken):
    x, w = torch.randn(12, 8).bfloat16(), torch.randn(40, 8).bfloat16()
    target, soft = torch.randint(0, 40, (12,)), torch.rand(12, 40).softmax(1).bfloat16()
    linear_cross_entropy(x, w, target)
    assert taken == [True]
    linear_cross_entropy(x, w, target, label_smoothing=0.1)
    linear_cross_entropy(x, w, target, return_stats=True)
    linear_cross_entropy(x, w, soft)
    linear_cross_entropy(x.float(), w.float(), target)
    linear_cross_entropy(x[:5], w, target[:5])  # a single chunk
    linear_cross_entropy(x, w, target, options=SimpleNamespace(batch_chunk_size=4))
    assert taken == [True] + 6 * [False]


@pytest.mark.skipif(not chunks.WIDENED, reason="this CPU multiplies 16-bit floats")
def test_memory_is_a_16th_of_eagers():
    rows, features, classes = sizes = (1024, 256, 32_000)
    eager = 3 * rows * classes * 2  # logits, log-probabilities, gradient
    assert memory.in_child("ours", "bfloat16", sizes) * 16 <= eager
