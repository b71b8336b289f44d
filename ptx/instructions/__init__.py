"""PTX instructions as C++ statements: one table from an opcode's first word to its emitter."""

from __future__ import annotations

from ptx.instructions import (
    arithmetic,
    asynchronous,
    bits,
    compare,
    control,
    convert,
    matrix,
    memory,
    sync,
    tensor,
)
from ptx.instructions.base import Emitter, Function, Instruction
from ptx.operands import Unsupported
from ptx.syntax import Statement

EMITTERS: dict[str, Emitter] = {}
for _module in (
    arithmetic,
    asynchronous,
    bits,
    compare,
    control,
    convert,
    matrix,
    memory,
    sync,
    tensor,
):
    EMITTERS.update(_module.EMITTERS)

__all__ = ["EMITTERS", "emit"]


def emit(statement: Statement, function: Function) -> str:
    """The statement's C++, its guard included; raises Unsupported."""
    emitter = EMITTERS.get(statement.words[0])
    if emitter is None:
        raise Unsupported("the instruction")
    instruction = Instruction(statement, function)
    code = emitter(instruction)
    instruction.check_nothing_left()
    if statement.guard is None:
        return code
    predicate = function.names.find(statement.guard.register)
    if predicate is None:
        raise Unsupported(f"the guard {statement.guard.register}")
    condition = ("!" if statement.guard.negated else "") + predicate.cpp
    if not instruction.skipped_spaces:
        return f"if ({condition}) {{ {code} }}"
    skips = " ".join(f"skip({s}, {instruction.site});" for s in instruction.skipped_spaces)
    return f"if ({condition}) {{ {code} }} else {{ {skips} }}"
