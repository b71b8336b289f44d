"""Rows as int8 by PyTorch's own ops: F.layer_norm in float32, then the rule as it stands."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.int8_matmul.rows.reference import quantize_rows

backward = None


def unsupported(*_: object) -> str | None:
    return None


def forward(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    if normalized:
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
        x = F.layer_norm(x.float(), x.shape[1:], weight, bias, eps)
    values, scale = quantize_rows(x)
    return values.contiguous(), scale
