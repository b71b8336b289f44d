"""PTX text → tokens."""

from __future__ import annotations

import bisect
import re
from typing import NamedTuple

from ptx.syntax import PtxSyntaxError

# A word holds its dots and double colons (ld.shared::cta.b32, %tid.x); a single colon ends a label.
WORD = r"[A-Za-z_$%.][\w$.]*(?:::[\w$.]+)*"
INTEGER = r"(?:0[xX][0-9a-fA-F]+U?|0[bB][01]+U?|\d+U?)"
FLOAT = r"(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d+(?:[eE][+-]?\d+)?)"
COMMENT = r"/(?:/[^\n]*|\*.*?\*/)"

_SPACE = re.compile(rf"\s*(?:{COMMENT}\s*)*", re.DOTALL)
_TOKEN = re.compile(
    rf"""
    (?P<word>{WORD})
  | (?P<float>{FLOAT})
  | (?P<integer>{INTEGER})
  | (?P<string>"[^"]*")
  | (?P<mark>[][{{}}(),;:|!@<>+\-=*])
  | (?P<end>\Z)
    """,
    re.VERBOSE,
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
        text = self.text.split("\n")[line - 1]
        return PtxSyntaxError(f"PTX line {line}: {message}: {text!r}")

    def token(self, offset: int) -> Token:
        """The next token from the offset on."""
        space = _SPACE.match(self.text, offset)
        start = space.end() if space else offset
        match = _TOKEN.match(self.text, start)
        if match is None:
            raise self.error(start, f"unknown character {self.text[start]!r}")
        return Token(match.lastgroup or "", match.group(), start, match.end())
