"""The gates: what every kernel measured last time (gates.json) against what it measures now.

A gate fails where something got worse, and where a kernel is new or gone; `--update` then writes
the new numbers, and the diff of gates.json shows in review what the change costs. Registers and the
like come from compiled.py, sectors and wavefronts from counted.py. Nothing runs on a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Row = Mapping[str, float]
Rows = Mapping[str, Mapping[str, Row]]  # section, such as "cuda sm_80" -> kernel -> row

PATH = Path(__file__).with_name("gates.json")
TOLERANCE = 1e-3  # of ratios: they are printed and kept with three digits

ALWAYS_ZERO = ("local", "spills", "reports")
NOT_ABOVE: tuple[str, ...] = (
    "registers",
    "scalars_in_lanes",
    "shared",
    "load_narrow",
    "store_narrow",
    "load_64",
    "store_64",
)
NOT_ABOVE += ("moved_over_least", "sectors_over_ideal", "wavefronts_over_ideal")
NOT_BELOW = ("blocks", "load_wide", "store_wide", "mma", "wgmma", "wide_share")


@dataclass(frozen=True)
class Failure:
    section: str
    kernel: str
    column: str
    value: float | None  # None: the kernel is gone
    gate: float | None  # None: the kernel is new

    def __str__(self) -> str:
        where = f"{self.section}  {self.kernel}"
        if self.gate is None:
            return f"{where}: new, gates.json does not know it"
        if self.value is None:
            return f"{where}: gone, gates.json still has it"
        return f"{where}: {self.column} is {self.value:g}, the gate is {self.gate:g}"


def _worse(column: str, value: float, gate: float) -> bool:
    plain = column.removeprefix("loop_").removeprefix("all_")
    if plain in ALWAYS_ZERO:
        return value > 0
    if plain in NOT_ABOVE:
        return value > gate + TOLERANCE
    if plain in NOT_BELOW:
        return value < gate - TOLERANCE
    return False


def compare(measured: Rows, gates: Rows) -> list[Failure]:
    """Every value of `measured` that is worse than its gate. Counts that are not listed are 0."""
    failures = []
    for section in sorted(measured.keys() | gates.keys()):
        now, before = measured.get(section, {}), gates.get(section, {})
        for kernel in sorted(now.keys() | before.keys()):
            if kernel not in before:
                failures.append(Failure(section, kernel, "", 0, None))
            if kernel not in now:
                failures.append(Failure(section, kernel, "", None, 0))
                continue
            row, gate = now[kernel], before.get(kernel, {})
            for column in sorted(row.keys() | gate.keys()):
                value = row.get(column, 0)
                limit = gate.get(column, 0) if gate else math.nan
                if column.endswith(ALWAYS_ZERO) and value > 0:
                    failures.append(Failure(section, kernel, column, value, 0))
                elif gate and _worse(column, value, limit):
                    failures.append(Failure(section, kernel, column, value, limit))
    return failures


def read(path: Path = PATH) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, str]]:
    """The gates, and the versions of the compilers that they were measured with."""
    if not path.exists():
        return {}, {}
    rows = json.loads(path.read_text(encoding="utf-8"))
    return rows, rows.pop("compilers")


def write(rows: Rows, compilers: Mapping[str, str], path: Path = PATH) -> None:
    """Sorted, a kernel per line, so that a diff shows the kernels that changed and no others."""
    sections = [f' "compilers": {json.dumps(dict(compilers), sort_keys=True)}']
    for section in sorted(rows):
        lines = [
            f"  {json.dumps(kernel)}: {json.dumps(dict(rows[section][kernel]))}"
            for kernel in sorted(rows[section])
        ]
        sections.append(f" {json.dumps(section)}: {{\n" + ",\n".join(lines) + "\n }")
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


# Columns of the printed tables: what a reader looks at first.
COLUMNS = ("registers", "spills", "local", "shared", "threads", "blocks")
MIX: tuple[str, ...] = (
    "load_wide",
    "load_64",
    "load_narrow",
    "store_wide",
    "store_narrow",
    "mma",
    "wgmma",
)
MIX += ("ldmatrix", "copy_async", "mufu", "barrier", "shuffle")


def table(rows: Mapping[str, Row]) -> list[list[str]]:
    """One line per kernel; instruction counts, where there are any, follow as name=count."""
    lines = []
    for kernel in sorted(rows):
        row = rows[kernel]
        if "registers" not in row:
            lines.append([kernel, *(f"{row[column]:g}" for column in row)])
            continue
        mix = " ".join(
            f"{kind}={row[prefix + kind]:g}"
            for kind in MIX
            for prefix in ("loop_", "all_")
            if row.get(prefix + kind)
        )
        lines.append([kernel, *(f"{row[column]:g}" for column in COLUMNS), mix])
    return lines


def headers(rows: Mapping[str, Row]) -> list[str]:
    first = next(iter(rows.values()))
    if "registers" in first:
        return ["kernel", *COLUMNS, "in the innermost loops"]
    return ["call", *(name.replace("_", " ") for name in first)]
