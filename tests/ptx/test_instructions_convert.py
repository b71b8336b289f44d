"""cvt between all pairs of types in all roundings, on edge values, against exact rationals."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.assembly import Array
from tests.ptx.formats import E4M3, E5M2, F16, FORMATS, TF32, Format, decode_all, encode
from tests.ptx.snippets import Snippet, bits_of, dtype_of, run
from tests.ptx.test_instructions_integer import clamped, each

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")
_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def values(type: str, column: Array) -> Array:
    """Exact numbers of a floating-point column."""
    if type in ("f16", "bf16"):
        return decode_all(FORMATS[type], column)
    return column.astype(np.float64)


def coded(type: str, codes: list[int]) -> Array:
    word = np.array(codes, np.dtype(f"uint{bits_of(type)}"))
    return word.view(dtype_of(type)) if type in ("f32", "f64") else word


def to_float(source: str, target: str, mode: str) -> Callable[[Array], Array]:
    def reference(column: Array) -> Array:
        numbers = map(int, column) if source in INTEGERS else map(float, values(source, column))
        return coded(target, [_encode(FORMATS[target], x, mode) for x in numbers])

    return reference


def _encode(format: Format, x: float | int, mode: str, finite: bool = False) -> int:
    return encode(format, Fraction(x) if isinstance(x, int) else x, mode, finite)


def test_integers() -> None:
    snippets = []
    for source in INTEGERS:
        for target in INTEGERS:
            snippets.append(
                Snippet(f"cvt.{target}.{source} d, a;", target, (source,), each(int, target))
            )
            clamp = each(lambda a, t=target: clamped(t, a), target)
            snippets.append(Snippet(f"cvt.sat.{target}.{source} d, a;", target, (source,), clamp))
    run(snippets)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_integers_to_floats(mode: str) -> None:
    run(
        [
            Snippet(f"cvt.{mode}.{t}.{s} d, a;", t, (s,), to_float(s, t, mode))
            for s in INTEGERS
            for t in FLOATS
        ]
    )


@pytest.mark.parametrize("mode", _INTEGRAL)
def test_floats_to_integers(mode: str) -> None:
    """Clamped; NaN is 0, but the top bit where f64 or 64 bits are involved."""

    def reference(source: str, target: str) -> Callable[[Array], Array]:
        def convert(column: Array) -> Array:
            whole = _INTEGRAL[mode](values(source, column))
            low, high = (
                int(f(np.iinfo(dtype_of(target)))) for f in (lambda i: i.min, lambda i: i.max)
            )
            nan = 1 << bits_of(target) - 1 if source == "f64" or bits_of(target) == 64 else 0
            result = []
            for x in map(float, whole):
                value = (
                    nan if np.isnan(x) else high if x == np.inf else low if x == -np.inf else int(x)
                )
                result.append((value if np.isnan(x) else min(max(value, low), high)) % (1 << 64))
            return np.array(result, np.uint64).astype(dtype_of(target))

        return convert

    run(
        [
            Snippet(f"cvt.{mode}.{t}.{s} d, a;", t, (s,), reference(s, t))
            for s in FLOATS
            for t in INTEGERS
        ]
    )


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_narrowing(mode: str) -> None:
    pairs = [("f64", "f32"), ("f64", "f16"), ("f32", "f16"), ("f32", "bf16"), ("f64", "bf16")]
    run([Snippet(f"cvt.{mode}.{t}.{s} d, a;", t, (s,), to_float(s, t, mode)) for s, t in pairs])


def test_widening_and_whole_numbers() -> None:
    snippets = [
        Snippet(f"cvt.{t}.{s} d, a;", t, (s,), to_float(s, t, "rn"))
        for s, t in [("f16", "f32"), ("bf16", "f32"), ("f32", "f64"), ("f16", "f64")]
    ]
    for mode, whole in _INTEGRAL.items():
        for t in ("f32", "f64"):
            snippets.append(Snippet(f"cvt.{mode}.{t}.{t} d, a;", t, (t,), whole))
    run(snippets)


def test_pairs_of_16_bits() -> None:
    def pair(type: str, mode: str, relu: bool = False) -> Callable[[Array, Array], Array]:
        def reference(a: Array, b: Array) -> Array:
            high, low = (
                np.array([encode(FORMATS[type], float(x), mode) for x in column], np.uint32)
                for column in (a, b)
            )
            if relu:
                high, low = (np.where(_negative(type, c), 0, c) for c in (high, low))
            return high << 16 | low

        return reference

    snippets = []
    for t in ("f16", "bf16"):
        for mode in ("rn", "rz"):
            for relu in (False, True):
                text = f"cvt.{mode}{'.relu' * relu}.{t}x2.f32 d, a, b;"
                snippets.append(Snippet(text, f"{t}x2", ("f32", "f32"), pair(t, mode, relu)))
    run(snippets)


def _negative(type: str, codes: Array) -> Array:
    return (codes & 0x8000 != 0) & ~np.isnan(decode_all(FORMATS[type], codes))


def test_tf32() -> None:
    def reference(mode: str) -> Callable[[Array], Array]:
        def convert(a: Array) -> Array:
            codes = [encode(TF32, float(x), mode) << 13 for x in a]
            return np.where(np.isnan(a), 0x7FFFFFFF, np.array(codes, np.uint32))

        return convert

    run(
        [
            Snippet(f"cvt.{mode}.tf32.f32 d, a;", "u32", ("f32",), reference(mode))
            for mode in ("rna", "rn", "rz")
        ]
    )


@pytest.mark.parametrize("type", ["e4m3", "e5m2"])
def test_eight_bits(type: str) -> None:
    format = E4M3 if type == "e4m3" else E5M2

    def code(column: Array, relu: bool = False) -> Array:
        floor = np.maximum(column, 0) if relu else column
        return np.array([encode(format, float(x), "rn", finite=True) for x in floor], np.uint16)

    def from_halves(a: Array) -> Array:
        parts = [code(decode_all(F16, (a >> shift & 0xFFFF))) for shift in (16, 0)]
        return parts[0] << 8 | parts[1]

    def widened(a: Array) -> Array:
        parts = [decode_all(format, a >> shift & 0xFF) for shift in (8, 0)]
        high, low = (np.array([encode(F16, x) for x in part], np.uint32) for part in parts)
        return high << 16 | low

    pair = f"{type}x2"
    run(
        [
            Snippet(
                f"cvt.rn.satfinite.{pair}.f32 d, a, b;",
                pair,
                ("f32", "f32"),
                lambda a, b: code(a) << 8 | code(b),
            ),
            Snippet(
                f"cvt.rn.satfinite.relu.{pair}.f32 d, a, b;",
                pair,
                ("f32", "f32"),
                lambda a, b: code(a, True) << 8 | code(b, True),
            ),
            Snippet(f"cvt.rn.satfinite.{pair}.f16x2 d, a;", pair, ("f16x2",), from_halves),
            Snippet(f"cvt.rn.f16x2.{pair} d, a;", "f16x2", (pair,), widened),
        ]
    )


def test_packing() -> None:
    def pack(type: str, takes_c: bool) -> Callable[..., int]:
        bits = int(type[1:])
        low, high = (
            (-(1 << bits - 1), (1 << bits - 1) - 1) if type[0] == "s" else (0, (1 << bits) - 1)
        )

        def reference(a: int, b: int, c: int = 0) -> int:
            a, b = (min(max(x, low), high) & (1 << bits) - 1 for x in (a, b))
            return (c << 2 * bits if takes_c else 0) | a << bits | b

        return reference

    snippets = [
        Snippet(
            f"cvt.pack.sat.{t}.s32 d, a, b;", "u32", ("s32", "s32"), each(pack(t, False), "u32")
        )
        for t in ("u16", "s16")
    ]
    for t in ("u8", "s8", "u4", "s4", "u2", "s2"):
        text = f"cvt.pack.sat.{t}.s32.b32 d, a, b, c;"
        reference = each(pack(t, True), "u32")
        snippets.append(Snippet(text, "u32", ("s32", "s32", "u32"), reference))
    run(snippets)
