"""Calls of int8_matmul and int8_linear, checked and in the form that backends take."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import is_readable
from kernels.int8_matmul import checks
from kernels.int8_matmul.quantized import Quantized, check_quantized, is_grouped

MODES = ("dynamic", "static", "weight_only")

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_PLAIN_MODES = ("dynamic", "weight_only")
_ACTIVATIONS = tuple(checks.ACTIVATIONS)  # of a tuple even a list may be asked
_FAST_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

# Under their own names, as every attribute that is looked up shows in a call of microseconds.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_torch_function_mode_enabled = torch._C._is_torch_function_mode_enabled
_is_autocast_enabled = torch._C._is_any_autocast_enabled


class Call(NamedTuple):
    """What a backend's forward is called with; the modes are those of README.md."""

    x: Tensor  # [M, K], last stride 1
    weight: Tensor  # int8 [N, K], stride 1 in one of its dimensions
    x_scale: Tensor | None  # float32 [M] or [1]
    weight_scale: Tensor | None  # float32 [N] or [1]; None for the integer sums
    bias: Tensor | None  # [N]
    activation: str
    mode: str
    out_dtype: torch.dtype


def matmul_call(
    a: Any,
    b: Any,
    scale_a: Any,
    scale_b: Any,
    bias: Any,
    activation: Any,
    out_dtype: Any,
    transpose_b: Any,
) -> Call:
    """The call as backends take it; raises what is wrong."""
    name = "int8_matmul"
    for argument, tensor in (("a", a), ("b", b)):
        checks.check_dtype(name, argument, tensor, (torch.int8,))
    if a.dim() == 0 or b.dim() != 2:
        raise ValueError(
            f"{name}: a must be [..., K] and b [K, N] ([N, K] with transpose_b), but have shapes "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    weight = b if transpose_b else b.t()  # [N, K]
    columns, terms = weight.shape
    if a.shape[-1] != terms:
        raise ValueError(
            f"{name}: the last size of a must be the {'last' if transpose_b else 'first'} of b, "
            f"but they have shapes {list(a.shape)} and {list(b.shape)}"
        )
    checks.check_terms(name, "a", terms)
    checks.check_device(name, "b", b, a)
    x, weight = rows_of(a), checks.with_unit_stride(weight, 0, 1)
    if (scale_a is None) != (scale_b is None):
        missing = "scale_a" if scale_a is None else "scale_b"
        raise ValueError(f"{name}: scale_a and scale_b go together, but {missing} is None")
    if scale_a is None:
        for argument, value in (("bias", bias), ("activation", activation)):
            if value is not None:
                raise ValueError(f"{name}: {argument} needs scale_a and scale_b")
        if out_dtype not in (None, torch.int32):
            raise TypeError(f"{name}: out_dtype without scales is int32, but {out_dtype} was given")
        return Call(x, weight, None, None, None, "none", "raw", torch.int32)
    lead = tuple(a.shape[:-1])
    row_shapes = lead, (*lead, 1), (x.shape[0],), (x.shape[0], 1)
    return Call(
        x,
        weight,
        checks.scale_of(name, "scale_a", scale_a, row_shapes, a),
        checks.scale_of(name, "scale_b", scale_b, ((columns,), (1, columns)), a),
        checks.bias_of(name, bias, columns, a),
        checks.activation_name(name, activation),
        "int8",
        checks.out_dtype_of(name, out_dtype, torch.float32),
    )


def linear_call(
    x: Any,
    quantized_weight: Any,
    bias: Any,
    mode: Any,
    activation: Any,
    x_scale: Any,
    out_dtype: Any,
) -> Call | tuple[Any, ...]:
    """The call as backends take it, or as composite.linear does; raises what is wrong."""
    name = "int8_linear"
    check_quantized(name, "quantized_weight", quantized_weight)
    weight, weight_scale, *zero_point = quantized_weight
    if weight.dim() != 2:
        raise ValueError(
            f"{name}: quantized_weight.values must be [N, K], but has shape {list(weight.shape)}"
        )
    checks.check_mode(name, mode, MODES)
    values = x
    if isinstance(x, tuple):
        values, x_scale, mode = _quantized_input(x, mode, x_scale)
    else:
        checks.check_float(name, "x", x)
        x_scale = _static_scale(x, mode, x_scale)
    columns, terms = weight.shape
    if values.dim() == 0 or values.shape[-1] != terms:
        raise ValueError(
            f"{name}: the last size of x must be {terms}, as quantized_weight.values has shape "
            f"{list(weight.shape)}, but x has shape {list(values.shape)}"
        )
    checks.check_device(name, "quantized_weight", weight, values)
    bias = checks.bias_of(name, bias, columns, values)
    activation = checks.activation_name(name, activation)
    out_dtype = checks.out_dtype_of(name, out_dtype, result_dtype(values))
    if is_grouped(weight, weight_scale) or any(z is not None for z in zero_point):
        if mode != "weight_only":
            raise ValueError(
                f"{name}: a quantized_weight with scales for groups, or with zero points, needs "
                f"mode='weight_only', but mode is {mode!r}"
            )
        return x, quantized_weight, bias, activation, out_dtype
    if mode != "weight_only":
        checks.check_terms(name, "x", terms)
    weight_scale = checks.scale_of(
        name, "quantized_weight.scale", weight_scale, ((columns, 1),), values
    )
    weight = checks.with_unit_stride(weight, 0, 1)
    return Call(rows_of(values), weight, x_scale, weight_scale, bias, activation, mode, out_dtype)


def is_plain(
    x: Any,
    quantized_weight: Any,
    bias: Any,
    mode: Any,
    activation: Any,
    x_scale: Any,
    out_dtype: Any,
) -> bool:
    """Whether linear_call has nothing to refuse nor to change, but for the shapes of x and scales.

    Answers for the most frequent calls on a CPU, False for all others: a product of one row takes
    tens of microseconds, and all the checks a third of that.
    """
    if (
        type(x) not in _TENSORS
        or type(quantized_weight) is not Quantized
        or mode not in _PLAIN_MODES
        or activation not in _ACTIVATIONS
        or x_scale is not None
        or out_dtype is not None
        or _is_compiling()
        or _is_torch_function_mode_enabled()
        or _is_autocast_enabled()
    ):
        return False
    weight, scale, zero_point = quantized_weight
    if (
        type(weight) not in _TENSORS
        or type(scale) not in _TENSORS
        or zero_point is not None
        or weight.dtype is not torch.int8
        or scale.dtype is not torch.float32
        or x.dtype not in _FAST_DTYPES
        or not (x.is_cpu and weight.is_cpu and scale.is_cpu)
        or weight.dim() != 2
        or not (x.is_contiguous() and weight.is_contiguous() and scale.is_contiguous())
        or not (x.numel() and weight.numel() and x.dim())
    ):
        return False
    columns, terms = weight.shape
    if x.shape[-1] != terms or scale.shape != (columns, 1) or terms > checks.MOST_TERMS:
        return False
    return bias is None or (
        type(bias) in _TENSORS
        and bias.shape == (columns,)
        and bias.dtype in _FAST_DTYPES
        and bias.is_cpu
        and bias.is_contiguous()
    )


def _quantized_input(x: tuple[Any, ...], mode: str, x_scale: Any) -> tuple[Tensor, Tensor, str]:
    """Values, one scale or one for each row, and the backends' mode."""
    name = "int8_linear"
    check_quantized(name, "x", x)
    if mode != "dynamic" or x_scale is not None:
        raise ValueError(
            f"{name}: a Quantized x has its own scale: it goes with mode='dynamic' and no x_scale"
        )
    if len(x) == 3 and x[2] is not None:
        raise ValueError(f"{name}: x must be symmetric, but has a zero_point")
    values, scale = x[:2]
    row_shape = (*values.shape[:-1], 1)
    return values, checks.scale_of(name, "x.scale", scale, (row_shape,), values), "int8"


def _static_scale(x: Tensor, mode: str, x_scale: Any) -> Tensor | None:
    name = "int8_linear"
    if (x_scale is not None) != (mode == "static"):
        wanted = "needs" if mode == "static" else "takes no"
        raise ValueError(f"{name}: mode={mode!r} {wanted} x_scale")
    if x_scale is None:
        return None
    if type(x_scale) is float:
        x_scale = torch.full((1,), x_scale, dtype=torch.float32, device=x.device)
    scale = checks.scale_of(name, "x_scale", x_scale, (), x)
    if is_readable(scale) and not 0 < float(scale) < math.inf:
        raise ValueError(f"{name}: x_scale must be above 0 and finite, but is {float(scale)}")
    return scale


def result_dtype(x: Tensor) -> torch.dtype:
    """What F.linear gives for x, or float32 for int8."""
    if x.dtype == torch.int8:
        return torch.float32
    if _is_autocast_enabled() and x.dtype != torch.float64 and not x.is_meta:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return x.dtype


def rows_of(x: Tensor) -> Tensor:
    """[M, K] with last stride 1."""
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return checks.with_unit_stride(x, 1)
