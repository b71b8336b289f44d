"""Runs CMake for the native modules; decides whether `kernels._cuda` is built.

A module that cannot be built does not stop the install: it is left out, and why is written to
`kernels/_build_info.json`, which `python -m kernels info` shows.  KERNELS_CUDA=1 makes it an error
for the CUDA module, KERNELS_CUDA=0 leaves that out, KERNELS_CUDA_ARCHS="80 90a" chooses its
targets.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DRIVER_FILE = Path("/proc/driver/nvidia/version")
REASON_LENGTH = 300  # characters of the sentence that says why a module is not built
FAILURE_OUTPUT = 4000  # characters of the failed command's output kept in _build_info.json


@dataclass(frozen=True)
class CudaChoice:
    """Whether to build `kernels._cuda`, and why not (or why so)."""

    build: bool
    reason: str
    nvcc: str | None = None
    forced: bool = False  # then a failure is an error
    archs: tuple[str, ...] = ()  # empty: CMakeLists.txt's own list


def site_packages() -> list[Path]:
    """Folders of installed packages, the target environment's first.

    Inside pip's isolated build sysconfig still names the target environment, sys.path does not.
    """
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    return [Path(path) for path in dict.fromkeys(paths) if path]


def torch_cuda_version() -> str | None:
    """The CUDA version of the target environment's torch, None for a CPU build or no torch.

    Read from torch/version.py: importing torch takes seconds and fails in an isolated build.
    """
    for folder in site_packages():
        version = folder / "torch" / "version.py"
        if version.is_file():
            match = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", version.read_text(), re.M)
            return match[1] if match else None
    return None


def find_nvcc(env: Mapping[str, str]) -> str | None:
    """nvcc from $CUDACXX, $CUDA_HOME, the PATH, /usr/local/cuda, or NVIDIA's wheels."""
    candidates = [env.get("CUDACXX")]
    candidates += [f"{env[home]}/bin/nvcc" for home in ("CUDA_HOME", "CUDA_PATH") if env.get(home)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    candidates += [str(folder / "nvidia" / "cu13" / "bin" / "nvcc") for folder in site_packages()]
    found = (shutil.which(candidate, path=env.get("PATH")) for candidate in candidates if candidate)
    return next((nvcc for nvcc in found if nvcc), None)


def nvidia_smi(*arguments: str) -> list[str]:
    """The lines nvidia-smi answers, none where it is missing or finds no driver."""
    if not (command := shutil.which("nvidia-smi")):
        return []
    done = subprocess.run([command, *arguments], capture_output=True, text=True)
    return done.stdout.split("\n") if done.returncode == 0 else []


def driver_present() -> bool:
    """True where an NVIDIA driver is loaded, inside WSL and containers too."""
    return DRIVER_FILE.exists() or any("GPU" in line for line in nvidia_smi("-L"))


def machine_archs() -> tuple[str, ...]:
    """Targets of this machine's own GPUs, such as ("89", "90a"); none without a driver."""
    answers = nvidia_smi("--query-gpu=compute_cap", "--format=csv,noheader")
    numbers = {int(major) * 10 + int(minor) for major, minor in _capabilities(answers)}
    return tuple(f"{number}a" if number >= 90 else str(number) for number in sorted(numbers))


def _capabilities(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        if match := re.fullmatch(r"\s*(\d+)\.(\d)\s*", line):
            yield match[1], match[2]


def choose_cuda(env: Mapping[str, str] = os.environ) -> CudaChoice:
    """Whether and for which targets `kernels._cuda` is built here.

    Raises SystemExit where KERNELS_CUDA asks for what this machine cannot do.
    """
    wish = env.get("KERNELS_CUDA", "").lower()
    if wish not in ("", "auto", "0", "1", "on", "off"):
        raise SystemExit(f"KERNELS_CUDA={wish}: expected 1, 0 or auto")
    if wish in ("0", "off"):
        return CudaChoice(False, "KERNELS_CUDA=0")
    forced = wish in ("1", "on")
    nvcc = find_nvcc(env)
    if nvcc is None:
        if forced:
            raise SystemExit("KERNELS_CUDA=1, but nvcc is not found: set CUDA_HOME or PATH")
        return CudaChoice(False, "nvcc is not found (PATH, CUDA_HOME, /usr/local/cuda)")
    if forced:
        reason = "KERNELS_CUDA=1"
    elif cuda := torch_cuda_version():
        reason = f"the environment's torch is built for CUDA {cuda}"
    elif driver_present():
        reason = "the machine has an NVIDIA driver"
    else:
        return CudaChoice(
            False,
            "no NVIDIA driver and no CUDA build of torch here (KERNELS_CUDA=1 builds it anyway)",
        )
    asked = re.split(r"[\s,;]+", env.get("KERNELS_CUDA_ARCHS", "").strip())
    archs = tuple(arch for arch in asked if arch) or machine_archs()
    return CudaChoice(True, reason, nvcc, forced, archs)


class BuildError(Exception):
    """Why a module is not built: one sentence, and the last lines of the output if any."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def run(purpose: str, command: list[str | Path]) -> None:
    """Runs a command, passing its output through; raises BuildError where it fails."""
    lines: list[str] = []
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
    except OSError as error:
        raise BuildError(f"{purpose} failed: {command[0]}: {error.strerror}") from error
    with process:
        for line in process.stdout or ():
            sys.stderr.write(line)
            lines.append(line.rstrip())
    if process.returncode:
        output = "\n".join(lines)
        raise BuildError(f"{purpose} failed: {_first_error(output)}", output[-FAILURE_OUTPUT:])


def _first_error(output: str) -> str:
    """One line: a compiler's first error, or the first paragraphs of CMake's."""
    if match := re.search(r"^CMake Error.*\n((?:\s.*\n|\n)+)", output, re.M):
        return " ".join(match[1].split())[:REASON_LENGTH]
    if match := re.search(r"^.*\b(?:error|fatal)\b.*$", output, re.M | re.I):
        return match[0].strip()[:REASON_LENGTH]
    return output.strip().rpartition("\n")[2][:REASON_LENGTH]


def tool(name: str) -> str:
    """The path of cmake or ninja: beside this Python (a virtual environment), else on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=path) or name


class CMakeBuild(build_ext):
    """`build_ext` by CMake: configure, build each module, record what came of it."""

    def run(self) -> None:
        # beside kernels/*.py for an editable install, else in the wheel being put together
        self.output = Path(self.get_ext_fullpath("kernels._cpu")).resolve().parent
        platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.folder = ROOT / "build" / f"cmake-{platform}"
        cuda = choose_cuda()
        try:
            missing = self.build_modules(cuda)
        except BuildError as error:
            raise SystemExit(f"KERNELS_CUDA=1, but {error}\n{error.output}") from error
        self.record(missing)
        for module, failure in missing.items():
            if cuda.build or module == "_cpu":
                text = f"WARNING: kernels.{module} is not built: {failure}"
                print("=" * 78, text, "=" * 78, sep="\n", file=sys.stderr)

    def build_modules(self, cuda: CudaChoice) -> dict[str, BuildError]:
        """The modules that could not be built, each with its reason."""
        missing = {} if cuda.build else {"_cuda": BuildError(cuda.reason)}
        for with_cuda in (True, False) if cuda.build else (False,):
            try:
                self.configure(cuda, with_cuda)
                break
            except BuildError as failure:  # without CUDA it may still do for the CPU
                if cuda.forced:
                    raise
                missing["_cuda" if with_cuda else "_cpu"] = failure
                self.forget_tools()
        for module in [name for name in ("_cpu", "_cuda") if name not in missing]:
            try:
                run(f"building {module}", [tool("cmake"), "--build", self.folder, "-t", module])
            except BuildError as failure:
                if cuda.forced:
                    raise
                missing[module] = failure
        return missing

    def configure(self, cuda: CudaChoice, with_cuda: bool) -> None:
        """Runs `cmake`; the ninja of an earlier isolated build may be gone, so it is passed on."""
        options: dict[str, object] = {
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "KERNELS_OUTPUT_DIR": self.output,
            "KERNELS_CUDA": "ON" if with_cuda else "OFF",
            "KERNELS_CUDA_ARCHS": ";".join(cuda.archs),
        }
        if with_cuda:
            options["CMAKE_CUDA_COMPILER"] = cuda.nvcc
        self.forget_tools(keep=cuda.nvcc)
        command: list[str | Path] = [tool("cmake"), "-S", ROOT, "-B", self.folder, "-G", "Ninja"]
        run("configuring", [*command, *(f"-D{name}={value}" for name, value in options.items())])

    def forget_tools(self, keep: str | None = None) -> None:
        """Drops what CMake knows of compilers, unless they exist and nvcc is still `keep`.

        Unlike `cmake --fresh` this leaves the object files, so nothing compiles in vain.
        """
        cache = self.folder / "CMakeCache.txt"
        if not cache.is_file():
            return
        known = dict(re.findall(r"^(CMAKE_\w+_COMPILER):\w+=(.*)$", cache.read_text(), re.M))
        nvcc = known.get("CMAKE_CUDA_COMPILER", keep)
        if keep is None or nvcc != keep or not all(Path(path).exists() for path in known.values()):
            cache.unlink()
            for folder in self.folder.glob("CMakeFiles/[0-9]*"):
                shutil.rmtree(folder)

    def record(self, missing: Mapping[str, BuildError]) -> None:
        """Completes CMake's `_build_info.json` and drops missing modules' earlier builds."""
        path = self.output / "_build_info.json"
        self.output.mkdir(parents=True, exist_ok=True)
        unknown: dict[str, object] = {"compiler": "", "flags": "", "targets": []}
        info = {module: dict(unknown) for module in ("_cpu", "_cuda")}
        if path.is_file():
            info |= json.loads(path.read_text())
        for module, entry in info.items():
            failure = missing.get(module)
            entry["built"] = failure is None
            entry["reason"] = None if failure is None else str(failure)
            entry["output"] = "" if failure is None else failure.output
            if failure is not None:
                entry.update(unknown)
                for old in self.output.glob(f"{module}.*"):
                    old.unlink()
        path.write_text(json.dumps(info, indent=2) + "\n")


if __name__ == "__main__":
    setup(ext_modules=[Extension("kernels._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
