"""One call per row: the registered ops, and autograd through whichever backend runs.

Everything above this file (reductions, shapes, chunks, process groups) is made of `row_losses` and
ordinary operations on [N] tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.cross_entropy import eager, reference
from kernels.dispatch import Operators, define

_OPTIONS = (
    "Tensor input, Tensor target, Tensor? weight, int ignore_index, float label_smoothing,"
    " float z_loss, float softcap, float logit_scale, bool stats"
)
choose = define(
    "cross_entropy",
    forward=f"({_OPTIONS}) -> (Tensor losses, Tensor lse, Tensor log_prob, Tensor best)",
    backward=f"(Tensor dlosses, Tensor? dlse, {_OPTIONS}, Tensor lse, bool[2] output_mask,"
    " bool inplace) -> (Tensor dinput, Tensor dtarget)",
    gradients=2,
)


class Options(NamedTuple):
    """What every backend takes after input, target and weight, in its order."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none
    logit_scale: float
    stats: bool


class RowResults(NamedTuple):
    """Of each row, [N]: see reference.forward.  All but losses are None where not asked for."""

    losses: Tensor
    lse: Tensor | None
    log_prob: Tensor | None
    best: Tensor | None


def select_backend(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Any:
    backend = choose(input, target, weight, *options)
    if isinstance(backend, Operators) and target.requires_grad:
        return eager  # the registered ops' backends differentiate only the logits
    return backend


class Reduction(NamedTuple):
    """What becomes of the losses, in float32, of all rows."""

    dtype: torch.dtype  # of the result
    summed: bool = False
    # Scalar that the sum is divided by.  Where weights add up to it both are summed in float64, as
    # rounding each term would show beside the rows' own errors.
    total: Tensor | None = None

    def of(self, losses: Tensor) -> Tensor:
        if self.summed and self.total is not None and self.total.is_floating_point():
            losses = losses.sum(dtype=self.total.dtype) / self.total
        elif self.summed:
            losses = losses.sum() if self.total is None else losses.sum() / self.total
        return losses.to(self.dtype)

    def gradient(self, dloss: Tensor, rows: int, wide: torch.dtype) -> Tensor:
        """Of each loss, [rows]."""
        dloss = dloss.to(wide)
        if not self.summed:
            return dloss
        return (dloss if self.total is None else (dloss / self.total).to(wide)).expand(rows)


class RowFunction(torch.autograd.Function):
    """Backward runs the forward's backend, or, under create_graph, the reference's formula.

    The reduction is part of it: as operations of their own, autograd would take longer for it than
    for the losses of a small model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        with_lse: bool,
        inplace: bool,
        dtype: torch.dtype,
        summed: bool,
        total: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        backend = select_backend(input, target, weight, options)
        losses, lse, log_prob, best = backend.forward(input, target, weight, *options)
        ctx.save_for_backward(input, target, weight, total)
        ctx.rest = backend, lse, options, inplace, dtype, summed
        ctx.set_materialize_grads(False)
        if not options.stats or target.is_floating_point():
            log_prob = None
        if not options.stats:
            best = None
        ctx.mark_non_differentiable(*(x for x in (log_prob, best) if x is not None))
        loss = Reduction(dtype, summed, total).of(losses)
        # A copy: what the caller does to it must not reach the backward.
        return loss, lse[0].clone() if with_lse else None, log_prob, best

    @staticmethod
    def backward(
        ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        input, target, weight, total = ctx.saved_tensors  # raises where one was written to since
        backend, lse, options, inplace, dtype, summed = ctx.rest
        rows = input.shape[0]
        if dloss is None:
            dlosses = lse.new_zeros(1).expand(rows)
        else:
            dlosses = Reduction(dtype, summed, total).gradient(dloss, rows, lse.dtype)
        if torch.is_grad_enabled():
            # create_graph: lse depends on input, so it takes part in the second derivative.
            x = reference.logits(input, options.softcap, options.logit_scale)
            lse, backend, inplace = reference.log_sum_exp(x), reference, False
        inplace = inplace and not isinstance(backend, Operators) and not _overlap(input)
        mask = ctx.needs_input_grad[:2]
        dinput, dtarget = backend.backward(
            dlosses, dlse, input, target, weight, *options, lse, mask, inplace
        )
        if inplace:
            torch.autograd.graph.increment_version(input)
        return dinput if mask[0] else None, dtarget if mask[1] else None, *(None,) * 7


# Function.apply without its preparations for torch.func.
_apply = super(torch.autograd.Function, RowFunction).apply


def _overlap(rows: Tensor) -> bool:
    return rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]


def row_losses(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    with_lse: bool = False,
    inplace: bool = False,
    reduction: Reduction | None = None,
) -> RowResults:
    """Losses, and what else was asked for, of input [N, C], differentiable in input and target.

    With a `reduction` what it makes of the losses is in their place.
    """
    if reduction is None:
        reduction = Reduction(torch.promote_types(input.dtype, torch.float32))
    if torch.is_grad_enabled() and (input.requires_grad or target.requires_grad):
        prepared = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        apply = RowFunction.apply if prepared else _apply
        arguments = input, target, weight, options, with_lse, inplace
        return RowResults(*apply(*arguments, *reduction))
    backend = select_backend(input, target, weight, options)
    losses, lse, log_prob, best = backend.forward(input, target, weight, *options)
    with_log_prob = options.stats and not target.is_floating_point()
    return RowResults(
        reduction.of(losses),
        lse[0] if with_lse else None,
        log_prob if with_log_prob else None,
        best if options.stats else None,
    )
