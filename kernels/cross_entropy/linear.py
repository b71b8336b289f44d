"""linear_cross_entropy: the loss of a linear map's outputs, which are never stored whole."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from kernels.cross_entropy import linear_function
from kernels.cross_entropy.checks import (
    check_classes,
    check_ignore_index,
    check_options,
    check_target,
    check_tensor,
    check_weight,
    is_autocast,
)
from kernels.cross_entropy.chunks import Problem
from kernels.cross_entropy.op import (
    cross_entropy,
    make_stats,
    result_dtype,
    target_weights,
)
from kernels.cross_entropy.rows import Options, Reduction, RowResults

_OP = "linear_cross_entropy"


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_stats: bool = False,
) -> Any:
    """``torch.nn.functional.linear_cross_entropy`` (torch 2.13): cross_entropy(linear(input)).

    The logits exist for one chunk of rows at a time, forward and backward.

    Args:
        input: Tensor (K) or (N, K) of float32, bfloat16, float16 or float64.
        linear_weight: Tensor (C, K), or (C, d1, ..., K) for a loss over (N, C, d1, ...).
        target: class indices or probabilities, of the logits' positions: see `cross_entropy`.
        linear_bias: Tensor (C) or (C, d1, ...), added to the logits.
        weight, reduction, label_smoothing, z_loss, softcap, return_stats: as in `cross_entropy`.
        ignore_index: None is -100 for class indices; refused with probabilities.
        options: a torch.nn.LinearCrossEntropyOptions, of which batch_chunk_size is the rows of a
            chunk; None takes as many as keep a chunk's logits in cache.  The rest of it chooses
            between precisions and modes that do not exist here: parameter gradients are summed in
            float32, and backward may run as often as the graph is retained.

    Returns:
        The loss in input's dtype (float32 under autocast, where the linear map runs in the
        autocast dtype), or (loss, CrossEntropyStats).

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as torch's function, before anything runs;
            a target out of range as in `cross_entropy`.

    Differentiable any number of times in input, linear_weight and linear_bias.  A second
    derivative, torch.func transforms, forward-mode differentiation and gradients of target
    probabilities store the logits whole.
    """
    if has_torch_function_variadic(input, linear_weight, target, linear_bias, weight):
        return handle_torch_function(
            linear_cross_entropy,
            (input, linear_weight, target, linear_bias, weight),
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=weight,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            options=options,
            z_loss=z_loss,
            softcap=softcap,
            return_stats=return_stats,
        )
    check_options(_OP, reduction, label_smoothing, z_loss, softcap, 1.0)
    shape, ignored = _check(input, linear_weight, target, linear_bias, weight, ignore_index)
    if is_autocast(input):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = _lowered(input, dtype), _lowered(linear_weight, dtype)
        linear_bias = None if linear_bias is None else _lowered(linear_bias, dtype)
    chunk_rows = _chunk_rows(options)
    row_options = Options(ignored, label_smoothing, z_loss, softcap or 0.0, 1.0, return_stats)
    if _must_store_logits(shape, input, target, weight):
        logits = F.linear(input, linear_weight.flatten(0, -2), _flat(linear_bias)).reshape(shape)
        return cross_entropy(
            logits,
            target,
            weight,
            ignored,
            reduction,
            label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            return_stats=return_stats,
        )
    return _of_positions(
        input, linear_weight, linear_bias, target, weight, reduction, row_options, chunk_rows, shape
    )


def _chunk_rows(options: Any) -> int | None:
    if options is None:
        return None
    if not hasattr(options, "batch_chunk_size"):
        raise TypeError(
            f"{_OP}: options must be a torch.nn.LinearCrossEntropyOptions or None, "
            f"not {type(options).__name__}"
        )
    rows: int | None = options.batch_chunk_size
    return rows


def _lowered(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


def _must_store_logits(
    shape: tuple[int, ...], input: Tensor, target: Tensor, weight: Tensor | None
) -> bool:
    recording = torch.is_grad_enabled()
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or math.prod(shape) == 0
        or (recording and target.requires_grad)
        or (recording and weight is not None and weight.requires_grad)
    )


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    ignore_index: int | None,
) -> tuple[tuple[int, ...], int]:
    """The logits' shape and the ignore_index; raises what torch's function would."""
    check_tensor(_OP, "input", input)
    check_tensor(_OP, "linear_weight", linear_weight, like=input)
    if input.dim() not in (1, 2):
        raise RuntimeError(f"{_OP}: expected input with 1 or 2 dimensions, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"{_OP}: expected linear_weight with at least 2 dimensions, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            f"{_OP}: input has {input.shape[-1]} features, but linear_weight "
            f"{linear_weight.shape[-1]}; they must be equal"
        )
    classes, *out_features = linear_weight.shape[:-1]
    if linear_bias is not None:
        check_tensor(_OP, "linear_bias", linear_bias, like=input)
        if linear_bias.shape != linear_weight.shape[:-1]:
            raise RuntimeError(
                f"{_OP}: linear_bias must have shape {list(linear_weight.shape[:-1])}, "
                f"but has shape {list(linear_bias.shape)}"
            )
    if not is_autocast(input):
        for name, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
            if value is not None and value.dtype != input.dtype:
                raise RuntimeError(
                    f"{_OP}: {name} is {value.dtype}, but input is {input.dtype}; "
                    "they must be equal"
                )
    if out_features and input.dim() == 1:
        raise RuntimeError(
            f"{_OP}: linear_weight of shape {list(linear_weight.shape)} needs input (N, K), "
            f"got shape {list(input.shape)}"
        )
    shape = (*input.shape[:-1], classes, *out_features)
    if isinstance(target, Tensor) and tuple(target.shape) == shape and ignore_index is not None:
        raise RuntimeError(
            f"{_OP}: ignore_index={ignore_index} cannot be given with class probabilities"
        )
    ignored = -100 if ignore_index is None else ignore_index
    check_ignore_index(_OP, ignored)
    check_target(_OP, input, shape, target, ignored)
    check_weight(_OP, weight, classes, input)
    return shape, ignored


def _of_positions(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    options: Options,
    chunk_rows: int | None,
    shape: tuple[int, ...],
) -> Any:
    """One linear map and one loss for each of d1 * ... positions: 1 unless the loss has several."""
    x = input if input.dim() == 2 else input[None]
    rows, classes, features = x.shape[0], linear_weight.shape[0], x.shape[1]
    matrices = _positions(linear_weight, (classes, -1, features))
    positions = len(matrices)
    no_biases: tuple[None, ...] = (None,) * positions
    biases = no_biases if linear_bias is None else _positions(linear_bias, (classes, positions))
    probabilities = target.is_floating_point()
    dtype = result_dtype(input, target, weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    targets = target.reshape((rows, classes, positions) if probabilities else (rows, positions))
    if not probabilities:
        targets = targets.long()
        check_classes(targets.flatten(), classes, options.ignore_index)
    elif targets.dtype != x.dtype:
        targets = targets.to(wide)
    if reduction == "sum":
        total = torch.ones((), dtype=torch.float64, device=x.device)
    elif probabilities or reduction == "none":
        total = torch.full((), rows * positions, dtype=torch.float64, device=x.device)
    else:
        flat = targets.flatten()
        counted = target_weights(flat, weight, options.ignore_index, torch.float64)
        total = counted.sum(dtype=torch.float64)
    results = []
    for position, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        row_targets = targets[..., position].contiguous()
        arguments = x, matrix, bias, row_targets, weight, total, options
        results.append(_apply(*arguments, chunk_rows, reduction != "none"))
    losses = torch.stack([result.losses for result in results], -1)
    place = (*shape[: input.dim() - 1], *shape[input.dim() :])
    if not probabilities and input.dim() == 1:
        place = tuple(target.shape)
    loss = (losses.reshape(place) if reduction == "none" else losses.sum()).to(dtype)
    if not options.stats:
        return loss
    joined = RowResults(losses, *(_joined(parts) for parts in list(zip(*results, strict=True))[1:]))
    return loss, make_stats(joined, targets.flatten() if not probabilities else targets, place)


def _positions(parameter: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Slices of `parameter` along dimension 1 of `shape`, which autograd joins in one copy; a
    single one is a view whose gradient is not copied."""
    parameter = parameter.reshape(shape)
    return (parameter.flatten(0, 1),) if parameter.shape[1] == 1 else parameter.unbind(1)


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.stack(tensors, -1).flatten() if tensors else None


def _apply(
    x: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    options: Options,
    chunk_rows: int | None,
    summed: bool,
) -> RowResults:
    learns = x.requires_grad or matrix.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and learns:
        arguments = x, matrix, bias, target, weight, total, options, chunk_rows, summed
        return RowResults(*linear_function.LinearFunction.apply(*arguments))
    problem = Problem(x, matrix, bias, target, weight, options, chunk_rows)
    rows, _ = linear_function.forward(problem, None, (False, False, False))
    losses = Reduction(rows.losses.dtype, summed, total).of(rows.losses)
    return RowResults(losses, rows.lse[0], rows.log_prob, rows.best)


class LinearCrossEntropyLoss(nn.modules.loss._WeightedLoss):
    """``torch.nn.LinearCrossEntropyLoss``: a linear map to classes and its loss, in one module."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: weight must have shape {(num_classes,)}, "
                f"but has shape {tuple(weight.shape)}"
            )
        check_options("LinearCrossEntropyLoss", reduction, label_smoothing, z_loss, softcap, 1.0)
        super().__init__(weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        self.softcap = softcap
        size = math.prod(out_features, start=num_classes)
        self.linear = nn.Linear(in_features, size, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        loss: Tensor = linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
        )
        return loss
