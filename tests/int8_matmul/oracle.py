"""Int8 matmul from its definition: NumPy for the rule of quantisation, float64 for the rest."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

TINY = np.float32(2.0**-120)


def quantize_row(row: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Values and the scale of one row of float32, every step rounded to float32."""
    limit = np.float32(127)
    if not np.isfinite(row).all():
        return np.zeros(row.shape, np.int8), np.float32("nan")
    absmax = np.abs(row).max(initial=np.float32(0))
    if absmax < TINY:
        return np.zeros(row.shape, np.int8), np.float32(1)
    inverse = limit / absmax
    return np.rint(row * inverse).astype(np.int8), absmax / limit


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 [M]."""
    rows = [quantize_row(row) for row in x.float().numpy()]
    values = torch.from_numpy(np.stack([row for row, _ in rows]))
    return values, torch.from_numpy(np.stack([scale for _, scale in rows]))


def quantize_by(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The same by one given scale."""
    wide = x.float().numpy()
    inverse = np.float32(1) / scale.numpy()
    finite = np.isfinite(wide).all(1)
    values = np.rint(np.where(finite[:, None], wide, 0) * inverse).clip(-127, 127)
    scales = np.where(finite, scale.numpy(), np.float32("nan"))
    return torch.from_numpy(values.astype(np.int8)), torch.from_numpy(scales)


def activate(y: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return F.relu(y)
    if activation is None:
        return y
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def sums(values: Tensor, weight: Tensor) -> Tensor:
    """int64 [M, N] of int8 [M, K] and [N, K]."""
    return values.long() @ weight.long().t()


def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    mode: str,
    dtype: torch.dtype,
    x_scale: Tensor | None = None,
) -> Tensor:
    """y [M, N], everything behind the integers computed in `dtype`; weight_scale [N] or [1]."""
    scale = weight_scale.to(dtype)
    if mode == "weight_only":
        y = (x.to(dtype) @ weight.to(dtype).t()) * scale
    else:
        if mode == "dynamic":
            x, x_scale = quantize_rows(x)
        elif mode == "static":
            x, x_scale = quantize_by(x, x_scale)
        y = sums(x, weight).to(dtype) * (scale * x_scale.to(dtype)[:, None])
    if bias is not None:
        y = y + bias.to(dtype)
    return activate(y, activation)
