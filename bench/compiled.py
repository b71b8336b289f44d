"""What the compilers make of every kernel: registers, spills, shared memory, blocks, instructions.

CUDA: csrc/<op>/module_cuda.cu with the package's own flags, a cubin per target, cached by contents.
Triton: the kernels that the calls of cases.py launch, compiled without a GPU by Triton itself.
Nothing here runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import cases, sass
from bench.loops import innermost_loops
from ptx import build, occupancy
from ptx.machine_code import MachineCode, count_ptx_instructions, cuobjdump

CUDA_TARGETS = ("80", "86", "89", "90a", "100a", "120a")
SIMDS = 4  # of an AMD compute unit

Row = dict[str, float]


# ---- CUDA ----------------------------------------------------------------------------------------
def _cubin(source: Path, target: str) -> Path:
    """The kernels of one op as machine code for one target."""
    return build.nvcc_cubin(source, f"sm_{target}")


def _version(nvcc: str) -> str:
    command = [nvcc, "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def versions() -> dict[str, str]:
    """Of the compilers: another version makes other code of the same kernel."""
    found = re.search(r"release .*, V([\d.]+)", _version(build.nvcc()))
    return {
        "nvcc": found[1] if found else "unknown",
        "triton": importlib.metadata.version("triton"),
    }


def _machine_code(
    cubin: Path, target: str, threads: int | None = None, dynamic: int = 0
) -> dict[str, Row]:
    """Mangled kernel -> its row. `threads` and `dynamic` shared bytes are those of a launch;
    without them the largest block the kernel was compiled for, and its static shared memory."""
    bounds = {} if threads else sass.launch_bounds(cuobjdump("-elf", cubin))
    listings = sass.functions(cuobjdump("-sass", cubin))
    rows: dict[str, Row] = {}
    for name, usage in sass.resources(cuobjdump("-res-usage", cubin)).items():
        system = sass.SYSTEM_SHARED if int(re.sub(r"\D", "", target)) >= 90 else 0
        shared = max(usage.shared - system, 0) + dynamic  # some kernels that use none have none
        block = threads or bounds.get(name, 1024)
        inner = sass.mix(i for loop in innermost_loops(listings[name]) for i in loop)
        rows[name] = {
            "registers": usage.registers,
            "local": usage.stack + usage.local,
            "spills": sass.mix(listings[name])["local"],
            "shared": shared,
            "threads": block,
            "blocks": occupancy.blocks(target, block, usage.registers, shared),
            **{f"loop_{kind}": count for kind, count in sorted(inner.items())},
        }
    return rows


def cuda() -> dict[str, dict[str, Row]]:
    """ "cuda sm_80" -> short kernel name -> row."""

    def measure(target: str) -> dict[str, Row]:
        rows: dict[str, Row] = {}
        for source in build.op_sources().values():
            rows |= _machine_code(_cubin(source, target), target)
        names = sass.demangled(list(rows))
        return {names[name]: row for name, row in rows.items()}

    with ThreadPoolExecutor(2) as pool:
        done = tqdm(
            pool.map(measure, CUDA_TARGETS), "CUDA, by target", total=len(CUDA_TARGETS), leave=False
        )
        return {f"cuda sm_{target}": rows for target, rows in zip(CUDA_TARGETS, done, strict=True)}


@functools.cache
def cuda_code(kernel: str, arch: str) -> MachineCode:
    """What the time model asks of a kernel of the package, by its mangled name."""
    source = next(
        file for file in build.op_sources().values() if kernel in build.kernel_names(file, arch)
    )
    cubin = _cubin(source, arch.removeprefix("sm_"))
    usage = _tool_output("-res-usage", cubin)
    resources = sass.resources(usage)[kernel]
    code = sass.functions(_tool_output("-sass", cubin))[kernel]
    text = build.kernel_ptx(source, arch, kernel)
    return MachineCode(
        registers=resources.registers,
        stack=resources.stack,
        opcodes=Counter(instruction.opcode.split(".")[0] for instruction in code),
        ptx_instructions=count_ptx_instructions(text),
    )


_tool_output = functools.cache(cuobjdump)


# ---- Triton --------------------------------------------------------------------------------------
def _amd(kernel: Any) -> Row:
    """A row out of the assembly and its metadata, where LLVM counts occupancy in waves per SIMD."""
    text = kernel.file("amdgcn").read_text()

    def number(pattern: str) -> int:
        found = re.search(pattern + r":?\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"{kernel.name}: no {pattern!r} in its assembly")
        return int(found[1])

    moves = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(\w+)", text)
    count: Counter[str] = Counter()
    for move, width in moves:
        kind = {"dwordx4": "wide", "dwordx3": "wide", "dwordx2": "64"}.get(width, "narrow")
        count[f"all_{move}_{kind}"] += 1
    waves = number("; Occupancy")
    # Scalar registers that do not fit are kept in lanes of vector registers, not in memory.
    scalar = number(r"\.sgpr_spill_count")
    return {
        "registers": number(r"\.vgpr_count"),
        "local": number(r"\.private_segment_fixed_size"),
        "spills": number(r"\.vgpr_spill_count"),
        **({"scalars_in_lanes": scalar} if scalar else {}),
        "shared": kernel.metadata.shared,
        "threads": kernel.metadata.num_warps * kernel.metadata.warp_size,
        "blocks": waves * SIMDS // kernel.metadata.num_warps,
        **dict(sorted(count.items())),
    }


def _triton_row(kernel: Any) -> Row:
    if kernel.target.backend == "hip":
        return _amd(kernel)
    threads = kernel.metadata.num_warps * 32
    target = str(kernel.target.arch)
    shared = kernel.metadata.shared
    (row,) = _machine_code(kernel.file("cubin"), target, threads, shared).values()
    return row


def triton() -> dict[str, dict[str, Row]]:
    """ "triton sm_80" -> kernel with the dtype and row length it was first met with -> row."""
    from kernels import _triton

    found: dict[str, dict[str, Row]] = {}
    calls = cases.triton_calls()
    progress = tqdm(total=len(calls) * len(_triton.TARGETS), desc="Triton", leave=False)
    for target in _triton.TARGETS:
        rows = found[f"triton {target}"] = {}
        seen = set()
        for call in calls:
            with _triton.compile_only(target) as launched:
                list(cases.run(call, "triton"))
            for kernel in launched:
                if kernel.metadata.hash not in seen:
                    seen.add(kernel.metadata.hash)
                    rows[f"{call.op}::{kernel.name}<{call.label}>"] = _triton_row(kernel)
            progress.update()
    progress.close()
    return found
