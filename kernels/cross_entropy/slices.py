"""Linear + cross-entropy over slices of classes: the logits of a few classes exist at a time.

For 16-bit dtypes without instructions for their products, which are float32's then (chunks.py).
Over chunks of rows the weight's gradient would be summed in float32, twice its own size and larger
than all else together; a slice of it is finished at once.  The price is a fourth product, as the
logits are computed once for lse and once more for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy import reference
from kernels.cross_entropy.chunks import Gradients, Losses, Problem, in_parts, parts, slices
from kernels.cross_entropy.rows import Options, select_backend

CLASSES, ROWS = 512, 2048  # of a block of logits: 4 MiB, and products large enough to be quick
NOTHING = -1  # the target of a row whose class is in another slice


def takes(problem: Problem) -> bool:
    """Whether this is worth while, and a loss whose gradient in a class needs no other class."""
    options = problem.options
    plain = not (options.label_smoothing or options.stats or problem.target.is_floating_point())
    by_size = problem.chunk_rows is None and not torch.compiler.is_compiling()
    return in_parts(problem.input) and plain and by_size and len(slices(problem)) > 1


class Blocks:
    """The logits of one call, in float32, block after block."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x = problem.input.float()
        self.rows = parts(len(self.x), ROWS)
        self.classes = parts(len(problem.linear_weight), CLASSES)
        self._buffer = self.x.new_empty(self.rows[0].stop * self.classes[0].stop)
        # Weights, smoothing and z-loss come with the gradients of each row.
        self.options = Options(
            NOTHING, 0.0, 0.0, problem.options.softcap, problem.options.logit_scale, False
        )

    def matrix(self, classes: slice) -> Tensor:
        return self.problem.linear_weight[classes].float()

    def of(self, classes: slice, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their logits of these classes, which the next rows' will overwrite."""
        bias = self.problem.linear_bias
        for rows in self.rows:
            x = self.x[rows]
            logits = self._buffer[: len(x) * len(matrix)].view(len(x), len(matrix))
            torch.mm(x, matrix.t(), out=logits)
            if bias is not None:
                logits += bias[classes]
            yield rows, logits

    def local(self, rows: slice, classes: slice) -> tuple[Tensor, Tensor]:
        """The rows' targets counted from the slice's first class, and which of them are in it."""
        target = self.problem.target[rows]
        here = (target >= classes.start) & (target < classes.stop) & self.counted(rows)
        return torch.where(here, target - classes.start, NOTHING), here

    def counted(self, rows: slice) -> Tensor:
        return self.problem.target[rows] != self.problem.options.ignore_index

    def ask(self, logits: Tensor, target: Tensor) -> tuple[Any, tuple[Any, ...]]:
        """The backend of a block and the arguments of its forward."""
        backend = select_backend(logits, target, None, self.options)
        return backend, (logits, target, None, *self.options)


def _row_weights(problem: Problem) -> Tensor | None:
    """What each row's loss is multiplied by, [N] in float32."""
    if problem.weight is None:
        return None
    return problem.weight.float()[problem.target.clamp(0, len(problem.weight) - 1)]


def forward(
    problem: Problem, dlosses: Tensor | None, mask: tuple[bool, ...]
) -> tuple[Losses, Gradients]:
    """As chunks.forward."""
    with torch.autocast("cpu", enabled=False):  # which would take the products to 16 bits again
        blocks = Blocks(problem)
        losses, lse = _losses(blocks)
        gradients = Gradients(None, None, None)
        if dlosses is not None:
            gradients = _gradients(blocks, dlosses, None, lse, mask)
    return Losses(losses, lse, None, None), gradients


def backward(
    problem: Problem, dlosses: Tensor, dlse: Tensor | None, lse: Tensor, mask: tuple[bool, ...]
) -> Gradients:
    """As chunks.backward."""
    with torch.autocast("cpu", enabled=False):
        return _gradients(Blocks(problem), dlosses, dlse, lse, mask)


def _losses(blocks: Blocks) -> tuple[Tensor, Tensor]:
    """losses [N] and lse [2, N]: the sum and, of its rounding, the rest."""
    problem, x = blocks.problem, blocks.x
    options = problem.options
    total = x.new_full((len(x),), -torch.inf, dtype=torch.float64)
    picked = torch.zeros_like(total)  # the target's logit
    for classes in blocks.classes:
        for rows, logits in blocks.of(classes, blocks.matrix(classes)):
            target, here = blocks.local(rows, classes)
            at_target = logits.gather(1, target.clamp(min=0)[:, None])[:, 0].double()
            at_target = reference.logits(at_target, options.softcap, options.logit_scale)
            picked[rows] = torch.where(here, at_target, picked[rows])
            backend, arguments = blocks.ask(logits, torch.full_like(target, NOTHING))
            lse = backend.forward(*arguments)[1].double().sum(0)
            total[rows] = torch.logaddexp(total[rows], lse)
    losses = total - picked
    weights = _row_weights(problem)
    if weights is not None:
        losses *= weights
    losses += options.z_loss * total.square()
    target = problem.target
    valid = (target >= 0) & (target < len(problem.linear_weight))
    losses = torch.where(valid, losses, torch.nan)
    losses = torch.where(target == options.ignore_index, 0, losses)
    high = total.float()
    rest = torch.where(high.isfinite(), total - high, 0).float()
    return losses.float(), torch.stack((high, rest))


def _gradients(
    blocks: Blocks, dlosses: Tensor, dlse: Tensor | None, lse: Tensor, mask: tuple[bool, ...]
) -> Gradients:
    problem, x = blocks.problem, blocks.x
    weights = _row_weights(problem)
    of_target = dlosses.float() if weights is None else dlosses.float() * weights
    of_lse = dlosses.float() * (2 * problem.options.z_loss) * lse[0]
    counted = blocks.counted(slice(None))
    of_target, of_lse = (torch.where(counted, g, 0.0) for g in (of_target, of_lse))
    if dlse is not None:
        of_lse = of_lse + dlse.float()
    silent = ~counted if dlse is None and not bool(counted.all()) else None
    dx = torch.zeros_like(x) if mask[0] else None
    dweight = torch.empty_like(problem.linear_weight) if mask[1] else None
    with_bias = mask[2] and problem.linear_bias is not None
    dbias = torch.empty_like(problem.linear_bias) if with_bias else None  # type: ignore[arg-type]
    for classes in blocks.classes:
        matrix = blocks.matrix(classes)
        part, bias_part = torch.zeros_like(matrix), matrix.new_zeros(len(matrix))
        for rows, logits in blocks.of(classes, matrix):
            target, here = blocks.local(rows, classes)
            # A row whose class is elsewhere has of its loss the part that goes through lse.
            through_lse = of_lse[rows] + torch.where(here, 0.0, of_target[rows])
            backend, arguments = blocks.ask(logits, target)
            kept = lse[:, rows].contiguous()
            dlogits = backend.backward(
                of_target[rows].contiguous(), through_lse, *arguments, kept, (True, False), True
            )[0]
            if silent is not None:  # exactly 0, whatever their logits are
                dlogits.masked_fill_(silent[rows, None], 0.0)
            if dx is not None:
                dx[rows].addmm_(dlogits, matrix)
            if dweight is not None:
                part.addmm_(dlogits.t(), x[rows])
            if dbias is not None:
                bias_part += dlogits.sum(0)
        if dweight is not None:
            dweight[classes] = part
        if dbias is not None:
            dbias[classes] = bias_part
    return Gradients(None if dx is None else dx.to(problem.input.dtype), dweight, dbias)
