"""Facts of the GPUs that code is compiled for: what a launch may ask for, and how fast they are.

Limits are from NVIDIA's CUDA programming guide, speeds from its data sheets and architecture white
papers; no data sheet tells the bandwidth of the L2 cache, so that is what microbenchmarks in print
found.  Speeds feed the time model (model.py) and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32  # threads


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
