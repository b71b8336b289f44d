"""PTX text → tokens."""

from __future__ import annotations

import bisect
import re
from typing import NamedTuple

from ptx.syntax import PtxSyntaxError

# A word holds its dots and double colons (ld.shared::cta.b32, %tid.x); a single colon ends a label.
_TOKEN = re.compile(
    r"""
    (?P<space>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<word>[A-Za-z_$%.][\w$.]*(?:::[\w$.]+)*)
  | (?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d+(?:[eE][+-]?\d+)?)
  | (?P<integer>0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)
  | (?P<string>"[^"]*")
  | (?P<mark>[][{}(),;:|!@<>+\-=*])
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(NamedTuple):
    kind: str  # word, float, integer, string, mark or end
    text: str
    start: int  # offsets in the source
    end: int


class Source:
    """A PTX text with its line numbers."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._newlines = [m.start() for m in re.finditer("\n", text)]

    def line(self, offset: int) -> int:
        return bisect.bisect_left(self._newlines, offset) + 1

    def error(self, offset: int, message: str) -> PtxSyntaxError:
        line = self.line(offset)
        return PtxSyntaxError(f"PTX line {line}: {message}: {self.text.splitlines()[line - 1]!r}")

    def tokens(self) -> list[Token]:
        tokens, position = [], 0
        match_at = _TOKEN.match
        while position < len(self.text):
            match = match_at(self.text, position)
            if match is None:
                raise self.error(position, f"unknown character {self.text[position]!r}")
            position = match.end()
            kind = match.lastgroup or ""
            if kind != "space":
                tokens.append(Token(kind, match.group(), match.start(), position))
        tokens.append(Token("end", "", position, position))
        return tokens
