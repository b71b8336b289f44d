"""PTX text → ptx.syntax.Module.

Declarations are read token by token.  Statements, labels and .loc, nearly all of a text, are one
match of a regular expression each."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ptx.cursor import Cursor
from ptx.lexer import COMMENT, INTEGER, WORD, Source
from ptx.operand_parser import OperandParser, float_literal
from ptx.syntax import (
    TYPE_BYTES,
    Function,
    Guard,
    Item,
    Label,
    Module,
    PtxSyntaxError,
    Registers,
    ScopeBegin,
    ScopeEnd,
    Statement,
    Variable,
)

_LINKAGE = (".visible", ".extern", ".weak", ".common")
_SPACES = (".global", ".const", ".shared", ".local", ".param", ".tex")
# Directives between a function's parameters and its body, with integers behind them.
_FUNCTION_DIRECTIVES = re.compile(
    r"\.(maxntid|reqntid|minnctapersm|maxnreg|reqnctapercluster|maxclusterrank|explicitcluster"
    r"|noreturn|abi_preserve\w*)$"
)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_SPACE = re.compile(rf"(?:{COMMENT}|\s)\s*", re.DOTALL)
_SECTION = re.compile(rf"\.section[^{{]*\{{[^}}/]*(?:{COMMENT}[^}}/]*)*\}}", re.DOTALL)
# The groups: file, line and column, and those of the place that this one was inlined at.
_LOC = re.compile(
    r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)\s*"
    rf"(?:,\s*function_name\s+{WORD}\s*(?:\+\s*{INTEGER}\s*)?"
    r",\s*inlined_at\s+(\d+)\s+(\d+)\s+(\d+)\s*)?"
)
_LABEL = re.compile(rf"({WORD})\s*:\s*")
# The groups: "!" and the register of a guard, the opcode, the operands.
_STATEMENT = re.compile(
    rf"(?:@\s*(!?)\s*({WORD})\s+)?({WORD})(?![\w$.]|\s*:)"
    rf"\s*([^;/]*(?:{COMMENT}[^;/]*)*);\s*",
    re.DOTALL,
)


def parse(text: str) -> Module:
    """The functions and variables of a PTX text; raises PtxSyntaxError where it isn't PTX."""
    return _Parser(Source(text)).module()


class _Parser(Cursor):
    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.result = Module()
        self.location = ""
        self.files = {n: PurePosixPath(path).name for n, path in _FILE.findall(source.text)}
        self.inlined: dict[tuple[str, ...], str] = {}  # (file, line, column) → its own chain
        self.operands = OperandParser()
        self.opcodes: dict[str, tuple[str, ...]] = {}  # each opcode's words

    # ---- module ----------------------------------------------------------------------------------

    def module(self) -> Module:
        while self.token.kind != "end":
            self.module_item()
        return self.result

    def module_item(self) -> None:
        linkage = ""
        while self.token.text in _LINKAGE:
            linkage = self.next().text
        text = self.token.text
        if text in (".entry", ".func"):
            self.function()
        elif text in _SPACES:
            for variable in self.variables(external=linkage == ".extern"):
                self.result.variables[variable.name] = variable
        elif text in (".version", ".target", ".address_size"):
            self.next()
            self.next()
            while self.accept(","):
                self.next()
        elif text == ".file":
            self.next()
            self.integer()
            self.next()
            while self.accept(","):
                self.integer()
        elif text == ".loc":
            self.move(self.directive(self.token.start, []))
        elif text == ".section":
            self.section()
        elif text in (".pragma", ".alias"):
            self.skip_statement()
        else:
            raise self.error(f"unknown directive {text!r}")

    def section(self) -> None:
        """Debug information: nothing that runs."""
        found = _SECTION.match(self.source.text, self.token.start)
        if found is None:
            raise self.error("a section without its braces")
        self.move(found.end())

    def loc(self, found: re.Match[str]) -> None:
        """.loc file line column [, function_name label, inlined_at file line column]"""
        position, caller = found.groups()[:3], found.groups()[3:]
        if position[1] != "0":  # code without a line of its own stays with the line before
            self.location = self.place(position)
            if caller[0]:
                self.location += f"<{self.inlined.get(caller) or self.place(caller)}"
            self.inlined[position] = self.location

    def place(self, position: tuple[str, ...]) -> str:
        file, line, _ = position
        return f"{self.files.get(file) or f'file {file}'}:{line}"

    # ---- variables -------------------------------------------------------------------------------

    def variables(self, external: bool = False) -> list[Variable]:
        """.global .align 4 .b8 name[16] = {…}, other;"""
        found = self.variable_list(external)
        self.expect(";")
        return found

    def variable_list(self, external: bool = False) -> list[Variable]:
        space, align, element, vector = self.word()[1:], 0, "", 1
        while self.token.text.startswith("."):
            word = self.word()[1:]
            if word == "align":
                align = self.integer()
            elif word in TYPE_BYTES:
                element = word
            elif word in ("v2", "v4"):
                vector = int(word[1])
            elif word == "ptr":  # .ptr .global .align 16: what a pointer parameter points at
                while self.token.text in (".global", ".shared", ".local", ".const", ".align"):
                    if self.next().text == ".align":
                        self.integer()
            elif word != "unified":
                raise self.error(f"unknown word {word!r} in a variable's declaration")
        found = []
        while True:
            found.append(self.variable(space, element, vector, align, external))
            if space == "param" or not self.accept(","):
                return found

    def variable(
        self, space: str, element: str, vector: int, align: int, external: bool
    ) -> Variable:
        if element not in TYPE_BYTES:
            raise self.error("a variable without a type")
        name, count = self.word(), vector
        unsized = False
        while self.accept("["):
            if self.accept("]"):
                unsized = True
            else:
                count *= self.integer()
                self.expect("]")
        initial: list[int] = []
        unsupported = ""
        if self.accept("="):
            unsupported = self.initial_value(initial)
        if unsized and initial:
            count = len(initial)
        natural = TYPE_BYTES[element] * vector
        return Variable(
            name,
            space,
            element,
            None if unsized and not initial else count,
            align or natural,
            tuple(initial),
            unsupported,
            external,
        )

    def initial_value(self, out: list[int]) -> str:
        """Appends the elements' bits; returns why one cannot be expressed, or ""."""
        if self.accept("{"):
            reason = ""
            while not self.accept("}"):
                reason = self.initial_value(out) or reason
                self.accept(",")
            return reason
        if self.token.kind == "word":  # the address of another variable or function
            while self.token.text not in (",", "}", ";"):
                self.next()
            out.append(0)
            return "an initial value that is an address"
        if self.token.kind == "float":
            out.append(float_literal(self.next().text).bits)
        else:
            out.append(self.integer())
        return ""

    # ---- functions -------------------------------------------------------------------------------

    def function(self) -> None:
        is_kernel = self.word() == ".entry"
        results = self.parameters()
        name = self.word()
        parameters = self.parameters()
        directives: dict[str, tuple[int, ...]] = {}
        while self.token.text not in (";", "{"):
            directive = _FUNCTION_DIRECTIVES.match(self.token.text)
            if self.token.text == ".pragma":
                self.skip_statement()
                continue
            if directive is None:
                raise self.error(f"unknown directive {self.token.text!r}")
            self.next()
            values = []
            while self.token.kind == "integer":
                values.append(self.integer())
                self.accept(",")
            directives[directive.group(1)] = tuple(values)
        known = self.result.functions.get(name)
        function = Function(name, is_kernel, results, parameters, directives)
        if self.accept("{"):
            self.location, self.inlined = "", {}
            function.body = []
            self.body(function, function.body)
        else:
            self.expect(";")
        if known is None or known.body is None:
            self.result.functions[name] = function

    def parameters(self) -> list[Variable]:
        found: list[Variable] = []
        if self.accept("("):
            while not self.accept(")"):
                if self.token.text not in (".param", ".reg"):
                    raise self.error(f"expected a parameter, found {self.token.text!r}")
                found += self.variable_list()
                self.accept(",")
        return found

    def body(self, function: Function, items: list[Item]) -> None:
        """From behind the opening brace to behind the closing one."""
        text, at, depth = self.source.text, self.token.start, 1
        while depth:
            character = text[at : at + 1]
            if character == ".":
                at = self.directive(at, items)
            elif character in ("{", "}", ";"):
                at += 1
                if character != ";":
                    items.append(ScopeBegin() if character == "{" else ScopeEnd())
                    depth += 1 if character == "{" else -1
            elif statement := _STATEMENT.match(text, at):
                items.append(self.statement(statement))
                at = statement.end()
            elif label := _LABEL.match(text, at):
                at = self.label(label, function, items)
            elif space := _SPACE.match(text, at):
                at = space.end()
            else:
                raise self.source.error(at, "expected an instruction")
        items.pop()  # the function's own closing brace
        self.move(at)

    def directive(self, at: int, items: list[Item]) -> int:
        """Returns where it ends."""
        if loc := _LOC.match(self.source.text, at):
            self.loc(loc)
            return loc.end()
        self.move(at)
        if self.token.text == ".reg":
            items += self.registers()
        elif self.token.text in _SPACES:
            items += self.variables()
        elif self.token.text in (".pragma", ".callprototype"):  # the latter of an indirect call
            self.skip_statement()
        else:
            raise self.error(f"unknown directive {self.token.text!r}")
        return self.token.start

    def label(self, label: re.Match[str], function: Function, items: list[Item]) -> int:
        """Returns where what it names begins."""
        name, end = label[1], label.end()
        if self.source.text.startswith(".branchtargets", end):
            self.move(end)
            targets = []
            while not self.accept(";"):
                self.next()
                targets.append(self.word())
            function.branch_targets[name] = tuple(targets)
            return self.token.start
        items.append(Label(name))
        return end

    def registers(self) -> list[Registers]:
        self.next()
        kind, found = self.word()[1:], []
        while True:
            name, count = self.word(), None
            if self.accept("<"):
                count = self.integer()
                self.expect(">")
            found.append(Registers(kind, name, count))
            if not self.accept(","):
                break
        self.expect(";")
        return found

    def statement(self, found: re.Match[str]) -> Statement:
        negated, register, opcode, operands = found.groups()
        start = found.start()
        words = self.opcodes.get(opcode)
        if words is None:
            words = self.opcodes[opcode] = tuple(opcode.split("."))
        try:
            parsed = self.operands.operands(operands)
        except PtxSyntaxError as problem:
            raise self.source.error(start, str(problem)) from None
        guard = Guard(register, negated == "!") if register else None
        text = " ".join(self.source.text[start : found.end(4)].split())
        return Statement(opcode, words, parsed, guard, self.source.line(start), self.location, text)
