"""`run`: for its time the cuda and triton backends accept CPU tensors and run on the executor."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from torch import Tensor

from kernels import _gpu, _native
from ptx.executor import Executor, KernelError, Launch, Report
from ptx.gpu import WARP, Gpu, gpu_of
from ptx.host import Library, PackageModule
from ptx.memory import Memory
from ptx.written import Written

# The runtime's numbers for what the options are called here.
SCHEDULES = {"round_robin": 0, "reverse": 1, "random": 2, "uniform": 3}
MMA_ROUNDINGS = {"double": 0, "sequential": 1, "truncating": 2}
BOUNDS = ("view", "storage")
ON_REPORT = ("raise", "record")

_one_session = threading.Lock()
_current: Session | None = None


def current() -> Session:
    """The session that is running."""
    if _current is None:
        raise RuntimeError("this works inside `with ptx.run(...)` only")
    return _current


class Session:
    """What `run` yields: the launches so far, and a stand-in for the GPU towards the backends."""

    warp_size = WARP

    def __init__(
        self,
        arch: str,
        multiprocessors: int | None,
        bounds: str,
        on_report: str,
        machine_code: bool,
        options: dict[str, int],
    ) -> None:
        self.arch = arch
        self.machine_code = machine_code
        self.gpu: Gpu = gpu_of(arch)
        self.multiprocessors = multiprocessors or self.gpu.multiprocessors
        self.launches: list[Launch] = []
        self.written = Written()
        self._bounds, self._on_report, self._options = bounds, on_report, options
        self._failure: BaseException | None = None

    @functools.cached_property
    def executor(self) -> Executor:
        """The runtime, with this session's options; built and loaded when first needed."""
        executor = Executor.instance()
        executor.options(shared_limit=self.gpu.shared_per_block, **self._options)
        return executor

    @functools.cached_property
    def memory(self) -> Memory:
        return Memory(self.executor, self.written, self._bounds)

    @property
    def reports(self) -> list[Report]:
        """Everything found wrong so far."""
        return [report for launch in self.launches for report in launch.reports]

    def table(self) -> str:
        """What each kernel has moved and executed so far, one line per kernel."""
        from ptx import counters

        return counters.table(self.launches)

    def address(self, tensor: Tensor, name: str = "") -> int:
        """Where kernels find `tensor` during the next `call`.

        Reports call it `name`, or what the caller's variable is called.
        """
        return self.memory.address(tensor, name or _variable(tensor) or f"{list(tensor.shape)}")

    @contextmanager
    def call(self, copies: bool = True) -> Iterator[None]:
        """One call of code that launches: the tensors addressed before are copied in, then back.

        Without `copies` it uses none of them, and they stay for the call they are meant for.
        """
        with self.executor.lock:
            if copies:
                self.memory.copy_in()
            try:
                yield
            except Exception as error:  # host code answers an error of a launch by its own
                self.raise_failure(error)
                raise
            finally:
                if copies:
                    self.memory.copy_out()
            self.raise_failure()

    def launch(
        self,
        kernel: int | str,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        parameters: bytes,
    ) -> Launch:
        """Executor.launch, with what it did to each tensor, and `keep`."""
        launch = self.executor.launch(kernel, grid, block, shared, parameters)
        launch.footprint = dict(self.memory.footprints())
        self.keep(launch)
        return launch

    def keep(self, launch: Launch) -> None:
        """Adds to `launches`; raises KernelError if it has reports, unless they are recorded."""
        self.launches.append(launch)
        if launch.reports and self._on_report == "raise":
            raise KernelError(launch)

    def fail(self, error: BaseException) -> None:
        """Keeps an exception that cannot pass through host code until that has returned."""
        self._failure = self._failure or error

    def raise_failure(self, cause: Exception | None = None) -> None:
        """Raises the exception that `fail` kept, if there is one."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure from cause

    def close(self) -> None:
        if "executor" in vars(self):
            self.executor.free_all()


def _variable(tensor: Tensor) -> str | None:
    """What the nearest caller outside of this machinery calls `tensor`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != _gpu.__name__ and not module.startswith("ptx."):
            for name, value in frame.f_locals.items():
                if value is tensor:
                    return name
            return None
        frame = frame.f_back
    return None


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _choice(option: str, given: str, accepted: Sequence[str]) -> str:
    if given not in accepted:
        raise ValueError(f"{option} {given!r} is not one of {', '.join(accepted)}")
    return given


@contextmanager
def run(
    arch: str = "sm_90a",
    *,
    schedule: Literal["round_robin", "reverse", "random", "uniform"] = "round_robin",
    seed: int = 0,
    bounds: Literal["view", "storage"] = "view",
    on_report: Literal["raise", "record"] = "raise",
    multiprocessors: int | None = None,
    preempt: int = 0,
    jitter: bool = False,
    mma_rounding: Literal["double", "sequential", "truncating"] = "double",
    async_early: bool = False,
    sample: int = 0,
    machine_code: bool = False,
) -> Iterator[Session]:
    """Inside, GPU kernels run on the executor, from their PTX for `arch`.

    Args:
        arch: what nvcc and Triton compile for, such as "sm_80", "sm_90a" or "sm_100a".
        schedule: which of the threads that can run goes on: in turn, the last one first, by random
            priorities of warps that sometimes change ("random"), or any ("uniform").
        seed: of the random schedules, of `preempt` and of `jitter`.
        bounds: what a kernel may touch of a tensor's storage: the views passed, or all of it.
        on_report: "raise" KernelError for the first launch with a report, or "record" them all.
        multiprocessors: that persistent grids count on; by default those of the GPU of `arch`.
        preempt: a thread gives way at one memory access in so many, by chance; 0: never.
        jitter: approximate instructions (.approx) err by up to their documented bounds.
        mma_rounding: how matrix instructions add: in double and rounded once, in fp32 one after
            another, or in fp32 with every sum truncated.
        async_early: asynchronous copies land when they are issued, not when they must have.
        sample: run only this many blocks of each launch, evenly chosen; 0: all.
        machine_code: Triton has ptxas make machine code as well, which is not run: a launch's
            `code` says what it is made of, and model.estimate needs that.

    Raises:
        KernelError: a launch had reports, at the call that launched it or, at the latest, at exit.
        Refused: something was asked for that the executor does not model.
        RuntimeError: a session is already running; there is one per process.
    """
    global _current
    options = {
        "schedule": SCHEDULES[_choice("schedule", schedule, tuple(SCHEDULES))],
        "mma_rounding": MMA_ROUNDINGS[_choice("mma_rounding", mma_rounding, tuple(MMA_ROUNDINGS))],
        "seed": seed,
        "preempt": preempt,
        "jitter": int(jitter),
        "async_early": int(async_early),
        "sample": sample,
    }
    _choice("bounds", bounds, BOUNDS)
    _choice("on_report", on_report, ON_REPORT)
    session = Session(arch, multiprocessors, bounds, on_report, machine_code, options)
    if not _one_session.acquire(blocking=False):
        running = _current.arch if _current else "another thread's"
        raise RuntimeError(f"ptx.run: sessions do not nest, and one is running ({running})")
    with ExitStack() as stack:
        stack.callback(_one_session.release)
        stack.callback(session.close)
        stack.enter_context(_replaced(sys.modules[__name__], "_current", session))
        stack.enter_context(_replaced(_gpu, "stand_in", session))
        stack.enter_context(_replaced(_native, "cuda", PackageModule(session)))
        if importlib.util.find_spec("triton"):
            from ptx import triton_driver

            stack.enter_context(triton_driver.installed(session))
        stack.enter_context(session.written.watching())
        yield session
        session.raise_failure()


def load(source: str | Path) -> Library:
    """The `extern "C"` functions of a .cu file, to be called inside `run` with CPU tensors.

    Arguments are as for ctypes, and tensors, which the functions get as pointers.

    >>> library = ptx.load("scale.cu")  # extern "C" void scale(float* x, int n, float factor)
    >>> with ptx.run("sm_90a"):
    ...     library.scale(x, x.numel(), ctypes.c_float(2.0))

    Raises ptx.build.BuildError where nvcc does not accept the source.
    """
    return Library(Path(source), current)
