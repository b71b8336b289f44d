"""Layer norm in plain torch: the tests' oracle, the fake of the ops, and the second derivative.

Runs in any floating dtype; float64 stays float64, everything else is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unsupported(*_: object) -> str | None:
    return None


def _split(x: Tensor, normalized_shape: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """The shape of the statistics and the dimensions that are normalised."""
    rank = len(normalized_shape)
    return tuple(x.shape[: x.dim() - rank]), list(range(x.dim() - rank, x.dim()))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def row_statistics(x: Tensor, normalized_shape: Sequence[int], eps: float) -> Tensor:
    """[2 * rows]: every row's mean, then every row's rstd = 1 / sqrt(variance + eps).

    Differentiable in x.
    """
    _, dims = _split(x, normalized_shape)
    wide = _wide(x)
    mean = wide.mean(dims, keepdim=True)
    mean = mean + (wide - mean).mean(dims, keepdim=True)  # takes out the first sum's rounding
    variance = (wide - mean).square().mean(dims)
    return torch.cat((mean.flatten(), torch.rsqrt(variance + eps).flatten()))


def _per_row(statistics: Tensor, lead: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    """mean and rstd in a shape that broadcasts against x."""
    mean, rstd = statistics.reshape(2, *lead, *(1,) * rank)
    return mean, rstd


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    """y = (x - mean) * rstd * weight + bias, and the statistics, wanted or not."""
    kept = row_statistics(x, normalized_shape, eps)
    mean, rstd = _per_row(kept, _split(x, normalized_shape)[0], len(normalized_shape))
    y = (_wide(x) - mean) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous(), kept


def backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that `output_mask` asks for; None for the others."""
    lead, dims = _split(x, normalized_shape)
    rows = list(range(len(lead)))
    mean, rstd = _per_row(statistics, lead, len(normalized_shape))
    xhat = (_wide(x) - mean) * rstd
    dy = _wide(dy)
    dx = dweight = dbias = None
    if output_mask[0]:
        dxhat = dy if weight is None else dy * weight
        centred = dxhat - dxhat.mean(dims, keepdim=True)
        dx = rstd * (centred - xhat * (dxhat * xhat).mean(dims, keepdim=True))
        dx = dx.to(x.dtype).contiguous()
    if output_mask[1] and weight is not None:
        dweight = _sum_rows(dy * xhat, rows).to(weight.dtype)
    if output_mask[2] and bias is not None:
        dbias = _sum_rows(dy, rows).to(bias.dtype)
    return dx, dweight, dbias


def _sum_rows(values: Tensor, rows: list[int]) -> Tensor:
    # sum over no dimensions would sum over all of them
    return values.sum(rows) if rows else values.contiguous()
