"""What the executor's tests of cross-entropy share: calls of a backend, checked element by element.

Every number is held against the reference in float64.  Losses, lse and log-probabilities are
float32 for every dtype, so one lost element of a row shows.  Of the gradient each element has a
bound of its own: measured by the largest, which is the target's, thousands of others could be
anything.  Logits, weights and incoming gradients differ from row to row and class to class.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from kernels.cross_entropy import reference
from tests.tolerance import assert_as_exact_as_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100
FLOAT32_ERROR = 3e-6  # of a term of a gradient: e^x, five roundings, exponents up to 30


@dataclass(frozen=True)
class Options:
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    weighted: bool = False
    probabilities: torch.dtype | None = None  # their dtype
    dlse: bool = False
    stats: bool = True
    inplace: bool = False
    ignore_index: int = IGNORED

    def arguments(self, target: Tensor, weight: Tensor | None) -> tuple:
        return (
            target,
            weight,
            self.ignore_index,
            self.label_smoothing,
            self.z_loss,
            self.softcap,
            self.logit_scale,
            self.stats,
        )


PLAIN = Options()
EVERYTHING = Options(0.1, 1e-3, 6.0, 0.7, weighted=True, dlse=True)
SOFT = Options(0.1, 1e-3, weighted=True, dlse=True, probabilities=torch.float32)


def make_logits(rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, classes) * 3 + torch.randn(rows, 1) * 5).to(dtype)


def make_target(rows: int, classes: int, options: Options) -> Tensor:
    """Indices that start at the last class and the first, then spread; or probabilities."""
    if options.probabilities is not None:
        soft = torch.softmax(torch.randn(rows, classes), 1) * (0.5 + torch.rand(rows, 1))
        return soft.to(options.probabilities)
    target = (torch.arange(rows) * 1009 - 1) % classes
    if rows > 3:
        target[2] = options.ignore_index
    return target


def check(
    backend: ModuleType,
    logits: Tensor,
    options: Options = PLAIN,
    target: Tensor | None = None,
) -> Tensor:
    """Runs forward and backward, checks all that they return; the gradient."""
    rows, classes = logits.shape
    target = make_target(rows, classes, options) if target is None else target
    weight = 0.5 + torch.rand(classes) if options.weighted else None
    arguments = options.arguments(target, weight)
    dlosses = 0.5 + torch.rand(rows)
    dlse = torch.randn(rows) if options.dlse else None
    kept = logits.clone()

    assert backend.unsupported(logits, *arguments) is None
    found = backend.forward(logits, *arguments)
    assert torch.equal(logits.nan_to_num(), kept.nan_to_num())
    dinput, _ = backend.backward(
        dlosses, dlse, logits, *arguments, found[1], (True, False), options.inplace
    )
    if options.inplace:
        assert dinput is logits
    else:
        assert torch.equal(logits.nan_to_num(), kept.nan_to_num())
        assert dinput.is_contiguous()
    assert dinput.dtype == logits.dtype

    exact = reference.forward(kept.double(), *arguments)
    torchs = reference.forward(kept.float(), *arguments)
    # A loss ends in the logarithm of a sum of at least 1: that is what its rounding is relative to.
    terms = [1.0, 0.0]
    assert_as_exact_as_torch(found[:2], torchs[:2], exact[:2], ("losses", "lse"), terms)
    # lse and its rest together are closer than float32 can say.
    whole, exact_whole = found[1].double().sum(0), exact[1].sum(0)
    finite = exact_whole.isfinite()
    torch.testing.assert_close(whole[finite], exact_whole[finite], rtol=0, atol=2e-6)
    with_log_prob = options.stats and options.probabilities is None
    assert (found[2] is not None) == with_log_prob
    assert (found[3] is not None) == options.stats
    if with_log_prob:
        assert_as_exact_as_torch(found[2:3], torchs[2:3], exact[2:3], ("log_prob",), [1.0])
    if options.stats:
        assert torch.equal(found[3], exact[3])
    check_gradient(dinput, dlosses, dlse, kept, arguments, exact[1])
    return dinput


def check_gradient(
    dinput: Tensor,
    dlosses: Tensor,
    dlse: Tensor | None,
    logits: Tensor,
    arguments: tuple,
    lse: Tensor,
    error: float = FLOAT32_ERROR,  # of a term
) -> None:
    """Every element: to a unit in the last place of its own, and of the terms it is made of."""
    wide = logits.double()
    mask = (True, False)
    h = None if dlse is None else dlse.double()
    exact, _ = reference.backward(dlosses.double(), h, wide, *arguments, lse, mask, False)
    # The same sums with all terms of one sign: what float32's rounding errors are relative to.
    target, weight, ignore_index, smoothing, z_loss, softcap, scale, _ = arguments
    x = reference.logits(wide, softcap, scale)
    p = torch.exp((x - lse[0][:, None]) - lse[1][:, None])
    size = dlosses.double().abs() * (2 + 2 * z_loss * lse[0].abs())
    if target.is_floating_point():
        size = size * (1 + target.double().sum(1)) * 1.5
    terms = (size + (0 if h is None else h.abs()))[:, None] * p
    share = reference.class_weights(weight, x) * smoothing / wide.shape[1]
    if target.is_floating_point():
        share = share + target.double() * reference.class_weights(weight, x)
        terms = terms + dlosses.double()[:, None] * share
    else:
        safe = torch.where((target >= 0) & (target < wide.shape[1]), target, 0)
        terms = terms + dlosses.double()[:, None] * share
        terms.scatter_add_(1, safe[:, None], 1.5 * dlosses.double()[:, None])
    terms = terms.nan_to_num(0.0)  # of an ignored row: its gradient is 0 whatever its logits
    units = torch.finfo(dinput.dtype)
    allowed = units.eps * exact.abs() + error * terms * abs(scale)
    allowed = allowed + units.smallest_normal * units.eps
    finite = exact.isfinite()
    assert torch.equal(dinput.isfinite(), finite)
    excess = torch.where(finite, (dinput.double() - exact).abs() - allowed, -1.0)
    worst = int(excess.argmax())
    row, column = divmod(worst, wide.shape[1])
    assert excess.max() <= 0, (
        f"gradient at row {row}, class {column}: {dinput[row, column].item():.9g}, "
        f"exactly {exact[row, column].item():.9g}, {(excess.max() + 1e-30).item():.1e} too far"
    )
