"""The project's files agree with one another, and say what is wrong where something is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.support import ROOT, python


def _names(text: str) -> set[str]:
    """Distribution names at the start of requirements, one a line or in a list of strings."""
    return {name.lower() for name in re.findall(r"^\s*[\"']?([A-Za-z][\w-]*)", text, re.M)}


def _list_in_pyproject(key: str) -> set[str]:
    """Requirements listed under `key`; tomllib is not in Python 3.10."""
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(rf"^{key} = \[(.*?)\]$", text, re.M | re.S)
    assert match is not None, key
    return _names(match[1].replace(", ", "\n"))


def test_everything_installed_is_pinned() -> None:
    pinned = _names((ROOT / "constraints.txt").read_text())
    for key in ("requires", "dependencies", "dev", "cuda-toolkit"):
        names = _list_in_pyproject(key)
        assert names
        assert names <= pinned, f"{key}: {names - pinned} not in constraints.txt"


def test_pins_are_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for line in lines:
        assert line.startswith("#") or re.match(r"[a-z0-9-]+==[0-9.]+(; python_version.*)?$", line)


def test_source_archive_holds_all_native_sources() -> None:
    patterns = re.search(r"^recursive-include csrc (.*)$", (ROOT / "MANIFEST.in").read_text(), re.M)
    assert patterns is not None
    suffixes = {path.suffix for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert suffixes <= {pattern.removeprefix("*") for pattern in patterns[1].split()}


def test_cmake_lists_every_source() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in (ROOT / "csrc").rglob("*.c*"):
        if path.suffix in (".cpp", ".cu"):
            assert str(path.relative_to(ROOT)) in listed


def test_without_native_modules_the_rest_works_and_says_why() -> None:
    code = """
import sys
class Missing:  # as if nothing had been built
    def find_spec(self, name, path=None, target=None):
        if name in ("kernels._cpu", "kernels._cuda"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch, kernels.dispatch as dispatch, kernels.layer_norm as ours
x = torch.randn(4, 8)
assert torch.equal(ours.layer_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)))
decision = dispatch.explain("layer_norm", x, (8,), None, None)
assert "not built" in decision.refusals["cpu"], decision
from kernels.__main__ import main
assert main(["info"]) == 0
"""
    assert "not built" in python(code, path=[ROOT])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "/nonexistent/python"}, "needs Python 3.10 or newer"),
        ({"CXX": "/nonexistent/g++"}, "missing: g++ (Debian: apt-get install g++)"),
        ({"CXX": "false"}, "does not know C++20"),
    ],
)
def test_bootstrap_names_what_is_missing(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    shutil.copy2(ROOT / "bootstrap.sh", tmp_path)
    done = subprocess.run(
        ["./bootstrap.sh"],
        cwd=tmp_path,
        env=os.environ | {"VENV": str(tmp_path / "venv")} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "venv").exists()
