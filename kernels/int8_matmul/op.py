"""Int8 matmul for users: checks, dispatch, autograd.  Maths: README.md."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from kernels.dispatch import define, is_readable
from kernels.int8_matmul import checks, composite, reference
from kernels.int8_matmul.quantized import Quantized, check_quantized, is_grouped

MODES = ("dynamic", "static", "weight_only")

choose = define(
    "int8_matmul",
    forward="(Tensor x, Tensor weight, Tensor? x_scale, Tensor? weight_scale, Tensor? bias,"
    " str activation, str mode, ScalarType out_dtype) -> Tensor y",
    backward=None,
)


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


# Under their own names, as every attribute that is looked up shows in a call of microseconds.
_is_transforming = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch._C._is_any_autocast_enabled


def int8_matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor | None = None,
    scale_b: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    transpose_b: bool = False,
) -> Any:
    """``torch._int_mm`` for all sizes, with scales, bias and activation in the same kernel.

    activation((a @ b) * scale_a * scale_b + bias), the product summed exactly in int32.

    Args:
        a: int8 [..., K]; any strides.
        b: int8 [K, N], or [N, K] with transpose_b; neither form, nor a transposed view, is copied.
        scale_a: None or a float Tensor: one value, or one for each row of a ([...] or [..., 1]).
        scale_b: None or a float Tensor: one value, or one for each column ([N] or [1, N]).
        bias: None or float [N]; with scales only, as activation.
        activation: None, "relu", "gelu" (with erf) or "gelu_tanh".
        out_dtype: float32 (the default), bfloat16, float16 or float64 with scales; int32 without.

    Returns:
        Tensor [..., N]: int32 sums without scales, else computed from them in float32 (float64 for
        float64) and rounded once.

    Raises:
        TypeError, ValueError, RuntimeError, before anything runs: among them K above 2^17, beyond
        which an int32 sum of 127 * 127 may overflow.  (128 * 128 * 2^17 wraps, as in PyTorch.)

    Differentiable in bias only.
    """
    tensors = a, b, scale_a, scale_b, bias
    if has_torch_function(tensors):
        return handle_torch_function(
            int8_matmul,
            tensors,
            *tensors,
            activation=activation,
            out_dtype=out_dtype,
            transpose_b=transpose_b,
        )
    call = _matmul_call(a, b, scale_a, scale_b, bias, activation, out_dtype, transpose_b)
    return run(call).view(*a.shape[:-1], call.weight.shape[0])


def int8_linear(
    x: Tensor | Quantized,
    quantized_weight: Quantized,
    bias: Tensor | None = None,
    mode: str = "dynamic",
    activation: str | None = None,
    *,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """``torch.nn.functional.linear`` with an int8 weight, and int8 arithmetic, in one kernel.

    Args:
        x: float32, bfloat16, float16 or float64 [..., K], any strides; or a Quantized with values
            [..., K] and a scale for each row or in all, as `layer_norm_quantize` returns it.
        quantized_weight: Quantized with values int8 [N, K], any strides, and a scale for each row
            or in all.  With mode "weight_only" also one for each group, or with zero points: then
            PyTorch's matmul runs on the dequantised weight.
        bias: None or float [N].
        mode: "dynamic" quantises each row of x by its largest value; "static" all of x by x_scale;
            "weight_only" leaves x as it is.  For a Quantized x it must be "dynamic", the default.
        activation: None, "relu", "gelu" (with erf) or "gelu_tanh".
        x_scale: for mode "static": one value; x is clamped to 127 times that.
        out_dtype: x's dtype (float32 for a Quantized), or under autocast the one F.linear gives.

    Returns:
        Tensor [..., N].  A row of x with a NaN or an infinity gives a row of NaN in modes "dynamic"
        and "static".

    Raises:
        TypeError, ValueError, RuntimeError, before anything runs.

    Differentiable in x and bias, any number of times, as if rounding were the identity: the
    gradient of x is that of the dequantised weight (straight-through estimator, Bengio et al.,
    arXiv:1308.3432).  Inside torch.func transforms and forward-mode differentiation PyTorch's
    ordinary ops run.
    """
    inputs = x if isinstance(x, tuple) else (x,)
    weights = quantized_weight if isinstance(quantized_weight, tuple) else ()
    tensors = *inputs, *weights, bias, x_scale
    if has_torch_function(tensors):
        return handle_torch_function(
            int8_linear,
            tensors,
            x,
            quantized_weight,
            bias=bias,
            mode=mode,
            activation=activation,
            x_scale=x_scale,
            out_dtype=out_dtype,
        )
    call = _linear_call(x, quantized_weight, bias, mode, activation, x_scale, out_dtype)
    if isinstance(call, Call):
        y = run(call)
        values: Any = inputs[0]
        return y if values.dim() == 2 else y.view(*values.shape[:-1], y.shape[1])
    return composite.linear(*call)


def run(call: Call) -> Tensor:
    """y [M, N], differentiable in x and bias."""
    bias = call.bias
    if _is_transforming() or forward_ad._current_level >= 0:
        return composite.straight_through(call)
    if _is_grad_enabled() and (call.x.requires_grad or (bias is not None and bias.requires_grad)):
        y: Tensor = Int8MatmulFunction.apply(*call)
        return y
    return _compute(call)


def _compute(call: Call) -> Tensor:
    if call.x.is_meta or not (call.x.numel() and call.weight.numel()):
        return reference.forward(*call)[0]
    return choose(*call).forward(*call)[0]


class Int8MatmulFunction(torch.autograd.Function):
    """Backward as if rounding were the identity; what activation needs is computed again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = Call(*arguments)
        ctx.save_for_backward(call.x, call.weight, call.x_scale, call.weight_scale, call.bias)
        ctx.rest = call.activation, call.mode
        return _compute(call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, x_scale, weight_scale, bias = ctx.saved_tensors
        activation, mode = ctx.rest
        wide = torch.promote_types(dy.dtype, torch.float32)
        dy = dy.to(wide)
        if activation != "none":
            z = run(Call(x, weight, x_scale, weight_scale, bias, "none", mode, wide))
            dy = composite.activation_gradient(dy, z, activation)
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            # Every int8 value is a bfloat16: nothing is rounded but the scaled gradient.
            dx = (dy * weight_scale).to(x.dtype) @ weight.to(x.dtype)
        if ctx.needs_input_grad[4]:
            dbias = dy.sum(0).to(bias.dtype)
        return dx, None, None, None, dbias, None, None, None


def backend_arguments(*arguments: Any, **keywords: Any) -> tuple[Any, ...]:
    """What backends are asked about a call of int8_linear or, if its second argument is no tuple,
    of int8_matmul; for dispatch.explain."""
    second = arguments[1] if len(arguments) > 1 else keywords.get("quantized_weight")
    if not isinstance(second, tuple):
        call = inspect.signature(int8_matmul).bind(*arguments, **keywords)
        call.apply_defaults()
        return _matmul_call(*call.arguments.values())
    call = inspect.signature(int8_linear).bind(*arguments, **keywords)
    call.apply_defaults()
    made = _linear_call(*call.arguments.values())
    if not isinstance(made, Call):
        raise ValueError(
            "int8_linear: no backend is asked about a weight with groups or zero points"
        )
    return made


def _matmul_call(
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


def _linear_call(
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
