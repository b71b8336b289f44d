"""What ptxas made of a kernel: registers, stack and how often each opcode occurs in a cubin."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
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
    usage = cuobjdump("-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump tells no registers of {cubin}: {usage}")
    opcodes = Counter(_INSTRUCTION.findall(cuobjdump("-sass", cubin)))
    del opcodes["NOP"]  # padding
    return MachineCode(
        registers=int(found[1]),
        stack=int(found[2]),
        opcodes=opcodes,
        ptx_instructions=count_ptx_instructions(ptx.read_text()),
    )


def count_ptx_instructions(text: str) -> int:
    return len(_PTX_INSTRUCTION.findall(text))


def cuobjdump(option: str, cubin: Path) -> str:
    command = [_disassembler(), option, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def _disassembler() -> str:
    """The path of cuobjdump: in the wheel of triton or in its own, or on the PATH."""
    site = sysconfig.get_path("purelib")
    folders = [f"{site}/{folder}" for folder in ("triton/backends/nvidia/bin", "nvidia/cu13/bin")]
    path = os.pathsep.join([*folders, os.environ.get("PATH", "")])
    found = shutil.which("cuobjdump", path=path)
    if found is None:
        raise FileNotFoundError("no cuobjdump: pip install triton, or nvidia-cuda-cuobjdump")
    return found
