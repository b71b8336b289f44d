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
from kernels.layer_norm import cpu, reference

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


class LayerNormFunction(torch.autograd.Function):
    """Backward runs the forward's backend, or, under create_graph, the reference's formula."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,  # None: to be chosen
        x: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        if backend is None:
            backend = choose(x, normalized_shape, weight, bias)
        y, statistics = backend.forward(x, normalized_shape, weight, bias, eps)
        ctx.save_for_backward(x, weight)
        # Of bias only the dtype is needed, and the statistics are no input or output: saving them
        # like x would cost a small call as much as its arithmetic.
        ctx.rest = backend, normalized_shape, bias, statistics, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        backend, shape, bias, statistics, eps = ctx.rest
        _, with_dx, _, with_dweight, with_dbias, _ = ctx.needs_input_grad
        mask = (with_dx, with_dweight, with_dbias)
        if _is_grad_enabled():
            # create_graph: the statistics depend on x, so they take part in the second derivative.
            statistics = reference.row_statistics(x, shape, eps)
            backend = reference
        dx, dweight, dbias = backend.backward(dy, x, shape, weight, bias, statistics, mask)
        return (
            None,
            dx if with_dx else None,
            None,
            dweight if with_dweight else None,
            dbias if with_dbias else None,
            None,
        )


# Function.apply without its preparations for torch.func, under which PyTorch's op runs anyway: they
# take longer than the checks below.
_apply = super(torch.autograd.Function, LayerNormFunction).apply
# What autograd calls, without looking up which function is the backward in two calls more.
_backward_node: Any = LayerNormFunction._backward_cls
_backward_node.apply = LayerNormFunction.backward


def _takes_nothing(*_: object) -> bool:
    return False


# Whether a call passes `_check` and suits the C++ kernels, answered in C++: most calls do, and
# small ones feel every attribute that Python asks for.
_takes = _takes_nothing if isinstance(_native.cpu, str) else _native.cpu.layer_norm_takes


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
    compiling = _is_compiling()
    backend: Any = None
    if not compiling and _takes(input, normalized_shape, weight, bias, eps):
        shape: tuple[int, ...] = normalized_shape  # type: ignore[assignment]
        if offered_to_cpu_first():
            backend = cpu
    else:
        shape, eps = _check(input, normalized_shape, weight, bias, eps)
    if _is_transforming() or forward_ad._current_level >= 0:
        # A kernel on raw memory cannot take part in these transforms.
        return F.layer_norm(input, shape, weight, bias, eps)
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        with torch.autocast("cuda", enabled=False):
            arguments = _to_float32(input), shape, _to_float32(weight), _to_float32(bias), eps
            return layer_norm(*arguments)
    if _is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        apply = LayerNormFunction.apply if compiling else _apply
        y: Tensor = apply(backend, input, shape, weight, bias, eps)
        return y
    if backend is None:
        backend = choose(input, shape, weight, bias)
    return backend.forward(input, shape, weight, bias, eps, statistics=False)[0]


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
