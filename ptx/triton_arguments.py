"""Packs the arguments of a Triton launch into the parameter bytes that the kernel's PTX declares.

Triton passes them in the order of the signature.  Compile-time constants (None and integers that
equal 1 are among them) are no parameters; tuples are flattened; a tensor descriptor becomes several
parameters; addresses of two scratch buffers follow at the end.  Only here do Triton 3.5 to 3.9
differ.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# A descriptor that was lowered to a pointer brings the flag "pad with NaN" and, from 3.7 on, "round
# float32 to tf32".
_DESCRIPTOR_FLAGS = 1 if _VERSION < (3, 7) else 2

TENSOR_MAP = "nvTmaDesc"  # Triton's name for a parameter of 128 bytes that holds a tensor map
# Type numbers in a compiled kernel are those of PTX, the encoder takes those of the CUDA driver.
_ELEMENT_TYPES = {8: 10, 9: 8, 10: 9}
_TF32 = 11

_INTEGER_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8}
_INTEGER_BYTES |= {"u1": 1, "u8": 1, "u16": 2, "u32": 4, "u64": 8}
_FLOAT_FORMATS = {"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}


@dataclass(frozen=True)
class Argument:
    """One parameter: Triton's type, the value given, and the name to report it by."""

    type: str
    value: Any
    name: str

    @property
    def tensor(self) -> torch.Tensor | None:
        """The tensor whose memory the kernel may touch through this argument."""
        if self.type == TENSOR_MAP:
            value = self.value.descriptor.base
        elif self.type.startswith("*"):
            value = self.value
        else:
            return None
        if isinstance(value, triton.runtime.jit.TensorWrapper):  # made by triton.reinterpret
            value = value.base
        if value is None or isinstance(value, torch.Tensor):
            return value
        raise TypeError(f"argument {self.name} is {value!r}; a pointer is given as a CPU tensor")


@dataclass(frozen=True)
class TensorMap:
    """What a host tensor descriptor and the compiled kernel say of the map to be encoded."""

    descriptor: Any  # triton.tools.tensor_descriptor.TensorDescriptor
    layout: Mapping[str, Any]  # swizzle, elem_size, elem_type, block_size, fp4_padded

    @property
    def element_type(self) -> int:
        if getattr(self.descriptor, "round_f32_to_tf32", False):
            return _TF32
        number = self.layout["elem_type"]
        return _ELEMENT_TYPES.get(number, number)

    @property
    def sizes(self) -> list[int]:
        """In elements, the contiguous dimension first, as the encoder wants them."""
        sizes = list(self.descriptor.shape)
        if self.layout["fp4_padded"]:
            sizes[-1] *= 2
        return sizes[::-1]

    @property
    def strides(self) -> list[int]:
        """In bytes, of every dimension but the contiguous one."""
        strides = [stride * self.layout["elem_size"] for stride in self.descriptor.strides]
        return strides[-2::-1]

    @property
    def box(self) -> list[int]:
        return list(self.layout["block_size"])[::-1]

    @property
    def pads_with_nan(self) -> bool:
        return self.descriptor.padding == "nan"


def flatten(
    signature: Sequence[Any],
    values: Sequence[Any],
    names: Sequence[str],
    tensor_maps: Sequence[Mapping[str, Any]] | None,
) -> list[Argument]:
    """One Argument per parameter, without the scratch buffers.

    `signature` holds Triton's type of each value, with tuples where a tuple is passed.
    `tensor_maps` is the compiled kernel's list of layouts, one per descriptor, where it reads
    descriptors by TMA; empty or None where they were lowered to pointers.
    """
    layouts = iter(tensor_maps) if tensor_maps else itertools.repeat(None)
    return list(_flatten(signature, values, names, layouts))


def _flatten(
    signature: Sequence[Any],
    values: Sequence[Any],
    names: Sequence[str],
    layouts: Iterator[Mapping[str, Any] | None],
) -> Iterator[Argument]:
    for type_, value, name in zip(signature, values, names, strict=True):
        if isinstance(type_, tuple):
            inner = [f"{name}[{i}]" for i in range(len(type_))]
            yield from _flatten(type_, value, inner, layouts)
        elif type_.startswith("tensordesc"):
            yield from _descriptor(type_, value, name, next(layouts))
        elif type_ != "constexpr":
            yield Argument(type_, value, name)


def _descriptor(
    type_: str, descriptor: Any, name: str, layout: Mapping[str, Any] | None
) -> Iterator[Argument]:
    if layout is not None:
        if layout.get("is_im2col"):
            raise NotImplementedError(f"argument {name} is an im2col descriptor; tiled ones run")
        yield Argument(TENSOR_MAP, TensorMap(descriptor, layout), name)
    else:
        element = re.match(r"tensordesc(?:_im2col)?<([^[>]*)\[", type_)
        assert element is not None, type_
        yield Argument(f"*{element[1]}", descriptor.base, name)
        for value in (*descriptor.shape, *descriptor.strides):
            yield Argument("i64", value, name)
        flags = (descriptor.padding == "nan", getattr(descriptor, "round_f32_to_tf32", False))
        for flag in flags[:_DESCRIPTOR_FLAGS]:
            yield Argument("i1", flag, name)
    # What the kernel's own source reads as desc.shape and desc.strides.
    for value in descriptor.shape:
        yield Argument("i32", value, name)
    for value in descriptor.strides:
        yield Argument("i64", value, name)


def pack(
    arguments: Iterable[Argument],
    scratch: Sequence[int],
    parameters: Sequence[tuple[int, int]],
    address: Callable[[torch.Tensor, str], int],
    encode: Callable[..., bytes],
) -> bytes:
    """The parameter bytes of one launch.

    `scratch` are the addresses of the scratch buffers, `parameters` (offset, bytes) of each
    parameter in the PTX, `address` tells where the kernel finds the first element of a named
    tensor, and `encode` is Executor.tensor_map.
    """
    values = [(argument.name, _bytes_of(argument, address, encode)) for argument in arguments]
    values += [("scratch buffer", struct.pack("<Q", buffer)) for buffer in scratch]
    if len(values) != len(parameters):
        raise ValueError(f"{len(values)} arguments for {len(parameters)} parameters in the PTX")
    packed = bytearray(max((offset + size for offset, size in parameters), default=0))
    for (name, value), (offset, size) in zip(values, parameters, strict=True):
        if len(value) != size:
            raise ValueError(f"argument {name} has {len(value)} bytes, its parameter {size}")
        packed[offset : offset + size] = value
    return bytes(packed)


def _bytes_of(
    argument: Argument,
    address: Callable[[torch.Tensor, str], int],
    encode: Callable[..., bytes],
) -> bytes:
    type_, value = argument.type, argument.value
    if type_ == TENSOR_MAP:
        tensor = argument.tensor
        assert tensor is not None
        return encode(
            element_type=value.element_type,
            address=address(tensor, argument.name),
            sizes=value.sizes,
            strides=value.strides,
            box=value.box,
            swizzle=value.layout["swizzle"],
            fill_nan=value.pads_with_nan,
        )
    if type_.startswith("*"):
        tensor = argument.tensor
        return struct.pack("<Q", 0 if tensor is None else address(tensor, argument.name))
    if type_ in _INTEGER_BYTES:
        size = _INTEGER_BYTES[type_]
        return (int(value) % (1 << (8 * size))).to_bytes(size, "little")
    if type_ == "bf16":  # Triton's launcher drops the lower half of a float32
        return struct.pack("<f", value)[2:]
    if type_ in _FLOAT_FORMATS:
        return struct.pack(_FLOAT_FORMATS[type_], value)
    raise TypeError(f"argument {argument.name} is of type {type_}, which no launch can pass")
