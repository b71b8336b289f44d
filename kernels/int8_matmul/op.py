"""Int8 matmul for users: checks, dispatch, autograd.  Maths: README.md."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from kernels import _native
from kernels.dispatch import define, offered_to_cpu_first
from kernels.int8_matmul import composite, cpu, reference
from kernels.int8_matmul.calls import Call, is_plain, linear_call, matmul_call
from kernels.int8_matmul.checks import ACTIVATIONS
from kernels.int8_matmul.quantized import Quantized

choose = define(
    "int8_matmul",
    forward="(Tensor x, Tensor weight, Tensor? x_scale, Tensor? weight_scale, Tensor? bias,"
    " str activation, str mode, ScalarType out_dtype) -> Tensor y",
    backward=None,
)


# Under their own names, as every attribute that is looked up shows in a call of microseconds.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_transforming = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled


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
    call = matmul_call(a, b, scale_a, scale_b, bias, activation, out_dtype, transpose_b)
    return run(call).view(*a.shape[:-1], call.weight.shape[0])


def int8_linear(
    x: Tensor | Quantized,
    quantized_weight: Quantized,
    bias: Tensor | None = None,
    mode: str = "dynamic",
    activation: str | None = None,
    *,
    x_scale: Tensor | float | None = None,
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
    if is_plain(x, quantized_weight, bias, mode, activation, x_scale, out_dtype):
        return _plain_linear(x, quantized_weight, bias, mode, ACTIVATIONS[activation])
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
    call = linear_call(x, quantized_weight, bias, mode, activation, x_scale, out_dtype)
    if isinstance(call, Call):
        y = run(call)
        values: Any = inputs[0]
        return y if values.dim() == 2 else y.view(*values.shape[:-1], y.shape[1])
    return composite.linear(*call)


def _plain_linear(
    x: Any, quantized_weight: Quantized, bias: Tensor | None, mode: str, activation: str
) -> Any:
    """A call that is_plain accepts, on the shortest way."""
    weight, scale, _ = quantized_weight
    rows = x if x.dim() == 2 else x.view(-1, x.shape[-1])
    if (
        offered_to_cpu_first()
        and not _needs_composite()
        and not _needs_gradient(x, bias)
        and not isinstance(_native.cpu, str)
    ):
        # scale [N, 1] is [N] in memory, and a view would cost a microsecond.
        y = cpu.forward(rows, weight, None, scale, bias, activation, mode, x.dtype)[0]
    else:
        y = run(Call(rows, weight, None, scale.view(-1), bias, activation, mode, x.dtype))
    return y if rows is x else y.view(*x.shape[:-1], -1)


def _needs_composite() -> bool:
    """Inside torch.func transforms and forward-mode differentiation kernels cannot take part."""
    return _is_transforming() or forward_ad._current_level >= 0


def _needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return _is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def run(call: Call) -> Tensor:
    """y [M, N], differentiable in x and bias."""
    if _needs_composite():
        return composite.straight_through(call)
    if _needs_gradient(call.x, call.bias):
        apply = Int8MatmulFunction.apply if _is_compiling() else _apply
        y: Tensor = apply(*call)
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


# Function.apply without its preparations for torch.func, under which `composite` runs anyway.
_apply = super(torch.autograd.Function, Int8MatmulFunction).apply


def backend_arguments(*arguments: Any, **keywords: Any) -> tuple[Any, ...]:
    """What backends are asked about a call of int8_linear or, if its second argument is no tuple,
    of int8_matmul; for dispatch.explain."""
    second = arguments[1] if len(arguments) > 1 else keywords.get("quantized_weight")
    if not isinstance(second, tuple):
        call = inspect.signature(int8_matmul).bind(*arguments, **keywords)
        call.apply_defaults()
        return matmul_call(*call.arguments.values())
    call = inspect.signature(int8_linear).bind(*arguments, **keywords)
    call.apply_defaults()
    made = linear_call(*call.arguments.values())
    if not isinstance(made, Call):
        raise ValueError(
            "int8_linear: no backend is asked about a weight with groups or zero points"
        )
    return made
