"""What cross_entropy accepts: everything else is refused before anything runs, as torch does."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.cross_entropy.eager import raise_where_out_of_range
from kernels.dispatch import is_checked, is_readable

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_REDUCTIONS = ("none", "mean", "sum")


def check_options(
    op: str,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    numbers = ("label_smoothing", label_smoothing), ("z_loss", z_loss), ("logit_scale", logit_scale)
    for name, value in (*numbers, ("softcap", 0.0 if softcap is None else softcap)):
        # torch takes what float() takes, but for text.
        if type(value) is not float and (isinstance(value, str) or not hasattr(value, "__float__")):
            raise TypeError(f"{op}: {name} must be a float, not {type(value).__name__}")
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"{op}: {reduction!r} is not a valid value for reduction "
            f"(accepted: {', '.join(_REDUCTIONS)})"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(
            f"{op}: label_smoothing must be between 0.0 and 1.0, got {label_smoothing}"
        )
    # No math.isfinite: under torch.compile(dynamic=True) a float may be symbolic.
    if not -math.inf < z_loss < math.inf:
        raise ValueError(f"{op}: z_loss must be finite, got {z_loss}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive and finite, or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"{op}: logit_scale must be finite, got {logit_scale}")


def check_ignore_index(op: str, value: Any) -> None:
    # Under torch.compile an int may be symbolic, of which no attribute can be asked for.
    known = type(value) is int or isinstance(value, torch.SymInt)
    if not known and (isinstance(value, bool) or not hasattr(value, "__index__")):
        raise TypeError(f"{op}: ignore_index must be an int, not {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: ignore_index must fit 64 bits with sign, got {value}")


def check_tensor(op: str, name: str, value: Any, like: Tensor | None = None) -> None:
    """A floating Tensor of an accepted dtype, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, not {type(value).__name__}")
    if value.dtype not in _DTYPES:
        raise NotImplementedError(
            f"{op}: {name} is {value.dtype}; accepted are float32, bfloat16, float16, float64"
        )
    if like is not None and value.device != like.device:
        raise RuntimeError(f"{op}: {name} is on {value.device}, but input is on {like.device}")


def check_target(
    op: str, input: Tensor, shape: tuple[int, ...], target: Any, ignore_index: int
) -> bool:
    """True where `target` holds probabilities: where it has the shape (of the logits) `shape`.

    Raises what F.cross_entropy raises for logits of that shape on input's device.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a Tensor, not {type(target).__name__}")
    if target.device != input.device:
        raise RuntimeError(f"{op}: target is on {target.device}, but input is on {input.device}")
    if tuple(target.shape) == shape:
        if not target.is_floating_point():
            raise RuntimeError(
                f"{op}: target has the logits' shape {list(shape)} and so holds class "
                f"probabilities: a floating point dtype is expected, but target is {target.dtype}"
            )
        if ignore_index >= 0:
            raise RuntimeError(
                f"{op}: ignore_index={ignore_index} is not supported for class probabilities"
            )
        return True
    if len(shape) == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise ValueError(
                f"{op}: for 1D logits target must have one element, but has shape "
                f"{list(target.shape)}"
            )
    else:
        expected = (shape[0], *shape[2:])
        if target.dim() > 0 and target.shape[0] != shape[0]:
            raise ValueError(
                f"{op}: expected logits batch_size ({shape[0]}) to match target batch_size "
                f"({target.shape[0]})"
            )
        if tuple(target.shape) != expected:
            raise RuntimeError(
                f"{op}: target must have shape {list(expected)} for logits of shape "
                f"{list(shape)}, but has shape {list(target.shape)}"
            )
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(
            f"{op}: target holds class indices: expected dtype int64 or uint8, got {target.dtype}"
        )
    return False


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """In checked mode: IndexError for the first of `target` [N] that is no class, on any device."""
    if is_checked() and not target.is_floating_point() and is_readable(target):
        raise_where_out_of_range(target, classes, ignore_index)


def check_weight(op: str, weight: Any, classes: int, input: Tensor) -> None:
    if weight is None:
        return
    check_tensor(op, "weight", weight, like=input)
    if tuple(weight.shape) != (classes,):
        raise RuntimeError(
            f"{op}: weight must have one element for each of the {classes} classes, "
            f"but has shape {list(weight.shape)}"
        )


def is_autocast(input: Tensor) -> bool:
    """Whether torch.autocast is on where `input` is; the meta device has none to ask about."""
    return input.device.type != "meta" and torch.is_autocast_enabled(input.device.type)
