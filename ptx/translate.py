"""PTX → C++ for the executor: `python -m ptx.translate IN.ptx OUT.cpp`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptx.kernel import KernelEmitter, Sites
from ptx.operands import Symbol, identifier
from ptx.parser import parse
from ptx.split import split_kernels
from ptx.syntax import TYPE_BYTES, Module, Variable

__all__ = ["Translation", "split_kernels", "translate"]


@dataclass(frozen=True)
class Translation:
    cpp: str
    kernels: list[str]
    unsupported: dict[str, int]  # opcode → how often it occurs; each is a report when reached


def translate(ptx: str) -> Translation:
    """C++ over ptx/runtime/device.h that registers every kernel of the PTX text when it is loaded.

    Compile it with -ffp-contract=off: the PTX says itself which products and sums are fused."""
    module = parse(ptx)
    tables = {
        name: Symbol(variable.space, f"table_{identifier(name)}")
        for name, variable in module.variables.items()
        if variable.space in ("global", "const") and not _unusable(variable)
    }
    sites, unsupported = Sites(), Counter[str]()
    emitters = [KernelEmitter(module, kernel, sites, tables) for kernel in module.kernels]
    bodies = []
    for number, emitter in enumerate(emitters):
        bodies.append(emitter.code(number))
        unsupported += emitter.unsupported_opcodes
    cpp = "\n".join(
        [
            "// Made by ptx.translate.",
            '#include "ptx/runtime/math.h"',
            "",
            "namespace ptx {",
            "namespace {",
            *_tables(module, tables),
            *_site_table(sites),
            *bodies,
            *_registration(emitters, tables, len(sites.texts)),
            "}  // namespace",
            "}  // namespace ptx",
            "",
        ]
    )
    return Translation(cpp, [kernel.name for kernel in module.kernels], dict(unsupported))


def _unusable(variable: Variable) -> bool:
    return bool(variable.external or variable.unsupported or variable.count is None)


def _tables(module: Module, tables: dict[str, Symbol]) -> Iterator[str]:
    for name, symbol in tables.items():
        variable = module.variables[name]
        bits = 8 * TYPE_BYTES[variable.type]
        suffix = "ull" if bits == 64 else "u"
        values = ", ".join(f"{value & (2**bits - 1)}{suffix}" for value in variable.initial)
        declaration = f"alignas({max(16, variable.align)}) u{bits} {symbol.cpp}"
        yield f"{declaration}[{max(1, variable.count or 0)}] = {{{values}}};  // {name}"


def _site_table(sites: Sites) -> Iterator[str]:
    yield "const char* const site_texts[] = {"
    for text in sites.texts:
        yield f'    "{text}",'
    yield "    nullptr};"
    yield "u32 first_site;"
    yield "[[maybe_unused]] inline u32 site(u32 number) { return first_site + number; }"


def _registration(
    emitters: list[KernelEmitter], tables: dict[str, Symbol], site_count: int
) -> Iterator[str]:
    yield "const Kernel kernel_table[] = {"
    for number, emitter in enumerate(emitters):
        yield f"    {emitter.descriptor(number)},"
    yield "    {}};"
    yield "const Variable variable_table[] = {"
    for symbol in tables.values():
        yield f"    {{{symbol.cpp}, sizeof {symbol.cpp}}},"
    yield "    {}};"
    yield (
        f"const Module module_table = {{site_texts, {site_count},"
        f" kernel_table, {len(emitters)}, variable_table, {len(tables)}}};"
    )
    yield "[[maybe_unused]] const u32 registered = first_site = register_module(module_table);"


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m ptx.translate IN.ptx OUT.cpp", file=sys.stderr)
        return 2
    translation = translate(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(translation.cpp)
    print(f"{len(translation.kernels)} kernels; unsupported: {translation.unsupported or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
