"""Layer norm by PyTorch's own op, which takes every device and dtype: the last resort.

aten wants the parameters in the input's dtype.  On CPUs it keeps the statistics of 16-bit input in
16 bits unless the parameters are float32, and sums its dweight and dbias in 16 bits always.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unsupported(*_: object) -> str | None:
    return None


def _is_short_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def _common_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> torch.dtype:
    if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def forward(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    if _is_short_on_cpu(x):
        dtype, parameter_dtype = x.dtype, torch.float32
        if weight is None:
            weight = x.new_ones(tuple(normalized_shape))
    else:
        dtype = parameter_dtype = _common_dtype(x, weight, bias)
    y, mean, rstd = torch.native_layer_norm(
        x.to(dtype), normalized_shape, _to(weight, parameter_dtype), _to(bias, parameter_dtype), eps
    )
    return y.to(x.dtype).contiguous(), torch.cat((mean.flatten(), rstd.flatten()))


def backward(
    dy: Tensor,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    mask = [
        output_mask[0],
        output_mask[1] and weight is not None,
        output_mask[2] and bias is not None,
    ]
    dtype = torch.float32 if _is_short_on_cpu(x) else _common_dtype(x, weight, bias)
    lead = x.shape[: x.dim() - len(normalized_shape)]
    mean, rstd = statistics.reshape(2, *lead, *(1,) * len(normalized_shape))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype),
        x.to(dtype),
        normalized_shape,
        mean,
        rstd,
        _to(weight, dtype),
        _to(bias, dtype),
        mask,
    )
    return (
        dx.to(x.dtype).contiguous() if mask[0] else None,
        dweight.to(weight.dtype) if mask[1] and weight is not None else None,
        dbias.to(bias.dtype) if mask[2] and bias is not None else None,
    )
