"""The character vocabulary: text to token ids and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN = "\ufffd"  # shown for token 0, and what undecodable bytes become
CODE_POINTS = 0x110000  # number of Unicode code points


@dataclass(frozen=True)
class Vocabulary:
    """Token i stands for characters[i]; token 0 for every character that is not among them."""

    characters: str

    def __post_init__(self) -> None:
        if not self.characters.startswith(UNKNOWN):
            raise ValueError("a vocabulary must begin with U+FFFD, the unknown character")
        if len(set(self.characters)) != len(self.characters):
            raise ValueError("a vocabulary must not hold a character twice")

    @classmethod
    def of(cls, texts: Iterable[str]) -> Vocabulary:
        """The vocabulary of all characters in `texts`, ordered by code point."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(UNKNOWN + "".join(sorted(characters - {UNKNOWN})))

    def __len__(self) -> int:
        return len(self.characters)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned integer type that holds every token."""
        return np.min_scalar_type(len(self) - 1)

    @functools.cached_property
    def _token_of(self) -> np.ndarray:
        """Token by code point, [CODE_POINTS]."""
        table = np.zeros(CODE_POINTS, self.dtype)
        table[[ord(character) for character in self.characters]] = np.arange(len(self))
        return table

    def encode(self, text: str) -> np.ndarray:
        """Token ids of `text`, one per character, in `dtype`."""
        # surrogatepass: a command line may hold bytes that are not UTF-8 as lone surrogates.
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        return self._token_of[code_points]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; token 0 becomes U+FFFD."""
        return "".join(self.characters[token] for token in tokens)
