"""Integer arithmetic of PTX on edge values, against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.assembly import Array
from tests.ptx.snippets import Snippet, bits_of, dtype_of, run

TYPES = ("u16", "s16", "u32", "s32", "u64", "s64")


def wrapped(type: str, value: int) -> int:
    """The value's low bits as a number of the type."""
    bits = bits_of(type)
    value &= (1 << bits) - 1
    return value - (1 << bits) if type[0] == "s" and value >> (bits - 1) else value


def clamped(type: str, value: int) -> int:
    info = np.iinfo(dtype_of(type))
    return min(max(value, int(info.min)), int(info.max))


def each(function: Callable[..., int], type: str) -> Callable[..., Array]:
    """`function` of Python integers, row by row, wrapped to the type."""

    def reference(*columns: Array) -> Array:
        values = [wrapped(type, function(*map(int, row))) for row in zip(*columns, strict=True)]
        return np.array(values, dtype_of(type))

    return reference


def of_type(
    text: str, type: str, function: Callable[..., int], arguments: int = 2, result: str = ""
) -> Snippet:
    result = result or type
    return Snippet(text, result, (type,) * arguments, each(function, result))


def quotient(a: int, b: int) -> int:  # towards zero, as C and PTX divide
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def test_arithmetic() -> None:
    snippets = []
    for t in TYPES:
        n = bits_of(t)
        snippets += [
            of_type(f"add.{t} d, a, b;", t, lambda a, b: a + b),
            of_type(f"sub.{t} d, a, b;", t, lambda a, b: a - b),
            of_type(f"mul.lo.{t} d, a, b;", t, lambda a, b: a * b),
            of_type(f"mul.hi.{t} d, a, b;", t, lambda a, b, n=n: a * b >> n),
            of_type(f"mad.lo.{t} d, a, b, c;", t, lambda a, b, c: a * b + c, 3),
            of_type(f"mad.hi.{t} d, a, b, c;", t, lambda a, b, c, n=n: (a * b >> n) + c, 3),
            of_type(f"sad.{t} d, a, b, c;", t, lambda a, b, c: abs(a - b) + c, 3),
            of_type(f"min.{t} d, a, b;", t, min),
            of_type(f"max.{t} d, a, b;", t, max),
        ]
        if t[0] == "s":
            snippets.append(of_type(f"abs.{t} d, a;", t, abs, 1))
            snippets.append(of_type(f"neg.{t} d, a;", t, lambda a: -a, 1))
    run(snippets)


def test_wide_and_24_bits() -> None:
    snippets = []
    for t in ("u16", "s16", "u32", "s32"):
        wide = f"{t[0]}{2 * bits_of(t)}"
        snippets.append(of_type(f"mul.wide.{t} d, a, b;", t, lambda a, b: a * b, result=wide))
        mad = each(lambda a, b, c: a * b + c, wide)
        snippets.append(Snippet(f"mad.wide.{t} d, a, b, c;", wide, (t, t, wide), mad))
    for t in ("u32", "s32"):

        def low24(a: int, kind: str = t[0]) -> int:
            a &= 0xFFFFFF
            return a - (1 << 24) if kind == "s" and a >> 23 else a

        snippets += [
            of_type(f"mul24.lo.{t} d, a, b;", t, lambda a, b, f=low24: f(a) * f(b)),
            of_type(f"mul24.hi.{t} d, a, b;", t, lambda a, b, f=low24: f(a) * f(b) >> 16),
            of_type(f"mad24.lo.{t} d, a, b, c;", t, lambda a, b, c, f=low24: f(a) * f(b) + c, 3),
        ]
    run(snippets)


def test_saturation() -> None:
    run(
        [
            of_type("add.sat.s32 d, a, b;", "s32", lambda a, b: clamped("s32", a + b)),
            of_type("sub.sat.s32 d, a, b;", "s32", lambda a, b: clamped("s32", a - b)),
            of_type(
                "mad.hi.sat.s32 d, a, b, c;",
                "s32",
                lambda a, b, c: clamped("s32", (a * b >> 32) + c),
                3,
            ),
            of_type("min.relu.s32 d, a, b;", "s32", lambda a, b: max(0, min(a, b))),
        ]
    )


def test_division() -> None:
    """By zero: all ones and the dividend, which is a choice; the smallest number by -1 wraps."""
    snippets = []
    for t in TYPES:
        snippets.append(of_type(f"div.{t} d, a, b;", t, lambda a, b: quotient(a, b) if b else -1))
        snippets.append(
            of_type(f"rem.{t} d, a, b;", t, lambda a, b: a - quotient(a, b) * b if b else a)
        )
    run(snippets)


def test_carry_chains() -> None:
    """128-bit sums, differences and products out of 64-bit halves, and 64-bit ones out of 32."""
    halves = "{ .reg .b32 p, q, r, s, t, u; mov.b64 {p, q}, a; mov.b64 {r, s}, b;"
    run(
        [
            of_type(
                f"{halves} add.cc.u32 t, p, r; addc.u32 u, q, s; mov.b64 d, {{t, u}}; }}",
                "u64",
                lambda a, b: a + b,
            ),
            of_type(
                f"{halves} sub.cc.u32 t, p, r; subc.u32 u, q, s; mov.b64 d, {{t, u}}; }}",
                "u64",
                lambda a, b: a - b,
            ),
            of_type(  # the borrow of a chain of three
                f"{halves} sub.cc.u32 t, p, r; subc.cc.u32 t, q, s; subc.u32 u, 0, 0;"
                " mov.b64 d, {u, u}; }",
                "u64",
                lambda a, b: -1 if a < b else 0,
            ),
            of_type(
                f"{halves} add.cc.s32 t, p, r; addc.cc.s32 t, q, s; addc.u32 u, 0, 0;"
                " mov.b64 d, {u, 0}; }",
                "u64",
                lambda a, b: a + b >> 64,
            ),
            of_type(  # the upper 64 bits of a 64-bit product, from 32-bit ones
                f"{halves} mul.hi.u32 t, p, r; mad.lo.cc.u32 t, p, s, t; madc.hi.u32 u, p, s, 0;"
                " mad.lo.cc.u32 t, q, r, t; madc.hi.cc.u32 u, q, r, u; addc.u32 t, 0, 0;"
                " mad.lo.cc.u32 u, q, s, u; madc.hi.u32 t, q, s, t; mov.b64 d, {u, t}; }",
                "u64",
                lambda a, b: a * b >> 64,
            ),
        ]
    )


def _bytes(value: int, type: str, width: int, count: int, first: int = 0) -> list[int]:
    return [wrapped(f"{type[0]}{width}", value >> width * (first + i)) for i in range(count)]


def test_dot_products() -> None:
    snippets = []
    for x in ("u32", "s32"):
        for y in ("u32", "s32"):
            result = "s32" if "s32" in (x, y) else "u32"

            def dp4a(a: int, b: int, c: int, x: str = x, y: str = y) -> int:
                pairs = zip(_bytes(a, x, 8, 4), _bytes(b, y, 8, 4), strict=True)
                return c + sum(p * q for p, q in pairs)

            def dp2a(a: int, b: int, c: int, x: str = x, y: str = y, half: int = 0) -> int:
                pairs = zip(_bytes(a, x, 16, 2), _bytes(b, y, 8, 2, 2 * half), strict=True)
                return c + sum(p * q for p, q in pairs)

            def upper(a: int, b: int, c: int, f: Callable[..., int] = dp2a) -> int:
                return f(a, b, c, half=1)

            snippets += [
                of_type(f"dp4a.{x}.{y} d, a, b, c;", "u32", dp4a, 3, result),
                of_type(f"dp2a.lo.{x}.{y} d, a, b, c;", "u32", dp2a, 3, result),
                of_type(f"dp2a.hi.{x}.{y} d, a, b, c;", "u32", upper, 3, result),
            ]
    run(snippets)


def test_pairs_of_16_bits() -> None:
    def paired(function: Callable[[int, int], int], kind: str) -> Callable[[int, int], int]:
        def both(a: int, b: int) -> int:
            halves = [
                function(wrapped(kind, a >> shift), wrapped(kind, b >> shift)) & 0xFFFF
                for shift in (0, 16)
            ]
            return halves[1] << 16 | halves[0]

        return both

    snippets = []
    for kind in ("u16", "s16"):
        snippets += [
            of_type(f"add.{kind}x2 d, a, b;", "u32", paired(lambda a, b: a + b, kind)),
            of_type(f"min.{kind}x2 d, a, b;", "u32", paired(min, kind)),
            of_type(f"max.{kind}x2 d, a, b;", "u32", paired(max, kind)),
        ]
    relu = paired(lambda a, b: max(0, min(a, b)), "s16")
    run([*snippets, of_type("min.relu.s16x2 d, a, b;", "u32", relu)])
