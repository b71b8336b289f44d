"""setup.py decides about the CUDA module; a module that cannot be built never stops an install.

The builds are of a tiny copy: the project's CMakeLists.txt over sources of one function each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.packaging.support import ROOT, copy_project

# without pybind11, which takes the compiler ten times as long
MODULE = """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, -1};
PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&definition); }
"""
CUDA_MODULE = MODULE.replace("_cpu", "_cuda")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["setup_py"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _machine(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    nvcc: bool = False,
    driver: bool = False,
    torch_cuda: str | None = None,
    gpus: tuple[str, ...] = (),
) -> None:
    monkeypatch.setattr(setup_py, "find_nvcc", lambda env: "/cuda/bin/nvcc" if nvcc else None)
    monkeypatch.setattr(setup_py, "driver_present", lambda: driver)
    monkeypatch.setattr(setup_py, "torch_cuda_version", lambda: torch_cuda)
    monkeypatch.setattr(setup_py, "nvidia_smi", lambda *arguments: list(gpus))


@pytest.mark.parametrize(
    ("machine", "build", "reason"),
    [
        ({}, False, "nvcc is not found"),
        ({"driver": True, "torch_cuda": "13.0"}, False, "nvcc is not found"),
        ({"nvcc": True}, False, "no NVIDIA driver and no CUDA build of torch"),
        ({"nvcc": True, "driver": True}, True, "driver"),
        ({"nvcc": True, "torch_cuda": "13.0"}, True, "CUDA 13.0"),
    ],
)
def test_rule(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    machine: dict[str, Any],
    build: bool,
    reason: str,
) -> None:
    _machine(setup_py, monkeypatch, **machine)
    choice = setup_py.choose_cuda({})
    assert choice.build is build
    assert reason in choice.reason
    assert not choice.forced


def test_forced_on_and_off(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(setup_py, monkeypatch, nvcc=True)
    choice = setup_py.choose_cuda({"KERNELS_CUDA": "1"})
    assert choice.build
    assert choice.forced
    _machine(setup_py, monkeypatch, nvcc=True, driver=True, torch_cuda="13.0")
    assert not setup_py.choose_cuda({"KERNELS_CUDA": "0"}).build
    _machine(setup_py, monkeypatch, driver=True)
    with pytest.raises(SystemExit, match="nvcc is not found"):
        setup_py.choose_cuda({"KERNELS_CUDA": "1"})
    with pytest.raises(SystemExit, match="KERNELS_CUDA=maybe: expected 1, 0 or auto"):
        setup_py.choose_cuda({"KERNELS_CUDA": "maybe"})


def test_targets(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(setup_py, monkeypatch, nvcc=True, driver=True, gpus=("9.0", "8.9", "9.0", ""))
    assert setup_py.choose_cuda({}).archs == ("89", "90a")
    assert setup_py.choose_cuda({"KERNELS_CUDA_ARCHS": "80;90a, 120"}).archs == ("80", "90a", "120")
    _machine(setup_py, monkeypatch, nvcc=True, torch_cuda="13.0")
    assert setup_py.choose_cuda({}).archs == ()  # CMakeLists.txt's own list


@pytest.mark.parametrize(
    ("text", "cuda"),
    [
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip = None\n", None),
        ("__version__ = '2.14.1+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n", "13.0"),
        ("__version__ = '2.10.0'\ncuda = '12.8'\n", "12.8"),
    ],
)
def test_torch_is_read_not_imported(
    setup_py: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str,
    cuda: str | None,
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.setattr(setup_py, "site_packages", lambda: [tmp_path / "empty", tmp_path])
    assert setup_py.torch_cuda_version() == cuda


def test_nvcc_is_found_where_it_may_be(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def put(folder: str) -> str:
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch(mode=0o755)
        return str(nvcc)

    monkeypatch.setattr(setup_py, "site_packages", lambda: [tmp_path / "site"])
    wheel, on_path, home = put("site/nvidia/cu13/bin"), put("bin"), put("home/bin")
    environment = {"PATH": str(tmp_path / "bin"), "CUDA_HOME": str(tmp_path / "home")}
    assert setup_py.find_nvcc(environment) == home
    assert setup_py.find_nvcc({"PATH": environment["PATH"]}) == on_path
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        assert setup_py.find_nvcc({"PATH": ""}) == wheel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = copy_project(tmp_path_factory.mktemp("tiny"))
    shutil.rmtree(project / "csrc")
    listed = re.findall(r"csrc/\S+\.(?:cpp|cu)", (project / "CMakeLists.txt").read_text())
    for name in listed:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("// nothing\n")
    (project / "csrc" / "module_cpu.cpp").write_text(MODULE)
    (project / "csrc" / "module_cuda.cpp").write_text(CUDA_MODULE)
    return project


def _build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`setup.py build_ext --inplace`, which is what an editable install runs."""
    for name in ("KERNELS_CUDA", "KERNELS_CUDA_ARCHS"):
        environment.setdefault(name, "")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=project, env=os.environ | environment, capture_output=True, text=True
    )


def _info(project: Path) -> dict[str, dict[str, Any]]:
    info: dict[str, dict[str, Any]] = json.loads(
        (project / "kernels" / "_build_info.json").read_text()
    )
    for entry in info.values():
        assert set(entry) == {"built", "reason", "output", "compiler", "flags", "targets"}
        assert entry["built"] is (entry["reason"] is None)
        assert entry["built"] is bool(entry["compiler"] and entry["flags"] and entry["targets"])
    return info


def _modules(project: Path) -> list[str]:
    return sorted(path.name.partition(".")[0] for path in (project / "kernels").glob("*.so"))


def test_builds_once_and_records_it(tiny: Path) -> None:
    done = _build(tiny, KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert _modules(tiny) == ["_cpu"]
    info = _info(tiny)
    assert "baseline" in info["_cpu"]["targets"]
    assert "-std=c++20" in info["_cpu"]["flags"]
    assert info["_cuda"]["reason"] == "KERNELS_CUDA=0"
    again = _build(tiny, KERNELS_CUDA="0")
    assert again.returncode == 0
    assert "no work to do" in again.stderr, again.stderr


def test_a_failing_nvcc_costs_only_the_cuda_module(tiny: Path, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal : error: no such luck' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: pretended'\n")
    smi.chmod(0o755)
    machine = {"CUDACXX": str(nvcc), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    done = _build(tiny, **machine)
    assert done.returncode == 0, done.stderr
    assert "WARNING: kernels._cuda is not built" in done.stderr
    assert _modules(tiny) == ["_cpu"]
    info = _info(tiny)
    assert info["_cpu"]["built"]
    assert info["_cuda"]["reason"].startswith("configuring failed: ")
    assert "CUDA" in info["_cuda"]["reason"]
    assert "CMake Error" in info["_cuda"]["output"]

    forced = _build(tiny, KERNELS_CUDA="1", **machine)
    assert forced.returncode != 0
    assert "KERNELS_CUDA=1, but configuring failed: " in forced.stderr
    recovered = _build(tiny, KERNELS_CUDA="0")
    assert recovered.returncode == 0, recovered.stderr
    assert _modules(tiny) == ["_cpu"]


def test_code_that_does_not_compile_leaves_no_old_module(tiny: Path) -> None:
    assert _build(tiny, KERNELS_CUDA="0").returncode == 0
    source = tiny / "csrc" / "module_cpu.cpp"
    source.write_text("#error no such luck\n")
    done = _build(tiny, KERNELS_CUDA="0")
    source.write_text(MODULE)
    assert done.returncode == 0, done.stderr
    assert _modules(tiny) == []
    info = _info(tiny)
    assert "building _cpu failed" in info["_cpu"]["reason"]
    assert "no such luck" in info["_cpu"]["reason"]


def test_no_compiler_at_all(tiny: Path) -> None:
    shutil.rmtree(tiny / "build")
    done = _build(tiny, CXX="/nonexistent/g++")
    assert done.returncode == 0, done.stderr
    assert "WARNING: kernels._cpu is not built" in done.stderr
    assert _modules(tiny) == []
    assert "configuring failed" in _info(tiny)["_cpu"]["reason"]
    assert _build(tiny, KERNELS_CUDA="0").returncode == 0  # a compiler came: all is well again
    assert _modules(tiny) == ["_cpu"]


def test_a_cache_that_names_vanished_tools(tiny: Path) -> None:
    assert _build(tiny, KERNELS_CUDA="0").returncode == 0
    cache = next(tiny.glob("build/*/CMakeCache.txt"))
    text = cache.read_text()
    for name in ("CMAKE_MAKE_PROGRAM", "CMAKE_CXX_COMPILER", "CMAKE_COMMAND"):
        before = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
        text = text.replace(before, f"{before.partition('=')[0]}=/tmp/pip-build-env-gone/bin/tool")
    cache.write_text(text)
    done = _build(tiny, KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert _info(tiny)["_cpu"]["built"]


def test_cmake_alone_places_the_module(tiny: Path) -> None:
    for module in (tiny / "kernels").glob("*.so"):
        module.unlink()
    options = ["-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        ["cmake", "-B", "build/by-hand", *options],
        ["cmake", "--build", "build/by-hand"],
    ):
        subprocess.run(command, cwd=tiny, check=True, capture_output=True)
    assert _modules(tiny) == ["_cpu"]


def test_source_archive_makes_a_wheel(tiny: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check"]
    done = subprocess.run(
        command, cwd=tiny, env=os.environ | {"KERNELS_CUDA": "0"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = next((tiny / "dist").glob("gpt_kernels-0.1.0-*.whl"))
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("kernels/_cpu.") and name.endswith(".so") for name in names)
    assert {"kernels/_build_info.json", "kernels/layer_norm/op.py"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "csrc", "bench"))]
