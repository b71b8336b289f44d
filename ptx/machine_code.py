"""What ptxas made of a kernel: registers, stack and how often each opcode occurs in a cubin."""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", re.MULTILINE)
_PTX_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?[a-z][\w.:]*\s[^;]*;", re.MULTILINE)


@dataclass(frozen=True)
class MachineCode:
    registers: int  # 32-bit, of a thread
    stack: int  # bytes of a thread; registers are spilled where it is not 0
    opcodes: Mapping[str, int]  # LDG, HMMA…, each instruction once however often it runs
    ptx_instructions: int  # from which they were made

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())


@functools.cache
def read(cubin: Path, ptx: Path) -> MachineCode:
    """Of a cubin that holds one kernel, as Triton's do, and the PTX it was assembled from."""
    usage = _disassembler("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump tells no registers of {cubin}: {usage}")
    opcodes = Counter(_INSTRUCTION.findall(_disassembler("cuobjdump", "-sass", cubin)))
    del opcodes["NOP"]  # padding
    return MachineCode(
        registers=int(found[1]),
        stack=int(found[2]),
        opcodes=opcodes,
        ptx_instructions=count_ptx_instructions(ptx.read_text()),
    )


def count_ptx_instructions(text: str) -> int:
    return len(_PTX_INSTRUCTION.findall(text))


def _disassembler(tool: str, option: str, cubin: Path) -> str:
    import triton  # its wheel brings NVIDIA's tools

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    command = [str(path), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
