"""Floating-point formats by exact rational arithmetic: the references of the instruction tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.ptx.assembly import Array

Number = float | Fraction


@dataclass(frozen=True)
class Format:
    precision: int  # bits of the significand, the hidden one included
    smallest: int  # exponent of the smallest normal number
    bits: int
    largest: int  # code of the largest number; the next one is infinity, or NaN where there's none
    nan: int
    has_infinity: bool = True


F16 = Format(11, -14, 16, 0x7BFF, 0x7FFF)
BF16 = Format(8, -126, 16, 0x7F7F, 0x7FFF)
F32 = Format(24, -126, 32, 0x7F7FFFFF, 0x7FFFFFFF)
F64 = Format(53, -1022, 64, 0x7FEFFFFFFFFFFFFF, 0x7FFFFFFFFFFFFFFF)
TF32 = Format(11, -126, 19, 0x3FBFF, 0x3FFFF)
E4M3 = Format(4, -6, 8, 0x7E, 0x7F, has_infinity=False)
E5M2 = Format(3, -14, 8, 0x7B, 0x7F)
FORMATS = {"f16": F16, "bf16": BF16, "f32": F32, "f64": F64, "e4m3": E4M3, "e5m2": E5M2}


def decode(format: Format, code: int) -> float:
    """Exact: every format here fits into f64."""
    magnitude = code & ((1 << (format.bits - 1)) - 1)
    sign = -1.0 if code >> (format.bits - 1) & 1 else 1.0
    if magnitude > format.largest:
        infinite = format.has_infinity and magnitude == format.largest + 1
        return sign * math.inf if infinite else math.nan
    field, fraction = divmod(magnitude, 1 << (format.precision - 1))
    if field:
        fraction += 1 << (format.precision - 1)
    exponent = format.smallest + max(field - 1, 0) - format.precision + 1
    return sign * math.ldexp(fraction, exponent)


def encode(format: Format, x: Number, mode: str = "rn", finite: bool = False) -> int:
    """Rounded once from the exact value.  mode: rn, rz, rm, rp or rna (ties away from zero)."""
    if isinstance(x, float) and math.isnan(x):
        return format.nan
    negative = math.copysign(1, x) < 0 if isinstance(x, float) else x < 0
    sign = 1 << (format.bits - 1) if negative else 0
    if isinstance(x, float) and math.isinf(x):
        return sign | (format.largest if finite else format.largest + 1)
    exact = abs(Fraction(x))
    if exact == 0:
        return sign
    exponent = max(_exponent(exact), format.smallest)
    unit = Fraction(2) ** (exponent - format.precision + 1)
    count, rest = divmod(exact, unit)
    half = unit / 2
    up = {
        "rn": rest > half or (rest == half and count % 2 == 1),
        "rna": rest >= half,
        "rz": False,
        "rm": negative and rest > 0,
        "rp": not negative and rest > 0,
    }[mode]
    code = ((exponent - format.smallest) << (format.precision - 1)) + int(count) + int(up)
    if code <= format.largest:
        return sign | code
    inward = mode == "rz" or mode == ("rp" if negative else "rm")
    return sign | (format.largest if finite or inward else format.largest + 1)


def _exponent(x: Fraction) -> int:
    """floor(log2(x))"""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess if Fraction(2) ** guess <= x else guess - 1


def decode_all(format: Format, codes: Array) -> Array:
    return np.array([decode(format, int(code)) for code in codes.ravel()]).reshape(codes.shape)


def calculate(
    format: Format, operation: Callable[..., Number], *columns: Array, mode: str = "rn"
) -> Array:
    """`operation` of f64 numbers: exact on Fractions, or on floats where one isn't finite.

    A sum that cancels exactly is -0 only when rounding down or when both terms are -0."""
    codes = []
    for row in zip(*columns, strict=True):
        numbers = [float(x) for x in row]
        floating = operation(*numbers)
        if not all(map(math.isfinite, numbers)):
            codes.append(encode(format, floating))
            continue
        exact = operation(*map(Fraction, numbers))
        if exact:
            codes.append(encode(format, exact, mode))
        else:
            mirrored = operation(*(-number for number in numbers))
            # like signs: the mirrored zero has the other sign; a cancelled one has not
            cancels = math.copysign(1, floating) == math.copysign(1, mirrored)
            product = _zero_product(operation, numbers)
            negative = math.copysign(1, floating) < 0
            if cancels and not product:
                negative = mode == "rm"
            codes.append(encode(format, -0.0 if negative else 0.0))
    return np.array(codes, np.uint64)


def _zero_product(operation: Callable[..., Number], numbers: list[float]) -> bool:
    """Is the zero one of a product, whose sign does not depend on the rounding?"""
    return len(numbers) == 2 and 0.0 in numbers and operation(1.0, 0.0) == 0.0
