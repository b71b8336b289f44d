"""The sharpest inputs for cross-entropy: where one lost, doubled or misplaced class shows.

With random logits a few classes make up the sum: any other may be lost.  Here

    even     every class weighs about as much as any other, large smoothing makes the sums over all
             classes count as much as the target, and where there are weights or probabilities
             with `dlse` the gradient is nearly 0 but for the target's class
    peaks    one class is e^200 times the others, in another place in each row: a maximum that
             misses it overflows
    ties     zeros of both signs, and several classes that are the largest
    far      equal logits up to 2^20: what rounding takes from lse, its rest, is up to 6 %
    special  targets out of range, ignored rows, NaN, infinities, parts that are -inf only
    capped   on both sides of where tanh has another formula, with a softcap so large that its
             last terms count

Logits are short fractions, scales powers of two, and a softcap of 2^60 leaves them as they are: so
nothing is rounded before the kernel sees it.  What is checked are the same bounds for all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from kernels.cross_entropy import reference
from tests.ptx.conftest import spread
from tests.ptx.cross_entropy_cases import FLOAT32_ERROR, Options, check_gradient

NO_CAP = 2.0**60
ERROR = 3e-6  # of a loss or log-probability, and of 1


@dataclass(frozen=True)
class Problem:
    options: Options
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    dlosses: Tensor
    dlse: Tensor | None

    @property
    def arguments(self) -> tuple:
        return self.options.arguments(self.target, self.weight)


def _problem(
    logits: Tensor,  # x', exact in dtype once divided by the scale
    dtype: torch.dtype,
    options: Options,
    scale: float,
    falls: Tensor | None = None,  # of each class's weight
    target: Tensor | None = None,
    **numbers: float,
) -> Problem:
    """The call whose flags are those of `options`, its numbers larger."""
    rows, classes = logits.shape
    defaults: dict[str, float] = {
        "label_smoothing": 0.75 if options.label_smoothing else 0.0,
        "softcap": NO_CAP if options.softcap else 0.0,
        "z_loss": 0.125 if options.z_loss else 0.0,
    }
    options = replace(options, **(defaults | numbers), logit_scale=scale)
    index = torch.arange(rows)
    indices = (index * 37 - 1) % classes if target is None else target
    raw = (logits / scale).to(dtype)
    if options.probabilities is not None:
        small = torch.rand(rows, classes) < 0.5
        target = torch.where(small, 1.0, 3.0).div(2 * classes).to(options.probabilities)
        if falls is not None:  # the share of three times the probability is about e^0.5
            raw = ((logits - 0.5 * small) / scale).to(dtype)
    else:
        target = indices
    weight = None
    if options.weighted:
        weight = torch.exp(-torch.zeros(classes) if falls is None else -falls)
    dlosses = (1 + index % 7) / 4
    dlse = None
    if options.dlse:  # the slope becomes the sum of the shares of all classes
        lse = reference.forward(raw.double(), *options.arguments(target, weight))[1][0]
        on = torch.zeros(rows, dtype=torch.float64)
        if options.probabilities is None:
            safe = torch.where((target >= 0) & (target < classes), target, 0)
            on += 1 - options.label_smoothing
            on *= 1 if weight is None else weight[safe]
        dlse = -(dlosses * (on + 2 * options.z_loss * lse)).nan_to_num(0.5).float()
    return Problem(options, raw, target, weight, dlosses, dlse)


def _even_logits(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    falls = torch.where(torch.rand(classes) < 0.5, 0.0, 0.75)
    return (torch.arange(rows) * 5 % 17)[:, None] / 4 - 2 - falls, falls


def even(rows: int, classes: int, dtype: torch.dtype, options: Options, scale: float) -> Problem:
    x, falls = _even_logits(rows, classes)
    return _problem(x, dtype, options, scale, falls)


def peaks(
    rows: int, classes: int, dtype: torch.dtype, options: Options, step: int, first: int = -1
) -> Problem:
    x, falls = _even_logits(rows, classes)
    row = torch.arange(rows)
    place = (first + row * step) % classes
    x[row, place] = 200.0
    return _problem(x, dtype, options, 1.0, falls, target=(place + row % 2) % classes)


def ties(rows: int, classes: int, dtype: torch.dtype, options: Options, scale: float) -> Problem:
    zeros = torch.where(torch.rand(rows, classes) < 0.5, 0.0, -0.0)
    few = torch.rand(rows, classes) < 3 / classes
    kind = torch.arange(rows)[:, None] % 3
    x = torch.where(few, torch.where(kind == 0, 1.0, zeros), torch.where(kind == 0, zeros, -1.0))
    x = torch.where(kind == 2, torch.where(few, -2.0, -3.0), x)
    return _problem(x, dtype, options, scale)


FAR_SCALE = 1024 * (1 + 2**-12 + 2**-15)  # so that small logits have digits that their lse lacks
FAR = (0.0, 2**-18, -3 * 2**-18, 1.25 * 2**-8, -1.0, 1024.0, -1000.0)


def copies(classes: int) -> int:
    """How often an odd number of rows is repeated so that each meets every row of a tile."""
    return 8 if classes <= 128 else 1


def far(classes: int, dtype: torch.dtype, options: Options) -> Problem:
    x = FAR_SCALE * torch.tensor(FAR, dtype=torch.float64).repeat(copies(classes))[:, None].expand(
        -1, classes
    )
    return _problem(x, dtype, options, FAR_SCALE, z_loss=0.0)


def special(classes: int, dtype: torch.dtype, options: Options) -> Problem:
    x, falls = _even_logits(13, classes)
    x[3, 5] = x[4, classes // 2] = torch.nan
    x[5, :-1] = -torch.inf
    x[6, 4] = torch.inf
    x[7] = -torch.inf
    x[8, ::2] = -torch.inf
    x[9, : classes // 2] = -torch.inf
    x[10, classes // 2 :] = -torch.inf
    end = classes - 1
    ignored = options.ignore_index
    target = torch.tensor([classes, -1, 2**40, ignored, 0, end, 4, 6, 1, end, 0, ignored, -2])
    times = copies(classes)
    return _problem(x.repeat(times, 1), dtype, options, 1.0, falls, target=target.repeat(times))


def capped(rows: int, classes: int, dtype: torch.dtype, options: Options) -> Problem:
    u = torch.tensor([0.59375, -0.609375, 0.625, -0.640625, 0.25, 1.0, -1.125])
    x = 512 * u.repeat(rows)[:rows, None].expand(rows, classes)
    return _problem(x, dtype, options, 2.0, softcap=512.0, z_loss=0.0)


def placed(problem: Problem, gap: int, offset: int, inplace: bool) -> Problem:
    """The same with rows `gap` elements apart, the first `offset` after a boundary."""
    view = spread(problem.logits, gap, offset, torch.nan)
    return replace(problem, logits=view, options=replace(problem.options, inplace=inplace))


def _around(view: Tensor) -> Tensor:
    """The elements of the view's storage that are not in it."""
    storage = torch.tensor([], dtype=view.dtype).set_(view.untyped_storage())
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return storage[outside]


def check_sharp(backend: ModuleType, problem: Problem) -> None:
    """Forward and backward against float64; every number has a bound of its own."""
    arguments, logits, options = problem.arguments, problem.logits, problem.options
    assert backend.unsupported(logits, *arguments) is None
    losses, lse, log_prob, best = backend.forward(logits, *arguments)
    kept = logits.clone()
    dinput, _ = backend.backward(
        problem.dlosses, problem.dlse, logits, *arguments, lse, (True, False), options.inplace
    )
    assert _around(logits).isnan().all(), "elements between the rows were written"
    assert (dinput is logits) == options.inplace
    logits = kept
    exact = reference.forward(logits.double(), *arguments)
    x = reference.logits(logits.double(), options.softcap, options.logit_scale)
    # A logit is softcap * tanh, which is rounded.
    rounded = 2.5e-7 * options.softcap if options.softcap < NO_CAP else 0.0
    whole = lse.double().sum(0)
    assert_near("lse", whole, exact[1].sum(0), 2e-6 + rounded)
    assert_near("loss", losses, exact[0], ERROR * (1 + exact[0].abs()) + rounded)
    if log_prob is not None:
        assert_near("log_prob", log_prob, exact[2], ERROR * (1 + exact[2].abs()) + rounded)
    if best is not None:
        assert torch.equal(best, exact[3])
    check_gradient(
        dinput, problem.dlosses, problem.dlse, logits, arguments, exact[1], FLOAT32_ERROR + rounded
    )
    if (x[:, :1] == x).all() and not rounded:  # the same sum for all rows
        log_sums = whole - x[:, 0]
        assert (log_sums == log_sums[0]).all(), "lse and its rest are not maximum + log(sum)"


def assert_near(name: str, found: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    """Row by row: what is not finite agrees, the rest is as close as allowed."""
    finite = exact.isfinite()
    torch.testing.assert_close(
        found[~finite].double(), exact[~finite], rtol=0, atol=0, equal_nan=True
    )
    excess = torch.where(finite, (found.double() - exact).abs() - allowed, -1.0)
    row = int(excess.nan_to_num(torch.inf).argmax())
    assert excess[row] <= 0, f"{name} of row {row}: {found[row]:.9g}, exactly {exact[row]:.9g}"
