"""Text as training data: found on disk, encoded once into a memory-mapped file, cut at random.

The first 90 % of the characters train and give the vocabulary, the last 10 % validate.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kernels._errors import CommandError
from kernels.gpt.files import replacing
from kernels.gpt.vocabulary import Vocabulary

Split = Literal["train", "validation"]

SUFFIXES = (".md", ".py", ".txt")  # what counts as text in a folder unless told otherwise
STDLIB_CHARACTERS = 8_000_000  # of about 12 million: a quick first start
CHUNK = 1 << 20  # characters held in memory at a time
CACHE_FORMAT = "kernels.gpt text 1"  # part of the key: change it with what is stored

# Folders of the standard library that are not its sources.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """Which text: a file, a folder, or (path None) the running Python's standard library."""

    path: str | None = None
    suffixes: tuple[str, ...] = SUFFIXES  # of files in a folder
    max_characters: int | None = None  # None: all, or STDLIB_CHARACTERS of the standard library

    def files(self) -> list[Path]:
        """The files, ordered by relative path. Raises CommandError where there is none."""
        suffixes, skipped = self.suffixes, set[str]()
        root = Path(self.path or sysconfig.get_path("stdlib"))
        if self.path is None:
            suffixes, skipped = (".py",), NOT_STDLIB
        if root.is_file():
            return [root]
        if not root.exists():
            raise CommandError(f"no such file or folder: {root}")
        found = [
            path
            for path in root.rglob("*")
            if path.suffix in suffixes
            and skipped.isdisjoint(path.relative_to(root).parts)
            and path.is_file()
        ]
        if not found:
            raise CommandError(f"{root} holds no file that ends in {' or '.join(suffixes)}")
        return sorted(found, key=lambda path: path.relative_to(root).as_posix())

    def chunks(self) -> Iterator[str]:
        """The text in pieces of at most CHUNK characters; undecodable bytes become U+FFFD."""
        left = self.max_characters
        if left is None and self.path is None:
            left = STDLIB_CHARACTERS
        for path in self.files():
            try:
                with path.open(encoding="utf-8", errors="replace") as file:
                    while left != 0 and (text := file.read(min(CHUNK, left or CHUNK))):
                        left = None if left is None else left - len(text)
                        yield text
            except OSError as error:
                raise CommandError(f"cannot read {path}: {error.strerror or error}") from error


@dataclass(frozen=True)
class TextData:
    """Encoded text with its vocabulary; `tokens` is memory-mapped, [characters]."""

    key: str  # hash of the text: equal keys, equal tokens
    vocabulary: Vocabulary
    tokens: np.ndarray

    def split(self, name: Split) -> np.ndarray:
        """The tokens of one split, [characters of it]."""
        border = training_characters(len(self.tokens))
        return self.tokens[:border] if name == "train" else self.tokens[border:]

    def check(self, block_size: int) -> None:
        """Raises CommandError where the text is too short for crops of block_size + 1."""
        needed = block_size + 1
        shorter = min(len(self.split("train")), len(self.split("validation")))
        if shorter < needed:
            raise CommandError(
                f"the text is too short: {len(self.tokens)} characters; its validation part, "
                f"the last 10 %, holds {len(self.split('validation'))} and needs at least "
                f"block_size + 1 = {needed}"
            )

    def batch(
        self, split: Split, batch_size: int, block_size: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random crops and the tokens that follow each position: two int64 [batch, block]."""
        tokens = self.split(split)
        starts = torch.randint(len(tokens) - block_size, (batch_size, 1), generator=generator)
        crops = tokens[starts.numpy() + np.arange(block_size + 1)].astype(np.int64)
        both = torch.from_numpy(crops)  # [batch, block + 1]
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def training_characters(total: int) -> int:
    """How many of `total` characters train: the first 90 %."""
    return total - total // 10


def cache_folder() -> Path:
    """Where encoded texts are kept: in $XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gpt-kernels" / "text"


def prepare(source: Source) -> str:
    """The key of the text of `source`, which is encoded into the cache if it is not there yet.

    Raises CommandError where there is no text or it, or the cache, cannot be read or written.
    """
    digest = hashlib.sha256(CACHE_FORMAT.encode())
    total = 0
    for text in source.chunks():
        digest.update(text.encode())
        total += len(text)
    if total == 0:
        raise CommandError(f"{source.path or 'the standard library'} holds no text")
    key = digest.hexdigest()[:32]
    vocabulary_path = cache_folder() / f"{key}.json"
    if not vocabulary_path.exists():
        vocabulary = Vocabulary.of(_head(source.chunks(), training_characters(total)))
        _encode(source, vocabulary, total, cache_folder() / f"{key}.npy")
        with replacing(vocabulary_path) as temporary:  # written last: now the pair is complete
            temporary.write_text(json.dumps(vocabulary.characters), encoding="utf-8")
    return key


def open_prepared(key: str) -> TextData:
    """The text with this key, memory-mapped. Raises CommandError where the cache is damaged."""
    path = cache_folder() / f"{key}.npy"
    try:
        characters = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return TextData(key, Vocabulary(characters), np.load(path, mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} is damaged ({error}); delete it") from error


def load(source: Source) -> TextData:
    """The encoded text of `source`; errors as `prepare` and `open_prepared` raise them."""
    return open_prepared(prepare(source))


def _head(texts: Iterator[str], characters: int) -> Iterator[str]:
    """The first `characters` of `texts`."""
    for text in texts:
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            return


def _encode(source: Source, vocabulary: Vocabulary, total: int, path: Path) -> None:
    """Writes the tokens of `source`, [total], as a NumPy file at `path`."""
    with replacing(path) as temporary:
        tokens = np.lib.format.open_memmap(temporary, "w+", vocabulary.dtype, (total,))
        done = 0
        for text in source.chunks():
            tokens[done : done + len(text)] = vocabulary.encode(text)
            done += len(text)
        tokens.flush()
        del tokens
