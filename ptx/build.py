"""Compilers: CUDA source to PTX and host code, PTX to a shared object, the runtime to a library.

Everything is kept in the cache (cache.py) and made again only when what it is made from changes.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from ptx.cache import CACHE as CACHE
from ptx.cache import ROOT, cached, cached_by_reading, digest

HERE = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
RUNTIME = HERE / "runtime"
CUDART = HERE / "cudart"
RUNTIME_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra"]
# No contraction: a * b + c that the PTX keeps apart must round twice here too.
KERNEL_FLAGS = ["-std=c++20", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-w"]
# What a kernel calls of the C and C++ libraries it finds through libptx.so, which is loaded before:
# to look for them at every link takes a third of a small kernel's time.
KERNEL_FLAGS += ["-shared", "-nostdlib"]
# Bytes of C++ from which on a kernel takes longer to optimise than its runs would gain: a launch
# spends a twentieth of its time in the kernel's own code.
LARGE_KERNEL = 100_000
# Host code is compiled once for every architecture; this one accepts all that the executor runs.
HOST_ARCH = "sm_90a"
ERROR_CHARACTERS = 4000  # of a failed compiler's output


class BuildError(RuntimeError):
    """A compiler is missing or failed; the message carries what it said."""


def _run(command: Sequence[str | Path]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        said = (done.stderr + done.stdout)[:ERROR_CHARACTERS]
        raise BuildError(f"{' '.join(map(str, command))} failed:\n{said}")
    return done.stdout


def op_sources() -> dict[str, Path]:
    """The CUDA source of every op: its kernels and their entry points."""
    return {file.parent.name: file for file in sorted(CSRC.glob("*/module_cuda.cu"))}


def cxx() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


@functools.cache
def nvcc() -> str:
    """From $CUDACXX, $CUDA_HOME, the PATH, /usr/local/cuda, or NVIDIA's wheels.

    setup.py looks in the same places by itself: pip builds where nothing of this can be imported.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    candidates.append(f"{sysconfig.get_path('purelib')}/nvidia/cu13/bin/nvcc")
    found = (shutil.which(candidate) for candidate in candidates if candidate)
    path = next((path for path in found if path), None)
    if path is None:
        raise BuildError(
            "nvcc is not found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda): "
            "install a CUDA 13 toolkit or `pip install -e .[cuda-toolkit]`"
        )
    return path


@functools.cache
def cuda_flags() -> list[str]:
    """The package's own nvcc flags: CUDA_FLAGS of CMakeLists.txt."""
    found = re.search(r"^set\(CUDA_FLAGS\s+([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.M)
    if found is None:
        raise BuildError("CMakeLists.txt sets no CUDA_FLAGS")
    return found[1].split()


@functools.cache
def _compilers() -> str:
    return _run([nvcc(), "--version"]) + _run([*cxx(), "--version"])


def _includes() -> list[str]:
    return [f"-I{CSRC}", "-isystem", sysconfig.get_path("include")]


def _nvcc(source: Path, product: str, options: Sequence[str]) -> Path:
    """The file `product` that nvcc makes of `source`."""
    source = source.resolve()
    options = [*options, *_includes()]

    def make(folder: Path) -> list[Path]:
        reads = folder / "reads"
        _run([nvcc(), *options, "-MMD", "-MF", reads, "-o", folder / product, source])
        names = reads.read_text().replace("\\\n", " ").partition(" : ")[2].split()
        return [Path(name).resolve() for name in names]

    recipe = f"nvcc-{digest(_compilers(), *options, product, str(source))}"
    return cached_by_reading(recipe, make) / product


def nvcc_ptx(source: Path, arch: str) -> str:
    """The PTX of every kernel of `source`, compiled as the package compiles it."""
    return _nvcc(source, "kernels.ptx", [*cuda_flags(), "-ptx", f"-arch={arch}"]).read_text()


def nvcc_cubin(source: Path, arch: str) -> Path:
    """The machine code of every kernel of `source`, compiled as the package compiles it."""
    return _nvcc(source, "kernels.cubin", [*cuda_flags(), "-cubin", f"-arch={arch}"])


@functools.cache
def _translator() -> list[Path]:
    """The files that ptx.translate is made of: what its output depends on."""
    found: list[Path] = []
    wanted = [HERE / "translate.py"]
    while wanted:
        file = wanted.pop()
        if file in found:
            continue
        found.append(file)
        for name in re.findall(r"^from ptx\.([\w.]+) import", file.read_text(), re.M):
            module = HERE / name.replace(".", "/")
            wanted += module.glob("*.py") if module.is_dir() else [module.with_suffix(".py")]
    return sorted(found)


@functools.cache
def _split(source: Path, arch: str) -> Path:
    from ptx.translate import split_kernels

    text = nvcc_ptx(source, arch)

    def make(folder: Path) -> None:
        kernels = split_kernels(text)
        for name, kernel in kernels.items():
            (folder / digest(name)).write_text(kernel)
        (folder / "names").write_text("\n".join(kernels))

    return cached(f"kernels-{digest(text, *_translator())}", make)


def kernel_names(source: Path, arch: str) -> list[str]:
    """The mangled names of the kernels of `source`."""
    return (_split(source.resolve(), arch) / "names").read_text().split()


def kernel_ptx(source: Path, arch: str, kernel: str) -> str:
    """The PTX of one kernel of `source` and of all that it needs; `kernel` is the mangled name."""
    path = _split(source.resolve(), arch) / digest(kernel)
    if not path.is_file():
        raise KeyError(f"{source} has no kernel {kernel} for {arch}")
    return path.read_text()


def kernel_library(ptx: str) -> Path:
    """The kernels of a PTX text as a shared object, which registers them when it is loaded."""

    def make(folder: Path) -> None:
        from ptx.translate import translate

        (folder / "kernel.ptx").write_text(ptx)
        source = folder / "kernel.cpp"
        source.write_text(translate(ptx).cpp)
        output = folder / "kernel.so"
        optimise = "-O0" if source.stat().st_size > LARGE_KERNEL else "-Og"
        _run([*cxx(), *KERNEL_FLAGS, optimise, f"-I{ROOT}", "-o", output, source])

    headers = ("device", "math", "integers", "floats", "narrow_floats", "messages")
    interface = [RUNTIME / f"{name}.h" for name in headers]
    flags = [*KERNEL_FLAGS, str(LARGE_KERNEL)]
    key = digest(ptx, *_translator(), *interface, *flags, *cxx())
    return cached(f"kernel-{key}", make) / "kernel.so"


@functools.cache
def runtime_library() -> Path:
    """ptx/runtime as a shared object, compiled as one file: in half the time."""
    sources = sorted(RUNTIME.glob("*.cpp"))

    def make(folder: Path) -> None:
        every = folder / "runtime.cpp"
        every.write_text("".join(f'#include "{source}"\n' for source in sources))
        output = folder / "libptx.so"
        _run([*cxx(), *RUNTIME_FLAGS, "-shared", "-Wl,-z,defs", "-o", output, every])

    key = digest(*sources, *sorted(RUNTIME.glob("*.h")), *RUNTIME_FLAGS, *cxx())
    return cached(f"runtime-{key}", make) / "libptx.so"


def host_library(source: Path, name: str, *others: Path) -> Path:
    """The host code of `source`, linked with the stand-in CUDA runtime library, as `name`.

    `others` are C++ sources to link with it.

    Its device code is never run, so that is compiled without optimisation: in half the time.
    """
    compiled = ["-c", "-cudart", "none", "-Xcompiler"]
    number = HOST_ARCH.removeprefix("sm_")
    target = ["-Xcicc", "-O0", "-gencode", f"arch=compute_{number},code=compute_{number}"]
    flags = [flag for flag in cuda_flags() if not re.match(r"-O|-lineinfo", flag)]
    host = _nvcc(source, "host.o", [*flags, *target, *compiled, "-fPIC"])
    # Hidden, so that it is taken even where the process has the real library loaded.
    options = ["-std=c++20", "-O2", *compiled, "-fPIC,-fvisibility=hidden"]
    files = [*others, *sorted(CUDART.glob("*.cpp"))]
    stand_in = [_nvcc(file, f"{file.stem}.o", options) for file in files]

    def make(folder: Path) -> None:
        _run([*cxx(), "-shared", "-o", folder / name, host, *stand_in])
        undefined = _run(["nm", "--undefined-only", folder / name])
        missing = re.findall(r" U ((?:__)?cuda\w+|cu[A-Z]\w+)$", undefined, re.M)
        if missing:
            raise BuildError(
                f"{source} calls {', '.join(missing)}, which the stand-in CUDA runtime library "
                "(ptx/cudart/) does not have"
            )

    return cached(f"host-{digest(host, *stand_in, name)}", make) / name
