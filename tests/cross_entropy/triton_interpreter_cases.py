"""Values and gradients of the Triton cross-entropy in Triton's interpreter, for TRITON_INTERPRET=1.

The interpreter must be on before the kernels are decorated, so this file runs in another process
(tests/test_triton_interpreter.py).  Programs are planned as for a GPU with four multiprocessors.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels import dispatch
from kernels.cross_entropy import linear_cross_entropy, triton_linear
from kernels.cross_entropy import triton as backend
from tests.cross_entropy import linear_cases
from tests.ptx.cross_entropy_cases import EVERYTHING, PLAIN, SOFT, Options, check, make_logits
from tests.tolerance import assert_as_exact_as_torch

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# One class, powers of two and their neighbours, several tiles; swept rows that are all ends, that
# have none, and that several programs share.
SIZES = [
    (1, 1),
    (70, 2),
    (33, 7),
    (9, 64),
    (9, 65),
    (5, 256),
    (5, 257),
    (3, 1001),
    (3, 1056),
    (4, 1031),
    (2, 9001),
]
OPTIONS = [
    PLAIN,
    EVERYTHING,
    SOFT,
    Options(stats=False, label_smoothing=0.2),
    Options(weighted=True, dlse=True),
    Options(softcap=4.0, logit_scale=-0.5),
    Options(inplace=True, ignore_index=3),
]


DTYPES = itertools.cycle([torch.float32, torch.float16])  # by turns


@pytest.mark.parametrize(("size", "dtype"), zip(SIZES, DTYPES, strict=False))
def test_values_and_gradients(size, dtype):
    rows, classes = size
    check(backend, make_logits(rows, classes, dtype), PLAIN)
    check(backend, make_logits(max(rows, 3), classes, dtype), EVERYTHING)


# Rows held whole, with all options; swept rows, which share the code, with most at once.
CASES = [(67, options) for options in OPTIONS] + [(1050, EVERYTHING), (1050, SOFT)]
CASES += [
    pytest.param(1050, options, marks=pytest.mark.sweep)
    for options in OPTIONS
    if options not in (EVERYTHING, SOFT)
]


@pytest.mark.parametrize(("classes", "options"), CASES, ids=str)
def test_options(options, classes):
    check(backend, make_logits(6, classes, torch.float32), options)


@pytest.mark.parametrize("classes", [65, 1031])
def test_rows_with_gaps(classes):
    for inplace in (False, True):
        wide = make_logits(5, classes + 3, torch.float16)
        check(backend, wide[:, :classes], Options(inplace=inplace, dlse=True))


def test_probabilities_of_both_dtypes():
    for dtype in (torch.float16, torch.float32):
        options = Options(0.1, weighted=True, probabilities=dtype)
        check(backend, make_logits(4, 300, torch.float16), options)


def test_no_rows():
    arguments = PLAIN.arguments(torch.empty(0, dtype=torch.int64), None)
    losses, lse, log_prob, best = backend.forward(torch.empty(0, 5), *arguments)
    assert [tuple(t.shape) for t in (losses, lse, log_prob, best)] == [(0,), (2, 0), (0,), (0,)]
    dinput, _ = backend.backward(
        torch.empty(0), None, torch.empty(0, 5), *arguments, lse, (True, False), False
    )
    assert dinput.shape == (0, 5)


def test_refused_in_the_interpreter():
    rest = (torch.tensor([1, 2]), None, -100, 0.0, 0.0, 0.0, 1.0, False)
    assert "bfloat16" in backend.unsupported(torch.randn(2, 8).bfloat16(), *rest)
    assert "float64" in backend.unsupported(torch.randn(2, 8).double(), *rest)


# Rows, classes, features; blocks are of 16, 32 and 16 here.
LINEAR_SIZES = [(1, 1, 1), (5, 3, 8), (33, 70, 40), (16, 32, 16), (50, 7, 33)]


LINEAR_OPTIONS = [linear_cases.Case(linear_cases.EVERYTHING, True, True, True), linear_cases.Case()]
LINEAR = [  # by default one or the other
    pytest.param(sizes, case, marks=() if n % 2 == i % 2 else pytest.mark.sweep)
    for i, sizes in enumerate(LINEAR_SIZES)
    for n, case in enumerate(LINEAR_OPTIONS)
]


@pytest.mark.parametrize(("sizes", "case"), LINEAR, ids=str)
def test_linear_without_logits(sizes, case):
    problem = linear_cases.make_problem(*sizes, torch.float16, case)
    linear_cases.check(triton_linear, problem, case)


def test_linear_of_strided_matrices():
    case = linear_cases.Case(linear_cases.PLAIN, bias=True)
    problem = linear_cases.make_problem(20, 24, 12, torch.float16, case)
    wide = torch.full((20, 17), torch.nan).half()
    wide[:, :12] = problem.input
    strided = problem._replace(
        input=wide[:, :12],
        linear_weight=problem.linear_weight.t().contiguous().t(),
        linear_bias=problem.linear_bias[:, None].repeat(1, 2)[:, 0],
        target=problem.target[:, None].repeat(1, 2)[:, 0],
    )
    linear_cases.check(triton_linear, strided, case)


def test_linear_is_what_the_public_function_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(
        triton_linear, "forward", lambda *a, f=triton_linear.forward: calls.append(1) or f(*a)
    )
    x, w = (torch.randn(n, 8).half().requires_grad_() for n in (20, 30))
    target = torch.randint(0, 30, (20,))
    with dispatch.use("triton"):
        loss = linear_cross_entropy(x, w, target)
        gradients = torch.autograd.grad(loss, (x, w), retain_graph=True)
        again = torch.autograd.grad(loss, (x, w))

    def eager(*leaves):
        loss = F.cross_entropy(F.linear(*leaves), target)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    exact = eager(*(leaf.detach().double().requires_grad_() for leaf in (x, w)))
    for found in (gradients, again):
        results = [loss.detach(), *found]
        assert_as_exact_as_torch(results, eager(x, w), exact, ("loss", "dinput", "dweight"))
    assert calls == [1]


def test_linear_refused():
    case = linear_cases.Case()
    problem = linear_cases.make_problem(4, 5, 6, torch.float16, case)
    assert "chunk" in triton_linear.unsupported(problem._replace(chunk_rows=2))
    assert "probabilities" in triton_linear.unsupported(problem._replace(target=torch.rand(4, 5)))
    assert "float32" in triton_linear.unsupported(problem._replace(input=problem.input.float()))
