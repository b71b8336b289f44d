"""Linear + cross-entropy under autograd: which way its logits are gone through, and its gradients.

Whole where a kernel needs none in memory (Triton), over slices of classes, or over chunks of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch
from kernels.cross_entropy import chunks, slices
from kernels.cross_entropy.chunks import Gradients, Losses, Problem
from kernels.cross_entropy.rows import Options, Reduction, row_losses, select_backend
from kernels.dispatch import Operators


def forward(
    problem: Problem, dlosses: Tensor | None, mask: tuple[bool, ...]
) -> tuple[Losses, Gradients]:
    """Losses of all rows and, where `dlosses` (expanded to [N]) is given, the gradients."""
    fused = _without_logits(problem)
    if fused is not None:
        whole = Losses(*fused.forward(problem))
        if dlosses is None:
            return whole, Gradients(None, None, None)
        return whole, Gradients(*fused.backward(problem, dlosses, None, whole.lse, mask))
    way = slices if slices.takes(problem) else chunks
    return way.forward(problem, dlosses, mask)


def backward(
    problem: Problem, dlosses: Tensor, dlse: Tensor | None, lse: Tensor, mask: tuple[bool, ...]
) -> Gradients:
    """The gradients, from logits computed once more."""
    fused = _without_logits(problem)
    if fused is not None:
        return Gradients(*fused.backward(problem, dlosses, dlse, lse, mask))
    way = slices if slices.takes(problem) else chunks
    return way.backward(problem, dlosses, dlse, lse, mask)


def _without_logits(problem: Problem) -> Any:
    """The kernels that need no logits in memory, where the backend that runs has them."""
    logits = problem.input.new_empty(0, problem.linear_weight.shape[0])
    backend = select_backend(logits, problem.target[:0], problem.weight, problem.options)
    if isinstance(backend, Operators) or backend is not dispatch.load("cross_entropy", "triton"):
        return None
    from kernels.cross_entropy import triton_linear

    return triton_linear if triton_linear.unsupported(problem) is None else None


class LinearFunction(torch.autograd.Function):
    """Losses, or where `summed` their sum over `total`, with the gradients then made in forward.

    They are handed out once, scaled in place by the gradient that arrives; a second backward, like
    that of single losses and of lse, computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        total: Tensor,  # scalar, float64
        options: Options,
        chunk_rows: int | None,
        summed: bool,
    ) -> tuple[Tensor | None, ...]:
        problem = Problem(input, linear_weight, linear_bias, target, weight, options, chunk_rows)
        wide = torch.promote_types(input.dtype, torch.float32)
        scale = (1 / total if summed else torch.ones_like(total)).to(wide)
        # float16 holds no gradients of 1 / N: there the scale waits for the gradient's.  But 1 / 0,
        # where nothing counts, must not reach the rows that are ignored.
        late = torch.ones_like(scale)
        if input.dtype == torch.float16:
            late = torch.where(total == 0, late, scale)
        dlosses = (scale / late).expand(input.shape[0])
        mask = ctx.needs_input_grad[:3]
        rows, gradients = forward(problem, dlosses if summed else None, mask)
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight, scale, late)
        ctx.rest = options, chunk_rows, rows.lse
        ctx.gradients = gradients if summed else None
        ctx.set_materialize_grads(False)
        log_prob, best = (rows.log_prob, rows.best) if options.stats else (None, None)
        lse = rows.lse[0].clone() if options.stats else None
        ctx.mark_non_differentiable(*(x for x in (log_prob, best) if x is not None))
        loss = Reduction(rows.losses.dtype, summed, total).of(rows.losses)
        return loss, lse, log_prob, best

    @staticmethod
    def backward(
        ctx: Any, dloss: Tensor | None, dlse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, linear_weight, linear_bias, target, weight, scale, late = ctx.saved_tensors
        options, chunk_rows, lse = ctx.rest
        problem = Problem(x, linear_weight, linear_bias, target, weight, options, chunk_rows)
        dloss = torch.zeros_like(scale) if dloss is None else dloss
        dlosses = (dloss * scale).expand(problem.input.shape[0])
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            gradients = _differentiable(problem, dlosses, dlse, mask)
        elif ctx.gradients is None or dlse is not None:
            gradients = backward(problem, dlosses, dlse, lse, mask)
        else:
            gradients = _scaled(ctx, dloss * late)
        return (*gradients, None, None, None, None, None, None)


def _scaled(ctx: Any, factor: Tensor) -> Gradients:
    if torch.compiler.is_compiling():  # a compiled backward may run twice on the same gradients
        return Gradients(*((g * factor).to(g.dtype) if g is not None else g for g in ctx.gradients))
    gradients: Gradients = ctx.gradients
    ctx.gradients = None
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)
    return gradients


def _differentiable(
    problem: Problem, dlosses: Tensor, dlse: Tensor | None, mask: tuple[bool, ...]
) -> Gradients:
    """The gradients by operations that can be differentiated again, on logits stored whole."""
    logits = F.linear(problem.input, problem.linear_weight, problem.linear_bias)
    rows = row_losses(logits, problem.target, problem.weight, problem.options, with_lse=True)
    inputs = (problem.input, problem.linear_weight, problem.linear_bias)
    wanted = [x for x, asked in zip(inputs, mask, strict=True) if asked and x is not None]
    outputs, gradients = [rows.losses], [dlosses]
    if dlse is not None and rows.lse is not None:
        outputs.append(rows.lse)
        gradients.append(dlse)
    found = iter(torch.autograd.grad(outputs, wanted, gradients, create_graph=True))
    return Gradients(*(next(found) if asked else None for asked in mask))
