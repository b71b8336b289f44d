"""Facts of the GPUs that code is compiled for: what a launch may ask for, and how fast they are.

Limits are from NVIDIA's CUDA programming guide, speeds from its data sheets and architecture white
papers; no data sheet tells the bandwidth of the L2 cache, so that is what microbenchmarks in print
found.  Speeds feed the time model (model.py) and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32  # threads
REGISTERS = 65536  # 32-bit, of a multiprocessor; a quarter belongs to each of its partitions
PARTITIONS = 4
WARPS, BLOCKS = 64, 32  # most that a multiprocessor holds at a time
REGISTER_UNIT = 256  # a warp gets registers in these
SHARED_UNIT, SHARED_SYSTEM = 128, 1024  # bytes; the system takes its part of every block's


@dataclass(frozen=True)
class Speed:
    """What a GPU's parts do at best. `per clock` is of one multiprocessor."""

    clock_ghz: float
    dram_bytes_per_us: float
    l2_bytes_per_us: float
    l2_bytes: int
    fp32_per_clock: int  # thread instructions; so is the next
    special_per_clock: int  # exp2, rsqrt, …
    tensor_flop_per_clock: int  # dense, of 16-bit floats


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: int  # 90 for sm_90
    multiprocessors: int
    shared_per_block: int  # bytes, the most a launch may ask for
    shared_per_multiprocessor: int  # bytes
    speed: Speed | None  # None: not modelled

    @property
    def capability(self) -> tuple[int, int]:
        return divmod(self.arch, 10)


_KB, _MB = 1024, 1024 * 1024

A100 = Gpu(
    name="A100",  # SXM, 80 GB
    arch=80,
    multiprocessors=108,
    shared_per_block=163 * _KB,
    shared_per_multiprocessor=164 * _KB,
    speed=Speed(
        clock_ghz=1.41,
        dram_bytes_per_us=2039e3,
        l2_bytes_per_us=4500e3,
        l2_bytes=40 * _MB,
        fp32_per_clock=64,
        special_per_clock=16,
        tensor_flop_per_clock=2048,
    ),
)
H100 = Gpu(
    name="H100",  # SXM
    arch=90,
    multiprocessors=132,
    shared_per_block=227 * _KB,
    shared_per_multiprocessor=228 * _KB,
    speed=Speed(
        clock_ghz=1.755,
        dram_bytes_per_us=3352e3,
        l2_bytes_per_us=7000e3,
        l2_bytes=50 * _MB,
        fp32_per_clock=128,
        special_per_clock=16,
        tensor_flop_per_clock=4096,
    ),
)
B200 = Gpu(
    name="B200",
    arch=100,
    multiprocessors=148,
    shared_per_block=227 * _KB,
    shared_per_multiprocessor=228 * _KB,
    speed=None,
)
_BY_ARCH = {gpu.arch: gpu for gpu in (A100, H100, B200)}


def gpu_of(arch: str) -> Gpu:
    """The GPU that code for `arch` ("sm_80", "sm_90a", "sm_100a"…) is judged as running on."""
    number = arch.removeprefix("sm_").rstrip("af")
    if not number.isdecimal() or int(number) not in _BY_ARCH:
        accepted = ", ".join(f"sm_{known} ({gpu.name})" for known, gpu in _BY_ARCH.items())
        raise ValueError(f"arch {arch!r} is not one of {accepted}; a and f may follow the number")
    return _BY_ARCH[int(number)]


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time.

    `threads` are those of a block, `registers` those of a thread, `shared` the bytes a block asks
    for, static and dynamic.
    """
    warps = _round_up(threads, WARP) // WARP
    registers_of_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // registers_of_warp * PARTITIONS // warps
    by_shared = gpu.shared_per_multiprocessor // _round_up(shared + SHARED_SYSTEM, SHARED_UNIT)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)
