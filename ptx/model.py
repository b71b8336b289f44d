"""How long a kernel may take on a GPU, from the counts of one launch: a model, not a measurement.

    time = start + soft maximum of (multiprocessor, DRAM, L2)
    multiprocessor = busiest pipe + all other pipes / resident blocks + waves * latencies of a block

One resident block cannot overlap its own phases; many can.  Latencies are those a block cannot
hide: waiting for loads between two barriers, the barriers themselves, shuffles.  The constants are
public figures of the parts (gpu.py) and typical latencies; none was fitted to a kernel.  It is of
no use for a kernel that spills registers and says nothing about host time.  It is good for ranking
variants and for telling what bounds them, and for nothing that needs a true time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptx import occupancy
from ptx.executor import Launch
from ptx.gpu import WARP, Gpu, Speed
from ptx.machine_code import MachineCode

HEADING = "model, not measured"

START_US = 3.0
LOAD_CYCLES, BARRIER_CYCLES, SHUFFLE_CYCLES = 650, 35, 24
DRAM_SHARE, L2_SHARE = 0.91, 0.8  # of the peak that is reached
SECTOR = 32  # bytes
SECTOR_BYTES_PER_CLOCK = 64  # that a multiprocessor moves
ALU_PER_CLOCK = 64
SCHEDULERS = 4  # of a multiprocessor, each issues an instruction per clock
ISSUE_PER_WARP = 0.4  # a warp issues its dependent instructions about every 2.5 clocks
SOFTNESS = 4  # exponent of the soft maximum
SMALL = 128 * 1024  # bytes; a tensor read again and again stays in the L1 cache up to here
# Ampere's mma.sync on Hopper reaches this part of wgmma's peak.
MMA_ON_HOPPER = 0.62

_SPECIAL = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}
_MEMORY = {"ld", "st", "atom", "red", "shfl", "ldmatrix", "stmatrix"}
_FREE = {"mov", "ret", "createpolicy", "cvta", "fence", "bar", "barrier"}
_MATRIX = re.compile(r"(wgmma|mma)\..*?m(\d+)n(\d+)k(\d+)\.(.*)")


@dataclass(frozen=True)
class Estimate:
    microseconds: float
    bound: str  # the part that takes longest
    parts: Mapping[str, float]  # microseconds each part would take alone
    blocks: int  # resident on a multiprocessor
    spills: bool  # then the estimate is worth nothing


def estimate(launch: Launch, gpu: Gpu, code: MachineCode) -> Estimate:
    """The modelled time of `launch`, which must have run every block, were it run on `gpu`."""
    speed = gpu.speed
    if speed is None:
        raise ValueError(f"{gpu.name} is not modelled")
    counts = launch.counts
    if counts["blocks_run"] != counts["blocks"]:
        raise ValueError(f"the launch ran {counts['blocks_run']} of {counts['blocks']} blocks")
    grid, threads = math.prod(launch.grid), math.prod(launch.block)
    shared = launch.static_shared + launch.dynamic_shared
    warps = -(-threads // WARP)
    busiest = math.ceil(grid / gpu.multiprocessors)  # blocks of the busiest multiprocessor
    resident = max(
        1, min(occupancy.blocks(str(gpu.arch), threads, code.registers, shared), busiest)
    )
    cycles = _pipe_cycles(launch, gpu, speed, code)
    cycles["issue"] /= min(1.0, ISSUE_PER_WARP * resident * warps / SCHEDULERS)
    per_us = speed.clock_ghz * 1e3
    pipes = {name: value / grid * busiest / per_us for name, value in cycles.items()}
    block_latency = (
        counts["load_phases"] * LOAD_CYCLES
        + counts["barriers"] * BARRIER_CYCLES
        + counts["shuffles"] / warps * SHUFFLE_CYCLES
    ) / (grid * per_us)
    longest = max(pipes.values())
    pipes["latency"] = math.ceil(busiest / resident) * block_latency
    dram, l2 = _memory_microseconds(launch, gpu, speed, resident)
    multiprocessor = longest + (sum(pipes.values()) - longest - pipes["latency"]) / resident
    multiprocessor += pipes["latency"]
    body = sum(part**SOFTNESS for part in (multiprocessor, dram, l2)) ** (1 / SOFTNESS)
    parts = {**pipes, "dram": dram, "l2": l2}
    bound = max(parts, key=lambda name: parts[name])
    return Estimate(START_US + body, bound, parts, resident, spills=code.stack > 0)


def _pipe_cycles(launch: Launch, gpu: Gpu, speed: Speed, code: MachineCode) -> dict[str, float]:
    """Cycles of one multiprocessor that would run the whole launch alone, by pipe."""
    counts = launch.counts
    work = _thread_instructions(launch.instructions)
    # PTX was counted; ptxas makes more or fewer machine instructions of it.
    ratio = min(1.5, max(0.4, code.instructions / max(1, code.ptx_instructions)))
    sectors = sum(counts[f"global_{kind}_sectors"] for kind in ("load", "store", "atomic"))
    return {
        "issue": sum(launch.instructions.values()) / WARP * ratio / SCHEDULERS,
        "fp32": work["fp32"] / speed.fp32_per_clock,
        "alu": work["alu"] / ALU_PER_CLOCK,
        "special": work["special"] / speed.special_per_clock,
        "memory": counts["shared_wavefronts"]
        + counts["shuffles"]
        + sectors * SECTOR / SECTOR_BYTES_PER_CLOCK,
        "tensor": _tensor_cycles(launch.instructions, gpu, speed),
    }


def _thread_instructions(instructions: Mapping[str, int]) -> dict[str, float]:
    """PTX thread-instructions by the pipe that carries them out."""
    work = {"fp32": 0.0, "alu": 0.0, "special": 0.0}
    for opcode, count in instructions.items():
        name, *rest = opcode.split(".")
        kind = rest[-1] if rest else ""
        if name in _FREE or name in _MEMORY or name in {"mma", "wgmma", "cp"}:
            continue  # counted elsewhere, or nothing to carry out
        if name in _SPECIAL:
            work["special"] += count
            work["fp32"] += count  # scaling of the argument
        elif name == "div" and kind == "f32":
            work["special"] += count
            work["fp32"] += count * (3 if {"full", "approx"} & set(rest) else 8)
        elif name == "cvt":
            integer = {"s32", "u32", "s64", "u64"} & set(rest)
            work["special" if integer and {"f32", "f16"} & set(rest) else "alu"] += count
        elif name in {"mul", "mad", "fma"} or (kind == "f32" and name in {"add", "sub"}):
            work["fp32"] += count  # integer multiplication too runs there
        else:
            work["alu"] += count * (2 if name == "add" and kind in {"s64", "u64"} else 1)
    return work


def _tensor_cycles(instructions: Mapping[str, int], gpu: Gpu, speed: Speed) -> float:
    cycles = 0.0
    for opcode, count in instructions.items():
        shape = _MATRIX.match(opcode)
        if shape is None:
            continue
        threads = 128 if shape[1] == "wgmma" else WARP
        flop = 2 * int(shape[2]) * int(shape[3]) * int(shape[4]) * count / threads
        peak = float(speed.tensor_flop_per_clock)
        types = set(shape[5].split("."))
        if types & {"s8", "u8", "e4m3", "e5m2"}:
            peak *= 2
        elif "tf32" in types:
            peak /= 2
        if shape[1] == "mma" and gpu.arch >= 90:
            peak *= MMA_ON_HOPPER
        cycles += flop / peak
    return cycles


def _memory_microseconds(
    launch: Launch, gpu: Gpu, speed: Speed, resident: int
) -> tuple[float, float]:
    """What DRAM and L2 need for the launch."""
    grid = math.prod(launch.grid)
    counts = launch.counts
    least = again = resident_bytes = from_l1 = 0.0
    for tensor in launch.footprint.values():
        least += tensor.bytes_read + tensor.bytes_written
        requested = tensor.requested_read_sectors * SECTOR
        if requested > 4 * tensor.bytes_read and tensor.bytes_read < SMALL:
            # Every block reads all of it, as weights are: from L1 after the first time.
            from_l1 += max(0.0, requested - tensor.bytes_read * gpu.multiprocessors)
            continue
        repeated = max(0.0, requested - tensor.bytes_read)
        again += repeated
        if repeated > 0.3 * tensor.bytes_read:
            blocks_at_once = min(grid, gpu.multiprocessors * resident)
            resident_bytes += blocks_at_once * tensor.bytes_read / grid
    # Each half of the L2 keeps its own copy of far lines.
    half = speed.l2_bytes / 2
    missed = min(1.0, max(0.0, (resident_bytes - 0.75 * half) / (0.5 * half)))
    dram = (least + missed * again) / (speed.dram_bytes_per_us * DRAM_SHARE)
    if grid < gpu.multiprocessors:  # few multiprocessors cannot take all that DRAM gives
        per_us = SECTOR_BYTES_PER_CLOCK * speed.clock_ghz * 1e3
        dram = max(dram, least / grid / per_us)
    sectors = sum(counts[f"global_{kind}_sectors"] for kind in ("load", "store", "atomic"))
    l2 = (sectors * SECTOR - from_l1) / (speed.l2_bytes_per_us * L2_SHARE)
    return dram, l2


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """`rows` as text under the heading that every modelled time must carry."""
    from tabulate import tabulate

    return f"{HEADING}\n{tabulate(rows, headers=headers, disable_numparse=True)}"
