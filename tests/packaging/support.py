"""Fresh Python processes, a stand-in for Hugging Face's package, copies of this project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

# As the real one: names from a submodule, a class of its own, relative imports, a version check.
NAMESAKE = {
    "__init__.py": """
        import importlib.metadata
        __version__ = importlib.metadata.version("kernels")
        from .hub import get_kernel
        from kernels.layer.mode import Mode
        class Device:
            def __init__(self, kind): self.kind = kind
            def __eq__(self, other): return self.kind == other.kind
        def kernelize(): return "theirs"
        __all__ = ["Device", "Mode", "get_kernel", "kernelize"]
    """,
    "hub.py": """
        from kernels import __version__
        def get_kernel(): return __version__
    """,
    "layer/__init__.py": "from .mode import Mode\n",
    "layer/mode.py": "class Mode: pass\n",
}
NAMESAKE_VERSION = "0.18.2"


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        lines = text.strip("\n").splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")


def write_namesake(site: Path, **changed: str) -> Path:
    """Installs the stand-in into `site`, with the files of `changed` (init=...) replaced."""
    files = NAMESAKE | {f"__{name}__.py": text for name, text in changed.items()}
    _write(site / "kernels", files)
    metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {NAMESAKE_VERSION}\n"
    _write(site / f"kernels-{NAMESAKE_VERSION}.dist-info", {"METADATA": metadata})
    return site


def python(
    code: str | Sequence[str],
    path: Sequence[Path] = (),
    cwd: Path | None = None,
    interpreter: Path | str = sys.executable,
    **variables: str,
) -> str:
    """What a fresh interpreter prints; it must succeed.  `path` is its PYTHONPATH."""
    arguments = ["-c", code] if isinstance(code, str) else list(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables
    done = subprocess.run(
        [interpreter, *arguments], capture_output=True, text=True, cwd=cwd or "/", env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def copy_project(destination: Path, native: bool = True) -> Path:
    """What an install needs of this project, without anything built."""
    unwanted = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    names = ["pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"]
    folders = ["kernels"]
    if native:
        names += ["setup.py", "CMakeLists.txt", "constraints.txt", "bootstrap.sh", "Makefile"]
        folders += ["csrc", "ptx", "tests", "bench"]
    for folder in folders:
        shutil.copytree(ROOT / folder, destination / folder, ignore=unwanted)
    for name in names:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, destination / name)
    return destination
