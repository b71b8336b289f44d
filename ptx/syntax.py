"""The tree that the parser makes of PTX: modules, functions, variables, statements, operands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

# Bytes of one element of each PTX type.  Predicates live in registers only.
TYPE_BYTES = {
    **dict.fromkeys(("b8", "u8", "s8", "e4m3", "e5m2"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16", "e4m3x2", "e5m2x2"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "tf32"), 4),
    **dict.fromkeys(("f16x2", "bf16x2", "u16x2", "s16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64", "f32x2"), 8),
    "b128": 16,
    "pred": 0,
}


class PtxSyntaxError(ValueError):
    """The text is not PTX that the parser knows."""


# ---- operands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """A register, a special register such as %tid.x, a variable, a label, a function or `_`."""

    text: str


@dataclass(frozen=True)
class Integer:
    value: int


@dataclass(frozen=True)
class Float:
    """A floating-point literal by its bits: 0f3F800000 (32) or 0d3FF0000000000000 (64)."""

    bits: int
    width: int


@dataclass(frozen=True)
class Not:
    """A negated predicate: !%p1."""

    name: Name


@dataclass(frozen=True)
class Pair:
    """Two destinations: %r1|%p1."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Vector:
    """{%r1, %r2}."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset], or with the coordinates of a tensor copy: [base, {%r1, %r2}]."""

    base: Name | Integer
    offset: int = 0
    coordinates: Vector | None = None


@dataclass(frozen=True)
class Group:
    """The parameters of a call: (param0, param1)."""

    items: tuple[Operand, ...]


Operand = Name | Integer | Float | Not | Pair | Vector | Address | Group

# ---- declarations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registers:
    """.reg .b32 %r<70>; the names %r0 … %r69, or one name where count is None."""

    type: str
    name: str
    count: int | None


@dataclass(frozen=True)
class Variable:
    """A variable in the space global, const, shared, local or param."""

    name: str
    space: str
    type: str
    count: int | None = 1  # elements; None: extern, of the size that the launch gives
    align: int = 1
    initial: tuple[int, ...] = ()  # the elements' bits; what is missing is zero
    unsupported: str = ""  # why its initial value cannot be expressed
    external: bool = False

    @property
    def bytes(self) -> int:
        return TYPE_BYTES[self.type] * (self.count or 0)


# ---- statements ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guard:
    """@%p1 or @!%p1 before an instruction."""

    register: str
    negated: bool


class Statement(NamedTuple):
    """One instruction: its opcode and the words of that, its operands and where it stands."""

    opcode: str  # "add.rn.f32"
    words: tuple[str, ...]  # three
    operands: tuple[Operand, ...]
    guard: Guard | None
    line: int  # of the PTX text, from 1
    location: str  # "kernel.cuh:12<caller.cuh:70", "" where the text names none
    text: str  # as written, in one line


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class ScopeBegin:
    pass


@dataclass(frozen=True)
class ScopeEnd:
    pass


Item = Statement | Label | Registers | Variable | ScopeBegin | ScopeEnd


@dataclass
class Function:
    """An .entry (a kernel) or a .func; body is None where only the declaration is given."""

    name: str
    is_kernel: bool
    results: list[Variable]
    parameters: list[Variable]
    directives: dict[str, tuple[int, ...]]  # "maxntid": (1024, 1, 1)
    body: list[Item] | None = None
    branch_targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # for brx.idx


@dataclass
class Module:
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)

    @property
    def kernels(self) -> list[Function]:
        return [f for f in self.functions.values() if f.is_kernel and f.body is not None]
