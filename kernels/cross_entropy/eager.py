"""Cross-entropy by PyTorch's own ops, which take every device and dtype: the last resort.

The reference's formula, in float32 (float64 for float64 input), after a check of the targets.
F.cross_entropy itself has no lse to hand on, and stops a GPU at a target out of range.
"""

from __future__ import annotations

from torch import Tensor

from kernels.cross_entropy import reference
from kernels.cross_entropy.reference import backward

__all__ = ["backward", "forward", "unsupported"]


def unsupported(*_: object) -> str | None:
    return None


def forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if target.is_cpu and type(target) is Tensor and not target.is_floating_point():
        raise_where_out_of_range(target, input.shape[1], ignore_index)
    return reference.forward(
        input,
        target,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        logit_scale,
        stats,
    )


def raise_where_out_of_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for the first target that is neither a class nor ignored."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise IndexError(
            f"cross_entropy: target {int(target[position])} at position {position} is out of "
            f"range: accepted are 0 to {classes - 1} and ignore_index"
        )
