"""A place among the tokens of a PTX text, and what can be read there: names and integers."""

from __future__ import annotations

from ptx.lexer import Source, Token


class Cursor:
    """Tokens are made as they are read: statements, nearly all of a text, never become tokens."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.token: Token = source.token(0)

    def move(self, offset: int) -> None:
        """Goes to the next token from the offset on."""
        self.token = self.source.token(offset)

    def next(self) -> Token:
        token = self.token
        if token.kind == "end":
            raise self.error("the text ends too early")
        self.move(token.end)
        return token

    def accept(self, text: str) -> bool:
        if self.token.text == text:
            self.move(self.token.end)
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
            self.next()
