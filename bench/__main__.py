"""python -m bench gates [--update] [--peers] [--only cuda|triton] [--static]
python -m bench scaling [--dtype bfloat16] [--longest 4096] [--png FILE]"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tabulate import tabulate

from bench import compiled, gates


def _measure(kinds: tuple[str, ...], static: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Every section of these kinds."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for kind in kinds:
        rows |= compiled.cuda() if kind == "cuda" else compiled.triton()
        if not static:
            from bench import counted

            rows |= counted.counted(kind)
    return rows


def _gates(only: str | None, static: bool, update: bool) -> int:
    kinds = (only,) if only else ("cuda", "triton")
    rows = _measure(kinds, static)
    for section in sorted(rows):
        print(f"\n{section}")
        print(
            tabulate(
                gates.table(rows[section]),
                headers=gates.headers(rows[section]),
                disable_numparse=True,
            )
        )
    known, compilers = gates.read()
    here = compiled.versions()
    unmeasured = {
        section: known[section]
        for section in known
        if section.split()[0] not in kinds or (static and "counted" in section)
    }
    if update:
        known = {**unmeasured, **rows}
        gates.write(known, here)
        print(f"\nwrote {gates.PATH}")
    known = {section: known[section] for section in known if section not in unmeasured}
    failures = gates.compare(rows, known)
    if failures and compilers != here:
        print(f"gates.json is from {compilers}, this is {here}: that may be all", file=sys.stderr)
    for failure in failures:
        print(f"FAILED  {failure}", file=sys.stderr)
    if failures:
        print(f"{len(failures)} gates failed; --update accepts the new numbers", file=sys.stderr)
        return 1
    kernels = sum(len(section) for section in rows.values())
    print(f"\n{kernels} rows pass their gates")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("gates", help="compare every kernel with gates.json")
    command.add_argument("--update", action="store_true", help="write the numbers to gates.json")
    command.add_argument("--peers", action="store_true", help="count Liger and torch.compile too")
    command.add_argument("--only", choices=["cuda", "triton"], help="one kind of kernels")
    command.add_argument("--static", action="store_true", help="compile only, execute nothing")
    command = commands.add_parser("scaling", help="attention's time and memory by length, on a CPU")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    command.add_argument("--longest", type=int, default=16384, help="length to end with (16384)")
    command.add_argument("--png", type=Path, help="file for a plot")
    arguments = parser.parse_args()
    if arguments.command == "scaling":
        from bench import scaling

        scaling.show(getattr(torch, arguments.dtype), arguments.longest, arguments.png)
        return 0
    if arguments.peers:
        from bench import peers

        return peers.show()
    return _gates(arguments.only, arguments.static, arguments.update)


if __name__ == "__main__":
    sys.exit(main())
