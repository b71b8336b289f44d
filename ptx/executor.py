"""The runtime from Python: memory, launches, and what a launch found and counted."""

from __future__ import annotations

import ctypes
import functools
import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptx import build

Triple = tuple[int, int, int]

TENSOR_MAP_BYTES = 128
PARAMETER_ALIGN = 64  # bytes: that of a tensor map, the strictest a parameter asks for


class Refused(NotImplementedError):  # noqa: N818  it says no, nothing went wrong
    """The executor does not model what was asked for; the message says what."""


@dataclass(frozen=True)
class Report:
    """One finding. The runtime counts further ones of the same kind at the same instructions."""

    kind: str  # "race-RAW", "out-of-bounds", …: ptx/README.md lists them
    message: str
    count: int
    kernel: str
    source: str  # "cuda_forward.cuh:88<cuda.cuh:40": the line, and where it was inlined
    opcode: str
    ptx_line: int
    other_source: str | None  # of the access it collides with
    block: Triple
    thread: int  # in its block; -1: found outside any thread

    def __str__(self) -> str:
        at = f" at {self.source} ({self.opcode}, ptx line {self.ptx_line})" if self.source else ""
        other = f", vs {self.other_source}" if self.other_source else ""
        thread = f", thread {self.thread}" if self.thread >= 0 else ""
        return (
            f"[{self.kind} x{self.count}] {self.message}{at}{other}, in kernel "
            f"{readable(self.kernel)}, block {self.block}{thread}"
        )


@dataclass(frozen=True)
class Footprint:
    """What one launch did to one tensor: distinct bytes and 32-byte sectors, and sectors moved."""

    bytes_read: int
    bytes_written: int
    sectors_read: int
    sectors_written: int
    sectors_touched: int
    requested_read_sectors: int  # summed over requests, so a sector asked for twice counts twice
    requested_written_sectors: int


@dataclass
class Launch:
    kernel: str  # the mangled name
    grid: Triple
    block: Triple
    dynamic_shared: int  # bytes
    static_shared: int  # bytes
    seconds: float  # on the executor
    counts: dict[str, int]
    reports: list[Report]
    sites: list[dict[str, Any]]  # one per memory instruction
    instructions: dict[str, int]  # executed by threads, by opcode
    footprint: dict[str, Footprint] = field(default_factory=dict)  # by name of the tensor

    @property
    def name(self) -> str:
        """The kernel's name as its source has it, template arguments included."""
        return readable(self.kernel)

    @property
    def sectors_moved(self) -> int:
        """32-byte sectors of global memory asked for, each as often as it was asked for."""
        kinds = ("load", "store", "atomic")
        return sum(self.counts[f"global_{kind}_sectors"] for kind in kinds)

    @property
    def least_bytes(self) -> int:
        """Distinct bytes read and written: no order of the same work moves fewer."""
        return sum(each.bytes_read + each.bytes_written for each in self.footprint.values())

    def table(self) -> str:
        """What every memory instruction moved."""
        from ptx import counters

        return counters.site_table(self)


class KernelError(RuntimeError):
    """Something is wrong in a launch; `launch` and `reports` tell what and where."""

    def __init__(self, launch: Launch) -> None:
        self.launch, self.reports = launch, launch.reports
        grid, block = "x".join(map(str, launch.grid)), "x".join(map(str, launch.block))
        lines = "\n".join(f"  {report}" for report in launch.reports)
        super().__init__(f"{launch.name}, grid {grid}, block {block}:\n{lines}")


@functools.cache
def readable(mangled: str) -> str:
    """A kernel's demangled name without its return type and arguments."""
    demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = demangle(mangled.encode(), None, None, ctypes.byref(status))
    if status.value:
        return mangled  # extern "C", or Triton's
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    without_arguments = re.sub(r"\([^()]*\)$", "", name)
    return re.sub(r"^void ", "", without_arguments)


class Executor:
    """The one runtime of this process: it runs a launch at a time."""

    def __init__(self) -> None:
        # its symbols are global: kernels' shared objects find the runtime among them
        self._library = _typed(ctypes.CDLL(str(build.runtime_library()), mode=ctypes.RTLD_GLOBAL))
        self._loaded: dict[Path, tuple[ctypes.CDLL, dict[str, int]]] = {}
        self.lock = threading.RLock()

    @staticmethod
    @functools.cache
    def instance() -> Executor:
        return Executor()

    def options(self, **values: int) -> None:
        """Sets options of the runtime by name; those of ptx_set_option in runtime/api.cpp."""
        for name, value in values.items():
            if self._library.ptx_set_option(name.encode(), value):
                raise ValueError(f"the runtime has no option {name!r}")

    # ---- memory

    def alloc(self, size: int, name: str, align: int = 512, written: bool = True) -> int:
        """The address of new global memory between guard zones; unwritten bytes are 0xff."""
        address = self._library.ptx_alloc(size, name.encode(), align, int(written))
        if not address:
            raise MemoryError(f"the executor's memory has no room for {size} bytes of {name}")
        return address

    def free(self, address: int) -> None:
        self._library.ptx_free(address)

    def free_all(self) -> None:
        self._library.ptx_free_all()

    def set_written(self, address: int, size: int, flags: int | None = None) -> None:
        """Which bytes hold data; `flags` is the address of a 0 or 1 for each, None: all do."""
        self._library.ptx_set_written(address, size, flags)

    def get_written(self, address: int, size: int, flags: int) -> None:
        self._library.ptx_get_written(address, size, flags)

    def set_accessible(self, address: int, size: int, flags: int) -> None:
        """Which bytes of an allocation a kernel may touch; the others are out of bounds."""
        self._library.ptx_set_accessible(address, size, flags)

    def footprint(self, address: int, size: int) -> Footprint:
        """What the last launch did to these bytes."""
        numbers = (ctypes.c_uint64 * 7)()
        self._library.ptx_footprint(address, size, numbers)
        return Footprint(*numbers)

    def tensor_map(
        self,
        *,
        element_type: int,
        address: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: int,
        fill_nan: bool,
    ) -> bytes:
        """The 128 bytes that cuTensorMapEncodeTiled makes, with its numbers and orders.

        `sizes` and `box` are in elements, the contiguous dimension first; `strides` in bytes,
        without that dimension's.  Raises ValueError saying which argument is refused.
        """
        rank = len(sizes)
        made = _aligned(bytes(TENSOR_MAP_BYTES))
        error = self._library.ptx_encode_tensor_map(
            made,
            element_type,
            rank,
            address,
            (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * rank)(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            swizzle,
            int(fill_nan),
        )
        if error:
            raise ValueError(f"tensor map of a tensor of sizes {list(sizes)}: {error.decode()}")
        return bytes(made)

    # ---- kernels

    def load(self, library: Path) -> dict[str, int]:
        """The kernels of a shared object that build.kernel_library made, by mangled name."""
        with self.lock:
            if library not in self._loaded:
                before = self._library.ptx_kernel_count()
                handle = ctypes.CDLL(str(library))  # registers its kernels
                new = range(before, self._library.ptx_kernel_count())
                names = {self._library.ptx_kernel_name(kernel).decode(): kernel for kernel in new}
                self._loaded[library] = handle, names
            return self._loaded[library][1]

    def _number(self, name: str) -> int:
        number: int = self._library.ptx_find_kernel(name.encode())
        if number < 0:
            raise KeyError(f"no kernel {name} is loaded")
        return number

    def parameters(self, kernel: int) -> list[tuple[int, int]]:
        """(offset, size) in bytes of each parameter of a kernel."""
        count = self.kernel_info(kernel)["parameter_count"]
        pair = (ctypes.c_uint32 * 2)()
        found = []
        for index in range(count):
            self._library.ptx_kernel_parameter(kernel, index, pair)
            found.append((pair[0], pair[1]))
        return found

    def kernel_info(self, kernel: int) -> dict[str, int]:
        numbers = (ctypes.c_uint64 * 8)()
        self._library.ptx_kernel_info(kernel, numbers)
        return dict(zip(_KERNEL_INFO, numbers, strict=True))

    def launch(
        self,
        kernel: int | str,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        parameters: bytes,
    ) -> Launch:
        """Runs a kernel: its number from `load`, or the name of one that is loaded.

        `shared` is the dynamic shared memory in bytes; `parameters` the kernel's parameter space.
        Whatever is wrong stands in the launch's reports; nothing is raised for it here.
        """
        number = self._number(kernel) if isinstance(kernel, str) else kernel
        expected = self.kernel_info(number)["parameter_bytes"]
        if len(parameters) < expected:
            raise ValueError(f"expected {expected} bytes of parameters, got {len(parameters)}")
        dimensions = ctypes.c_uint32 * 3
        with self.lock:
            self._library.ptx_launch(
                number, dimensions(*grid), dimensions(*block), shared, _aligned(parameters)
            )
            return _launch(json.loads(self._library.ptx_result()))


def _aligned(data: bytes) -> ctypes.Array[ctypes.c_uint8]:
    """`data` in memory of its own that begins where a kernel's parameters may."""
    memory = (ctypes.c_uint8 * (len(data) + PARAMETER_ALIGN))()
    start = -ctypes.addressof(memory) % PARAMETER_ALIGN
    array = (ctypes.c_uint8 * len(data)).from_buffer(memory, start)
    array[:] = list(data)
    return array


_KERNEL_INFO = (
    "static_shared",
    "local_bytes",
    "parameter_count",
    "parameter_bytes",
    "max_threads",
    "required_x",
    "required_y",
    "required_z",
)


def _launch(result: Mapping[str, Any]) -> Launch:
    def triple(numbers: Sequence[int]) -> Triple:
        x, y, z = numbers
        return x, y, z

    reports = [Report(**{**each, "block": triple(each["block"])}) for each in result["reports"]]
    changed = {"grid": triple(result["grid"]), "block": triple(result["block"])}
    return Launch(**{**result, **changed, "reports": reports})


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the functions of runtime/api.cpp their C types."""
    pointer, size, number, text = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p
    types: dict[str, tuple[Any, list[Any]]] = {
        "ptx_set_option": (number, [text, ctypes.c_int64]),
        "ptx_alloc": (pointer, [size, text, size, number]),
        "ptx_free": (None, [pointer]),
        "ptx_free_all": (None, []),
        "ptx_set_written": (None, [pointer, size, pointer]),
        "ptx_get_written": (None, [pointer, size, pointer]),
        "ptx_set_accessible": (None, [pointer, size, pointer]),
        "ptx_footprint": (None, [pointer, size, pointer]),
        "ptx_find_kernel": (number, [text]),
        "ptx_kernel_count": (number, []),
        "ptx_kernel_name": (text, [number]),
        "ptx_kernel_info": (None, [number, pointer]),
        "ptx_kernel_parameter": (None, [number, number, pointer]),
        "ptx_launch": (number, [number, pointer, pointer, ctypes.c_uint64, pointer]),
        "ptx_result": (text, []),
        "ptx_encode_tensor_map": (
            text,
            [pointer, number, ctypes.c_uint32, pointer, *[pointer] * 4, *[number] * 3],
        ),
    }
    for name, (result, arguments) in types.items():
        function = library[name]
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    return library
