"""Host code of CUDA sources, unmodified: what it asks of the CUDA runtime library comes here.

cudart/ is linked into every host library and answers what it can by itself; a kernel's name and a
launch it passes on.  A kernel is translated and compiled when it is first launched.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ptx import build, occupancy
from ptx.executor import Executor, Launch, Refused

if TYPE_CHECKING:
    from ptx.session import Session

# What a launch answers host code, by what the executor found, where a GPU would fail too.
CUDA_ERRORS = {
    "bad-launch": 9,  # cudaErrorInvalidConfiguration
    "out-of-bounds": 700,  # cudaErrorIllegalAddress
    "wild-access": 700,
    "deadlock": 702,  # cudaErrorLaunchTimeout
    "device-assert": 710,  # cudaErrorAssert
    "misaligned": 716,  # cudaErrorMisalignedAddress
    "trap": 719,  # cudaErrorLaunchFailure
    "unsupported": 801,  # cudaErrorNotSupported
}
LAUNCH_FAILURE = 719
KERNEL_MISSING = -1  # answered to a search for a kernel

_Dimensions = ctypes.POINTER(ctypes.c_uint32)
_Find = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)
_Launch = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int, _Dimensions, _Dimensions, ctypes.c_uint64, ctypes.c_void_p
)
_Refuse = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class _Device(ctypes.Structure):
    """Device of cudart/cudart.h."""

    _fields_ = (
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("multiprocessors", ctypes.c_int),
        ("shared_per_block", ctypes.c_int),
        ("shared_per_multiprocessor", ctypes.c_int),
    )


class HostCode:
    """The host code of one CUDA source, in this process, and the way to its kernels."""

    def __init__(self, source: Path, name: str, *others: Path) -> None:
        self.source = source.resolve()
        self.path = build.host_library(self.source, name, *others)
        Executor.instance()  # has what the stand-in library calls
        self.library = ctypes.CDLL(str(self.path))
        self._callbacks = _Find(self._find), _Launch(self._launch), _Refuse(self._refuse)
        self._session: Session | None = None
        self._kernels: dict[tuple[str, str], int] = {}  # by architecture and mangled name

    def attach(self, session: Session) -> None:
        """Launches go to `session` from now on, and no error of an earlier one is pending."""
        if self._session is session:
            return
        self._session = session
        gpu = session.gpu
        device = _Device(
            *gpu.capability,
            session.multiprocessors,
            gpu.shared_per_block,
            occupancy.multiprocessor(session.arch).shared,
        )
        self.library.ptx_cudart_connect(*self._callbacks, ctypes.byref(device))

    def _attached(self) -> Session:
        if self._session is None:
            raise RuntimeError(f"{self.source} launches outside of a session")
        return self._session

    # No exception can pass through host code, so the session keeps it until that has returned.

    def _find(self, name: bytes) -> int:
        session = self._attached()
        try:
            return self._kernel(session, name.decode())
        except BaseException as error:
            session.fail(error)
            return KERNEL_MISSING

    def _kernel(self, session: Session, name: str) -> int:
        key = session.arch, name
        if key not in self._kernels:
            library = build.kernel_library(build.kernel_ptx(self.source, session.arch, name))
            self._kernels[key] = session.executor.load(library)[name]
        return self._kernels[key]

    def _launch(
        self,
        kernel: int,
        grid: Sequence[int],
        block: Sequence[int],
        shared: int,
        parameters: int | None,
    ) -> int:
        session = self._attached()
        try:
            size = session.executor.kernel_info(kernel)["parameter_bytes"]
            given = ctypes.string_at(parameters, size) if parameters else b""
            return _answer(session.launch(kernel, grid[:3], block[:3], shared, given))
        except BaseException as error:
            session.fail(error)
            return LAUNCH_FAILURE

    def _refuse(self, sentence: bytes) -> None:
        self._attached().fail(Refused(f"{self.source.name}: {sentence.decode()}"))


def _answer(launch: Launch) -> int:
    """The cudaError_t of a launch whose reports are recorded."""
    codes = (CUDA_ERRORS.get(report.kind) for report in launch.reports)
    return next((code for code in codes if code), 0)


@functools.cache
def _host_code(source: Path, name: str, *others: Path) -> HostCode:
    return HostCode(source, name, *others)


@functools.cache
def _package_module(path: Path) -> Any:
    """The package's extension module `_cuda`, which does not become kernels._cuda."""
    loader = importlib.machinery.ExtensionFileLoader("ptx._cuda", str(path))
    spec = importlib.util.spec_from_file_location("ptx._cuda", path, loader=loader)
    if spec is None:
        raise ImportError(f"{path} is no extension module")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class PackageModule:
    """What kernels._native.cuda is during a session: the same functions, run on the executor.

    Every op is a module of its own here, so that a change of one op compiles no other again.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Callable[..., Any]:
        sources = build.op_sources().items()
        source = next((file for op, file in sources if name.startswith(f"{op}_")), None)
        if source is None:
            raise AttributeError(f"no op of csrc/ has a CUDA entry point {name!r}")
        code = _host_code(source, "_cuda.so", build.CSRC / "module_cuda.cpp")
        code.attach(self._session)
        function = getattr(_package_module(code.path), name)

        def call(*arguments: Any) -> Any:
            # A function that plans a launch may be called while the arguments of the launch are
            # being gathered: tensors are copied for the call that got their addresses.
            memory = self._session.memory
            copies = any(memory.holds(value) for value in arguments if isinstance(value, int))
            with self._session.call(copies):
                return function(*arguments)

        return call


class Library:
    """The `extern "C"` functions of a CUDA source of one's own: see ptx.load."""

    def __init__(self, source: Path, session: Callable[[], Session]) -> None:
        self._code = _host_code(source.resolve(), "library.so")
        self._current = session

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = self._code.library[name]

        def call(*arguments: Any) -> Any:
            session = self._current()
            self._code.attach(session)
            values = [
                ctypes.c_void_p(session.address(value)) if isinstance(value, Tensor) else value
                for value in arguments
            ]
            with session.call():
                return function(*values)

        return call
