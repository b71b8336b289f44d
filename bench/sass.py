"""Reads machine code: what cuobjdump says of a cubin's resources, launch bounds, instructions."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench.loops import Instruction

SYSTEM_SHARED = 1024  # bytes that cuobjdump adds for the system, from sm_90 on

# The first pattern that matches the opcode names the instruction's class.
CLASSES = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        ("mma", r"(HMMA|IMMA|QMMA|BMMA|DMMA)\b"),
        ("wgmma", r"(HGMMA|IGMMA|QGMMA|UTC\w*MMA)\b"),
        ("ldmatrix", r"LDSM\b"),
        ("copy_async", r"(LDGSTS|UTMALDG|UBLKCP)\b"),
        ("load_wide", r"LDG\.(.*\.)?(128|256)\b"),
        ("load_64", r"LDG\.(.*\.)?64\b"),
        ("load_narrow", r"(LDG|LD)\b"),
        ("store_wide", r"STG\.(.*\.)?(128|256)\b"),
        ("store_64", r"STG\.(.*\.)?64\b"),
        ("store_narrow", r"(STG|ST)\b"),
        ("local", r"(LDL|STL)\b"),
        ("shared", r"(LDS|STS)\b"),
        ("mufu", r"MUFU\b"),
        ("barrier", r"BAR\b"),
        ("shuffle", r"SHFL\b"),
    )
)


@dataclass(frozen=True)
class Resources:
    """Of a thread: 32-bit registers, bytes of stack and local memory. Of a block: shared bytes."""

    registers: int
    stack: int
    shared: int
    local: int


def resources(usage: str) -> dict[str, Resources]:
    """Kernel -> resources, from the output of cuobjdump -res-usage."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return {name: Resources(*map(int, numbers)) for name, *numbers in re.findall(pattern, usage)}


def launch_bounds(elf: str) -> dict[str, int]:
    """Kernel -> the most threads a block of it may have, from the output of cuobjdump -elf."""
    bounds = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        section = section.split("\n.", 1)[0]
        name = section.split("\n", 1)[0].strip()
        shape = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+((?:0x\w+ ?)+)", section)
        if shape is not None:
            x, y, z = (int(number, 16) for number in shape[1].split())
            bounds[name] = x * y * z
    return bounds


def functions(listing: str) -> dict[str, list[Instruction]]:
    """Kernel -> instructions without padding, from the output of cuobjdump -sass."""
    found: dict[str, list[Instruction]] = {}
    for part in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE)[1:]:
        lines = re.findall(
            r"^\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);",
            part,
            flags=re.MULTILINE,
        )
        found[part.split("\n", 1)[0].strip()] = [
            Instruction(int(address, 16), opcode, operands.strip(), bool(predicate))
            for address, predicate, opcode, operands in lines
            if opcode != "NOP"
        ]
    return found


def mix(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many instructions of each of CLASSES; the rest is not counted."""
    count: Counter[str] = Counter()
    for instruction in instructions:
        for name, pattern in CLASSES:
            if pattern.match(instruction.opcode):
                count[name] += 1
                break
    return count


def demangled(names: list[str]) -> dict[str, str]:
    """Mangled -> short, such as layer_norm::forward_rows_kernel<bf16, 8, 16>."""
    command = ["c++filt", "--no-params", *names]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    short = []
    for name in text.splitlines():
        name = name.removeprefix("void ").replace("kernels::", "")
        for long, brief in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
            name = name.replace(long, brief)
        short.append(name)
    return dict(zip(names, short, strict=True))
