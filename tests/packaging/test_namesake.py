"""Hugging Face's package has our import name: every way of installing both that can work, works.

A stand-in plays theirs (nothing is fetched).  `kernels._errors` plays our API where torch is not
needed: what is tested is which file a name resolves to.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.packaging.support import ROOT, copy_project, python, write_namesake

# Both are there: their names, their submodules, their version; our submodules.
BOTH = """
import kernels, sys
from kernels import Device, Mode, get_kernel, kernelize
from kernels.layer.mode import Mode as SameMode
import kernels._errors, kernels.layer, kernels.hub
assert Mode is SameMode is kernels.layer.Mode
assert kernelize() == "theirs"
assert kernels.__version__ == get_kernel() == "0.18.2"
assert {"Device", "get_kernel", "__version__", "layer"} <= set(dir(kernels))
assert not hasattr(kernels, "nonsense")
assert "theirs_site" not in kernels._errors.__file__ and "theirs_site" in kernels.layer.__file__
print("theirs" if "theirs_site" in kernels.__file__ else "ours")
"""
# Every top-level submodule their releases 0.4.4 to 0.17.2 have had.
TAKEN = set(
    """
    _interval_tree _rust _system _vendored _versions _windows archs backends benchmark benchmarks
    check cli compat deps doc hf_hub importer install layer load lockfile locking metadata
    python_depends python_deps resolver status upload utils validate variants verify versions_cli
    wheel
    """.split()  # noqa: SIM905
)
IMPORT_ORDERS = {
    "ours first": "import kernels._errors\n",
    "theirs first": "from kernels import get_kernel\n",
    "their submodule first": "import kernels.layer.mode\n",
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_namesake(tmp_path_factory.mktemp("theirs_site"))


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """site-packages with both: theirs, and ours as setuptools' editable install puts it there."""
    site = write_namesake(tmp_path_factory.mktemp("theirs_site"))
    project = copy_project(tmp_path_factory.mktemp("project"), native=False)
    hook = f"from setuptools.build_meta import build_editable as b; b({str(project)!r})"
    subprocess.run([sys.executable, "-c", hook], cwd=project, check=True, capture_output=True)
    with zipfile.ZipFile(next(project.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return site


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_ours_first_by_pythonpath(theirs: Path, order: str) -> None:
    assert python(IMPORT_ORDERS[order] + BOTH, path=[ROOT, theirs]) == "ours"


def test_ours_first_by_working_directory(theirs: Path) -> None:
    assert python(BOTH, path=[theirs], cwd=ROOT) == "ours"


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_theirs_first_and_ours_editable(editable: Path, order: str) -> None:
    site = f"import site; site.addsitedir({str(editable)!r})\n"
    assert python(site + IMPORT_ORDERS[order] + BOTH) == "theirs"


def test_our_ops_work_where_theirs_is_first(editable: Path) -> None:
    code = (
        f"import site; site.addsitedir({str(editable)!r})\n"
        "import torch, kernels.layer_norm as ours\n"
        "print(ours.LayerNorm(4)(torch.ones(2, 4)).abs().sum().item())"
    )
    assert python(code) == "0.0"


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_command_line_is_ours(theirs: Path, editable: Path, first: str) -> None:
    if first == "ours":
        help_text = python(["-m", "kernels", "--help"], path=[ROOT, theirs])
    else:
        code = (
            f"import site, sys, runpy; site.addsitedir({str(editable)!r})\n"
            "sys.argv[1:] = ['--help']\n"
            "try: runpy.run_module('kernels', run_name='__main__')\n"
            "except SystemExit as e: assert e.code == 0"
        )
        help_text = python(code)
    assert "usage: python -m kernels" in help_text


def test_our_submodules_do_not_run_their_package(tmp_path: Path) -> None:
    broken = write_namesake(tmp_path, init="raise ImportError('huggingface_hub is missing')")
    python("from kernels import _errors; _errors.CommandError", path=[ROOT, broken])


@pytest.mark.parametrize("error", ["ImportError", "AttributeError", "RuntimeError"])
def test_their_import_error_is_passed_on_every_time(tmp_path: Path, error: str) -> None:
    broken = write_namesake(tmp_path, init=f"raise {error}('huggingface_hub is missing')")
    code = f"""
import kernels
for _ in range(2):
    try:
        kernels.get_kernel
    except {error} as error:
        assert str(error) == "huggingface_hub is missing", error
    else:
        raise SystemExit("swallowed")
"""
    python(code, path=[ROOT, broken])


def test_unknown_names(theirs: Path) -> None:
    code = """
import kernels
for name in ("nonsense", "__wrapped__"):
    try:
        getattr(kernels, name)
    except AttributeError as error:
        assert str(error) == f"module 'kernels' has no attribute {name!r}", error
    else:
        raise SystemExit("found")
try:
    from kernels import nonsense
except ImportError:
    print("ok")
"""
    assert python(code, path=[ROOT]) == "ok"
    assert python(code, path=[ROOT, theirs]) == "ok"


def test_what_they_define_can_be_pickled(theirs: Path, tmp_path: Path) -> None:
    file = str(tmp_path / "pickle")
    dump = f"import kernels, pickle; pickle.dump(kernels.Device('cpu'), open({file!r}, 'wb'))"
    load = f"import pickle; print(pickle.load(open({file!r}, 'rb')).kind)"
    python(dump, path=[ROOT, theirs])
    assert python(load, path=[ROOT, theirs]) == "cpu"
    assert python(load, path=[theirs]) == "cpu"


def test_dir_and_version_alone() -> None:
    code = "import kernels; assert '__version__' in dir(kernels); print(kernels.__version__)"
    assert python(code, path=[ROOT]) == "0.1.0"


def test_another_package_of_this_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("get_kernel = 1\n")
    code = "import kernels; print(len(kernels.__path__), hasattr(kernels, 'get_kernel'))"
    assert python(code, path=[ROOT, tmp_path]) == "1 False"


# How transformers 5.x finds out whether Hugging Face's package is there and new enough.
DETECTION = """
import importlib.metadata as metadata, importlib.util
assert importlib.util.find_spec("kernels") is not None
try:
    version = metadata.version("kernels")
except metadata.PackageNotFoundError:
    providers = metadata.packages_distributions().get("kernels", [])
    version = metadata.version(providers[0]) if providers else __import__("kernels").__version__
major, minor = map(int, version.split(".")[:2])
available = (0, 9) <= (major, minor)  # the widest window of any release; the newest is narrower
if available:
    from kernels import Device, Mode, get_kernel  # unguarded while a model is imported
print(version, available)
"""


def test_ours_alone_is_not_taken_for_theirs(tmp_path: Path) -> None:
    assert python(DETECTION, path=[ROOT]) == "0.1.0 False"
    (tmp_path / "gpt_kernels-0.1.0.dist-info").mkdir()
    metadata = tmp_path / "gpt_kernels-0.1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: gpt-kernels\nVersion: 0.1.0\n")
    (tmp_path / "gpt_kernels-0.1.0.dist-info" / "top_level.txt").write_text("kernels\n")
    assert python(DETECTION, path=[ROOT, tmp_path]) == "0.1.0 False"


def test_theirs_is_detected_beside_ours(theirs: Path, editable: Path) -> None:
    site = f"import site; site.addsitedir({str(editable)!r})\n"
    assert python(DETECTION, path=[ROOT, theirs]) == "0.18.2 True"
    assert python(site + DETECTION) == "0.18.2 True"


def test_clash_names_an_overwritten_install(theirs: Path, tmp_path: Path) -> None:
    code = "from kernels import _namesake; print(_namesake.clash())"
    assert python(code, path=[ROOT]) == "None"
    assert python(code, path=[ROOT, theirs]) == "None"
    write_namesake(tmp_path)
    for name in ("__init__.py", "_namesake.py"):  # a plain `pip install .` over theirs
        (tmp_path / "kernels" / name).write_bytes((ROOT / "kernels" / name).read_bytes())
    assert "overwrote each other" in python(code, path=[tmp_path])


def test_import_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import kernels; print(time.perf_counter() - t)"
    seconds = min(float(python(code, path=[ROOT])) for _ in range(3))
    assert seconds < 0.1, f"`import kernels` took {seconds:.3f} s: it must not import torch"
    assert "torch" not in python("import kernels, sys; print(*sys.modules)", path=[ROOT]).split()


def test_no_submodule_has_a_name_that_theirs_has_had() -> None:
    ours = {path.name.partition(".")[0] for path in os.scandir(ROOT / "kernels")}
    assert not ours & TAKEN
