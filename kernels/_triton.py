"""What the Triton backends share, and the only file that knows how Triton 3.5 to 3.9 differ.

Host helpers: when a call is refused, how many persistent programs to start, how large a tile is.
`compile_only` lets a machine without a GPU compile exactly what a launch would compile.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from kernels import _gpu

WARPS_PER_MULTIPROCESSOR = 16  # one wave stays resident with up to 128 registers per thread
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
# Before 3.7 the interpreter takes loop bounds out of arrays of one element, which NumPy forbids
# since 2.4.
INTERPRETER_LOOPS = VERSION >= (3, 7) or tuple(map(int, np.__version__.split(".")[:2])) < (2, 4)
INTERPRETER_MULTIPROCESSORS = 4  # few, so that small tests walk the persistent loops
# Contracted, `a * a + shuffle(b * b)` rounds differently in each lane, and lanes that must agree on
# a row's sum do not: which of them is stored would be chance.  Triton 3.9 changes the default.
LAUNCH = {"enable_fp_fusion": False}
# The longest row that is held, divided by this, with vectors and without: addresses of single
# elements take registers too.  Triton 3.5 and 3.8 need more of them and would spill.
_SHARES: dict[tuple[int, ...], tuple[int, int]] = {(3, 5): (2, 4), (3, 8): (1, 4)}
WITH_VECTORS, WITHOUT_VECTORS = _SHARES.get(VERSION, (1, 2))
MAX_THREADS = 1024  # of one program
VECTOR = 4  # elements from which on a row counts as loaded by vectors
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every architecture the kernels are compiled for in the tests, as Triton names them.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# KiB that one program may have on each.
SHARED_MEMORY = {"80": 163, "90": 227, "100": 227, "120": 99, "gfx942": 64, "gfx950": 160}


def interpreted(kernel: Any) -> bool:
    """Whether `kernel` was decorated under TRITON_INTERPRET=1 and so runs in Python on the CPU."""
    return not isinstance(kernel, triton.JITFunction)


def unsupported(
    kernel: Any,
    x: torch.Tensor,
    *others: torch.Tensor | None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> str | None:
    """None where `kernel` can take these tensors, else one sentence saying why not."""
    if x.dtype not in dtypes:
        accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"dtype {x.dtype} is not one of {accepted}"
    if not interpreted(kernel):
        return _gpu.unsupported(x)
    if x.device.type != "cpu":
        return f"Triton's interpreter is on (TRITON_INTERPRET=1) and input is on {x.device.type}"
    if not INTERPRETER_LOOPS:
        return f"the interpreter of Triton {triton.__version__} needs NumPy before 2.4"
    for tensor in (x, *others):
        if tensor is not None and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter rounds bfloat16 wrongly"
    return None


@functools.cache
def _device_warp_size(index: int) -> int:
    return torch.cuda.get_device_properties(index).warp_size


def warp_size(x: torch.Tensor) -> int:
    if x.device.type == "cpu":
        return getattr(_gpu.stand_in, "warp_size", 32)
    return _device_warp_size(x.device.index)


def multiprocessors(x: torch.Tensor) -> int:
    """Those of the device of `x`; a few in the interpreter."""
    if x.device.type == "cpu" and _gpu.stand_in is None:
        return INTERPRETER_MULTIPROCESSORS
    return _gpu.multiprocessors(x)


def wave(x: torch.Tensor, num_warps: int) -> int:
    """Programs of `num_warps` warps that the device of `x` holds at once."""
    return multiprocessors(x) * max(1, WARPS_PER_MULTIPROCESSOR // num_warps)


def programs(tiles: int, most: int) -> int:
    """Persistent programs, at most `most`, so that the longest of them walks the fewest tiles."""
    return triton.cdiv(tiles, triton.cdiv(tiles, most))


def vector(cols: int) -> int:
    """Elements, at most 8, that every aligned vector of a row of `cols` elements may hold.

    A kernel that takes the row length as a product of this constant and a number lets Triton prove
    that rows start on a vector boundary; without it Triton loads element by element unless 16
    divides the length.
    """
    return min(cols & -cols, 8)


def tile(
    table: tuple[tuple[int, int, int], ...], x: torch.Tensor, cols: int, vec: int
) -> tuple[int, int]:
    """(BLOCK_M, num_warps) of the first row of `table` whose largest cols covers `cols`.

    Without vectors every element needs an address of its own: half the rows, or registers spill.
    """
    block_m, num_warps = next(row[1:] for row in table if cols <= row[0])
    block_m = block_m if vec >= VECTOR else max(1, block_m // 2)
    return block_m, min(num_warps, MAX_THREADS // warp_size(x))


def resident(limit: int, cols: int, vec: int) -> bool:
    """Whether rows fit the registers: up to `limit` columns or, by Triton's version, a share."""
    return cols <= limit // (WITH_VECTORS if vec >= VECTOR else WITHOUT_VECTORS)


@functools.cache
def _device_target(index: int) -> GPUTarget:
    with torch.cuda.device(index):
        return triton.runtime.driver.active.get_current_target()


def architecture(x: torch.Tensor) -> str:
    """The key of tables of tiles for the device of `x`: its generation, by shared memory.

    "sm_86" stands for every cuda device with 99 KiB of shared memory for a block.
    """
    if x.device.type == "cpu" and _gpu.stand_in is None:
        return "interpreter"
    on_stand_in = x.device.type == "cpu"
    target = (
        triton.runtime.driver.active.get_current_target()
        if on_stand_in
        else _device_target(x.device.index)
    )
    if target.backend == "hip":
        return "gfx942"
    generation = {8: "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(target.arch // 10)
    return "sm_86" if generation is None or target.arch in (86, 89) else generation


def float32_dot(x: torch.Tensor) -> str:
    """How tl.dot multiplies float32 on the device of `x` without losing digits."""
    return "ieee" if architecture(x) == "gfx942" else "tf32x3"


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `x` the current one, which is where Triton launches."""
    return contextlib.nullcontext() if x.device.type == "cpu" else torch.cuda.device(x.device)


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one target: its files lie in Triton's cache."""

    name: str
    target: GPUTarget
    metadata: Any

    def file(self, extension: str) -> Path:
        """The path of the kernel's ttgir, ptx, cubin, amdgcn or hsaco file."""
        path = get_cache_manager(self.metadata.hash).get_file(f"{self.name}.{extension}")
        if path is None:
            raise FileNotFoundError(f"Triton's cache holds no {self.name}.{extension}")
        return Path(path)

    def spills(self) -> int:
        """Bytes of stack (cuda) or spilled registers (hip) of one thread: 0 when all fits."""
        if self.target.backend == "hip":
            found = re.search(r"\.vgpr_spill_count:\s*(\d+)", self.file("amdgcn").read_text())
            if found is None:
                raise RuntimeError(f"{self.name} has no .vgpr_spill_count in its metadata")
            return int(found[1])
        return self._resource("STACK")

    def registers(self) -> int:
        """32-bit registers of one thread."""
        if self.target.backend == "hip":
            found = re.search(r"\.vgpr_count:\s*(\d+)", self.file("amdgcn").read_text())
            return int(found[1]) if found else 0
        return self._resource("REG")

    def _resource(self, name: str) -> int:
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "-res-usage", str(self.file("cubin"))]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(rf"\b{name}:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reports no {name}: {usage}")
        return int(found[1])


class _CompileOnlyDriver(DriverBase):
    """Stands where Triton's GPU driver would: compiles at each launch, records it, runs nothing."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        self.launched: list[Compiled] = []
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is run, so nothing can be timed")

    def get_current_device(self) -> GPUTarget:
        return self.target  # Triton keeps compiled kernels by device: one device per target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0

    def get_device_properties(self, device: GPUTarget) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[str(device.arch)] * 1024}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: GPUTarget
    ) -> tuple[None, int, int, int, int]:
        return None, 1, 0, 0, 1024  # module, function, registers, spills, threads of a block

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        compiled = Compiled(metadata.name, self.target, metadata)

        def launch(*_: Any) -> None:
            driver = triton.runtime.driver.active
            if not isinstance(driver, _CompileOnlyDriver):
                raise RuntimeError("a kernel compiled under compile_only cannot be run")
            if compiled not in driver.launched:
                driver.launched.append(compiled)

        return launch


@dataclass
class _Device:
    """The stand-in of a compile-only session; one multiprocessor makes programs walk many tiles."""

    warp_size: int
    multiprocessors: int = 1

    def address(self, tensor: torch.Tensor) -> int:
        return tensor.data_ptr()  # nothing runs, so nothing looks there


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[list[Compiled]]:
    """Launches inside compile for `target` (a key of TARGETS) and run nothing; no GPU is needed.

    Yields the list of distinct kernels launched. Backends accept CPU tensors inside; what they
    return was never written. The cuda targets use the ptxas that comes with Triton.
    """
    driver = _CompileOnlyDriver(TARGETS[target])
    active, stand_in = triton.runtime.driver._active, _gpu.stand_in
    triton.runtime.driver.set_active(driver)
    _gpu.stand_in = _Device(driver.target.warp_size)
    try:
        yield driver.launched
    finally:
        triton.runtime.driver._active, _gpu.stand_in = active, stand_in
