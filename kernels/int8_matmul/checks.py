"""What the functions on int8 check before anything runs; the messages name the argument."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = {None: "none", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_tanh"}
# As in csrc/int8_matmul/cpu.h and cuda_epilogue.cuh.
ACTIVATION_CODES = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3}
MOST_TERMS = 1 << 17  # of an int32 sum: 2^17 * 127 * 127 < 2^31


def names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(function: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a Tensor, not {type(value).__name__}")


def check_dtype(function: str, name: str, x: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    check_tensor(function, name, x)
    if x.dtype not in accepted:
        raise TypeError(f"{function}: {name} is {x.dtype}; accepted: {names(accepted)}")


def check_float(function: str, name: str, x: Tensor) -> None:
    check_dtype(function, name, x, FLOATS)


def check_device(function: str, name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise RuntimeError(
            f"{function}: {name} is on {tensor.device}, but the first argument is on {x.device}; "
            "they must be on one device"
        )


def check_like(function: str, name: str, given: Any, wanted: Tensor) -> None:
    """That `given` has the shape, dtype and device of `wanted`."""
    check_tensor(function, name, given)
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        raise ValueError(
            f"{function}: {name} must be {wanted.dtype} of shape {list(wanted.shape)}, "
            f"but is {given.dtype} of shape {list(given.shape)}"
        )
    check_device(function, name, given, wanted)


def activation_name(function: str, activation: Any) -> str:
    """The backends' name of a public `activation`."""
    if (activation is None or isinstance(activation, str)) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    raise ValueError(
        f"{function}: activation is {activation!r}; accepted: None, 'relu', 'gelu', 'gelu_tanh'"
    )


def check_mode(function: str, mode: Any, accepted: tuple[str, ...]) -> None:
    if not isinstance(mode, str) or mode not in accepted:
        raise ValueError(
            f"{function}: mode is {mode!r}; accepted: {', '.join(map(repr, accepted))}"
        )


def check_terms(function: str, name: str, terms: int) -> None:
    if terms > MOST_TERMS:
        raise ValueError(
            f"{function}: the last size of {name} is {terms}; int32 sums hold at most {MOST_TERMS}"
        )


def bias_of(function: str, bias: Any, columns: int, x: Tensor) -> Tensor | None:
    """`bias` with stride 1."""
    if bias is None:
        return None
    check_float(function, "bias", bias)
    if bias.shape != (columns,):
        raise ValueError(
            f"{function}: bias must have shape [{columns}], but has shape {list(bias.shape)}"
        )
    check_device(function, "bias", bias, x)
    return bias.contiguous()


def out_dtype_of(function: str, out_dtype: Any, default: torch.dtype) -> torch.dtype:
    if out_dtype is None:
        return default
    if out_dtype not in FLOATS:
        raise TypeError(f"{function}: out_dtype is {out_dtype}; accepted: {names(FLOATS)}")
    return out_dtype


def scale_of(
    function: str, name: str, scale: Any, shapes: tuple[tuple[int, ...], ...], x: Tensor
) -> Tensor:
    """`scale` as float32 with one dimension; it has one of `shapes`, or a single element."""
    check_float(function, name, scale)
    if scale.shape not in shapes and not (scale.numel() == 1 and scale.dim() <= 2):
        wanted = "".join(f"have shape {list(shape)} or " for shape in shapes)
        raise ValueError(
            f"{function}: {name} must {wanted}hold one value, but has shape {list(scale.shape)}"
        )
    check_device(function, name, scale, x)
    return scale.detach().float().reshape(-1).contiguous()


def with_unit_stride(x: Tensor, *dims: int) -> Tensor:
    """`x`, copied where none of these dimensions is contiguous."""
    strides = [x.stride(dim) for dim in dims]  # in a backward torch 2.14 compiles no generator
    if 1 in strides:
        return x
    return x.clone(memory_format=torch.contiguous_format)
