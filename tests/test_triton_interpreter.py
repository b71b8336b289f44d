"""The Triton kernels of every op in Triton's interpreter: tests/<op>/triton_interpreter_cases.py.

The interpreter must be on before the kernels are decorated, hence in a process of its own, and in
one for all ops: starting takes as long as an op's cases.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_triton = pytest.importorskip(
    "kernels._triton", reason="triton is not installed", exc_type=ImportError
)
ROOT = Path(__file__).parent.parent  # pytest's -v names files as seen from there
CASES = sorted(ROOT.glob("tests/*/triton_interpreter_cases.py"))


@pytest.mark.long
@pytest.mark.skipif(
    not _triton.INTERPRETER_LOOPS, reason="Triton before 3.7 needs NumPy before 2.4 here"
)
@pytest.mark.parametrize("selection", ["not sweep", pytest.param("sweep", marks=pytest.mark.sweep)])
def test_values_and_gradients(selection):
    """All selected cases pass, and every op has some."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", selection]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, *CASES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = set(re.findall(r"^tests/(\w+)/\S+::.* PASSED", done.stdout, re.M))
    assert passed >= {"attention", "cross_entropy"}, done.stdout
    if selection == "not sweep":
        assert passed == {file.parent.name for file in CASES}
