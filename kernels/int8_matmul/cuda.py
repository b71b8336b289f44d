"""Int8 matmul in CUDA C++: not written yet."""

from __future__ import annotations

import torch
from torch import Tensor

backward = None


def unsupported(*_: object) -> str | None:
    return "there is no kernel yet"


def forward(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor]:
    raise NotImplementedError(unsupported())
