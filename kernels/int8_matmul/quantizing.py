"""Tensors to int8 values and scales: `quantize`.  Rules: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.int8_matmul import checks
from kernels.int8_matmul.quantized import SCALE_DTYPES, Quantized
from kernels.int8_matmul.rows.op import int8_rows
from kernels.int8_matmul.rows.reference import LIMIT, TINY, quantize_rows

NAME = "quantize"
STEPS = 255.0  # between the least and the largest of 256 values


def quantize(
    x: Tensor,
    axis: int | None = -1,
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    out: Quantized | None = None,
) -> Quantized:
    """`x` as int8, rounded to the nearest, ties to even; no gradient.

    torch.quantize_per_channel is the nearest PyTorch has; here the scales come from the values.

    Args:
        x: Tensor of float32, bfloat16, float16 or float64 (computed in float32); any strides.
        axis: the dimension each scale goes along: -1 for a scale per row of a matrix, 0 for one per
            column, None for one in all.  scale has x's shape with 1 there (with None: no
            dimensions).
        group_size: a scale for every so many values along the last axis, which they must divide.
        symmetric: values are -127 ... 127 with scale = max |x| / 127.  Else -128 ... 127 between
            the least value and the largest, or 0, with a zero_point.
        scale_dtype: a float dtype.  Values are computed from the scale as it is rounded to that.
        out: a Quantized to write to and return.

    Returns:
        Quantized.  Where all values are zero the scale is 1.  A NaN or an infinity makes the scale
        NaN and the values 0, so that all that is computed of them is NaN.

    Raises:
        TypeError, ValueError: for what is not accepted, before anything runs.
    """
    axis = _check(x, axis, group_size, symmetric, scale_dtype)
    x = x.detach()
    fits_rows = axis == x.dim() - 1 and group_size is None
    if symmetric and fits_rows and scale_dtype == torch.float32 and x.dtype != torch.float64:
        made = Quantized(*int8_rows(x, False, None, None, 0.0))
    else:
        made = _composite(x, axis, group_size, symmetric, scale_dtype)
    if out is None:
        return made
    return _write(made, out)


def _check(
    x: Tensor, axis: int | None, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> int | None:
    """`axis`, counted from the front."""
    checks.check_float(NAME, "x", x)
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(
            f"{NAME}: scale_dtype is {scale_dtype}; accepted are {checks.names(SCALE_DTYPES)}"
        )
    if type(symmetric) is not bool:
        raise TypeError(f"{NAME}: symmetric must be a bool, not {type(symmetric).__name__}")
    if axis is not None:
        if type(axis) is not int:
            raise TypeError(f"{NAME}: axis must be an int or None, not {type(axis).__name__}")
        if not -x.dim() <= axis < x.dim():
            raise ValueError(
                f"{NAME}: axis is {axis}, but x has {x.dim()} dimensions, shape {list(x.shape)}"
            )
        axis %= x.dim()
    if group_size is not None:
        if type(group_size) is not int:
            raise TypeError(
                f"{NAME}: group_size must be an int or None, not {type(group_size).__name__}"
            )
        if axis is None or axis != x.dim() - 1:
            raise ValueError(f"{NAME}: group_size goes with axis=-1 only")
        if group_size < 1 or x.shape[-1] % group_size:
            raise ValueError(
                f"{NAME}: group_size must divide the last size of x, but is {group_size} and x "
                f"has shape {list(x.shape)}"
            )
    return axis


def _composite(
    x: Tensor, axis: int | None, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> Quantized:
    """Any of the options in plain torch: what shares a scale is made a row."""
    if axis is None:
        rows = x.reshape(1, -1)
    elif group_size is not None:
        rows = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    else:
        rows = x.movedim(axis, -1)
    values, *rest = _quantize_rows(rows, symmetric, scale_dtype)
    if axis is None:
        return Quantized(values.reshape(x.shape), *(scale[0] for scale in rest))
    if group_size is not None:
        return Quantized(values.reshape(x.shape), *rest)
    values = values.movedim(-1, axis).contiguous()
    return Quantized(values, *(scale.unsqueeze(axis).contiguous() for scale in rest))


def _quantize_rows(rows: Tensor, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Values [..., K], scale [...] and, unless symmetric, zero_point [...]."""
    if symmetric:
        values, scale = quantize_rows(rows)
        if scale_dtype == torch.float32:
            return values, scale
        scale = _rounded(scale, scale_dtype)
        values = (rows.float() / scale.float()[..., None]).round().clamp(-LIMIT, LIMIT)
        usable = scale.isfinite()[..., None]
        return torch.where(usable, values, 0.0).to(torch.int8), scale
    wide = rows.float()
    if rows.shape[-1] == 0:
        low = high = wide.new_zeros(rows.shape[:-1])
    else:
        low, high = wide.amin(-1).clamp(max=0.0), wide.amax(-1).clamp(min=0.0)
    absmax = torch.maximum(-low, high)  # NaN where either is
    scale = high / STEPS - low / STEPS  # high - low may exceed float32's range
    scale = torch.where(absmax < TINY, 1.0, torch.where(absmax < torch.inf, scale, torch.nan))
    scale = _rounded(scale, scale_dtype)
    usable = scale.isfinite()
    zero_point = (-128.0 - low / scale.float()).round().clamp(-128.0, 127.0)
    values = (wide / scale.float()[..., None]).round() + zero_point[..., None]
    values = torch.where(usable[..., None], values.clamp(-128.0, 127.0), 0.0).to(torch.int8)
    return values, scale, torch.where(usable, zero_point, 0.0).to(torch.int32)


def _rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in `dtype`, never rounded to 0 or infinity; NaN stays."""
    if dtype.itemsize >= scale.itemsize:
        return scale.to(dtype)
    limits = torch.finfo(dtype)
    return scale.clamp(limits.tiny, limits.max).to(dtype)


def _write(made: Quantized, out: Quantized) -> Quantized:
    if not isinstance(out, Quantized):
        raise TypeError(f"{NAME}: out must be a Quantized or None, not {type(out).__name__}")
    for name, source, target in zip(Quantized._fields, made, out, strict=True):
        if (source is None) != (target is None):
            wanted = "None" if source is None else "a Tensor"
            raise ValueError(f"{NAME}: out.{name} must be {wanted}")
        if source is not None and target is not None:
            checks.check_like(NAME, f"out.{name}", target, source)
    for source, target in zip(made, out, strict=True):
        if source is not None and target is not None:
            target.copy_(source)
    return out
