"""Rows as int8, normalised first or not, in Triton: the kernels of ../triton_rows.py."""

from __future__ import annotations

from torch import Tensor

from kernels.int8_matmul.triton_rows import quantize_rows, refusal

__all__ = ["backward", "forward", "unsupported"]

backward = None


def unsupported(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    """None where these kernels accept the call, else one sentence saying why not."""
    return refusal(x, weight, bias)


def forward(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 [M]: the rows of x, or of its layer norm, and their scales."""
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    return quantize_rows(x, None, normalized, weight, bias, eps)
