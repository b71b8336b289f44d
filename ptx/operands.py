"""What the names of one PTX function mean, and its operands as C++ expressions."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ptx.syntax import (
    TYPE_BYTES,
    Address,
    Float,
    Integer,
    Name,
    Not,
    Operand,
    Registers,
    Vector,
)


class Unsupported(Exception):  # noqa: N818  it says what is missing, nothing went wrong
    """What the translator does not know; it becomes a report when execution reaches it."""


# PTX type → the C++ type that math.h calculates with.  16-bit floats travel as their bits.
C_TYPE = {
    "pred": "bool",
    "f32": "f32",
    "f64": "f64",
    "b128": "u128",
    **{f"{kind}{bits}": f"{kind}{bits}" for kind in "us" for bits in (8, 16, 32, 64)},
}
for _type, _bytes in TYPE_BYTES.items():
    C_TYPE.setdefault(_type, f"u{8 * _bytes}")

SPECIAL_REGISTERS = {
    **{f"%tid.{axis}": f"current->index.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"block_dim.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"block_index.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"grid_dim.{axis}" for axis in "xyz"},
    # every cluster is one block
    **{f"%clusterid.{axis}": f"block_index.{axis}" for axis in "xyz"},
    **{f"%nclusterid.{axis}": f"grid_dim.{axis}" for axis in "xyz"},
    **{f"%cluster_ctaid.{axis}": "0u" for axis in "xyz"},
    **{f"%cluster_nctaid.{axis}": "1u" for axis in "xyz"},
    "%cluster_ctarank": "0u",
    "%cluster_nctarank": "1u",
    "%laneid": "current->lane",
    "%warpid": "current->warp",
    "%nwarpid": "warps_per_block()",
    "%lanemask_eq": "(1u << current->lane)",
    "%lanemask_lt": "((1u << current->lane) - 1)",
    "%lanemask_le": "((2u << current->lane) - 1)",
    "%lanemask_gt": "~((2u << current->lane) - 1)",
    "%lanemask_ge": "~((1u << current->lane) - 1)",
    "%clock": "clock_ticks()",
    "%clock64": "clock_ticks()",
    "%globaltimer": "clock_ticks()",
    "%globaltimer_lo": "clock_ticks()",
    "%dynamic_smem_size": "(total_shared() - dynamic_shared())",
    "%total_smem_size": "total_shared()",
    "WARP_SZ": "32u",
}


# PTX type → the C++ type of a register: f32 and f64 as such, everything else as unsigned bits.
_STORAGE = {type: f"u{8 * bytes}" for type, bytes in TYPE_BYTES.items()}
_STORAGE |= {"pred": "bool", "f32": "f32", "f64": "f64"}


class Register(NamedTuple):
    cpp: str
    type: str  # the PTX type that it was declared with
    storage: str  # its C++ type


@dataclass(frozen=True)
class Symbol:
    """A variable: in global, const and param space its value is a pointer, else an offset."""

    space: str
    cpp: str

    @property
    def is_pointer(self) -> bool:
        return self.space in ("global", "const", "param")


# Neither a C++ word nor one of the types in math.h.
_FREE = re.compile(r"[%$]*((?!(?:[us](?:8|16|32|64|128)|f32|f64)\Z)(?:[a-z]{1,3}\d+|L__\w+))")


def identifier(name: str) -> str:
    """A C++ identifier for a PTX name; %r12 stays r12, what might be a C++ word gets a `_`."""
    free = _FREE.fullmatch(name)
    return free[1] if free else re.sub(r"\W", "_", name.lstrip("%$")) + "_"


def convert(expression: str, source: str, target: str) -> str:
    """A C++ value of type `source` as type `target`: bits are kept, integers cut or extended."""
    if source == target:
        return expression
    if source in ("f32", "f64"):
        return convert(f"bits({expression})", "u32" if source == "f32" else "u64", target)
    if target in ("f32", "f64"):
        return f"as_{target}({convert(expression, source, 'u32' if target == 'f32' else 'u64')})"
    return f"{target}({expression})"


def literal(value: Operand, type: str) -> str:
    """An integer or floating-point constant read as a PTX type."""
    target = C_TYPE[type]
    if isinstance(value, Float):
        bits = value.bits
        if value.width == 64 and target in ("f32", "u32"):  # a decimal literal, 1.5
            bits = struct.unpack("<I", struct.pack("<f", _f64(bits)))[0]
        width = 32 if target in ("f32", "u32") else value.width
        return convert(f"{bits:#x}u" if width == 32 else f"{bits:#x}ull", f"u{width}", target)
    assert isinstance(value, Integer)
    if target in ("f32", "f64"):
        raise Unsupported(f"the integer {value.value} as {type}")
    if target == "bool":
        return "true" if value.value else "false"
    if target == "u128":
        return f"u128({value.value & (2**64 - 1)}ull)"
    bits = value.value & (2 ** (8 * TYPE_BYTES[type]) - 1)
    if target == "u32":
        return f"{bits}u"
    if target == "u64":
        return f"{bits}ull"
    if target == "s32" and bits < 2**31:
        return str(bits)
    return f"{target}({bits}{'ull' if target == 's64' else 'u'})"


def _f64(bits: int) -> float:
    value: float = struct.unpack("<d", struct.pack("<Q", bits))[0]
    return value


class Names:
    """The registers and variables of a function, scope by scope."""

    def __init__(self, symbols: dict[str, Symbol], resolve: Callable[[str], Symbol | None]) -> None:
        self._resolve = resolve  # names of the module's scope
        self._scopes: list[dict[str, Register | Symbol]] = [dict(symbols)]
        self._families: list[dict[str, str]] = [{}]  # %r of .reg .b32 %r<70> → b32
        self._suffixes = [""]  # makes the names of an inner scope unique
        self._found: list[dict[str, Register | Symbol]] = [{}]  # by names as seen in each scope
        self._scope_count = 0
        self.used: dict[str, Register] = {}  # by C++ name

    def push(self) -> None:
        self._scope_count += 1
        self._scopes.append({})
        self._families.append({})
        self._found.append({})
        self._suffixes.append(f"_{self._scope_count}")

    def pop(self) -> None:
        self._scopes.pop()
        self._families.pop()
        self._found.pop()
        self._suffixes.pop()

    def declare(self, item: Registers) -> None:
        self._found[-1].clear()
        if item.count is None:
            self._scopes[-1][item.name] = self._register(item.name, item.type, -1)
        else:
            self._families[-1][item.name] = item.type

    def add(self, name: str, symbol: Symbol) -> None:
        self._found[-1].clear()
        self._scopes[-1][name] = symbol

    def unique(self, name: str) -> str:
        """A C++ identifier for a variable of the innermost scope."""
        return identifier(name) + self._suffixes[-1]

    def find(self, name: str) -> Register | Symbol | None:
        found = self._found[-1].get(name)
        return found or self._search(name)

    def _search(self, name: str) -> Register | Symbol | None:
        """From the innermost scope outwards."""
        for depth in range(len(self._scopes) - 1, -1, -1):
            found = self._scopes[depth].get(name)
            if found is None:
                type = self._families[depth].get(name.rstrip("0123456789"))
                if type is None:
                    continue
                found = self._register(name, type, depth)
            if isinstance(found, Register):
                self.used[found.cpp] = found
            self._found[-1][name] = found
            return found
        return self._resolve(name)

    def _register(self, name: str, type: str, depth: int) -> Register:
        return Register(identifier(name) + self._suffixes[depth], type, _STORAGE[type])

    # ---- operands --------------------------------------------------------------------------------

    def read(self, operand: Operand, type: str) -> str:
        """The operand's value as an expression of the C++ type of the PTX type."""
        if isinstance(operand, Name):
            target = C_TYPE[type]
            found = self.find(operand.text)
            if isinstance(found, Register):
                return convert(found.cpp, found.storage, target)
            if isinstance(found, Symbol):
                return convert(self.symbol(found), "u64", target)
            special = SPECIAL_REGISTERS.get(operand.text)
            if special:
                return special if target == "u32" else f"{target}({special})"
            raise Unsupported(f"the operand {operand.text}")
        if isinstance(operand, (Integer, Float)):
            return literal(operand, type)
        if isinstance(operand, Not):
            return f"!{self.read(operand.name, 'pred')}"
        if isinstance(operand, Vector) and len(operand.items) == 1:
            return self.read(operand.items[0], type)
        raise Unsupported(f"an operand of the kind {operand.__class__.__name__.lower()}")

    def write(self, operand: Operand, type: str, value: str) -> str:
        """The statement that stores a value of the C++ type of the PTX type.

        A register wider than the type is extended by the type's sign."""
        if isinstance(operand, Vector) and len(operand.items) == 1:
            operand = operand.items[0]
        if not isinstance(operand, Name):
            raise Unsupported("a destination that is not a register")
        if operand.text == "_":
            return f"(void)({value});"
        found = self.find(operand.text)
        if not isinstance(found, Register):
            raise Unsupported(f"the destination {operand.text}")
        source, target = C_TYPE[type], found.storage
        if source != target and ("f32" in (source, target) or "f64" in (source, target)):
            value = convert(value, source, target)
        return f"{found.cpp} = {value};"

    def symbol(self, symbol: Symbol) -> str:
        return f"u64({symbol.cpp})"

    def address(self, operand: Operand) -> str:
        """[base + offset] as an expression of type u64 (in its own space)."""
        if not isinstance(operand, Address):
            raise Unsupported("an operand that is not an address")
        if isinstance(operand.base, Integer):
            return f"{operand.base.value + operand.offset}ull"
        base = self.read(operand.base, "u64")
        if operand.offset:
            return f"{base} {'-' if operand.offset < 0 else '+'} {abs(operand.offset)}"
        return base
