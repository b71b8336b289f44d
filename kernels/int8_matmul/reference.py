"""Int8 matmul in plain torch: the tests' oracle and the fake of the op.

Integer sums are exact: float64 holds all of them.  What follows them is computed in float32, or in
float64 where x or the result is float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.int8_matmul.rows.reference import LIMIT, quantize_rows

backward = None


def unsupported(*_: object) -> str | None:
    return None


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], both int8, as int32 [M, N], modulo 2^32."""
    exact = x.double() @ weight.double().t()  # below 2^53 for any K that memory holds
    return exact.long().int()


def quantize_by(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] as int8 by the scale [1], and the scale of each row: NaN where it is not finite."""
    wide = x.float()
    inverse = torch.ones_like(scale) / scale
    values = (wide * inverse).round().clamp(-LIMIT, LIMIT)
    finite = wide.isfinite().all(-1)
    values = torch.where(finite[:, None], values, 0.0).to(torch.int8)
    return values, torch.where(finite, scale, torch.nan)


def activate(y: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    return y


def epilogue(
    product: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """act(product * (weight_scale * x_scale) + bias) in the dtype of product, then rounded."""
    scale = weight_scale.to(product.dtype)
    if x_scale is not None:
        scale = scale * x_scale.to(product.dtype)[:, None]  # [M, N], or [M, 1], [1, N], [1, 1]
    y = product * scale
    if bias is not None:
        y = y + bias.to(product.dtype)
    return activate(y, activation).to(out_dtype).contiguous()


def run(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor | None,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    activation: str,
    mode: str,
    out_dtype: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor]:
    """y [M, N] of x [M, K] and weight [N, K], with `product` for the integer sums."""
    if weight_scale is None:  # mode "raw"
        return (product(x, weight),)
    is_double = torch.float64 in (x.dtype, out_dtype)
    wide = torch.float64 if is_double else torch.float32
    if mode == "weight_only":
        sums = x.to(wide) @ weight.to(wide).t()
        return (epilogue(sums, None, weight_scale, bias, activation, out_dtype),)
    if mode == "dynamic":
        x, x_scale = quantize_rows(x)
    elif mode == "static":
        assert x_scale is not None
        x, x_scale = quantize_by(x, x_scale)
    sums = product(x, weight).to(wide)
    return (epilogue(sums, x_scale, weight_scale, bias, activation, out_dtype),)


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
    """The call as README.md describes it, for each mode."""
    call = x, weight, x_scale, weight_scale, bias, activation, mode, out_dtype
    return run(*call, product=integer_product)
