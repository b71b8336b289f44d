"""Built files, kept by the hash of what they are made from; several processes may ask at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("PTX_CACHE") or ROOT / "build" / "ptx")


def digest(*parts: str | bytes | Path) -> str:
    """A name for these parts: texts, bytes, and the contents of files."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        elif isinstance(part, str):
            part = part.encode()
        # the length keeps ("ab", "c") and ("a", "bc") apart
        total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:24]


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time is inside, for each name."""
    folder = CACHE / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file unlocks it
        yield


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `make(folder)` fills it where it is not there yet.

    It appears under its name all at once and complete, or, if `make` raises, not at all.
    """
    folder = CACHE / name
    if folder.is_dir():
        return folder
    with locked(name):
        if folder.is_dir():  # made while this process waited
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=CACHE))
        try:
            make(unfinished)
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished)
            raise
    return folder


def cached_by_reading(recipe: str, make: Callable[[Path], list[Path]]) -> Path:
    """As `cached`, for a tool that finds out itself which files it reads: `make` returns them.

    `recipe` names the command; what it made is taken again while those files have not changed.
    """
    with locked(recipe):
        listed = CACHE / f"{recipe}.reads"
        if listed.is_file():
            folder = _folder_of(recipe, listed)
            if folder is not None and folder.is_dir():
                return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f"{recipe}.", dir=CACHE))
        try:
            reads = make(unfinished)
            listed.write_text("\n".join(map(str, reads)))
            folder = _folder_of(recipe, listed)
            if folder is None:
                raise FileNotFoundError("a file that was read is gone")
            unfinished.rename(folder)
        except BaseException:
            shutil.rmtree(unfinished)
            raise
    return folder


def _folder_of(recipe: str, listed: Path) -> Path | None:
    """Where the output belongs, by the contents of the files in the list; None if one is gone."""
    paths = [Path(line) for line in listed.read_text().splitlines()]
    if not all(path.is_file() for path in paths):
        return None
    return CACHE / f"{recipe}-{digest(*paths)}"
