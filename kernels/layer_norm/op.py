"""Layer norm for users: checks, dispatch, autograd, function and module.  Maths: README.md."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from kernels import _native
from kernels.dispatch import define, offered_to_cpu_first
from kernels.layer_norm import reference

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})

choose = define(
    "layer_norm",
    forward="(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps)"
    " -> (Tensor y, Tensor statistics)",
    backward="(Tensor dy, Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias,"
    " Tensor statistics, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


# Under their own names, as every attribute that is looked up shows in a call of microseconds.
_is_compiling = torch.compiler.is_dynamo_compiling
_is_transforming = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_empty_like = torch.empty_like

_FEW_ROWS = 1024  # up to these a call keeps its statistics in a bytearray
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _differentiable_gradients(
    dy: Tensor,
    x: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mask: tuple[bool, bool, bool],
) -> Gradients:
    """The gradients under create_graph.  The statistics depend on x, so they are part of it."""
    statistics = reference.row_statistics(x, shape, eps)
    return reference.backward(dy, x, shape, weight, bias, statistics, mask)


class LayerNormFunction(torch.autograd.Function):
    """Backward runs the forward's backend, or, under create_graph, the reference's formula."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        backend = choose(x, normalized_shape, weight, bias)
        y, statistics = backend.forward(x, normalized_shape, weight, bias, eps)
        ctx.save_for_backward(x, weight)
        # Of bias only the dtype is needed, and the statistics are no input or output.
        ctx.rest = backend, normalized_shape, bias, statistics, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        backend, shape, bias, statistics, eps = ctx.rest
        with_dx, _, with_dweight, with_dbias, _ = ctx.needs_input_grad
        mask = (with_dx, with_dweight, with_dbias)
        if _is_grad_enabled():
            dx, dweight, dbias = _differentiable_gradients(dy, x, shape, weight, bias, eps, mask)
        else:
            dx, dweight, dbias = backend.backward(dy, x, shape, weight, bias, statistics, mask)
        return (
            dx if with_dx else None,
            None,
            dweight if with_dweight else None,
            dbias if with_dbias else None,
            None,
        )


class CommonCallFunction(torch.autograd.Function):
    """LayerNormFunction on the `cpu` backend, for a call whose rows `_rows` could tell.

    It leaves out what such a call cannot need, and calls the kernels itself: forward and backward
    of 64 x 768 take them 18 µs, and autograd 35, so that every step of Python in between shows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: int,
        x: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        y, cols = _empty_like(x), x.numel() // rows
        statistics: Any  # a bytearray takes a tenth of a tensor's time, but is filled with zeros
        if rows <= _FEW_ROWS:
            statistics = bytearray(8 * rows)
        else:
            statistics = x.new_empty(2 * rows, dtype=torch.float32)
        _native.cpu.layer_norm_forward(x, rows, cols, weight, bias, eps, y, statistics)
        ctx.save_for_backward(x, weight)
        ctx.rest = rows, cols, normalized_shape, bias, statistics, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, cols, shape, bias, statistics, eps = ctx.rest
        _, with_dx, _, with_dweight, with_dbias, _ = ctx.needs_input_grad
        if _is_grad_enabled():
            mask = (with_dx, with_dweight, with_dbias)
            dx, dweight, dbias = _differentiable_gradients(dy, x, shape, weight, bias, eps, mask)
        else:
            x = x.contiguous()  # saved tensors' hooks may give back others
            weight = None if weight is None else weight.contiguous()
            dx = _empty_like(x) if with_dx else None
            dweight = _empty_like(weight) if weight is not None and with_dweight else None
            dbias = _empty_like(bias) if bias is not None and with_dbias else None
            _native.cpu.layer_norm_backward(
                dy.contiguous(), x, rows, cols, weight, statistics, dx, dweight, dbias
            )
        return None, dx, None, dweight, dbias, None


# Function.apply without its preparations for torch.func, under which PyTorch's op runs anyway: they
# take longer than the checks below.
_apply_common = super(torch.autograd.Function, CommonCallFunction).apply
# What autograd calls, without looking up which function is the backward in two calls more.
_backward_node: Any = CommonCallFunction._backward_cls
_backward_node.apply = CommonCallFunction.backward


def _no_rows(*_: object) -> int:
    return 0


# How many rows a call has that passes `_check`, suits the C++ kernels and has nothing to copy
# first, answered in C++; 0 for any other.  Most calls have some, and small ones feel every
# attribute that Python asks for.
_rows = _no_rows if isinstance(_native.cpu, str) else _native.cpu.layer_norm_rows


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``torch.nn.functional.layer_norm``, fused: (x - mean) / sqrt(variance + eps) * weight + bias.

    Ba, Kiros and Hinton, "Layer Normalization", 2016 (arXiv:1607.06450).

    Args:
        input: Tensor [*, *normalized_shape] of float32, bfloat16, float16 or float64 (float64 runs
            PyTorch's own op); any strides.
        normalized_shape: the trailing dimensions that are normalised together; at least one.
        weight, bias: None or Tensor [*normalized_shape] on input's device, each of any of these
            dtypes, whichever input has (F.layer_norm takes fewer combinations).
        eps: added to the (biased) variance; in squared units of input.

    Returns:
        Tensor of input's shape and dtype, contiguous.  Mean and variance are computed in float32
        (float64 for float64 input), the variance from centred values.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as F.layer_norm, before anything runs.

    Differentiable any number of times in input, weight and bias; the first derivative is fused and
    deterministic.  Under CUDA autocast the arguments are cast to float32, as F.layer_norm's are.
    Inside torch.func transforms and forward-mode differentiation PyTorch's own op runs.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight, bias, eps=eps
        )
    transforming = _is_transforming() or forward_ad._current_level >= 0
    rows = 0 if _is_compiling() else _rows(input, normalized_shape, weight, bias, eps)
    if rows and not transforming and offered_to_cpu_first():
        shape: tuple[int, ...] = normalized_shape  # type: ignore[assignment]
        if _needs_graph(input, weight, bias):
            y: Tensor = _apply_common(rows, input, shape, weight, bias, eps)
        else:
            y, cols = _empty_like(input), input.numel() // rows
            _native.cpu.layer_norm_forward(input, rows, cols, weight, bias, eps, y, None)
        return y
    shape, eps = _check(input, normalized_shape, weight, bias, eps)
    if transforming:  # a kernel on raw memory cannot take part in it
        return F.layer_norm(input, shape, weight, bias, eps)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        with torch.autocast("cuda", enabled=False):
            arguments = _to_float32(input), shape, _to_float32(weight), _to_float32(bias), eps
            return layer_norm(*arguments)
    if _needs_graph(input, weight, bias):
        y = LayerNormFunction.apply(input, shape, weight, bias, eps)
    else:
        backend = choose(input, shape, weight, bias)
        y = backend.forward(input, shape, weight, bias, eps, statistics=False)[0]
    return y


def _needs_graph(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return _is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


def _to_float32(tensor: Any) -> Any:
    return tensor.float() if tensor is not None and tensor.dtype != torch.float64 else tensor


def _check(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[tuple[int, ...], float]:
    """normalized_shape and eps in their plain types; raises what F.layer_norm would."""
    if not isinstance(input, Tensor):
        raise TypeError(f"layer_norm: input must be a Tensor, not {type(input).__name__}")
    if type(eps) is not float:
        eps = _as_float(eps)
    shape = normalized_shape if type(normalized_shape) is tuple else _as_tuple(normalized_shape)
    for size in shape:
        if type(size) is not int:
            shape = _as_tuple(shape)
            break
    if not shape or input.shape[-len(shape) :] != shape:
        _raise_shape(input, shape)
    if input.dtype not in _DTYPES:
        raise NotImplementedError(
            f"layer_norm: input is {input.dtype}; accepted are float32, bfloat16, float16, float64"
        )
    # A parameter that is right costs no call: small inputs feel each of them.
    on_cpu = input.is_cpu
    for parameter in (weight, bias):
        if parameter is not None and not (
            isinstance(parameter, Tensor)
            and parameter.shape == shape
            and parameter.dtype in _DTYPES
            and ((on_cpu and parameter.is_cpu) or parameter.device == input.device)
        ):
            _raise_parameter("weight" if parameter is weight else "bias", parameter, shape, input)
    return shape, eps


def _as_float(eps: Any) -> float:
    if isinstance(eps, str | bytes) or not hasattr(eps, "__float__"):
        raise TypeError(f"layer_norm: eps must be a float, not {type(eps).__name__}")
    return float(eps)


def _as_tuple(normalized_shape: Any) -> tuple[Any, ...]:
    if not isinstance(normalized_shape, tuple | list):
        raise TypeError(
            "layer_norm: normalized_shape must be a tuple or list of ints, not "
            f"{type(normalized_shape).__name__}"
        )
    for position, size in enumerate(normalized_shape):
        if not isinstance(size, torch.SymInt) and not hasattr(size, "__index__"):
            raise TypeError(
                "layer_norm: normalized_shape must hold ints, but element "
                f"{position} is a {type(size).__name__}"
            )
    sizes: list[Any] = list(normalized_shape)  # ints, or the SymInts of torch.compile
    return tuple(n if isinstance(n, torch.SymInt) else operator.index(n) for n in sizes)


def _raise_shape(input: Tensor, shape: tuple[int, ...]) -> NoReturn:
    if not shape:
        raise RuntimeError("layer_norm: normalized_shape is empty; it must name at least one dim")
    expected = ", ".join(["*", *map(str, shape)])
    raise RuntimeError(
        f"layer_norm: normalized_shape={list(shape)} expects input of shape [{expected}], "
        f"but input has shape {list(input.shape)}"
    )


def _raise_parameter(name: str, parameter: Any, shape: tuple[int, ...], input: Tensor) -> NoReturn:
    if not isinstance(parameter, Tensor):
        raise TypeError(
            f"layer_norm: {name} must be a Tensor or None, not {type(parameter).__name__}"
        )
    if parameter.shape != shape:
        raise RuntimeError(
            f"layer_norm: {name} must have shape normalized_shape={list(shape)}, "
            f"but has shape {list(parameter.shape)}"
        )
    if parameter.dtype not in _DTYPES:
        raise RuntimeError(
            f"layer_norm: {name} is {parameter.dtype}; "
            "accepted are float32, bfloat16, float16, float64"
        )
    raise RuntimeError(
        f"layer_norm: {name} is on {parameter.device}, but input is on {input.device}; "
        "they must be on one device"
    )


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, fused: same arguments, parameters, initialisation and state_dict.

    Raises RuntimeError where ``dtype`` is not a floating one, as nn.LayerNorm does.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dtype is not None and dtype not in _DTYPES:
            raise RuntimeError(
                f"LayerNorm: dtype is {dtype}; accepted are float32, bfloat16, float16, float64"
            )
        shape: Any = normalized_shape  # nn.LayerNorm's annotation is narrower than what it takes
        super().__init__(shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
