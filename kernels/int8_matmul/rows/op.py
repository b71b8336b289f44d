"""Rows as int8 for users: checks and dispatch.  Rule: kernels/int8_matmul/README.md."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from kernels.dispatch import define
from kernels.int8_matmul import checks
from kernels.int8_matmul.quantized import Quantized
from kernels.int8_matmul.rows import reference

NAME = "layer_norm_quantize"

choose = define(
    "int8_matmul.rows",
    forward="(Tensor x, bool normalized, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor values, Tensor scale)",
    backward=None,
)


def int8_rows(
    x: Tensor, normalized: bool, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x [..., K] as int8 of its shape, and scale [..., 1]; the arguments are checked."""
    rows = as_rows(x)
    if (
        rows.is_meta
        or not rows.numel()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        values, scale = reference.forward(rows, normalized, weight, bias, eps)
    else:
        backend = choose(rows, normalized, weight, bias, eps)
        values, scale = backend.forward(rows, normalized, weight, bias, eps)
    return values.view(x.shape), scale.view(*x.shape[:-1], 1)


def as_rows(x: Tensor) -> Tensor:
    """[M, K] with last stride 1."""
    x = x.detach()
    if x.dim() != 2:
        x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return checks.with_unit_stride(x, 1)


def layer_norm_quantize(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """The rows of ``torch.nn.functional.layer_norm`` as int8, in one pass over the input.

    What `quantize(layer_norm(input, ...))` gives, but from normalised values that are never rounded
    to the input's dtype nor written; for `int8_linear`.

    Args:
        input: Tensor [..., K] of float32, bfloat16, float16 or float64 (computed in float32).
        normalized_shape: K or (K,): rows are the last dimension.
        weight, bias: None or Tensor [K] of any of these dtypes.
        eps: added to the (biased) variance.

    Returns:
        Quantized: int8 values [..., K], float32 scale [..., 1].  Statistics are float32.

    Raises:
        TypeError, ValueError, RuntimeError, before anything runs; RuntimeError where a gradient
        would be needed, which there is none of.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            layer_norm_quantize,
            (input, weight, bias),
            input,
            normalized_shape,
            weight=weight,
            bias=bias,
            eps=eps,
        )
    eps = _check(input, normalized_shape, weight, bias, eps)
    tensors = input, weight, bias
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(
            f"{NAME}: has no gradient; call it under torch.no_grad(), or use layer_norm and "
            "int8_linear"
        )
    return Quantized(*int8_rows(input, True, weight, bias, eps))


def backend_arguments(*arguments: Any, **keywords: Any) -> tuple[Any, ...]:
    """What backends are asked about a call of layer_norm_quantize; for dispatch.explain."""
    call = inspect.signature(layer_norm_quantize).bind(*arguments, **keywords)
    call.apply_defaults()
    input, _, weight, bias, _ = call.args
    eps = _check(*call.args)
    return as_rows(input), True, weight, bias, eps


def _check(input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any) -> float:
    """`eps` as a float."""
    checks.check_float(NAME, "input", input)
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if len(shape) != 1:
        raise ValueError(
            f"{NAME}: normalized_shape must be the last size of input alone, but is {list(shape)}"
        )
    if input.dim() == 0 or input.shape[-1] != shape[0]:
        raise ValueError(
            f"{NAME}: normalized_shape={list(shape)} expects input of shape [*, {shape[0]}], "
            f"but input has shape {list(input.shape)}"
        )
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        checks.check_float(NAME, name, parameter)
        if parameter.shape != shape:
            raise ValueError(
                f"{NAME}: {name} must have shape {list(shape)}, "
                f"but has shape {list(parameter.shape)}"
            )
        checks.check_device(NAME, name, parameter, input)
    if isinstance(eps, str | bytes) or not hasattr(eps, "__float__"):
        raise TypeError(f"{NAME}: eps must be a float, not {type(eps).__name__}")
    return float(eps)
