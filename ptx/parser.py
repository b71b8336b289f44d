"""PTX text → ptx.syntax.Module: a recursive-descent parser over the tokens of the text."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from ptx.cursor import Cursor
from ptx.lexer import Source
from ptx.syntax import (
    TYPE_BYTES,
    Float,
    Function,
    Guard,
    Integer,
    Item,
    Label,
    Module,
    Operand,
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


def parse(text: str) -> Module:
    """The functions and variables of a PTX text; raises PtxSyntaxError where it isn't PTX."""
    return _Parser(Source(text)).module()


class _Parser(Cursor):
    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.result = Module()
        self.location = ""
        self.files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', source.text, re.MULTILINE))
        self.inlined: dict[tuple[str, ...], str] = {}  # (file, line, column) → its own chain

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
            self.loc()
        elif text == ".section":
            self.section()
        elif text in (".pragma", ".alias"):
            self.skip_statement()
        else:
            raise self.error(f"unknown directive {text!r}")

    def section(self) -> None:
        """Debug information: nothing that runs."""
        while not self.accept("{"):
            self.next()
        while not self.accept("}"):
            self.next()

    def loc(self) -> None:
        """.loc file line column [, function_name label, inlined_at file line column]"""
        self.next()
        position = tuple(self.next().text for _ in range(3))
        parent = ""
        while self.token.text == "," or self.token.text in ("function_name", "inlined_at"):
            self.accept(",")
            keyword = self.word()
            if keyword == "function_name":
                self.word()
                if self.accept("+"):
                    self.integer()
            elif keyword == "inlined_at":
                caller = tuple(self.next().text for _ in range(3))
                parent = self.inlined.get(caller) or self.place(caller)
        if position[1] == "0":  # code without a line of its own stays with the line before
            return
        self.location = self.place(position) + (f"<{parent}" if parent else "")
        self.inlined[position] = self.location

    def place(self, position: tuple[str, ...]) -> str:
        path = self.files.get(position[0], f"file {position[0]}")
        return f"{PurePosixPath(path).name}:{position[1]}"

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
        value = self.operand()
        if not isinstance(value, Integer | Float):
            raise self.error("an initial value that is not a constant")
        out.append(value.value if isinstance(value, Integer) else value.bits)
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
        depth = 1
        while depth:
            text = self.token.text
            if text == "{":
                self.next()
                items.append(ScopeBegin())
                depth += 1
            elif text == "}":
                self.next()
                items.append(ScopeEnd())
                depth -= 1
            elif text == ".loc":
                self.loc()
            elif text == ".reg":
                items += self.registers()
            elif text in _SPACES:
                items += self.variables()
            elif text == ".pragma":
                self.skip_statement()
            elif text == ";":
                self.next()
            elif self.tokens[self.at + 1].text == ":" and self.token.kind == "word":
                self.label(function, items)
            else:
                items.append(self.statement())
        items.pop()  # the function's own closing brace

    def label(self, function: Function, items: list[Item]) -> None:
        name = self.word()
        self.expect(":")
        if self.token.text == ".branchtargets":
            self.next()
            targets = [self.word()]
            while self.accept(","):
                targets.append(self.word())
            self.expect(";")
            function.branch_targets[name] = tuple(targets)
        elif self.token.text == ".callprototype":  # of an indirect call, which is unsupported
            self.skip_statement()
        else:
            items.append(Label(name))

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

    def statement(self) -> Statement:
        start = self.token.start
        guard = None
        if self.accept("@"):
            negated = self.accept("!")
            guard = Guard(self.word(), negated)
        words = tuple(self.word().split("."))
        operands: list[Operand] = []
        while self.token.text != ";":
            if operands and not self.accept(","):
                raise self.error(f"expected ',' or ';', found {self.token.text!r}")
            operands.append(self.operand())
        end = self.next().start
        text = " ".join(self.source.text[start:end].split())
        line = self.source.line(start)
        return Statement(words, tuple(operands), guard, line, self.location, text)
