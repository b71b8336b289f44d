"""Arithmetic of f16 and bf16, single and in pairs, and of pairs of f32.

One expression for an element is written with the names x, y, z; pairs apply it to each element.
"""

from __future__ import annotations

from collections.abc import Sequence

from ptx.instructions.base import Instruction
from ptx.operands import Unsupported

FORMATS = {"f16": "Half", "bf16": "Brain"}  # math.h's names
NARROW = ("f16", "bf16", "f16x2", "bf16x2")
_NAMES = "xyz"


def each(type: str, element: str, arguments: Sequence[str]) -> str:
    """The expression `element` of x, y, z applied to the arguments of a packed type."""
    kind, function = ("f32", "each_f32") if type == "f32x2" else ("u16", "each_half")
    names = ", ".join(f"{kind} {name}" for name in _NAMES[: len(arguments)])
    return f"{function}([&]({names}) -> {kind} {{ return {element}; }}, {', '.join(arguments)})"


def binary(operation: str, type: str, a: str, b: str) -> str:
    """a ∘ b without modifiers."""
    format = FORMATS[type.removesuffix("x2")]
    if type.endswith("x2"):
        return each(type, f"{operation}16<{format}>(x, y)", (a, b))
    return f"{operation}16<{format}>({a}, {b})"


def arithmetic(i: Instruction, operation: str, type: str, arguments: int) -> str:
    """add, sub, mul, fma, min, max, neg, abs, ex2, tanh of the types in NARROW."""
    format = FORMATS[type.removesuffix("x2")]
    packed = type.endswith("x2")
    operands = [i.read(number + 1, "b32" if packed else "b16") for number in range(arguments)]
    names = list(_NAMES[:arguments]) if packed else operands
    if operation in ("add", "sub", "mul", "fma"):
        i.take("rn")
    elif operation in ("ex2", "tanh"):
        i.one_of(("approx",))
    flush = i.take("ftz")
    if flush and operation != "ex2" and format == "Brain":
        raise Unsupported(".ftz of bf16")
    if flush:
        names = [f"flush16<{format}>({name})" for name in names]
    if operation in ("min", "max"):
        quiet = str(not i.take("NaN")).lower()
        sign = i.take("xorsign")
        if sign:
            i.one_of(("abs",))
        element = f"{operation}16<{format}, {quiet}, {str(sign).lower()}>({', '.join(names)})"
    else:
        element = f"{operation}16<{format}>({', '.join(names)})"
    if flush:
        element = f"flush16<{format}>({element})"
    if i.take("sat"):
        element = f"saturate16<{format}>({element})"
    if i.take("relu"):
        element = f"relu16<{format}>({element})"
    value = each(type, element, operands) if packed else element
    return i.write(value, "b32" if packed else "b16")
