"""One PTX function → one C++ function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from ptx.instructions import emit
from ptx.operands import Names, Symbol, Unsupported
from ptx.syntax import (
    Function,
    Item,
    Label,
    Name,
    Registers,
    ScopeBegin,
    ScopeEnd,
    Statement,
    Variable,
)

# What never-written registers hold: recognisable, and NaN in every floating-point type.
_POISON = {"bool": "false", "f32": "as_f32(kPoison32)", "f64": "as_f64(kPoison64)", "u8": "0xde"}
_POISON |= {"u16": "kPoison16", "u32": "kPoison32", "u64": "kPoison64", "u128": "kPoison64"}
_ENDS_BLOCK = ("bra", "brx", "ret", "exit", "trap")


class Kernel(Protocol):
    """The kernel that the function is translated for (ptx.kernel)."""

    def site(self, statement: Statement) -> str: ...
    def new_block(self) -> int: ...
    def count(self, opcode: str) -> None: ...
    def unsupported(self, opcode: str) -> None: ...
    def place_shared(self, variable: Variable) -> int: ...
    def place_local(self, variable: Variable) -> int: ...
    def call(self, name: str) -> tuple[str, int, int]: ...


class FunctionEmitter:
    """Walks a function's statements in order; .code() is the text of its body."""

    def __init__(self, function: Function, kernel: Kernel, names: Names) -> None:
        self.function = function
        self.names = names
        self._kernel = kernel
        self._lines: list[str] = []
        self._buffers: list[str] = []  # .param variables of calls
        self._carry = False
        self._location = ""
        self._block_begins = True  # at the next statement
        self._scopes = [0]
        self._labels = dict(_labels(function.body or []))
        self._targeted = self._find_targets()
        self._scopes = [0]

    # ---- what emitters ask for (instructions.base.Function) --------------------------------------

    @property
    def is_kernel(self) -> bool:
        return self.function.is_kernel

    def site(self, statement: Statement) -> str:
        return self._kernel.site(statement)

    def label(self, name: str) -> str:
        scope = next((s for s in reversed(self._scopes) if (s, name) in self._labels), None)
        if scope is None:
            raise Unsupported(f"the label {name}")
        return self._labels[scope, name]

    def branch_targets(self, name: str) -> tuple[str, ...]:
        if name not in self.function.branch_targets:
            raise Unsupported(f"the branch targets {name}")
        return tuple(self.label(target) for target in self.function.branch_targets[name])

    def use_carry(self) -> str:
        self._carry = True
        return "carry"

    def call(self, name: str) -> tuple[str, int, int]:
        return self._kernel.call(name)

    def leave(self, exits: bool) -> str:
        if exits and not self.function.is_kernel:
            raise Unsupported("exit inside a .func")
        return "return;"

    # ---- the walk --------------------------------------------------------------------------------

    def code(self) -> str:
        scopes = _scope_numbers()
        for item in self.function.body or []:
            if isinstance(item, Statement):
                self._statement(item)
            elif isinstance(item, Label):
                self._place_label(item)
            elif isinstance(item, ScopeBegin):
                self._scopes.append(next(scopes))
                self.names.push()
            elif isinstance(item, ScopeEnd):
                self._scopes.pop()
                self.names.pop()
            elif isinstance(item, Registers):
                self.names.declare(item)
            else:
                self._variable(item)
        return "\n".join([*self._declarations(), *self._lines, "  return;"])

    def _statement(self, statement: Statement) -> None:
        opcode = statement.opcode
        if self._block_begins:
            self._block_begins = False
            self._lines.append(f"  block_hits[{self._kernel.new_block()}]++;")
        self._kernel.count(opcode)
        if statement.location != self._location:
            self._location = statement.location
            self._lines.append(f"  // {self._location}")
        try:
            code = emit(statement, self)
        except Unsupported as reason:
            self._kernel.unsupported(opcode)
            message = _quoted(f"PTX instruction {opcode} is not implemented ({reason})")
            code = f'fatal("unsupported", {message}, {self.site(statement)});'
        written = statement.text.rstrip("\\")  # which would make a comment of the next line
        self._lines.append(f"  {code}  // {written}")
        if statement.words[0] in _ENDS_BLOCK:
            self._block_begins = True

    def _place_label(self, label: Label) -> None:
        cpp = self._labels[self._scopes[-1], label.name]
        if cpp in self._targeted:
            self._lines.append(f"{cpp}:")
            self._block_begins = True

    def _variable(self, variable: Variable) -> None:
        if variable.space == "shared":
            symbol = Symbol("shared", str(self._kernel.place_shared(variable)))
        elif variable.space == "local":
            symbol = Symbol("local", str(self._kernel.place_local(variable)))
        else:  # .param: a buffer for one call
            cpp = self.names.unique(variable.name)
            self._buffers.append(f"alignas(16) unsigned char {cpp}[{max(1, variable.bytes)}];")
            symbol = Symbol("param", cpp)
        self.names.add(variable.name, symbol)

    def _declarations(self) -> Iterator[str]:
        """All at the top: goto may not jump over an initialisation."""
        by_type: dict[str, list[str]] = {}
        for register in self.names.used.values():
            by_type.setdefault(register.storage, []).append(register.cpp)
        for storage, names in by_type.items():
            values = [f"{name} = {_POISON[storage]}" for name in names]
            for start in range(0, len(values), 5):
                yield f"  {storage} {', '.join(values[start : start + 5])};"
        if self._carry:
            yield "  u32 carry = 0;  // CC.CF"
        for buffer in self._buffers:
            yield f"  {buffer}"

    def _find_targets(self) -> set[str]:
        """The labels that something jumps to; the others are the debug information's."""
        found: set[str] = set()
        scopes = _scope_numbers()
        for item in self.function.body or []:
            if isinstance(item, ScopeBegin):
                self._scopes.append(next(scopes))
            elif isinstance(item, ScopeEnd):
                self._scopes.pop()
            elif isinstance(item, Statement) and item.words[0] == "bra":
                target = item.operands[0]
                if isinstance(target, Name):
                    found.add(self.label(target.text))
        for targets in self.function.branch_targets.values():
            found.update(self.label(target) for target in targets)
        return found


def _scope_numbers() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


def _labels(body: list[Item]) -> Iterator[tuple[tuple[int, str], str]]:
    """(scope, PTX label) → C++ label: inline assembly repeats its labels, each in its own scope."""
    scopes, numbers = [0], _scope_numbers()
    for item in body:
        if isinstance(item, ScopeBegin):
            scopes.append(next(numbers))
        elif isinstance(item, ScopeEnd):
            scopes.pop()
        elif isinstance(item, Label):
            plain = "".join(c if c.isalnum() else "_" for c in item.name.lstrip("$"))
            suffix = f"_{scopes[-1]}" if scopes[-1] else ""
            yield (scopes[-1], item.name), f"{plain}{suffix}"


def mix_text(mix: Counter[str]) -> str:
    return " ".join(f"{opcode}={count}" for opcode, count in mix.items())


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "/").replace('"', "'") + '"'
