"""Triton's driver interface: inside `ptx.run`, `kernel[grid](tensors…)` runs here on CPU tensors.

Triton compiles as for a GPU and leaves the PTX in its cache; its last stage, ptxas, runs for
sessions with `machine_code` only.  The launcher that Triton asks this driver for packs the
arguments (triton_arguments.py) and runs that PTX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.cache import get_cache_manager

from ptx import build, machine_code, model, triton_arguments
from ptx.executor import Launch, Refused, Report
from ptx.gpu import WARP
from ptx.occupancy import REGISTERS

if TYPE_CHECKING:
    from ptx.session import Session

MAX_THREADS = 1024  # of a block
MACHINE_CODE = 1000  # added to a device's number where ptxas runs
SCRATCH_ALIGN = 512  # bytes, at least
# What replicated lanes look like: see _judge.
REPLICA_RACES = {"race-RAW", "race-WAR"}
AUTOTUNE = ("first", "model")


@dataclass
class TritonLaunch(Launch):
    """A launch with the files that Triton made of its kernel."""

    ptx: Path = Path()
    cubin: Path | None = None  # of a session with machine_code
    harmless: list[Report] = field(default_factory=list)  # races that no result depends on

    @property
    def code(self) -> machine_code.MachineCode:
        if self.cubin is None:
            raise RuntimeError("machine code is there with ptx.run(..., machine_code=True) only")
        return machine_code.read(self.cubin, self.ptx)


class PtxCompiler(CUDABackend):  # type: ignore[misc]  # triton is untyped
    """Triton's compiler for NVIDIA GPUs up to the PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"  # what Triton takes for the kernel

    def add_stages(self, stages: dict[str, Any], *arguments: Any) -> None:
        super().add_stages(stages, *arguments)
        del stages["cubin"]

    def hash(self) -> str:
        """Part of the names in Triton's cache: these kernels are never taken for complete ones."""
        return f"{super().hash()}-ptx"


class Driver(DriverBase):  # type: ignore[misc]  # triton is untyped
    """Stands where Triton's CUDA driver would while a session runs."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.autotune = "first"  # which configuration @triton.autotune takes: one of AUTOTUNE
        self.order = itertools.count(1.0)
        self.launcher_cls = Launcher
        self.utils = self

    # ---- what Triton compiles for

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.session.gpu.arch, WARP)

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device, whatever their target: a device for each.
        return self.session.gpu.arch + (MACHINE_CODE if self.session.machine_code else 0)

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return self.session.gpu.capability

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_: str) -> str:
        return type_

    def get_device_properties(self, device: int) -> dict[str, int]:
        gpu = self.session.gpu
        return {
            "max_shared_mem": gpu.shared_per_block,
            "max_num_regs": REGISTERS,
            "multiprocessor_count": self.session.multiprocessors,
            "warpSize": WARP,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, int, int, int, int]:
        """Module, function, registers, spills, threads: no binary is loaded, its PTX is run."""
        return None, 1, 0, 0, MAX_THREADS

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        return _benchmark

    def assemble_tensormap_to_arg(self, tensormaps_info: Any, args: Any) -> Any:
        return args


def _active() -> Driver:
    driver = triton.runtime.driver.active
    if not isinstance(driver, Driver):
        raise RuntimeError("a Triton kernel of an executor session is used outside ptx.run")
    return driver


def _benchmark(
    call: Callable[[], Any], quantiles: Sequence[float] = (0.5,), **_: Any
) -> list[float]:
    """Milliseconds of one configuration of an autotuned kernel; the least is taken.

    An Autotuner keeps its benchmarker over sessions, so this asks for the driver at each call.
    """
    driver = _active()
    if driver.autotune == "first":
        return [next(driver.order)] * len(quantiles)  # nothing is run
    if driver.autotune != "model":
        raise ValueError(f"autotune {driver.autotune!r} is not one of {', '.join(AUTOTUNE)}")
    session = driver.session
    before = len(session.launches)
    call()
    modelled = 0.0
    for launch in session.launches[before:]:
        assert isinstance(launch, TritonLaunch)
        modelled += model.estimate(launch, session.gpu, launch.code).microseconds
    return [modelled / 1000] * len(quantiles)


class Launcher:
    """One compiled kernel; Triton makes it from its source and metadata and then calls it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        name = metadata.name
        if getattr(metadata, "num_ctas", 1) != 1:
            raise Refused(f"{name}: num_ctas={metadata.num_ctas}; clusters are not modelled")
        if metadata.launch_cooperative_grid:
            raise Refused(f"{name}: a cooperative grid; the executor runs block after block")
        self._metadata = metadata
        self._signature = list(source.signature.values())
        self._names = [str(key) for key in source.signature]
        cache = get_cache_manager(metadata.hash)
        ptx, cubin = cache.get_file(f"{name}.ptx"), cache.get_file(f"{name}.cubin")
        if ptx is None:
            raise FileNotFoundError(f"{name}: Triton's cache holds no PTX of it")
        self._ptx, self._cubin = Path(ptx), Path(cubin) if cubin else None

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Callable[[Any], None] | None,
        exit_hook: Callable[[Any], None] | None,
        *values: Any,
    ) -> None:
        grid = (grid_x, grid_y, grid_z)
        if not math.prod(grid):
            return
        if enter_hook is not None:
            enter_hook(launch_metadata)
        self._launch(_active().session, grid, values)
        if exit_hook is not None:
            exit_hook(launch_metadata)

    def _launch(self, session: Session, grid: tuple[int, int, int], values: Sequence[Any]) -> None:
        executor, metadata = session.executor, self._metadata
        (kernel,) = executor.load(build.kernel_library(_source(self._ptx))).values()
        block = executor.kernel_info(kernel)["required_x"] or metadata.num_warps * WARP
        arguments = triton_arguments.flatten(
            self._signature, values, self._names, getattr(metadata, "tensordesc_meta", None)
        )
        with self._scratch(session, math.prod(grid)) as scratch:
            parameters = triton_arguments.pack(
                arguments,
                scratch,
                executor.parameters(kernel),
                session.memory.address,
                executor.tensor_map,
            )

            def run() -> Launch:
                return executor.launch(kernel, grid, (block, 1, 1), metadata.shared, parameters)

            with session.call():
                launch = TritonLaunch(**vars(run()), ptx=self._ptx, cubin=self._cubin)
                launch.footprint = dict(session.memory.footprints())
                _judge(session, launch, run)
                session.keep(launch)

    @contextlib.contextmanager
    def _scratch(self, session: Session, blocks: int) -> Iterator[list[int]]:
        """Addresses of the memory that Triton hands to every kernel; 0 where it needs none."""
        buffers = []
        for kind in ("global", "profile"):
            size = getattr(self._metadata, f"{kind}_scratch_size", 0) or 0
            align = getattr(self._metadata, f"{kind}_scratch_align", 1) or 1
            address = 0
            if size:
                align = max(SCRATCH_ALIGN, align)
                address = session.executor.alloc(size * blocks, f"{kind} scratch", align, False)
            buffers.append(address)
        try:
            yield buffers
        finally:
            for address in filter(None, buffers):
                session.executor.free(address)


def _source(ptx: Path) -> str:
    """The PTX without lines that belong to no source.

    From Triton 3.8 on every line inside an inline assembly text counts as a further source line.
    """
    begin, end = "// begin inline asm", "// end inline asm"
    lines, inside = [], False
    for line in ptx.read_text().splitlines():
        inside = line.strip() == begin or (inside and line.strip() != end)
        # blank instead of gone: reports name lines of the file
        lines.append("" if inside and line.lstrip().startswith(".loc") else line)
    return "\n".join(lines) + "\n"


def _judge(session: Session, launch: TritonLaunch, run: Callable[[], Launch]) -> None:
    """Moves races that no result depends on from `reports` to `harmless`.

    Where a tensor has fewer elements than the block has threads, Triton lets several threads load
    and store the same element.  In place, one may load what another has stored already; what it
    loads is not used for anything that is kept.  So the launch is run again with every racing read
    returning NaN: if all memory ends up the same, bit by bit, the race is harmless.
    """
    if not launch.reports or {report.kind for report in launch.reports} - REPLICA_RACES:
        return
    memory, executor = session.memory, session.executor
    results = memory.contents()
    memory.copy_in()
    executor.options(poison_races=1)
    try:
        run()
    finally:
        executor.options(poison_races=0)
    if memory.contents() == results:
        launch.harmless, launch.reports = launch.reports, []
    else:  # the caller gets what the launch computed, not what the trial left
        memory.copy_in()
        run()


@contextlib.contextmanager
def installed(session: Session) -> Iterator[Driver]:
    """Triton's launches go to `session` inside the `with` block."""
    config, nvidia = triton.runtime.driver, backends["nvidia"]
    before, driver = config._active, Driver(session)
    if not session.machine_code:
        backends["nvidia"] = dataclasses.replace(nvidia, compiler=PtxCompiler)
    config.set_active(driver)
    try:
        yield driver
    finally:
        config._active = before
        backends["nvidia"] = nvidia
