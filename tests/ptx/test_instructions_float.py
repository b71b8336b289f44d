"""f32 and f64 arithmetic and comparisons of PTX, against numpy and exact rationals."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.assembly import Array
from tests.ptx.formats import F32, F64, Number, calculate, encode
from tests.ptx.snippets import Snippet, bits_of, dtype_of, run
from tests.ptx.test_instructions_integer import each

FLOATS = ("f32", "f64")
_FORMATS = {"f32": F32, "f64": F64}


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def of_type(text: str, type: str, reference: Callable[..., object], count: int = 2) -> Snippet:
    return Snippet(text, type, (type,) * count, reference)


def exactly(type: str, operation: Callable[..., Number], mode: str) -> Callable[..., Array]:
    def reference(*columns: Array) -> Array:
        codes = calculate(_FORMATS[type], operation, *columns, mode=mode)
        return codes.astype(np.dtype(f"uint{bits_of(type)}")).view(dtype_of(type))

    return reference


def test_nearest() -> None:
    snippets = []
    for t in FLOATS:
        snippets += [
            of_type(f"add.{t} d, a, b;", t, np.add),
            of_type(f"sub.rn.{t} d, a, b;", t, np.subtract),
            of_type(f"mul.{t} d, a, b;", t, np.multiply),
            of_type(f"div.rn.{t} d, a, b;", t, np.divide),
            of_type(f"sqrt.rn.{t} d, a;", t, np.sqrt, 1),
            of_type(f"rcp.rn.{t} d, a;", t, np.reciprocal, 1),
            of_type(f"abs.{t} d, a;", t, np.abs, 1),
            of_type(f"neg.{t} d, a;", t, np.negative, 1),
            of_type(f"copysign.{t} d, a, b;", t, lambda a, b: np.copysign(b, a)),
        ]
    run(snippets)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_directed_rounding(mode: str) -> None:
    snippets = []
    for t in FLOATS:
        snippets += [
            of_type(f"add.{mode}.{t} d, a, b;", t, exactly(t, lambda a, b: a + b, mode)),
            of_type(f"sub.{mode}.{t} d, a, b;", t, exactly(t, lambda a, b: a - b, mode)),
            of_type(f"mul.{mode}.{t} d, a, b;", t, exactly(t, lambda a, b: a * b, mode)),
        ]
    # neither of these can cancel to a zero, whose sign calculate() does not follow
    one = "{ .reg .f32 q; or.b32 q, c, 0x00800001; "
    fused = exactly("f32", lambda a, b, c: a * b + c, mode)

    def fma(a: Array, b: Array, c: Array) -> Array:
        odd = (c.view(np.uint32) | np.uint32(0x00800001)).view(np.float32)
        return fused(a, b, odd)

    snippets.append(Snippet(f"{one} fma.{mode}.f32 d, a, b, q; }}", "f32", ("f32",) * 3, fma))
    run(snippets)


def test_fma_rounds_once() -> None:
    def pairs(a: Array, b: Array, c: Array) -> Array:
        return np.array([_fma(x, y, z) for x, y, z in zip(a, b, c, strict=True)], np.uint32).view(
            np.float32
        )

    def _fma(a: np.float32, b: np.float32, c: np.float32) -> int:
        with np.errstate(all="ignore"):
            plain = float(a) * float(b) + float(c)
        if not np.isfinite([a, b, c]).all() or plain == 0:
            return encode(F32, plain)
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        return encode(F32, exact if exact else plain)

    run(
        [
            Snippet("fma.rn.f32 d, a, b, c;", "f32", ("f32",) * 3, pairs),
            Snippet("mad.rn.f32 d, a, b, c;", "f32", ("f32",) * 3, pairs),
            # two roundings: PTX keeps the product and the sum apart, and so must the C++ compiler
            Snippet(
                "{ .reg .f32 p; mul.f32 p, a, b; add.f32 d, p, c; }",
                "f32",
                ("f32",) * 3,
                lambda a, b, c: a * b + c,
            ),
        ]
    )


def test_flushing_and_saturation() -> None:
    unit = lambda x: np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1) + np.float32(0))  # noqa: E731
    both = {
        "add": lambda a, b: flushed(flushed(a) + flushed(b)),
        "sub": lambda a, b: flushed(flushed(a) - flushed(b)),
        "mul": lambda a, b: flushed(flushed(a) * flushed(b)),
    }
    snippets = []
    for name, f in both.items():
        snippets += [
            of_type(f"{name}.ftz.f32 d, a, b;", "f32", f),
            of_type(f"{name}.ftz.sat.f32 d, a, b;", "f32", lambda a, b, f=f: unit(f(a, b))),
        ]
    snippets += [
        of_type("add.sat.f32 d, a, b;", "f32", lambda a, b: unit(a + b)),
        of_type("abs.ftz.f32 d, a;", "f32", lambda a: np.abs(flushed(a)), 1),
        of_type("cvt.sat.f32.f32 d, a;", "f32", unit, 1),
        of_type("cvt.ftz.f32.f32 d, a;", "f32", flushed, 1),
    ]
    run(snippets)


def test_min_and_max() -> None:
    """A number wins over NaN; -0 is smaller than +0."""

    def extreme(name: str, spreads: bool = False) -> Callable[[Array, Array], Array]:
        choose = np.minimum if name == "min" else np.maximum

        def reference(a: Array, b: Array) -> Array:
            result = np.where(np.isnan(a), b, np.where(np.isnan(b), a, choose(a, b)))
            zeros = (a == 0) & (b == 0)
            negative = (
                np.signbit(a) | np.signbit(b) if name == "min" else np.signbit(a) & np.signbit(b)
            )
            result = np.where(zeros, np.where(negative, -0.0, 0.0), result).astype(a.dtype)
            return np.where(np.isnan(a) | np.isnan(b), np.nan, result) if spreads else result

        return reference

    snippets = []
    for name in ("min", "max"):
        plain, nan = extreme(name), extreme(name, True)

        def signed(a: Array, b: Array, f: Callable[..., Array] = plain) -> Array:
            sign = np.signbit(a) ^ np.signbit(b)
            return np.where(sign, -1, 1).astype(np.float32) * f(np.abs(a), np.abs(b))

        def three(a: Array, b: Array, c: Array, f: Callable[..., Array] = plain) -> Array:
            return f(f(a, b), c)

        snippets += [
            of_type(f"{name}.f32 d, a, b;", "f32", plain),
            of_type(f"{name}.f64 d, a, b;", "f64", plain),
            of_type(f"{name}.NaN.f32 d, a, b;", "f32", nan),
            of_type(f"{name}.xorsign.abs.f32 d, a, b;", "f32", signed),
            of_type(f"{name}.f32 d, a, b, c;", "f32", three, 3),
            of_type(
                f"{name}.ftz.f32 d, a, b;",
                "f32",
                lambda a, b, f=plain: f(flushed(a), flushed(b)),
            ),
        ]
    run(snippets)


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def test_comparisons() -> None:
    snippets = []
    for name, f in _COMPARE.items():
        for t in ("u16", "s16", "u32", "s32", "u64", "s64"):
            snippets.append(Snippet(f"setp.{name}.{t} d, a, b;", "pred", (t, t), f))
        for t in FLOATS:
            ordered = lambda a, b, f=f: f(a, b) & ~np.isnan(a) & ~np.isnan(b)  # noqa: E731
            either = lambda a, b, f=f: f(a, b) | np.isnan(a) | np.isnan(b)  # noqa: E731
            snippets.append(Snippet(f"setp.{name}.{t} d, a, b;", "pred", (t, t), ordered))
            snippets.append(Snippet(f"setp.{name}u.{t} d, a, b;", "pred", (t, t), either))
    for name, g in {
        "lo": np.less,
        "ls": np.less_equal,
        "hi": np.greater,
        "hs": np.greater_equal,
    }.items():
        snippets.append(Snippet(f"setp.{name}.u32 d, a, b;", "pred", ("u32", "u32"), g))
    nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    snippets += [
        Snippet("setp.nan.f32 d, a, b;", "pred", ("f32", "f32"), nan),
        Snippet("setp.num.f32 d, a, b;", "pred", ("f32", "f32"), lambda a, b: ~nan(a, b)),
    ]
    run(snippets)


def test_comparisons_with_more() -> None:
    """A second destination, a third operand, and results that are numbers."""
    two, three = ("s32", "s32"), ("s32", "s32", "pred")
    run(
        [
            Snippet(
                "{ .reg .pred p, q; setp.lt.s32 p|q, a, b; mov.pred d, q; }",
                "pred",
                two,
                lambda a, b: a >= b,
            ),
            Snippet(
                "setp.lt.and.s32 d, a, b, c;", "pred", three, lambda a, b, c: (a < b) & (c > 0)
            ),
            Snippet(
                "setp.lt.or.s32 d, a, b, !c;", "pred", three, lambda a, b, c: (a < b) | (c == 0)
            ),
            Snippet(
                "setp.lt.xor.s32 d, a, b, c;", "pred", three, lambda a, b, c: (a < b) ^ (c > 0)
            ),
            Snippet(
                "{ .reg .pred p, q; setp.lt.and.s32 p|q, a, b, c; mov.pred d, q; }",
                "pred",
                three,
                lambda a, b, c: (a >= b) & (c > 0),
            ),
            Snippet("set.lt.u32.s32 d, a, b;", "u32", two, lambda a, b: np.where(a < b, -1, 0)),
            Snippet("set.ge.f32.s32 d, a, b;", "f32", two, lambda a, b: (a >= b) * 1.0),
            Snippet(
                "set.ltu.u32.f32 d, a, b;",
                "u32",
                ("f32", "f32"),
                lambda a, b: np.where((a < b) | np.isnan(a) | np.isnan(b), -1, 0),
            ),
            Snippet(
                "setp.eq.ftz.f32 d, a, 0f00000000;", "pred", ("f32",), lambda a: flushed(a) == 0
            ),
            Snippet(
                "slct.f32.f32 d, a, b, c;",
                "f32",
                ("f32",) * 3,
                lambda a, b, c: np.where(c >= 0, a, b),
            ),
        ]
    )


def test_classes() -> None:
    tiny = {"f32": np.finfo(np.float32).tiny, "f64": np.finfo(np.float64).tiny}
    snippets = []
    for t in FLOATS:
        normal = lambda a, t=t: np.isfinite(a) & (np.abs(a) >= tiny[t])  # noqa: E731
        small = lambda a, t=t: (a != 0) & (np.abs(a) < tiny[t])  # noqa: E731
        tests: dict[str, Callable[[Array], Array]]
        tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan}
        tests |= {"number": lambda a: ~np.isnan(a), "normal": normal, "subnormal": small}
        snippets += [Snippet(f"testp.{k}.{t} d, a;", "pred", (t,), f) for k, f in tests.items()]
    run(snippets)


def test_pairs() -> None:
    """add, mul and fma of two f32 in 64 bits."""

    def both(f: Callable[..., Array], count: int) -> Callable[..., Array]:
        def reference(*columns: Array) -> Array:
            parts = [column.view(np.float32).reshape(-1, 2) for column in columns]
            result = f(*parts[:count]).astype(np.float32)
            return (
                np.where(np.isnan(result), np.float32(0), result).copy().view(np.uint64).reshape(-1)
            )

        return reference

    # NaNs are replaced, since their bits are not defined
    clean = "mov.b64 {x, y}, d; testp.notanumber.f32 p, x; testp.notanumber.f32 q, y;"
    clean += " selp.f32 x, 0f00000000, x, p; selp.f32 y, 0f00000000, y, q; mov.b64 d, {x, y}; }"
    frame = "{ .reg .f32 x, y; .reg .pred p, q; "
    two = ("u64", "u64")
    run(
        [
            Snippet(frame + "add.rn.f32x2 d, a, b; " + clean, "u64", two, both(np.add, 2)),
            Snippet(frame + "sub.f32x2 d, a, b; " + clean, "u64", two, both(np.subtract, 2)),
            Snippet(frame + "mul.rn.f32x2 d, a, b; " + clean, "u64", two, both(np.multiply, 2)),
        ]
    )


def test_approximations() -> None:
    """Within the ISA's error bounds, over the whole range."""
    positive = lambda f: lambda a: f(a.astype(np.float64))  # noqa: E731
    run(
        [
            Snippet("rcp.approx.f32 d, a;", "f32", ("f32",), positive(lambda a: 1 / a), 2**-22),
            Snippet("sqrt.approx.f32 d, a;", "f32", ("f32",), positive(np.sqrt), 2**-22),
            Snippet(
                "rsqrt.approx.f32 d, a;",
                "f32",
                ("f32",),
                positive(lambda a: 1 / np.sqrt(a)),
                2**-21.9,
            ),
            Snippet(
                "rsqrt.approx.ftz.f32 d, a;",
                "f32",
                ("f32",),
                lambda a: 1 / np.sqrt(flushed(a).astype(np.float64)),
                2**-21.9,
            ),
            Snippet(
                "ex2.approx.ftz.f32 d, a;",
                "f32",
                ("f32",),
                lambda a: flushed(np.exp2(flushed(a).astype(np.float64)).astype(np.float32)),
                2**-22,
            ),
            Snippet(  # far from 1, where lg2's bound is relative
                "{ .reg .f32 x; and.b32 x, a, 0x7fffffff; add.f32 x, x, 0f40800000;"
                " lg2.approx.f32 d, x; }",
                "f32",
                ("f32",),
                lambda a: np.log2((np.abs(a) + np.float32(4)).astype(np.float64)),
                2**-21.9,
            ),
            Snippet("tanh.approx.f32 d, a;", "f32", ("f32",), positive(np.tanh), 2**-10.9),
        ]
    )


def test_integers_are_not_floats() -> None:
    """Registers hold bits: an integer instruction on a float's register sees its bits."""
    run(
        [Snippet("{ .reg .f32 x; mov.b32 x, a; mov.b32 d, x; }", "u32", ("u32",), each(int, "u32"))]
    )
