"""Takes PTX text apart into one text per kernel, so that each is translated on its first launch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptx.parser import parse

_HEADER = re.compile(r"^\s*\.(?:version|target|address_size)\b.*$", re.MULTILINE)
_FILE = re.compile(r"^\s*\.file\s+(\d+)\s+.*$", re.MULTILINE)
_LOC_FILE = re.compile(r"(?:\.loc|inlined_at)\s+(\d+)\b")
_MARK = re.compile(r'//[^\n]*|/\*.*?\*/|"[^"]*"|[{};]', re.DOTALL)
_NAME = re.compile(r"[A-Za-z_$%][\w$]*")
_FUNCTION = re.compile(r"\.(entry|func)\s*(?:\([^)]*\)\s*)?([\w$]+)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def split_kernels(ptx: str) -> dict[str, str]:
    """Kernel name → PTX text of that kernel with the tables and functions that it needs.

    Kernels that use the same .global variable stay in one text: one may write what another reads.
    """
    header = "\n".join(line.strip() for line in _HEADER.findall(ptx))
    files = {match.group(1): match.group().strip() for match in _FILE.finditer(ptx)}
    items = [item for item in _items(ptx) if ".section" not in item.partition("{")[0]]
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
    # nvcc names the next kernel in a comment before the first declaration: not a use
    uses = [set(_NAME.findall(_COMMENT.sub("", item))) & defined.keys() for item in items]
    closures = {name: _closure(number, uses, defined) for name, number in entries.items()}
    shared = {number for name in mutable for number in defined[name]}
    _merge(closures, shared, set(entries.values()))
    return {
        name: "\n\n".join([header, *_text(sorted(closure), items, files)]) + "\n"
        for name, closure in closures.items()
    }


def _items(ptx: str) -> Iterator[str]:
    """The declarations and definitions of the module's scope, without header and .file lines."""
    text = _FILE.sub("", _HEADER.sub("", ptx))
    depth = start = 0
    for match in _MARK.finditer(text):
        mark = match.group()
        if mark == "{":
            depth += 1
        elif mark == "}":
            depth -= 1
        if depth or mark not in ("}", ";"):
            continue
        head = _COMMENT.sub("", text[start : match.end()])
        if mark == "}" and "=" in head.partition("{")[0]:  # an initial value; its ; follows
            continue
        yield text[start : match.end()].strip()
        start = match.end()


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
    used = {index for item in chosen for index in _LOC_FILE.findall(item)}
    yield "\n".join(line for index, line in files.items() if index in used)
    yield from chosen
