"""Installs into fresh environments, as a stranger does.  Slow, needs a package index."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.packaging.support import ROOT, copy_project, python

pytestmark = pytest.mark.slow


def _environment(folder: Path) -> Path:
    """The interpreter of a new, empty virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def _pip_install(interpreter: Path, *arguments: str, cwd: Path) -> tuple[str, float]:
    """What `pip install -v` prints, and the processor seconds it took.

    Not the seconds on the wall: those would judge what else runs on the machine, and the network.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [interpreter, "-m", "pip", "install", "-v", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout + done.stderr, seconds


def test_builds_in_isolation_without_torch_twice(tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    interpreter = _environment(tmp_path / "venv")
    first, seconds = _pip_install(interpreter, "--no-deps", "-e", ".", cwd=project)
    assert "Building CXX object" in first
    second, again = _pip_install(interpreter, "--no-deps", "-e", ".", cwd=project)
    assert "no work to do" in second
    assert "Building CXX object" not in second
    print(f"isolated install {seconds:.1f} processor seconds, again {again:.1f}")
    code = "import kernels._cpu, importlib.util as u; assert not u.find_spec('torch')"
    python(code, interpreter=interpreter)


def test_plain_install_without_pins(tmp_path: Path) -> None:
    """`pip install -e ".[dev]"` takes the newest torch, the CUDA build on PyPI: GBs."""
    project = copy_project(tmp_path / "project")
    interpreter = _environment(tmp_path / "venv")
    _, seconds = _pip_install(interpreter, "-e", ".[dev]", cwd=project)
    code = (
        "import torch, kernels.layer_norm as n; print(torch.__version__, "
        "n.layer_norm(torch.ones(2, 8), (8,)).abs().max().item())"
    )
    version, largest = python(code, interpreter=interpreter).split()
    assert float(largest) == 0.0
    start = time.perf_counter()
    python(["-m", "pytest", "tests", "-q", "-n", "2"], cwd=project, interpreter=interpreter)
    tested = time.perf_counter() - start
    python(
        ["-m", "pytest", "bench", "--benchmark-only", "-q"], cwd=project, interpreter=interpreter
    )
    print(f"torch {version}: {seconds:.0f} processor seconds to install, tests {tested:.0f} s")


# Triton before 3.7 puts no fence.proxy.async between cp.async and wgmma: the executor reports it.
UNFENCED = [
    "tests/ptx/test_attention_triton.py::test_values_and_gradients[plain, float16]",
    "tests/ptx/test_attention_triton.py::test_values_and_gradients[bool mask]",
    "tests/ptx/test_int8_matmul_triton.py::test_products[vectors of 16]",
]
# Triton 3.5 flushes a subnormal scale, and holds shorter rows (_SHARES of kernels/_triton.py).
IN_3_5 = [
    "tests/ptx/test_int8_matmul_triton.py::test_rows[sm_80-lengths0-dtype0-False]",
    "tests/ptx/test_layer_norm_triton.py::test_dx_alone",
]


@pytest.mark.parametrize(
    ("version", "known"),
    [("3.5.1", UNFENCED + IN_3_5), ("3.6.0", UNFENCED), ("3.8.0", []), ("3.9.0", [])],
)
def test_triton_kernels_with_other_tritons(tmp_path: Path, version: str, known: list[str]) -> None:
    """They compile for every target and give the right numbers on the executor."""
    site = tmp_path / "site"
    triton = ["--target", str(site), "--no-deps", f"triton=={version}", "--quiet"]
    _pip_install(Path(sys.executable), *triton, cwd=tmp_path)
    tests = [*ROOT.glob("tests/*/test_triton.py"), *ROOT.glob("tests/ptx/test_*_triton.py")]
    tests.append(ROOT / "tests" / "test_triton_interpreter.py")
    but = [f"--deselect={name}" for name in known]
    environment = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = ["-m", "pytest", *map(str, tests), *but, "-q", "-n", "2"]
    python(command, [site, ROOT], ROOT, **environment)


def test_transformers_does_not_take_ours_for_theirs(tmp_path: Path) -> None:
    site = tmp_path / "site"
    _pip_install(
        Path(sys.executable), "--target", str(site), "transformers", "--quiet", cwd=tmp_path
    )
    project = copy_project(tmp_path / "project", native=False)
    code = (
        "from transformers import GPT2Config, GPT2LMHeadModel, utils; import kernels.layer_norm\n"
        "GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=8))\n"
        "print(utils.is_kernels_available(), kernels.__version__)"
    )
    assert python(code, path=[project, site]) == "False 0.1.0"
    assert python(f"import kernels.layer_norm\n{code}", path=[project, site]) == "False 0.1.0"
