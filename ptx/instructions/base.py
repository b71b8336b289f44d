"""One instruction on its way to C++: what the emitters of this package work with.

An emitter takes the opcode's words that it knows and reads the operands that it uses; whatever it
leaves over makes the instruction unsupported, so that nothing is ignored silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from ptx.operands import C_TYPE, Names, Unsupported
from ptx.syntax import TYPE_BYTES, Operand, Pair, Statement, Vector

SCOPES = ("cta", "cluster", "gpu", "sys")
_SPACE_NAMES = {"": "kGeneric", "global": "kGlobal", "shared": "kShared", "const": "kGlobal"}


class Function(Protocol):
    """The function that the instruction stands in (ptx.function)."""

    names: Names

    @property
    def is_kernel(self) -> bool: ...
    def site(self, statement: Statement) -> str: ...
    def label(self, name: str) -> str: ...
    def branch_targets(self, name: str) -> tuple[str, ...]: ...
    def use_carry(self) -> str: ...
    def call(self, name: str) -> tuple[str, int, int]: ...
    def leave(self, exits: bool) -> str: ...


class Instruction:
    def __init__(self, statement: Statement, function: Function) -> None:
        self.statement = statement
        self.function = function
        self.names = function.names
        self.words = list(statement.words[1:])  # not taken yet
        self.skipped_spaces: list[str] = []  # what a predicated-off lane passes, see device.h
        self._operands = statement.operands
        self._unread = set(range(len(self._operands)))
        self._site = ""

    # ---- the opcode's words ----------------------------------------------------------------------

    @property
    def operation(self) -> str:
        return self.statement.words[0]

    def take(self, word: str) -> bool:
        """Is this modifier given?"""
        if word in self.words:
            self.words.remove(word)
            return True
        return False

    def take_all(self, words: Iterable[str]) -> None:
        """Accepts modifiers that change nothing here: cache hints, scopes, .sync, .aligned."""
        for word in words:
            self.take(word)

    def one_of(self, words: Iterable[str], default: str | None = None) -> str:
        """The one of these words that is given, the first in the opcode's order."""
        options = set(words)
        for word in self.words:
            if word in options:
                self.words.remove(word)
                return word
        if default is None:
            raise Unsupported("a modifier is missing")
        return default

    def type(self, accepted: Iterable[str] | None = None) -> str:
        """The last word: the instruction's type."""
        if not self.words or self.words[-1] not in TYPE_BYTES:
            raise Unsupported("no type")
        if accepted is not None and self.words[-1] not in set(accepted):
            raise Unsupported(f"the type {self.words[-1]}")
        return self.words.pop()

    # ---- operands --------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        return len(self._operands)

    def operand(self, index: int) -> Operand:
        if index >= len(self._operands):
            raise Unsupported("an operand is missing")
        self._unread.discard(index)
        return self._operands[index]

    def is_read(self, index: int) -> bool:
        return index not in self._unread

    def vector(self, index: int) -> tuple[Operand, ...]:
        operand = self.operand(index)
        return operand.items if isinstance(operand, Vector) else (operand,)

    def pair(self, index: int) -> tuple[Operand, Operand | None]:
        operand = self.operand(index)
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    def read(self, index: int, type: str) -> str:
        return self.names.read(self.operand(index), type)

    def write(self, value: str, type: str, index: int = 0) -> str:
        return self.names.write(self.operand(index), type, value)

    def write_all(self, operands: Iterable[Operand], type: str, array: str) -> str:
        return " ".join(
            self.names.write(operand, type, f"{array}[{i}]") for i, operand in enumerate(operands)
        )

    def array(self, operands: Iterable[Operand], type: str) -> str:
        """{a, b, c}: the initialiser of an array."""
        return "{" + ", ".join(self.names.read(operand, type) for operand in operands) + "}"

    # ---- memory ----------------------------------------------------------------------------------

    @property
    def site(self) -> str:
        if not self._site:
            self._site = self.function.site(self.statement)
        return self._site

    def space(self, accepted: Iterable[str] = ("global", "shared")) -> str:
        """Takes the word that names the state space; "" is generic."""
        found = ""
        for word in list(self.words):
            name = word.partition("::")[0]
            if name in ("global", "shared", "local", "const", "param") and name in set(accepted):
                self.words.remove(word)
                found = name
                break
        return found

    def pointer(self, index: int, space: str) -> str:
        """The address operand as a host pointer."""
        address = self.names.address(self.operand(index))
        return f"shared({address})" if space == "shared" else f"pointer({address})"

    def accesses(self, space: str) -> str:
        """device.h's Space; also notes that a predicated-off lane passes this access."""
        name = f"Space::{_SPACE_NAMES[space]}"
        # a generic access is counted under the space that it turns out to have: mostly global
        self.skipped_spaces.append("Space::kGlobal" if space == "" else name)
        return name

    # ---- the end ---------------------------------------------------------------------------------

    def check_nothing_left(self) -> None:
        if self.words:
            raise Unsupported("the modifier " + ", ".join("." + word for word in self.words))
        if self._unread:
            raise Unsupported(f"operand {min(self._unread) + 1}")


Emitter = Callable[[Instruction], str]


def c_type(type: str) -> str:
    return C_TYPE[type]


def bits_type(type: str) -> str:
    """The untyped PTX type of the same width."""
    return "pred" if type == "pred" else f"b{8 * TYPE_BYTES[type]}"


def signed(type: str) -> bool:
    return type[0] == "s"


def unsigned(type: str) -> str:
    return f"u{8 * TYPE_BYTES[type]}"


def width(type: str) -> int:
    return 8 * TYPE_BYTES[type]
