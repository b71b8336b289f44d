"""How far a result is from float64, and how far it may be: the one rule of tests and command line.

err(kernel) <= 2 * err(torch, same dtype) + floor
"""

from __future__ import annotations

import torch
from torch import Tensor


def error(got: Tensor, want: Tensor, terms: float = 0.0) -> float:
    """Largest difference over the largest value wanted; `want` is the float64 result.

    `terms` is the size of the terms the result is summed from: where they cancel, it and not the
    tiny rest is what errors are measured by.  Where `want` is infinite or NaN, `got` must be the
    same, else the error is infinite.
    """
    if got.shape != want.shape:
        raise ValueError(f"got has shape {tuple(got.shape)}, want has {tuple(want.shape)}")
    if not want.numel():
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    finite = torch.isfinite(want)
    same = torch.where(want.isnan(), got.isnan(), got == want)
    difference = torch.where(finite, (got - want).abs(), torch.where(same, 0.0, torch.inf))
    scale = max(torch.where(finite, want.abs(), 0.0).max().item(), terms)
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() / (scale or 1.0)


def floor(dtype: torch.dtype) -> float:
    """One unit in the last place of the largest value: what rounding alone may cost."""
    return torch.finfo(dtype).eps


def allowed(torch_error: float, dtype: torch.dtype) -> float:
    return 2 * torch_error + floor(dtype)
