"""Comparisons, selections, minimum and maximum."""

from __future__ import annotations

from ptx.instructions import narrow
from ptx.instructions.base import Emitter, Instruction, c_type, signed
from ptx.operands import Unsupported

_INTEGERS = ("b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64")
_FLOATS = ("f32", "f64")
_SYMBOLS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = tuple(f"{name}u" for name in _SYMBOLS)  # true as well where an operand is NaN
_COMPARISONS = (*_SYMBOLS, *_UNSIGNED, *_UNORDERED, "num", "nan")
_BOOLEAN = {"and": "&&", "or": "||", "xor": "!="}


def _test(comparison: str, type: str, a: str, b: str) -> str:
    """A C++ condition; a and b are plain names or literals, so that they may be repeated."""
    is_float = type in _FLOATS
    if comparison in ("num", "nan"):
        if not is_float:
            raise Unsupported(f"{comparison} of {type}")
        return f"!is_nan({a}, {b})" if comparison == "num" else f"is_nan({a}, {b})"
    if comparison in _UNORDERED:
        if not is_float:
            raise Unsupported(f"{comparison} of {type}")
        return f"(is_nan({a}, {b}) || {a} {_SYMBOLS[comparison[:-1]]} {b})"
    if comparison in _UNSIGNED:
        if type[0] != "u":
            raise Unsupported(f"{comparison} of {type}")
        return f"{a} {_UNSIGNED[comparison]} {b}"
    if type[0] == "b" and comparison not in ("eq", "ne"):
        raise Unsupported(f"{comparison} of {type}")
    if is_float and comparison == "ne":  # C++'s != is true for NaN, PTX's .ne is not
        return f"(!is_nan({a}, {b}) && {a} != {b})"
    return f"{a} {_SYMBOLS[comparison]} {b}"


def _narrow_tests(i: Instruction, comparison: str, type: str, flush: bool) -> list[str]:
    """The condition for each element of an f16 or bf16 type; f32 holds both exactly."""
    format = narrow.FORMATS[type.removesuffix("x2")]
    packed = type.endswith("x2")
    a, b = (i.read(number, "b32" if packed else "b16") for number in (1, 2))
    tests = []
    for shift in (0, 16) if packed else (0,):
        x, y = (f"u16({o} >> {shift})" if packed else o for o in (a, b))
        if flush:
            x, y = f"flush16<{format}>({x})", f"flush16<{format}>({y})"
        tests.append(_test(comparison, "f32", f"widen<{format}>({x})", f"widen<{format}>({y})"))
    return tests


def _tests(i: Instruction, type: str) -> list[str]:
    comparison = i.one_of(_COMPARISONS)
    flush = i.take("ftz")
    if type in narrow.NARROW:
        return _narrow_tests(i, comparison, type, flush)
    a, b = i.read(1, type), i.read(2, type)
    if flush:
        if type != "f32":
            raise Unsupported(f".ftz of {type}")
        a, b = f"flush({a})", f"flush({b})"
    return [_test(comparison, type, a, b)]


def setp(i: Instruction) -> str:
    """setp.cmp{.bool}.type p{|q}, a, b{, {!}c}: p = cmp bool c, q = !cmp bool c."""
    type = i.type((*_INTEGERS, *_FLOATS, *narrow.NARROW))
    boolean = i.one_of(_BOOLEAN, "")
    tests = _tests(i, type)
    first, second = i.pair(0)
    if len(tests) == 1:
        if second is None and not boolean:
            return i.names.write(first, "pred", tests[0])
        tests.append("!test")
    elif second is None:
        raise Unsupported("one destination for two results")
    combined = f" {_BOOLEAN[boolean]} {i.read(3, 'pred')}" if boolean else ""
    code = f"const bool test = {tests[0]}, other = {tests[1]};"
    code += f" const bool p = test{combined}, q = other{combined}; "
    code += i.names.write(first, "pred", "p")
    if second is not None:
        code += " " + i.names.write(second, "pred", "q")
    else:
        code += " (void)q;"
    return f"{{ {code} }}"


def set_(i: Instruction) -> str:
    """set.cmp{.bool}.dtype.stype d, a, b{, {!}c}: all ones or 1.0 where it holds."""
    type = i.type((*_INTEGERS, *_FLOATS, *narrow.NARROW))
    result = i.type(("u32", "s32", "f32", "u16", "s16", *narrow.NARROW))
    boolean = i.one_of(_BOOLEAN, "")
    tests = _tests(i, type)
    if boolean:
        tests = [f"({test}) {_BOOLEAN[boolean]} {i.read(3, 'pred')}" for test in tests]
    if result == "f32":
        return i.write(f"({tests[0]}) ? 1.0f : 0.0f", "f32")
    ones = {"f16": "0x3c00u", "bf16": "0x3f80u"}.get(result.removesuffix("x2"))
    if len(tests) == 2:
        one = ones or "0xffffu"
        value = f"(({tests[0]}) ? {one} : 0u) | (({tests[1]}) ? {one} << 16 : 0u)"
        return i.write(value, "b32")
    if ones:
        return i.write(f"u16(({tests[0]}) ? {ones} : 0u)", "b16")
    return i.write(f"{c_type(result)}(({tests[0]}) ? -1 : 0)", result)


def selp(i: Instruction) -> str:
    type = i.type((*_INTEGERS, *_FLOATS))
    return i.write(f"{i.read(3, 'pred')} ? {i.read(1, type)} : {i.read(2, type)}", type)


def slct(i: Instruction) -> str:
    """slct.dtype.ctype d, a, b, c: a where c >= 0, else b (also where c is NaN)."""
    by = i.type(("s32", "f32"))
    type = i.type((*_INTEGERS, *_FLOATS))
    selector = i.read(3, by)
    if i.take("ftz"):
        selector = f"flush({selector})"
    return i.write(f"{selector} >= 0 ? {i.read(1, type)} : {i.read(2, type)}", type)


def testp(i: Instruction) -> str:
    type = i.type(_FLOATS)
    kinds = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    return i.write(f"is_{i.one_of(kinds)}({i.read(1, type)})", "pred")


# ---- min and max ---------------------------------------------------------------------------------


def _extreme(i: Instruction) -> str:
    """Of integers, floats, f16 and bf16; of two or (f32) three values."""
    operation = i.operation
    type = i.type((*_INTEGERS, *_FLOATS, *narrow.NARROW, "u16x2", "s16x2"))
    if type in narrow.NARROW:
        return narrow.arithmetic(i, operation, type, 2)
    symbol = "<" if operation == "min" else ">"
    if type in ("u16x2", "s16x2"):
        kind = type.removesuffix("x2")
        relu = i.take("relu")
        element = f"{kind}(x) {symbol} {kind}(y) ? x : y"
        if relu:
            if not signed(type):
                raise Unsupported(f".relu of {type}")
            element = f"u16(s16({element}) < 0 ? 0 : {element})"
        return i.write(narrow.each(type, element, (i.read(1, "b32"), i.read(2, "b32"))), "b32")
    if type not in _FLOATS:
        a, b = i.read(1, type), i.read(2, type)
        value = f"({a} {symbol} {b} ? {a} : {b})"
        if i.take("relu"):
            if type != "s32":
                raise Unsupported(f".relu of {type}")
            value = f"({value} < 0 ? 0 : {value})"
        return i.write(value, type)
    return i.write(_float_extreme(i, operation, type), type)


def _float_extreme(i: Instruction, operation: str, type: str) -> str:
    values = [i.read(number, type) for number in range(1, i.count)]
    if not 2 <= len(values) <= 3 or (type == "f64" and (i.words or len(values) != 2)):
        raise Unsupported("these operands")
    flush, spreads_nan = i.take("ftz"), i.take("NaN")
    sign, magnitudes = i.take("xorsign"), i.take("abs")
    if sign and (not magnitudes or len(values) != 2):
        raise Unsupported(".xorsign")
    if magnitudes and not sign and len(values) != 3:
        raise Unsupported(".abs")
    if flush:
        values = [f"flush({value})" for value in values]
    signs = list(values)
    if magnitudes:
        values = [f"absolute({value})" for value in values]
    name = "smaller" if operation == "min" else "larger"
    if spreads_nan:
        name += "_or_nan"
    result = f"{name}({values[0]}, {values[1]})"
    if len(values) == 3:
        result = f"{name}({result}, {values[2]})"
    if sign:
        result = f"with_joint_sign({result}, {signs[0]}, {signs[1]})"
    return result


EMITTERS: dict[str, Emitter] = {
    "setp": setp,
    "set": set_,
    "selp": selp,
    "slct": slct,
    "testp": testp,
    "min": _extreme,
    "max": _extreme,
}
