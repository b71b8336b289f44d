"""Takes PTX text apart into one text per kernel, so that each is translated on its first launch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptx.lexer import COMMENT
from ptx.parser import parse

_LINE = r"^\s*\.(?:version|target|address_size|file)\b[^\n]*$"
_STRING = r'"[^"]*"'
# The next mark outside of braces, and the next inside of them: a vector's braces are passed over.
_OUTSIDE = re.compile(rf"{COMMENT}|{_STRING}|(?P<mark>{_LINE}|[{{}};])", re.DOTALL | re.MULTILINE)
_INSIDE = re.compile(
    rf"""[^{{}}/"]*(?:(?:{COMMENT}|{_STRING}|\{{[^{{}}/"]*\}})[^{{}}/"]*)*(?P<mark>[{{}}])""",
    re.DOTALL,
)
_FILE = re.compile(r"\.file\s+(\d+)\s")
_LOC_FILES = (re.compile(r"\.loc\s+(\d+)\b"), re.compile(r"inlined_at\s+(\d+)\b"))
_FUNCTION = re.compile(r"\.(entry|func)\s*(?:\([^)]*\)\s*)?([\w$]+)")
_COMMENT = re.compile(COMMENT, re.DOTALL)


def split_kernels(ptx: str) -> dict[str, str]:
    """Kernel name → PTX text of that kernel with the tables and functions that it needs.

    Kernels that use the same .global variable stay in one text: one may write what another reads.
    """
    found, lines = _items(ptx)
    items = [item for item in found if ".section" not in item.partition("{")[0]]
    files = {match[1]: line for line in lines if (match := _FILE.match(line))}
    header = "\n".join(line for line in lines if not _FILE.match(line))
    defined: dict[str, list[int]] = {}  # name → the items that declare or define it
    entries: dict[str, int] = {}
    mutable: set[str] = set()
    for number, item in enumerate(items):
        function = _FUNCTION.search(item)
        if function:
            defined.setdefault(function.group(2), []).append(number)
            if function.group(1) == "entry":
                entries[function.group(2)] = number
            continue
        for name, variable in parse(item).variables.items():
            defined.setdefault(name, []).append(number)
            if variable.space == "global":
                mutable.add(name)
    uses = _uses(items, defined)
    closures = {name: _closure(number, uses, defined) for name, number in entries.items()}
    shared = {number for name in mutable for number in defined[name]}
    _merge(closures, shared, set(entries.values()))
    return {
        name: "\n\n".join([header, *_text(sorted(closure), items, files)]) + "\n"
        for name, closure in closures.items()
    }


def _items(ptx: str) -> tuple[list[str], list[str]]:
    """The module's declarations and definitions, and the lines of its header and of its files."""
    items: list[str] = []
    lines: list[str] = []
    parts: list[str] = []  # of the item, between such lines
    start = at = depth = brace = 0
    while match := (_INSIDE if depth else _OUTSIDE).search(ptx, at):
        mark, begin, at = match["mark"], match.start("mark"), match.end()
        if mark == "{":
            brace = brace if depth else begin
            depth += 1
        elif mark == "}":
            depth -= 1
        if depth or mark in (None, "{"):
            continue
        if mark == "}" and "=" in _COMMENT.sub("", ptx[start:brace]):
            continue  # an initial value; its ; follows
        if mark in ("}", ";"):
            items.append("".join([*parts, ptx[start:at]]).strip())
            parts = []
        else:
            parts.append(ptx[start:begin])
            lines.append(mark.strip())
        start = at
    return items, lines


def _uses(items: list[str], defined: dict[str, list[int]]) -> list[set[str]]:
    """The module's names that each item has, its own among them."""
    # nvcc names the next kernel in a comment before the first declaration: not a use
    texts = [_COMMENT.sub("", item) for item in items]
    # A name may be part of another one, as of a parameter's.
    whole = {
        name: re.compile(rf"{re.escape(name)}(?<![\w$%]{re.escape(name)})(?![\w$])")
        for name in defined
    }
    return [
        {name for name, pattern in whole.items() if name in text and pattern.search(text)}
        for text in texts
    ]


def _closure(number: int, uses: list[set[str]], defined: dict[str, list[int]]) -> set[int]:
    found, open_items = {number}, [number]
    while open_items:
        for name in uses[open_items.pop()]:
            for other in defined[name]:
                if other not in found:
                    found.add(other)
                    open_items.append(other)
    return found


def _merge(closures: dict[str, set[int]], shared: set[int], entries: set[int]) -> None:
    """Gives kernels that share one of these items the same, joint set of items."""
    for number in shared:
        users = [name for name, closure in closures.items() if number in closure]
        if len(users) > 1:
            joint = set().union(*(closures[name] for name in users))
            members = joint & entries
            for name, closure in closures.items():
                if closure & members:
                    closures[name] = joint


def _text(numbers: list[int], items: list[str], files: dict[str, str]) -> Iterator[str]:
    chosen = [items[number] for number in numbers]
    used = {index for item in chosen for loc in _LOC_FILES for index in loc.findall(item)}
    yield "\n".join(line for index, line in files.items() if index in used)
    yield from chosen
