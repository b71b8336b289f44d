"""The operands of a statement, as written → ptx.syntax."""

from __future__ import annotations

import re
import struct

from ptx.lexer import COMMENT, FLOAT, INTEGER, WORD
from ptx.syntax import (
    Address,
    Float,
    Group,
    Integer,
    Name,
    Not,
    Operand,
    Pair,
    PtxSyntaxError,
    Vector,
)

_COMMENT = re.compile(COMMENT, re.DOTALL)
_BRACKET = re.compile(r"[\[{(]")
# Up to a comma outside brackets.  A bracket that nothing closes stays, for the parser to refuse.
_ELEMENT = re.compile(r"([^,\[{(]*(?:(?:\[[^]]*\]|\{[^}]*\}|\([^)]*\)|[\[{(])[^,\[{(]*)*),")
_NAME = re.compile(WORD)
_INTEGER = re.compile(rf"-?\s*{INTEGER}")
_FLOAT = re.compile(FLOAT)
_NOT = re.compile(rf"!\s*({WORD})")
_PAIR = re.compile(rf"({WORD})\s*\|\s*(.*)", re.DOTALL)
_ADDRESS = re.compile(
    rf"\[\s*(?:({WORD})|(-?\s*{INTEGER}))\s*((?:(?:\+\s*-?|-)\s*{INTEGER}\s*)*)"
    r"(?:,\s*\{([^}]*)\}\s*)?\]"
)


class OperandParser:
    """Parses each operand of a text once, however often it is written: most are registers."""

    def __init__(self) -> None:
        self._known: dict[str, Operand] = {}

    def operands(self, text: str) -> tuple[Operand, ...]:
        """Those that the commas outside brackets separate; raises PtxSyntaxError."""
        if "/" in text:
            text = _COMMENT.sub(" ", text)
        if not text or text.isspace():
            return ()
        parts = _ELEMENT.findall(text + ",") if _BRACKET.search(text) else text.split(",")
        known = self._known
        return tuple([known.get(part) or self._new(part) for part in map(str.strip, parts)])

    def _new(self, text: str) -> Operand:
        found = self._known[text] = self._operand(text)
        return found

    def _operand(self, text: str) -> Operand:
        if _NAME.fullmatch(text):
            return Name(text)
        if _INTEGER.fullmatch(text):
            return Integer(_integer(text))
        if text[:1] == "[":
            return self._address(text)
        if text[:1] == "{" and text[-1] == "}":
            return Vector(self.operands(text[1:-1]))
        if text[:1] == "(" and text[-1] == ")":
            return Group(self.operands(text[1:-1]))
        if _FLOAT.fullmatch(text):
            return float_literal(text)
        if negated := _NOT.fullmatch(text):
            return Not(Name(negated[1]))
        if pair := _PAIR.fullmatch(text):
            return Pair(Name(pair[1]), self._operand(pair[2]))
        raise PtxSyntaxError(f"expected an operand, found {text!r}")

    def _address(self, text: str) -> Address:
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise PtxSyntaxError(f"unknown address {text!r}")
        name, number, offsets, items = found.groups()
        base = Name(name) if name else Integer(_integer(number))
        offset = sum(map(_integer, _INTEGER.findall(offsets)))
        return Address(base, offset, Vector(self.operands(items)) if items is not None else None)


def _integer(text: str) -> int:
    value = int(text.lstrip("-").strip().rstrip("U"), 0)
    return -value if text[0] == "-" else value


def float_literal(text: str) -> Float:
    if text[1] in "fF":
        return Float(int(text[2:], 16), 32)
    if text[1] in "dD":
        return Float(int(text[2:], 16), 64)
    return Float(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
