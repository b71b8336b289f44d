"""What ptxas says of the CUDA kernels of an op for one target: registers, stack and spills.

The PTX is the executor's, from its cache, so that it is compiled once for all tests.  A target is
one test where ptxas takes long: pytest-xdist's workers share no fixture.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from ptx import build
from ptx.cache import cached, digest
from ptx.executor import readable
from tests.ptx.conftest import DEFAULT_ARCHS

# Machine code -> the PTX it is made of, as in the package but for 86 and 89, whose code differs
# from that of 80 in what ptxas makes of it alone.
TARGETS = {"80": "80", "86": "80", "89": "80", "90a": "90a", "100a": "100a", "120a": "120a"}
REGISTERS = 65536  # of a multiprocessor, on every target
DTYPES = ("__nv_bfloat16", "__half", "float")
# Of attention's and layer norm's kernels one dtype by default: ptxas takes 12 seconds for all.
in_dtypes = pytest.mark.parametrize(
    "dtypes",
    [DTYPES[:1], pytest.param(DTYPES, marks=pytest.mark.sweep)],
    ids=["bfloat16", "every dtype"],
)


def targets(op: str) -> list[object]:
    """Every target as the parameters of a fixture; those whose PTX the op's other tests do not need
    by default under `sweep`."""
    return [
        t if f"sm_{t}" in DEFAULT_ARCHS[op] else pytest.param(t, marks=pytest.mark.sweep)
        for t in TARGETS
    ]


class Usage(NamedTuple):
    kernel: str
    target: str
    integers: tuple[int, ...]  # template arguments
    registers: int
    local: int  # bytes of stack and spills


def usages(op: str, target: str, dtypes: Sequence[str] = DTYPES) -> list[Usage]:
    """Of every kernel of `op` for elements of `dtypes`; fails where one does not compile."""
    return _parsed(machine_code(op, target, dtypes)[1])


def machine_code(op: str, target: str, dtypes: Sequence[str] = DTYPES) -> tuple[Path, str]:
    """The machine code of every kernel of `op` for these dtypes, and what ptxas says of it."""
    source, arch = build.op_sources()[op], f"sm_{TARGETS[target]}"
    others = [f"<{dtype}{end}" for dtype in set(DTYPES) - set(dtypes) for end in ",>"]
    names = [
        name
        for name in build.kernel_names(source, arch)
        if not any(other in readable(name) for other in others)
    ]
    return assemble(build.nvcc_ptx(source, arch), target, names)


def assemble(ptx: str, target: str, kernels: Sequence[str] = ()) -> tuple[Path, str]:
    """The machine code of these kernels (none: of all), and what ptxas says of it; kept in the
    executor's cache."""
    entries = ["--entry", ",".join(kernels)] if kernels else []
    ptxas = Path(build.nvcc()).resolve().with_name("ptxas")

    def make(folder: Path) -> None:
        text, cubin = folder / "kernels.ptx", folder / "kernels.cubin"
        text.write_text(ptx)
        command = [ptxas, "-v", f"-arch=sm_{target}", *entries, text, "-o", cubin]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (folder / "said").write_text(result.stderr)

    version = subprocess.run([ptxas, "--version"], capture_output=True, check=True).stdout
    folder = cached(f"cubin-{digest(ptx, target, *entries, version)}", make)
    return folder / "kernels.cubin", (folder / "said").read_text()


def _parsed(ptxas: str) -> list[Usage]:
    found = []
    for entry in ptxas.split("Compiling entry function ")[1:]:
        head = re.match(r"'(?P<name>\S+)' for 'sm_(?P<target>\w+)'", entry)
        memory = re.search(r"(\d+) bytes stack.*?(\d+) bytes spill.*?(\d+) bytes spill", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        assert head, entry
        assert memory, entry
        assert registers, entry
        kernel = re.search(r"\d([a-z]+(?:_[a-z]+\d*)*_kernel)", head["name"])
        assert kernel, head["name"]
        integers = tuple(int(n) for n in re.findall(r"Li(\d+)E", head["name"]))
        local = sum(int(n) for n in memory.groups())
        found.append(Usage(kernel[1], head["target"], integers, int(registers[1]), local))
    return found
