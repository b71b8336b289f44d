"""A place in the tokens of a PTX text, and what can be read there: names, integers, operands."""

from __future__ import annotations

import struct

from ptx.lexer import Source, Token
from ptx.syntax import Address, Float, Group, Integer, Name, Not, Operand, Pair, Vector


class Cursor:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.tokens = source.tokens()
        self.at = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.at]

    def next(self) -> Token:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def accept(self, text: str) -> bool:
        if self.tokens[self.at].text == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            raise self.error(f"expected {text!r}, found {self.token.text!r}")

    def word(self) -> str:
        if self.token.kind != "word":
            raise self.error(f"expected a name, found {self.token.text!r}")
        return self.next().text

    def integer(self) -> int:
        negative = self.accept("-")
        if self.token.kind != "integer":
            raise self.error(f"expected an integer, found {self.token.text!r}")
        value = int(self.next().text.rstrip("U"), 0)
        return -value if negative else value

    def error(self, message: str) -> Exception:
        return self.source.error(self.token.start, message)

    def skip_statement(self) -> None:
        while not self.accept(";"):
            if self.next().kind == "end":
                raise self.error("expected ';'")

    # ---- operands --------------------------------------------------------------------------------

    def operand(self) -> Operand:
        token = self.token
        if token.kind == "word":
            self.next()
            if self.accept("|"):
                return Pair(Name(token.text), self.operand())
            return Name(token.text)
        if token.kind == "float":
            self.next()
            return _float(token.text)
        if token.kind == "integer" or token.text == "-":
            return Integer(self.integer())
        if self.accept("!"):
            return Not(Name(self.word()))
        if self.accept("{"):
            return Vector(self.operand_list("}"))
        if self.accept("("):
            return Group(self.operand_list(")"))
        if self.accept("["):
            return self.address()
        raise self.error(f"unknown operand {token.text!r}")

    def operand_list(self, closing: str) -> tuple[Operand, ...]:
        items: list[Operand] = []
        while not self.accept(closing):
            if items:
                self.expect(",")
            items.append(self.operand())
        return tuple(items)

    def address(self) -> Address:
        base: Name | Integer = Name("")
        if self.token.kind == "word":
            base = Name(self.word())
        else:
            base = Integer(self.integer())
        offset, coordinates = 0, None
        while not self.accept("]"):
            if self.accept("+") or self.token.text == "-":
                offset += self.integer()
            elif self.accept(","):
                self.expect("{")
                coordinates = Vector(self.operand_list("}"))
            else:
                raise self.error(f"unknown address: {self.token.text!r}")
        return Address(base, offset, coordinates)


def _float(text: str) -> Float:
    if text[1] in "fF":
        return Float(int(text[2:], 16), 32)
    if text[1] in "dD":
        return Float(int(text[2:], 16), 64)
    return Float(struct.unpack("<Q", struct.pack("<d", float(text)))[0], 64)
