"""Matrix elements for the tests: random values of every type, their bits, and registers of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.ptx.assembly import Array

_TORCH = {
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
_INTEGERS: dict[str, type[np.generic]] = {"s8": np.int8, "u8": np.uint8}
BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}
_WORD: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32}


def random_matrix(element: str, rows: int, columns: int, seed: int) -> tuple[Array, Array]:
    """Values (float64 or int64) and their bits (unsigned, of the element's width)."""
    generator = np.random.default_rng(seed)
    if element in _INTEGERS:
        limits = np.iinfo(_INTEGERS[element])
        values = generator.integers(limits.min, limits.max + 1, (rows, columns))
        return values, values.astype(_INTEGERS[element]).view(np.uint8)
    values = generator.standard_normal((rows, columns)).astype(np.float32)
    if element == "tf32":
        bits = values.view(np.uint32)  # the 13 lowest bits must not count
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64), bits
    rounded = torch.from_numpy(values).to(_TORCH[element])
    raw = rounded.view(torch.uint8 if BITS[element] == 8 else torch.int16).numpy()
    return rounded.double().numpy(), raw.view(_WORD[BITS[element]])


def words(bits: Array) -> Array:
    """Registers of elements: the last axis, lowest bits first."""
    packed = np.ascontiguousarray(bits).view(np.uint32)
    return packed.reshape(*bits.shape[:-1], -1)
