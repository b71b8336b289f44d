"""What CONTRIBUTING promises about the tree, checked."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import _spec, dispatch

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("kernels", "csrc", "ptx", "tests", "bench")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
)
LINES = 400


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    if text.strip():
        assert re.match(r'"""\S|r"""\S|// \S|#!', text), "opens without a sentence on itself"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_op_has_the_same_files(op):
    folder = ROOT.joinpath("kernels", *op.split("."))
    names = {path.name for path in folder.iterdir() if path.is_file()}
    backends = {f"{name}.py" for name in dispatch.BACKENDS + dispatch.FORCED_ONLY}
    assert names >= {"README.md", "__init__.py", "op.py", "spec.py"} | backends
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 80
    for name in sorted(names - {"README.md", "__init__.py"}):
        assert f"`{name}`" in readme, f"the file map of {op}/README.md lacks {name}"


@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*/module_cuda.cu")), ids=str)
def test_the_header_of_cuda_kernels_is_compiled_alone(source):
    """Before it stands nothing that it could lean on."""
    first = re.search(r'#include [<"](\S+)[>"]', source.read_text(encoding="utf-8"))
    assert first
    assert first[1] == f"{source.parent.name}/cuda.cuh"


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("backend", dispatch.BACKENDS + dispatch.FORCED_ONLY)
def test_backends_have_the_references_signatures(op, backend):
    module, reference = dispatch.load(op, backend), dispatch.load(op, "reference")
    assert not isinstance(module, str), module
    for name in ("forward", "backward"):
        if getattr(reference, name) is None:  # an op without a backward
            assert getattr(module, name) is None
            continue
        ours = inspect.signature(getattr(module, name)).parameters
        assert list(ours) == list(inspect.signature(getattr(reference, name)).parameters)
    assert callable(module.unsupported)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_specs_are_complete(op):
    spec = _spec.load(op)
    assert spec.op == op
    inputs = spec.make_inputs(spec.accuracy_cases[0], spec.dtypes[0], "cpu")
    assert len(inputs.differentiable) == len(spec.gradient_names)
    names = {case.name for case in spec.speed_cases}
    assert all(name in names for name, _, _ in spec.bars)


def test_info_and_check_run():
    for command in (["info"], ["check", "layer_norm", "--no-speed"]):
        run = subprocess.run(
            [sys.executable, "-m", "kernels", *command], capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        assert "layer_norm" in run.stdout
    refused = subprocess.run(
        [sys.executable, "-m", "kernels", "check", "batch_norm"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: unknown op 'batch_norm'")
