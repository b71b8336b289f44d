"""Jumps, calls and ends: bra, brx.idx, call, ret, exit, trap."""

from __future__ import annotations

from ptx.instructions.base import Emitter, Instruction
from ptx.operands import Symbol, Unsupported
from ptx.syntax import Group, Name, Operand


def _name(operand: Operand) -> str:
    if not isinstance(operand, Name):
        raise Unsupported("a target that is not a name")
    return operand.text


def bra(i: Instruction) -> str:
    i.take("uni")
    return f"goto {i.function.label(_name(i.operand(0)))};"


def brx(i: Instruction) -> str:
    i.one_of(("idx",))
    i.take("uni")
    targets = i.function.branch_targets(_name(i.operand(1)))
    cases = " ".join(f"case {number}: goto {label};" for number, label in enumerate(targets))
    outside = f'default: fatal("trap", "brx.idx outside its targets", {i.site});'
    return f"switch ({i.read(0, 'u32')}) {{ {cases} {outside} }}"


def _buffers(i: Instruction, group: Operand) -> list[str]:
    assert isinstance(group, Group)
    buffers = []
    for item in group.items:
        found = i.names.find(_name(item))
        if not isinstance(found, Symbol) or found.space != "param":
            raise Unsupported("an argument that is not a .param variable")
        buffers.append(found.cpp)
    return buffers


def call(i: Instruction) -> str:
    """call (results), function, (parameters): each is a buffer of bytes."""
    i.take("uni")
    operands = [i.operand(index) for index in range(i.count)]
    results = _buffers(i, operands.pop(0)) if isinstance(operands[0], Group) else []
    name = _name(operands.pop(0))
    parameters = _buffers(i, operands.pop(0)) if operands else []
    if operands or name.startswith("%"):
        raise Unsupported("an indirect call")
    known = _KNOWN_FUNCTIONS.get(name)
    if known:
        return known(i, results, parameters)
    cpp, result_count, parameter_count = i.function.call(name)
    if (len(results), len(parameters)) != (result_count, parameter_count):
        raise Unsupported(f"another number of parameters than {name} has")
    return f"{cpp}({', '.join((*results, *parameters))});"


def _printf(i: Instruction, results: list[str], parameters: list[str]) -> str:
    format, arguments = (f"load<u64>({buffer})" for buffer in parameters)
    code = f"print_formatted({format}, {arguments})"
    return f"store<u32>({results[0]}, {code});" if results else f"{code};"


def _assert_fail(i: Instruction, results: list[str], parameters: list[str]) -> str:
    message, file, line, function = parameters[:4]
    return (
        f"assertion_failed(load<u64>({message}), load<u64>({file}), load<u32>({line}),"
        f" load<u64>({function}), {i.site});"
    )


_KNOWN_FUNCTIONS = {"vprintf": _printf, "__assertfail": _assert_fail}


def ret(i: Instruction) -> str:
    i.take("uni")
    return i.function.leave(exits=False)


def leave(i: Instruction) -> str:
    return i.function.leave(exits=True)


def trap(i: Instruction) -> str:
    return f'fatal("trap", "{i.operation} executed", {i.site});'


EMITTERS: dict[str, Emitter] = {
    "bra": bra,
    "brx": brx,
    "call": call,
    "ret": ret,
    "exit": leave,
    "trap": trap,
    "brkpt": trap,
}
