"""Rows as int8 in CUDA C++: not written yet."""

from __future__ import annotations

from torch import Tensor

backward = None


def unsupported(*_: object) -> str | None:
    return "there is no kernel yet"


def forward(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    raise NotImplementedError(unsupported())
