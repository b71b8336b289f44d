"""How many blocks of a kernel a multiprocessor holds: NVIDIA's occupancy rules for all targets.

tests/test_gates.py compares it with NVIDIA's own calculator, cuda_occupancy.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from ptx.gpu import WARP

REGISTERS = 65536  # of a multiprocessor, on every target; a quarter belongs to each partition
PARTITIONS = 4
REGISTER_UNIT = 256  # registers are handed out to warps in these
SHARED_UNIT, SHARED_SYSTEM = 128, 1024  # bytes; the system takes its part of every block's


@dataclass(frozen=True)
class Multiprocessor:
    threads: int
    blocks: int
    shared: int  # bytes


_KB = 1024
MULTIPROCESSORS = {
    "80": Multiprocessor(2048, 32, 164 * _KB),
    "86": Multiprocessor(1536, 16, 100 * _KB),
    "89": Multiprocessor(1536, 24, 100 * _KB),
    "90": Multiprocessor(2048, 32, 228 * _KB),
    "100": Multiprocessor(2048, 32, 228 * _KB),
    "120": Multiprocessor(1536, 24, 100 * _KB),
}


def multiprocessor(target: str) -> Multiprocessor:
    """What a multiprocessor of `target` ("80", "90a", "sm_120a"…) holds at most."""
    number = target.removeprefix("sm_").rstrip("af")
    if number not in MULTIPROCESSORS:
        raise ValueError(f"target {target!r} is not one of sm_{', sm_'.join(MULTIPROCESSORS)}")
    return MULTIPROCESSORS[number]


def blocks(target: str, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor of `target` holds at a time.

    `registers` are those of a thread, `shared` the bytes a block asks for, static and dynamic.
    """
    limits = multiprocessor(target)
    warps = _ceil_div(threads, WARP)
    per_warp = _ceil_div(max(registers, 1) * WARP, REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    of_block = _ceil_div(shared + SHARED_SYSTEM, SHARED_UNIT) * SHARED_UNIT
    by_warps = limits.threads // WARP // warps
    return min(limits.blocks, by_warps, by_registers, limits.shared // of_block)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
