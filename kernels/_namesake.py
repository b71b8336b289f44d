"""Hugging Face's package of the same import name: where it is, how to run it, what clashes.

Both can be installed.  Python imports whichever it meets first; this module serves the case that
ours is first, and says so where one installation has overwritten the other.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

OURS = Path(__file__).resolve().parent
_loaded: dict[Path, ModuleType] = {}


def find(path: Iterable[str]) -> Path | None:
    """The folder of Hugging Face's `kernels` along `path`, or None; a few stat calls, no import."""
    for entry in path:
        folder = Path(entry, "kernels")
        # its `layer`, a folder or once a file, tells it from other packages of this name
        known = (folder / "layer").is_dir() or (folder / "layer.py").is_file()
        if known and (folder / "__init__.py").is_file() and folder.resolve() != OURS:
            return folder.resolve()
    return None


def load(folder: Path) -> ModuleType:
    """The namesake's top-level module, run once; whatever it raises is raised here.

    It calls itself `kernels`, so its relative imports resolve along our extended `__path__` and
    what it defines can be pickled, but sys.modules["kernels"] stays ours.
    """
    if folder in _loaded:
        return _loaded[folder]
    spec = importlib.util.spec_from_file_location("kernels", folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _loaded[folder] = module  # before it runs: its submodules may ask `kernels` for names
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del _loaded[folder]  # half-run: the next access runs it again and raises again
        raise
    return module


def is_ours(name: str) -> bool:
    """True where `kernels.<name>` is a submodule of this package."""
    return importlib.machinery.PathFinder.find_spec(f"kernels.{name}", [str(OURS)]) is not None


def clash() -> str | None:
    """One sentence where the two packages cannot work side by side here, else None."""
    import importlib.metadata

    try:
        theirs = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None
    if Path(str(theirs.locate_file("kernels"))).resolve() == OURS:
        return (
            f"Hugging Face's kernels {theirs.version} and gpt-kernels were installed into the same "
            "folder and overwrote each other's files: reinstall kernels, and install gpt-kernels "
            "with `pip install -e`"
        )
    return None
