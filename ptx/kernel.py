"""One kernel with the functions that it calls → one C++ namespace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ptx.function import FunctionEmitter, mix_text
from ptx.operands import Names, Symbol, Unsupported, identifier
from ptx.syntax import Function, Module, Statement, Variable


@dataclass
class Sites:
    """The table of the file's sites: the instructions that a report or a counter can name."""

    texts: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def number(self, statement: Statement) -> int:
        text = f"{statement.location or '?'}|{statement.opcode}|{statement.line}"
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


def _aligned(offset: int, align: int) -> int:
    return -(-offset // align) * align


class KernelEmitter:
    """Functions are translated once per kernel that calls them, so that each kernel has its own
    counters and its own layout of shared and local memory.  There's no recursion, so one place in
    local memory per function is enough."""

    def __init__(
        self, module: Module, kernel: Function, sites: Sites, tables: dict[str, Symbol]
    ) -> None:
        self.module = module
        self.kernel = kernel
        self.unsupported_opcodes: Counter[str] = Counter()
        self.sites = sites
        self._tables = tables
        self._blocks: list[Counter[str]] = []
        self._shared: dict[str, int] = {}  # module-scope .shared variables already placed
        self._shared_bytes = 0
        self._local_bytes = 0
        self._current = 0  # the basic block that statements are counted in
        self._calls: list[str] = []  # the chain of functions being translated
        self._functions: dict[str, str] = {}  # PTX name → C++ text

    # ---- what a function asks for (function.Kernel) ----------------------------------------------

    def site(self, statement: Statement) -> str:
        return f"site({self.sites.number(statement)})"

    def new_block(self) -> int:
        self._blocks.append(Counter())
        self._current = len(self._blocks) - 1
        return self._current

    def count(self, opcode: str) -> None:
        self._blocks[self._current][opcode] += 1

    def unsupported(self, opcode: str) -> None:
        self.unsupported_opcodes[opcode] += 1

    def place_shared(self, variable: Variable) -> int:
        offset = _aligned(self._shared_bytes, variable.align)
        self._shared_bytes = offset + variable.bytes
        return offset

    def place_local(self, variable: Variable) -> int:
        offset = _aligned(self._local_bytes, variable.align)
        self._local_bytes = offset + variable.bytes
        return offset

    def call(self, name: str) -> tuple[str, int, int]:
        """The C++ name of a function with a body, the number of its results and parameters."""
        function = self.module.functions.get(name)
        if function is None or function.body is None:
            raise Unsupported(f"a call of {name}")
        if name in self._calls:
            raise Unsupported(f"recursion: {name}")
        if name not in self._functions:
            caller = self._current
            self._calls.append(name)
            self._functions[name] = self._function(function)
            self._calls.pop()
            self._current = caller
        return f"function_{identifier(name)}", len(function.results), len(function.parameters)

    # ---- text ------------------------------------------------------------------------------------

    def code(self, number: int) -> str:
        """The namespace kernel_<number>."""
        offsets = self._parameter_offsets()
        symbols = {}
        for variable, offset in zip(self.kernel.parameters, offsets, strict=True):
            symbols[variable.name] = Symbol("param", f"(parameters + {offset})")
        refused = self._refused()
        body = refused or FunctionEmitter(self.kernel, self, Names(symbols, self.resolve)).code()
        blocks = self._blocks or [Counter()]
        parameters = [
            f"{{{offset}, {variable.bytes}}}"
            for variable, offset in zip(self.kernel.parameters, offsets, strict=True)
        ]
        return "\n".join(
            [
                f"namespace kernel_{number} {{  // {self.kernel.name}",
                f"u64 block_hits[{len(blocks)}];",
                "const char* const block_mix[] = {",
                *(f'    "{mix_text(mix)}",' for mix in blocks),
                "};",
                f"const Parameter parameter_table[] = {{{', '.join(parameters) or '{0, 0}'}}};",
                f"[[maybe_unused]] constexpr u32 kParameterBytes = {self._parameter_bytes()};",
                f"[[maybe_unused]] constexpr u32 kLocalBytes = {self._local_bytes};",
                *self._functions.values(),
                "void body([[maybe_unused]] const unsigned char* parameters) {",
                body,
                "}",
                f"}}  // namespace kernel_{number}",
            ]
        )

    def descriptor(self, number: int) -> str:
        """The entry of device.h's table of kernels."""
        space = f"kernel_{number}"
        threads = 1
        for size in self.kernel.directives.get("maxntid", (0,)):
            threads *= size
        required = (*self.kernel.directives.get("reqntid", (0, 0, 0)), 1, 1)[:3]
        return (
            f'{{"{self.kernel.name}", {space}::body, {self._shared_bytes}, {self._local_bytes},'
            f" {len(self.kernel.parameters)}, {self._parameter_bytes()}, {space}::parameter_table,"
            f" {threads}, {{{', '.join(map(str, required))}}}, {max(1, len(self._blocks))},"
            f" {space}::block_hits, {space}::block_mix}}"
        )

    def _refused(self) -> str:
        """Code instead of the body where the kernel as a whole cannot be run."""
        cluster = self.kernel.directives.get("reqnctapercluster", ())
        if any(size > 1 for size in cluster):
            self.unsupported(".reqnctapercluster")
            return '  fatal("unsupported", "clusters of more than one block", 0);'
        return ""

    def _function(self, function: Function) -> str:
        symbols = {}
        arguments = []
        for variable in (*function.results, *function.parameters):
            cpp = identifier(variable.name)
            arguments.append(f"[[maybe_unused]] unsigned char* {cpp}")
            symbols[variable.name] = Symbol("param", cpp)
        body = FunctionEmitter(function, self, Names(symbols, self.resolve)).code()
        name = f"function_{identifier(function.name)}"
        return f"void {name}({', '.join(arguments)}) {{\n{body}\n}}"

    def resolve(self, name: str) -> Symbol | None:
        """A name of the module's scope.  Its .shared variables get their place at first use."""
        variable = self.module.variables.get(name)
        if variable is None or variable.space != "shared":
            return self._tables.get(name)
        if variable.count is None:  # extern: the launch's dynamic part
            return Symbol("shared", "dynamic_shared()")
        if name not in self._shared:
            self._shared[name] = self.place_shared(variable)
        return Symbol("shared", str(self._shared[name]))

    def _parameter_offsets(self) -> list[int]:
        offsets, top = [], 0
        for variable in self.kernel.parameters:
            offsets.append(_aligned(top, variable.align))
            top = offsets[-1] + variable.bytes
        return offsets

    def _parameter_bytes(self) -> int:
        offsets = self._parameter_offsets()
        return offsets[-1] + self.kernel.parameters[-1].bytes if offsets else 0
