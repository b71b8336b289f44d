"""Fused kernels for PyTorch; shares its import name with Hugging Face's `kernels`.

The API lives in submodules, `kernels.layer_norm` and so on, which need nothing from this file: they
work too where Hugging Face's package is first on sys.path.  Where ours is first and theirs is
installed, their submodules and top-level names resolve to theirs.
"""

import sys as _sys

from kernels import _namesake

VERSION = "0.1.0"  # stays below 0.9: Hugging Face's libraries take that for their own package

_theirs = _namesake.find(_sys.path)
if _theirs is not None:
    __path__.append(str(_theirs))  # kernels.layer, kernels._rust, ... are theirs


def __getattr__(name: str) -> object:
    if name == "__version__":
        return _version()
    # Asked by `from kernels import layer_norm`: must not run their package to find out.
    if _theirs is None or name.startswith("__") or _namesake.is_ours(name):
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    module = _namesake.load(_theirs)
    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}") from None


def _version() -> str:
    """Theirs where it is installed: their code compares it with what a hub kernel asks for."""
    import importlib.metadata

    if _theirs is not None:
        try:
            return importlib.metadata.version("kernels")
        except importlib.metadata.PackageNotFoundError:
            pass  # theirs is on the path, but not installed
    return VERSION


def __dir__() -> list[str]:
    names = {*globals(), "__version__"}
    if _theirs is not None:
        names |= set(dir(_namesake.load(_theirs)))
    return sorted(names)
