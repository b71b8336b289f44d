"""Cross-entropy for users: checks, dispatch, reductions, function and module.  Maths: README.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from kernels.cross_entropy import reference
from kernels.cross_entropy.checks import (
    check_classes,
    check_ignore_index,
    check_options,
    check_target,
    check_tensor,
    check_weight,
    is_autocast,
)
from kernels.cross_entropy.rows import Options, Reduction, RowResults, row_losses


class CrossEntropyStats(NamedTuple):
    """What `return_stats` adds: of every row, in the shape of class indices."""

    lse: Tensor  # float32: log(sum(exp(logits))); differentiable
    log_prob: Tensor | None  # float32: of the target, 0 where ignored; None for probabilities
    correct: Tensor | None  # bool: the largest logit is the target's; None for probabilities


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> Any:
    """``torch.nn.functional.cross_entropy``, fused: one sweep over the logits and one back.

    Args:
        input: logits, Tensor (C), (N, C) or (N, C, d1, ...) of float32, bfloat16, float16 or
            float64 (float64 runs on PyTorch's ops); any strides, rows are taken where they lie.
        target: class indices (), (N) or (N, d1, ...) of int64 or uint8, or class probabilities of
            input's shape in any floating dtype.
        weight: Tensor [C], how much each class counts, of any of these dtypes.
        ignore_index: rows with this target count for nothing.
        reduction: "mean" (over the weights of the targets), "sum" or "none".
        label_smoothing: share of the target that is spread evenly over all classes, 0 to 1.
        z_loss: adds z_loss * lse ** 2 to every row's loss, which keeps lse near 0 (PaLM,
            arXiv:2204.02311, section 5).
        softcap: logits become softcap * tanh(logits / softcap) first (Gemma 2, arXiv:2408.00118).
        logit_scale: logits are multiplied by it first, before softcap.
        return_stats: also return a CrossEntropyStats.
        inplace_backward: the gradient may be written over `input`, whose values are then lost; a
            later use of them in backward raises, as after any in-place operation.
        process_group: input holds this rank's slice of the classes (rank r the r-th of equal
            slices), target indices of all: every rank gets the whole loss.

    Returns:
        The loss in the dtype F.cross_entropy gives, or (loss, CrossEntropyStats).  Losses are
        computed in float32 (float64 for float64 input) from the logits as they are.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as F.cross_entropy, before
            anything runs.
        IndexError: a target is out of range.  On a GPU, which cannot tell without stopping, only
            inside kernels.dispatch.checked; else the loss of that row is NaN.

    Differentiable any number of times in input, and in target probabilities; the first derivative
    is fused and deterministic.  Under autocast the loss is float32, as F.cross_entropy's.  Inside
    torch.func transforms and forward-mode differentiation PyTorch's ordinary ops run.
    """
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            logit_scale=logit_scale,
            return_stats=return_stats,
            inplace_backward=inplace_backward,
            process_group=process_group,
        )
    check_options("cross_entropy", reduction, label_smoothing, z_loss, softcap, logit_scale)
    check_ignore_index("cross_entropy", ignore_index)
    logits, targets, positions = as_rows(input, target, weight, ignore_index, process_group)
    if logits.shape[1] == 0:  # a loss of nothing
        return F.cross_entropy(
            input, target, weight, None, ignore_index, None, reduction, label_smoothing
        )
    options = Options(
        ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale, return_stats
    )
    dtype = result_dtype(input, target, weight)
    summed = reduction != "none"
    total = None
    if reduction == "mean":
        wide = torch.promote_types(logits.dtype, torch.float32)
        total = mean_total(targets, weight, ignore_index, wide)
    reducer = Reduction(dtype, summed, total)
    if process_group is None and not must_be_composite(logits, weight):
        check_classes(targets, logits.shape[1], ignore_index)
        rows = row_losses(logits, targets, weight, options, return_stats, inplace_backward, reducer)
        loss = rows.losses
    else:
        if process_group is None:
            rows = composite_rows(logits, targets, weight, options)
        else:
            from kernels.cross_entropy.parallel import parallel_rows

            rows = parallel_rows(logits, targets, weight, options, inplace_backward, process_group)
        loss = reducer.of(rows.losses)
    if reduction == "none":
        loss = loss.reshape(positions)
    return (loss, make_stats(rows, targets, positions)) if return_stats else loss


def backend_arguments(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_stats: bool = False,
    process_group: Any = None,
    **_: Any,
) -> tuple[Any, ...]:
    """The call as backends see it; `kernels.dispatch.explain` asks."""
    logits, targets, _positions = as_rows(input, target, weight, ignore_index, process_group)
    capped = softcap or 0.0
    rest = Options(ignore_index, label_smoothing, z_loss, capped, logit_scale, return_stats)
    return (logits, targets, weight, *rest)


def as_rows(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, process_group: Any
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Logits [N, C], targets [N] or [N, C], and the shape of one value per row; checks them all."""
    check_tensor("cross_entropy", "input", input)
    if input.dim() == 0:
        raise IndexError("cross_entropy: input must have a dimension of classes, but is a scalar")
    shape = tuple(input.shape)
    probabilities = check_target("cross_entropy", input, shape, target, ignore_index)
    class_dim = min(1, len(shape) - 1)
    classes = shape[class_dim]
    if process_group is None:
        check_weight("cross_entropy", weight, classes, input)
    positions = shape[:class_dim] + shape[class_dim + 1 :]
    if len(shape) == 1:
        positions = () if probabilities else tuple(target.shape)

    def rows(x: Tensor) -> Tensor:
        x = x if len(shape) == 2 else x.movedim(class_dim, -1).reshape(-1, classes)
        return x if x.stride(1) == 1 else x.contiguous()

    logits = rows(input)
    if not probabilities:
        return logits, target.reshape(-1).long(), positions
    dtype = torch.promote_types(input.dtype, torch.float32)
    if target.dtype != input.dtype:
        target = target.to(dtype)
    return logits, rows(target).contiguous(), positions


def must_be_composite(logits: Tensor, weight: Tensor | None) -> bool:
    """Whether a kernel on raw memory cannot take part."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (weight is not None and weight.requires_grad and torch.is_grad_enabled())
    )


def composite_rows(
    logits: Tensor, targets: Tensor, weight: Tensor | None, options: Options
) -> RowResults:
    losses, lse, log_prob, best = reference.forward(logits, targets, weight, *options)
    return RowResults(losses, lse[0], log_prob, best)


def target_weights(
    targets: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """What the rows of class indices count in a mean, [N] (bool where there are no weights)."""
    counted = targets != ignore_index
    if weight is None:
        return counted
    classes = weight.shape[0]  # a target out of range must not be an address, on a GPU either
    return torch.where(counted, weight.to(dtype)[targets.clamp(0, classes - 1)], 0)


def mean_total(
    targets: Tensor, weight: Tensor | None, ignore_index: int, wide: torch.dtype
) -> Tensor:
    """What a mean divides by, a scalar: what the rows count, or the number of rows."""
    if targets.is_floating_point():
        return torch.full((), targets.shape[0], dtype=wide, device=targets.device)
    if weight is None:
        return torch.count_nonzero(targets != ignore_index)
    return target_weights(targets, weight, ignore_index, torch.float64).sum()


def result_dtype(input: Tensor, target: Tensor, weight: Tensor | None) -> torch.dtype:
    """The dtype that F.cross_entropy gives its result, under autocast too."""
    dtype = input.dtype
    if target.is_floating_point():
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    if dtype.itemsize == 2 and is_autocast(input):
        return torch.float32
    return dtype


def make_stats(rows: RowResults, targets: Tensor, positions: tuple[int, ...]) -> CrossEntropyStats:
    assert rows.lse is not None
    lse = rows.lse.reshape(positions)
    if rows.log_prob is None or rows.best is None:
        return CrossEntropyStats(lse, None, None)
    correct = torch.eq(rows.best, targets).reshape(positions)
    return CrossEntropyStats(lse, rows.log_prob.reshape(positions), correct)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Targets of a causal model: `labels` [..., T] one position earlier, the last one ignored.

    The logits at position t predict the label at t + 1.
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on these kernels; keywords as in `cross_entropy`."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.inplace_backward = inplace_backward

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            inplace_backward=self.inplace_backward,
        )
        return loss
