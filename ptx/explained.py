"""mutants.json: the mutants that no test can notice, because they compute the same, or as well.

An entry names mutants by texts, in which "…" stands for anything:

    kernel  "_forward_kernel", or one shape of it: "_forward_kernel<vectors>"
    kind    of the mutant
    source  the line of this project that the instruction comes from
    code    optional: the instruction as Mutant.code writes it
    within  optional: one of the lines that call the function of the source line
    why     the mutant changes nothing that counts

`code` and `within` keep an entry from covering another instruction of the same line, one that does
count.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from ptx.mutations import Mutant

FILE = Path(__file__).with_name("mutants.json")

Entry = dict[str, str]


def entries() -> list[Entry]:
    found: list[Entry] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def fits(wanted: str, text: str) -> bool:
    """Whether `text` is `wanted`, in which "…" stands for anything."""
    if "…" not in wanted:
        return text == wanted
    return _pattern(wanted).fullmatch(text) is not None


@functools.cache
def _pattern(wanted: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, wanted.split("…"))))


def explains(entry: Entry, kernel: str, mutant: Mutant) -> bool:
    """Whether `entry` is about this mutant of `kernel`, a name with template arguments or shape."""
    return (
        any(fits(entry["kernel"], name) for name in (kernel, kernel.split("<")[0]))
        and fits(entry["kind"], mutant.kind)
        and fits(entry["source"], mutant.source)
        and fits(entry.get("code", "…"), mutant.code)
        and ("within" not in entry or any(fits(entry["within"], line) for line in mutant.within))
    )
