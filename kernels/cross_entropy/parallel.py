"""Cross-entropy of logits whose classes are split over a process group (tensor parallelism).

Every rank runs the row kernels on its own slice; two numbers per row go round: the slice's lse, and
what the slice knows of the target.  Backward communicates nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cross_entropy.eager import raise_where_out_of_range
from kernels.cross_entropy.rows import Options, RowResults, row_losses
from kernels.dispatch import is_readable


class _Exchange(torch.autograd.Function):
    """(parts [P, N], lse [N]) of every rank -> their sum, and the lse of all classes.

    Every rank goes on to compute the same loss, so its gradient reaches each rank's parts as it is.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, lse: Tensor, group: Any) -> tuple[Tensor, Tensor]:
        gathered = gather(torch.cat((parts, lse[None])), group)  # [ranks, P + 1, N]
        total = torch.logsumexp(gathered[:, -1], 0)
        ctx.save_for_backward(lse, total)
        return gathered[:, :-1].sum(0), total

    @staticmethod
    @once_differentiable  # the other ranks' logits are not here to be differentiated
    def backward(ctx: Any, dparts: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, None]:
        lse, total = ctx.saved_tensors
        return dparts, dtotal * torch.exp(lse - total), None


def gather(x: Tensor, group: Any) -> Tensor:
    """[ranks, *x.shape], in the order of the ranks."""
    from torch import distributed

    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, x, group=group)
    return torch.stack(parts)


def parallel_rows(
    logits: Tensor,  # [N, classes of this rank]
    targets: Tensor,  # [N], classes of all ranks
    weight: Tensor | None,  # [all classes]
    options: Options,
    inplace: bool,
    group: Any,
) -> RowResults:
    """The losses of all classes, equal on every rank; differentiable once, in logits."""
    from torch import distributed

    local = logits.shape[1]
    classes = local * distributed.get_world_size(group)
    first = local * distributed.get_rank(group)
    if is_readable(targets):
        raise_where_out_of_range(targets, classes, options.ignore_index)
    ignored = targets == options.ignore_index
    valid = (targets >= 0) & (targets < classes)
    here = (targets >= first) & (targets < first + local) & ~ignored
    nothing = -1
    row_options = Options(nothing, 0.0, 0.0, options.softcap, options.logit_scale, options.stats)
    own = row_losses(
        logits,
        torch.where(here, targets - first, nothing),
        None,
        row_options,
        with_lse=True,
        inplace=inplace and not options.label_smoothing,  # which reads the logits once more
    )
    assert own.lse is not None
    lse = own.lse.double()
    parts = [torch.where(here, own.losses.double() - lse, 0)]  # -x'_target
    if options.label_smoothing:
        # Smoothing alone, of every row: sum of w_c (lse - x'_c) over this rank's classes / classes.
        slice_weight = None if weight is None else weight[first : first + local]
        smooth = row_losses(
            logits,
            torch.zeros_like(targets),
            slice_weight,
            row_options._replace(label_smoothing=1.0, stats=False),
        )
        size = local if slice_weight is None else slice_weight.double().sum()
        parts.append(smooth.losses.double() * local - size * lse)  # -sum of w_c x'_c
    sums, total = _Exchange.apply(torch.stack(parts), lse, group)
    minus_log_prob = total + sums[0]
    losses = minus_log_prob
    if weight is not None:
        losses = losses * weight.double()[targets.clamp(0, classes - 1)]
    if options.label_smoothing:
        size = classes if weight is None else weight.double().sum()
        share = options.label_smoothing / classes
        losses = (1 - options.label_smoothing) * losses + share * (sums[1] + size * total)
    losses = losses + options.z_loss * total.square()
    losses = torch.where(ignored, 0, torch.where(valid, losses, torch.nan))
    dtype = own.losses.dtype
    if not options.stats:
        return RowResults(losses.to(dtype), total.to(dtype), None, None)
    log_prob = torch.where(ignored, 0, torch.where(valid, -minus_log_prob, torch.nan)).detach()
    assert own.best is not None
    best = _best_of_all(logits.detach(), own.best, first, options.logit_scale, group)
    return RowResults(losses.to(dtype), total.to(dtype), log_prob.to(dtype), best)


def _best_of_all(
    logits: Tensor, best: Tensor, first: int, logit_scale: float, group: Any
) -> Tensor:
    """The class of the largest logit of all ranks, [N]; the first of equals."""
    values = logits.gather(1, best[:, None])[:, 0].double()
    values = gather(values if logit_scale >= 0 else -values, group)
    return gather(best + first, group).gather(0, values.argmax(0)[None])[0]
