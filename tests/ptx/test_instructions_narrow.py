"""f16 and bf16 arithmetic of PTX against exact rationals rounded once."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx.assembly import Array
from tests.ptx.formats import FORMATS, Format, Number, calculate, decode, decode_all, encode
from tests.ptx.snippets import Snippet, run

NARROW = ["f16", "bf16"]


def halves(function: Callable[..., Array], *columns: Array) -> Array:
    """`function` of 16-bit codes applied to both halves of packed columns."""
    low, high = (
        function(*((column >> shift & 0xFFFF).astype(np.uint16) for column in columns))
        for shift in (0, 16)
    )
    return high.astype(np.uint32) << 16 | low.astype(np.uint32)


def is_nan(format: Format, codes: Array) -> Array:
    return (codes & 0x7FFF) > format.largest + 1


def arithmetic(type: str, operation: Callable[..., Number]) -> Callable[..., Array]:
    def reference(*codes: Array) -> Array:
        return calculate(FORMATS[type], operation, *(decode_all(FORMATS[type], c) for c in codes))

    return reference


def both(text: str, type: str, reference: Callable[..., Array], count: int) -> list[Snippet]:
    """The instruction of one number and of a pair; {t} is the type."""
    pair = f"{type}x2"
    packed = lambda *columns: halves(reference, *columns)  # noqa: E731
    return [
        Snippet(text.format(t=type), type, (type,) * count, reference),
        Snippet(text.format(t=pair), pair, (pair,) * count, packed),
    ]


@pytest.mark.parametrize("type", NARROW)
def test_arithmetic_rounds_once(type: str) -> None:
    run(
        [
            *both("add.rn.{t} d, a, b;", type, arithmetic(type, lambda a, b: a + b), 2),
            *both("sub.rn.{t} d, a, b;", type, arithmetic(type, lambda a, b: a - b), 2),
            *both("mul.rn.{t} d, a, b;", type, arithmetic(type, lambda a, b: a * b), 2),
        ]
    )


@pytest.mark.parametrize("type", NARROW)
def test_fma_rounds_once(type: str) -> None:
    """The term is shifted over the whole range, ties and double roundings among the results."""
    format = FORMATS[type]

    def fma(a: Array, b: Array, c: Array) -> Array:
        term = np.where((c & 0x7FFF) == 0, 1, c).astype(
            np.uint16
        )  # no zero: sums of zeros are apart
        values = (decode_all(format, codes) for codes in (a, b, term))
        return calculate(format, lambda x, y, z: x * y + z, *values)

    code = "{ .reg .b16 k; .reg .b32 w; .reg .pred p; and.b16 k, c, 0x7fff; setp.eq.u16 p, k, 0;"
    code += " selp.b16 k, 1, c, p; "
    relu = lambda *v: np.where(fma(*v) & 0x8000, 0, fma(*v))  # noqa: E731
    run(
        [
            Snippet(f"{code} fma.rn.{type} d, a, b, k; }}", type, (type,) * 3, fma),
            Snippet(f"{code} fma.rn.relu.{type} d, a, b, k; }}", type, (type,) * 3, relu),
        ]
    )


def test_fma_where_rounding_twice_is_wrong() -> None:
    """Terms far below f64's last place decide ties."""
    cases = [
        (0x3FC0, 0x3F83, 0x0001),  # 1.5 · 1.0234375 lies midway: up by 2⁻¹³³
        (0x3FC0, 0x3F81, 0x8001),  # 1.5 · 1.0078125 lies midway: down by 2⁻¹³³
        (0x3FC0, 0x3F83, 0x0000),  # to even
        (0x3F80, 0x3B80, 0x3F80),  # 1 + 2⁻⁸ is a tie, to even
        (0x3F81, 0x3B80, 0x3F80),  # a little more
        (0x7F7F, 0x3F80, 0x7B00),  # the largest number and half of its unit
    ]
    format = FORMATS["bf16"]
    wanted = [
        encode(
            format,
            Fraction(decode(format, a)) * Fraction(decode(format, b)) + Fraction(decode(format, c)),
        )
        for a, b, c in cases
    ]
    text = "mov.b16 d, a;"
    for a, b, c in cases:  # each computes its own constant; the input only chooses it
        text += f" {{ .reg .b16 x, y, z, r; .reg .pred p; mov.b16 x, {a}; mov.b16 y, {b};"
        text += (
            f" mov.b16 z, {c}; fma.rn.bf16 r, x, y, z; setp.eq.u16 p, a, {cases.index((a, b, c))};"
        )
        text += " selp.b16 d, r, d, p; }"

    def reference(a: Array) -> Array:
        return np.array([wanted[x] if x < len(wanted) else x for x in map(int, a)], np.uint16)

    run([Snippet(text, "u16", ("u16",), reference)])


@pytest.mark.parametrize("type", NARROW)
def test_min_max_abs_neg(type: str) -> None:
    format = FORMATS[type]

    def extreme(greater: bool, spreads: bool = False) -> Callable[[Array, Array], Array]:
        def order(codes: Array) -> Array:  # -0 before +0
            magnitude = (codes & 0x7FFF).astype(np.int32)
            return np.where(codes & 0x8000, -magnitude - 1, magnitude)

        def reference(a: Array, b: Array) -> Array:
            first = order(a) > order(b) if greater else order(a) < order(b)
            result = np.where(first, a, b)
            x, y = is_nan(format, a), is_nan(format, b)
            result = np.where(x, b, np.where(y, a, result))
            return np.where((x | y) if spreads else (x & y), format.nan, result)

        return reference

    run(
        [
            *both("min.{t} d, a, b;", type, extreme(False), 2),
            *both("max.{t} d, a, b;", type, extreme(True), 2),
            *both("max.NaN.{t} d, a, b;", type, extreme(True, True), 2),
            *both("neg.{t} d, a;", type, lambda a: a ^ 0x8000, 1),
            *both("abs.{t} d, a;", type, lambda a: a & 0x7FFF, 1),
        ]
    )


def test_saturation_and_flushing() -> None:
    f16 = FORMATS["f16"]

    def saturated(a: Array, b: Array) -> Array:
        codes = arithmetic("f16", lambda x, y: x + y)(a, b).astype(np.uint16)
        one = np.where((codes & 0x8000) != 0, 0, np.minimum(codes, 0x3C00))
        return np.where(is_nan(f16, codes), 0, one)

    def flush(codes: Array) -> Array:
        return np.where(codes & 0x7C00, codes, codes & 0x8000).astype(np.uint16)

    def flushed(a: Array, b: Array) -> Array:
        return flush(arithmetic("f16", lambda x, y: x * y)(flush(a), flush(b)).astype(np.uint16))

    run(
        [
            *both("add.sat.{t} d, a, b;", "f16", saturated, 2),
            *both("mul.ftz.{t} d, a, b;", "f16", flushed, 2),
        ]
    )


@pytest.mark.parametrize("type", NARROW)
def test_comparisons(type: str) -> None:
    values = lambda *columns: (decode_all(FORMATS[type], c) for c in columns)  # noqa: E731

    def compare(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
        return lambda a, b: function(*values(a, b))

    ordered = lambda x, y: (x != y) & ~np.isnan(x) & ~np.isnan(y)  # noqa: E731
    pair = f"{type}x2"
    high = lambda a, b: np.less(*values(*((c >> 16).astype(np.uint16) for c in (a, b))))  # noqa: E731
    run(
        [
            Snippet(f"setp.lt.{type} d, a, b;", "pred", (type, type), compare(np.less)),
            Snippet(f"setp.ne.{type} d, a, b;", "pred", (type, type), compare(ordered)),
            Snippet(f"setp.neu.{type} d, a, b;", "pred", (type, type), compare(np.not_equal)),
            Snippet(
                f"{{ .reg .pred p, q; setp.lt.{pair} p|q, a, b; mov.pred d, q; }}",
                "pred",
                (pair, pair),
                high,
            ),
        ]
    )


@pytest.mark.parametrize("type", NARROW)
def test_mixed_precision(type: str) -> None:
    """add.rn.f32.bf16 d, a, c: the narrow operands are widened, the sum is one of f32."""
    wide = lambda a: decode_all(FORMATS[type], a).astype(np.float32)  # noqa: E731
    inputs = (type, "f32")
    run(
        [
            Snippet(f"add.rn.f32.{type} d, a, b;", "f32", inputs, lambda a, b: wide(a) + b),
            Snippet(f"sub.rn.f32.{type} d, a, b;", "f32", inputs, lambda a, b: wide(a) - b),
        ]
    )
