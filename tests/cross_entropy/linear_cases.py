"""Calls of kernels that compute linear + cross-entropy without logits, held against float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cross_entropy import reference
from kernels.cross_entropy.chunks import Problem
from kernels.cross_entropy.rows import Options
from tests.tolerance import assert_as_exact_as_torch

PLAIN = Options(-100, 0.0, 0.0, 0.0, 1.0, False)
EVERYTHING = Options(-100, 0.1, 1e-3, 6.0, 0.7, True)
NAMES = ("losses", "lse", "log_prob", "dinput", "dlinear_weight", "dlinear_bias")


@dataclass(frozen=True)
class Case:
    options: Options = PLAIN
    bias: bool = False
    weighted: bool = False
    dlse: bool = False


def make_problem(rows: int, classes: int, features: int, dtype: torch.dtype, case: Case) -> Problem:
    """Logits of about unit size, unlike from row to row; some rows ignored."""
    x = torch.randn(rows, features) * (0.5 + torch.rand(rows, 1))
    w = torch.randn(classes, features) / features**0.5
    target = (torch.arange(rows) * 1009 - 1) % classes
    if rows > 3:
        target[2] = case.options.ignore_index
    bias = torch.randn(classes).to(dtype) if case.bias else None
    weight = 0.5 + torch.rand(classes) if case.weighted else None
    return Problem(x.to(dtype), w.to(dtype), bias, target, weight, case.options, None)


def check(module: ModuleType, problem: Problem, case: Case) -> None:
    """Forward and all gradients of `module` against logits that are stored."""
    rows = problem.input.shape[0]
    dlosses = 0.5 + torch.rand(rows)
    dlse = torch.randn(rows) if case.dlse else None
    mask = (True, True, case.bias)
    assert module.unsupported(problem) is None
    losses, lse, log_prob, best = module.forward(problem)
    gradients = module.backward(problem, dlosses, dlse, lse, mask)
    assert [g.dtype for g in gradients if g is not None] == [problem.input.dtype] * sum(mask)
    assert (best is not None) == case.options.stats
    stored = [_stored(problem, dlosses, dlse, mask, wide) for wide in (False, True)]
    found = losses, lse[0], log_prob, *gradients
    assert_as_exact_as_torch(found, stored[0][:-1], stored[1][:-1], NAMES, [1.0, 0.0, 1.0, 0, 0, 0])
    whole, exact = lse.double().sum(0), stored[1][1]
    assert (whole - exact).abs().max() <= 1e-5
    if best is not None:
        assert torch.equal(best, stored[1][-1])


def _stored(
    problem: Problem, dlosses: Tensor, dlse: Tensor | None, mask: tuple[bool, ...], wide: bool
) -> tuple[Tensor | None, ...]:
    """The same in float64, or in the problem's dtype, from logits stored whole."""
    dtype = torch.float64 if wide else problem.input.dtype
    x, w = problem.input.to(dtype), problem.linear_weight.to(dtype)
    bias = None if problem.linear_bias is None else problem.linear_bias.to(dtype)
    logits = F.linear(x, w, bias)
    arguments = problem.target, problem.weight, *problem.options
    losses, lse, log_prob, best = reference.forward(logits, *arguments)
    if wide:
        dlosses, dlse = dlosses.double(), None if dlse is None else dlse.double()
    dlogits, _ = reference.backward(
        dlosses, dlse, logits, *arguments, lse, (True, False), inplace=False
    )
    dbias = dlogits.sum(0) if mask[2] else None
    whole = lse.sum(0) if wide else lse[0]
    return losses, whole, log_prob, dlogits @ w, dlogits.t() @ x, dbias, best
