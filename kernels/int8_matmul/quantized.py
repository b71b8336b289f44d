"""A tensor as int8 values and scales: `Quantized`, `dequantize`.  Rules: README.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.int8_matmul import checks

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Quantized(NamedTuple):
    """A tensor as int8: values * scale, or (values - zero_point) * scale.

    A scale stands for every value it broadcasts to, or, [..., K / g] against values [..., K], for a
    group of g values.
    """

    values: Tensor  # int8
    scale: Tensor  # float
    zero_point: Tensor | None = None  # int32, of scale's shape


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `quantized` stands for, computed in float32 or wider and rounded to `dtype`.

    Raises TypeError and ValueError for what is no Quantized of `quantize`'s form.
    """
    if dtype not in SCALE_DTYPES:
        raise TypeError(f"dequantize: dtype is {dtype}; accepted are {checks.names(SCALE_DTYPES)}")
    check_quantized("dequantize", "quantized", quantized)
    values, scale, zero_point = quantized
    wide = torch.promote_types(dtype, torch.float32)
    x = values.to(wide)
    if is_grouped(values, scale):
        x = x.unflatten(-1, (scale.shape[-1], -1))
        scale = scale[..., None]
        zero_point = None if zero_point is None else zero_point[..., None]
    if zero_point is not None:
        x = x - zero_point
    return (x * scale.to(wide)).reshape(values.shape).to(dtype)


def is_grouped(values: Tensor, scale: Tensor) -> bool:
    """Whether `scale` has several values, but fewer than K, for each row of `values` [..., K]."""
    return (
        scale.dim() == values.dim() > 0
        and 1 < scale.shape[-1] < values.shape[-1]
        and scale.shape[:-1] == values.shape[:-1]
    )


def check_quantized(function: str, name: str, quantized: Any) -> None:
    """That it is a tuple of int8 values, a float scale that fits them and maybe a zero point."""
    if not isinstance(quantized, tuple) or len(quantized) not in (2, 3):
        raise TypeError(
            f"{function}: {name} must be a Quantized, as quantize returns it, "
            f"not {type(quantized).__name__}"
        )
    values, scale = quantized[:2]
    checks.check_dtype(function, f"{name}.values", values, (torch.int8,))
    checks.check_float(function, f"{name}.scale", scale)
    checks.check_device(function, f"{name}.scale", scale, values)
    if not _fits(values, scale):
        raise ValueError(
            f"{function}: {name}.scale of shape {list(scale.shape)} does not fit "
            f"{name}.values of shape {list(values.shape)}"
        )
    if len(quantized) == 3 and quantized[2] is not None:
        zero_point = quantized[2]
        checks.check_dtype(function, f"{name}.zero_point", zero_point, (torch.int32,))
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"{function}: {name}.zero_point must have the shape of its scale "
                f"{list(scale.shape)}, but has shape {list(zero_point.shape)}"
            )
        checks.check_device(function, f"{name}.zero_point", zero_point, values)


def _fits(values: Tensor, scale: Tensor) -> bool:
    """Whether `scale` broadcasts to `values`, or has one value for each group of the last axis."""
    if scale.dim() > values.dim():
        return False
    shape = values.shape[values.dim() - scale.dim() :]
    if all(s in (1, v) for s, v in zip(scale.shape, shape, strict=True)):
        return True
    return (
        scale.dim() == values.dim()
        and scale.shape[:-1] == values.shape[:-1]
        and scale.shape[-1] > 0
        and values.shape[-1] % scale.shape[-1] == 0
    )
