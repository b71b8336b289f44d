"""Rows as int8 in plain torch: the rule of quantisation that every backend follows to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.layer_norm import reference as layer_norm

LIMIT = 127.0  # largest value: symmetric, so -128 is not used
TINY = 2.0**-120  # rows below are zeros: 127 / TINY is still finite in float32

backward = None


def unsupported(*_: object) -> str | None:
    return None


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as int8 of its shape, and the scale of each row, float32 [...].

    Rows with a NaN or an infinity get scale NaN, rows of zeros get scale 1; both get values 0.
    """
    wide = x.float()
    if x.shape[-1] == 0:
        return torch.zeros_like(x, dtype=torch.int8), wide.new_ones(x.shape[:-1])
    absmax = wide.abs().amax(-1)
    finite = absmax < torch.inf  # False for NaN
    used = finite & (absmax >= TINY)
    divisor = torch.where(used, absmax, 1.0)
    # Divisions of tensors are rounded once; those by or of a number may be a multiplication.
    limit = torch.full_like(divisor, LIMIT)
    unused = torch.ones_like(divisor).masked_fill(~finite, torch.nan)
    scale = torch.where(used, divisor / limit, unused)
    values = (wide * (limit / divisor)[..., None]).round()  # to even
    return torch.where(used[..., None], values, 0.0).to(torch.int8), scale


def forward(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The rows of x [M, K], or of its layer norm, as int8 [M, K], and their scales, float32 [M]."""
    if normalized and x.shape[1]:
        x = layer_norm.forward(x.float(), x.shape[1:], weight, bias, eps)[0].float()
    values, scale = quantize_rows(x)
    return values.contiguous(), scale
