"""Integer and floating-point arithmetic."""

from __future__ import annotations

from collections.abc import Callable

from ptx.instructions import narrow
from ptx.instructions.base import Emitter, Instruction, c_type, unsigned, width
from ptx.operands import Unsupported

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
PAIRS = ("u16x2", "s16x2")
FLOATS = ("f32", "f64", "f32x2")
ROUNDINGS = {"rz": "kZero", "rm": "kDown", "rp": "kUp"}
_WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64", "u64": "u128", "s64": "s128"}
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}

# ---- floating point ------------------------------------------------------------------------------


def rounded(i: Instruction, operation: str, type: str, arguments: list[str]) -> str:
    """add, sub, mul, fma, div, sqrt with its rounding, .ftz and .sat."""
    rounding = i.one_of(("rn", *ROUNDINGS), "rn")
    flush, saturate = i.take("ftz"), i.take("sat")
    if (flush or saturate) and type == "f64":
        raise Unsupported(".ftz or .sat of f64")
    if flush:
        arguments = [f"flush({argument})" for argument in arguments]
    if rounding != "rn":
        mode = ROUNDINGS[rounding]
        value = f"directed_{operation}<Rounding::{mode}>({', '.join(arguments)})"
    elif operation in _SYMBOLS:
        value = f"{arguments[0]} {_SYMBOLS[operation]} {arguments[1]}"
    elif operation == "div":
        value = f"{arguments[0]} / {arguments[1]}"
    else:
        suffix = "f" if type == "f32" else ""
        value = f"__builtin_{operation}{suffix}({', '.join(arguments)})"
    if flush:
        value = f"flush({value})"
    return f"saturate_unit({value})" if saturate else value


def _float(i: Instruction, operation: str, type: str, arguments: int) -> str:
    operands = [i.read(number + 1, type) for number in range(arguments)]
    if type != "f32x2":
        return i.write(rounded(i, operation, type, operands), type)
    element = rounded(i, operation, "f32", list("xyz"[:arguments]))
    return i.write(narrow.each(type, element, operands), type)


def _mixed(i: Instruction, operation: str, arguments: int) -> str | None:
    """add, sub and fma of f32 whose first operands are f16 or bf16: add.rn.f32.bf16 d, a, c."""
    if len(i.words) < 2 or i.words[-2] != "f32" or i.words[-1] not in narrow.FORMATS:
        return None
    type = i.words.pop()
    i.type(("f32",))
    format = narrow.FORMATS[type]
    operands = [f"widen<{format}>({i.read(number + 1, 'b16')})" for number in range(arguments - 1)]
    operands.append(i.read(arguments, "f32"))
    return i.write(rounded(i, operation, "f32", operands), "f32")


# ---- add, sub, mul, mad, fma ---------------------------------------------------------------------


def _add_or_sub(operation: str) -> Emitter:
    def emit(i: Instruction) -> str:
        mixed = _mixed(i, operation, 2)
        if mixed:
            return mixed
        type = i.type((*INTEGERS, *PAIRS, *FLOATS, *narrow.NARROW))
        if type in FLOATS:
            return _float(i, operation, type, 2)
        if type in narrow.NARROW:
            return narrow.arithmetic(i, operation, type, 2)
        symbol = _SYMBOLS[operation]
        if type in PAIRS:
            a, b = i.read(1, "b32"), i.read(2, "b32")
            return i.write(narrow.each(type, f"u16(x {symbol} y)", (a, b)), "b32")
        if i.take("cc"):
            return _carry(i, operation, type, i.read(1, unsigned(type)), i.read(2, unsigned(type)))
        if i.take("sat"):
            if type != "s32":
                raise Unsupported(f".sat of {type}")
            total = f"s64({i.read(1, type)}) {symbol} {i.read(2, type)}"
            return i.write(f"saturate<s32>({total}, s64(-0x80000000ll), s64(0x7fffffff))", type)
        bits = unsigned(type)
        value = f"{i.read(1, bits)} {symbol} {i.read(2, bits)}"
        return i.write(f"{bits}({value})" if width(type) < 32 else value, bits)

    return emit


def _carry(i: Instruction, operation: str, type: str, a: str, b: str, takes: bool = False) -> str:
    """The sum or difference that sets CC.CF, and takes it in as well if `takes`."""
    if type not in ("u32", "s32", "u64", "s64"):
        raise Unsupported(f".cc of {type}")
    carry = i.function.use_carry()
    incoming = carry if takes else "0"
    bits = unsigned(type)
    return i.write(f"{operation}_carry<{bits}>({a}, {b}, {incoming}, {carry})", bits)


def _with_carry(operation: str) -> Emitter:
    """addc and subc: a ± (b + CC.CF)."""

    def emit(i: Instruction) -> str:
        type = i.type(("u32", "s32", "u64", "s64"))
        bits = unsigned(type)
        a, b = i.read(1, bits), i.read(2, bits)
        if i.take("cc"):
            return _carry(i, operation, type, a, b, takes=True)
        symbol = _SYMBOLS[operation]
        return i.write(f"{a} {symbol} {b} {symbol} {i.function.use_carry()}", bits)

    return emit


def _product(i: Instruction, type: str) -> tuple[str, str]:
    """a·b by .lo, .hi or .wide: the expression and the type that it has."""
    half = i.one_of(("lo", "hi", "wide"))
    wide = _WIDER[type]
    if half == "lo":
        calculation = "u64" if width(type) == 64 else "u32"
        bits = unsigned(type)
        return f"{bits}({calculation}({i.read(1, bits)}) * {i.read(2, bits)})", bits
    product = f"{wide}({i.read(1, type)}) * {wide}({i.read(2, type)})"
    if half == "hi":
        return f"{c_type(type)}({product} >> {width(type)})", type
    if width(type) == 64:
        raise Unsupported(f".wide of {type}")
    return product, wide


def mul(i: Instruction) -> str:
    type = i.type((*INTEGERS, *FLOATS, *narrow.NARROW))
    if type in FLOATS:
        return _float(i, "mul", type, 2)
    if type in narrow.NARROW:
        return narrow.arithmetic(i, "mul", type, 2)
    value, result = _product(i, type)
    return i.write(value, result)


def mad(i: Instruction) -> str:
    if i.words[-1] in ("f32", "f64"):
        return fma(i)
    type = i.type(INTEGERS)
    saturates, carries = i.take("sat"), i.take("cc")
    value, result = _product(i, type)
    if saturates:
        if result != "s32":
            raise Unsupported(f".sat of {type}")
        total = f"s64({value}) + {i.read(3, 's32')}"
        return i.write(f"saturate<s32>({total}, s64(-0x80000000ll), s64(0x7fffffff))", "s32")
    bits = unsigned(result)
    value = value if result == bits else f"{bits}({value})"
    if carries:
        return _carry(i, "add", type, value, i.read(3, bits))
    total = f"{value} + {i.read(3, bits)}"
    return i.write(f"{bits}({total})" if width(bits) < 32 else total, bits)


def madc(i: Instruction) -> str:
    type = i.type(("u32", "s32", "u64", "s64"))
    sets = i.take("cc")
    value, result = _product(i, type)
    bits = unsigned(type)
    if width(result) != width(type):
        raise Unsupported(".wide")
    if sets:
        return _carry(i, "add", type, f"{bits}({value})", i.read(3, bits), takes=True)
    return i.write(f"{bits}({value}) + {i.read(3, bits)} + {i.function.use_carry()}", bits)


def fma(i: Instruction) -> str:
    mixed = _mixed(i, "fma", 3)
    if mixed:
        return mixed
    type = i.type((*FLOATS, *narrow.NARROW))
    if type in narrow.NARROW:
        return narrow.arithmetic(i, "fma", type, 3)
    return _float(i, "fma", type, 3)


def mul24(i: Instruction) -> str:
    """The low 24 bits of both multiplied: .lo the product's low, .hi its bits from 16 on."""
    adds = i.operation == "mad24"
    type = i.type(("u32", "s32"))
    wide = _WIDER[type]
    half = i.one_of(("lo", "hi"))
    a, b = (f"low24({i.read(number, type)})" for number in (1, 2))
    value = f"u32(({wide}({a}) * {b}) >> {0 if half == 'lo' else 16})"
    return i.write(f"{value} + {i.read(3, 'u32')}" if adds else value, "u32")


def sad(i: Instruction) -> str:
    type = i.type(INTEGERS)
    a, b, bits = i.read(1, type), i.read(2, type), unsigned(type)
    larger = f"({bits}({a}) - {bits}({b}))"
    difference = f"({a} > {b} ? {larger} : {bits}({bits}({b}) - {bits}({a})))"
    return i.write(f"{bits}({i.read(3, bits)} + {difference})", bits)


# ---- div, rem, functions -------------------------------------------------------------------------


def div(i: Instruction) -> str:
    type = i.type((*INTEGERS, "f32", "f64"))
    if type in INTEGERS:
        return i.write(f"divide<{c_type(type)}>({i.read(1, type)}, {i.read(2, type)})", type)
    if i.one_of(("approx", "full"), ""):
        return _approximate(i, "div", type, 2)
    return _float(i, "div", type, 2)


def rem(i: Instruction) -> str:
    type = i.type(INTEGERS)
    return i.write(f"remainder<{c_type(type)}>({i.read(1, type)}, {i.read(2, type)})", type)


def _approximate(i: Instruction, name: str, type: str, arguments: int) -> str:
    if type != "f32":
        raise Unsupported(f"an approximation of {type}")
    operands = [i.read(number + 1, type) for number in range(arguments)]
    flush = i.take("ftz")
    if flush:
        operands = [f"flush({operand})" for operand in operands]
    value = f"approx_{name}({', '.join(operands)})"
    return i.write(f"flush({value})" if flush else value, type)


def rcp(i: Instruction) -> str:
    type = i.type(("f32", "f64"))
    if i.take("approx"):
        if type == "f64":
            i.one_of(("ftz",))
            return i.write(f"rough_rcp({i.read(1, type)})", type)
        return _approximate(i, "rcp", type, 1)
    one = "1.0f" if type == "f32" else "1.0"
    return i.write(rounded(i, "div", type, [one, i.read(1, type)]), type)


def sqrt(i: Instruction) -> str:
    type = i.type(("f32", "f64"))
    if i.take("approx"):
        return _approximate(i, "sqrt", type, 1)
    return _float(i, "sqrt", type, 1)


def rsqrt(i: Instruction) -> str:
    type = i.type(("f32", "f64"))
    i.one_of(("approx",))
    if type == "f64":
        return i.write(f"rough_rsqrt({i.read(1, type)}, {str(i.take('ftz')).lower()})", type)
    return _approximate(i, "rsqrt", type, 1)


def _function(name: str) -> Emitter:
    """ex2, lg2, sin, cos, tanh: only .approx exists."""

    def emit(i: Instruction) -> str:
        type = i.type(("f32", *(narrow.NARROW if name in ("exp2", "tanh") else ())))
        if type in narrow.NARROW:
            return narrow.arithmetic(i, i.operation, type, 1)
        i.one_of(("approx",))
        return _approximate(i, name, type, 1)

    return emit


# ---- abs, neg, copysign, dp ----------------------------------------------------------------------


def _sign(float_value: Callable[[str], str], integer: str) -> Emitter:
    def emit(i: Instruction) -> str:
        type = i.type(("s16", "s32", "s64", "f32", "f64", *narrow.NARROW))
        if type in narrow.NARROW:
            return narrow.arithmetic(i, i.operation, type, 1)
        if type in ("f32", "f64"):
            value = i.read(1, type)
            flush = i.take("ftz")
            value = float_value(f"flush({value})" if flush else value)
            return i.write(value, type)
        bits, value = unsigned(type), i.read(1, type)
        return i.write(f"{bits}({integer.format(value=value, bits=bits)})", bits)

    return emit


def _abs(value: str) -> str:
    return f"absolute({value})"


def _neg(value: str) -> str:
    return f"-({value})"


def copysign(i: Instruction) -> str:
    """copysign d, a, b: b with the sign of a."""
    type = i.type(("f32", "f64"))
    return i.write(f"with_sign({i.read(2, type)}, {i.read(1, type)})", type)


def dot_product(i: Instruction) -> str:
    """dp4a.atype.btype d, a, b, c; dp2a.{lo,hi}.atype.btype takes two halves of a."""
    types = [i.type(("u32", "s32")) for _ in range(2)]
    kinds = ", ".join(f"{type[0]}{bits}" for type, bits in zip(types[::-1], (8, 8), strict=True))
    if i.operation == "dp2a":
        half = i.one_of(("lo", "hi"))
        kinds = f"{types[1][0]}16, {types[0][0]}8"
        shift = 0 if half == "lo" else 16
        value = f"dot_2<{kinds}>({i.read(1, 'b32')}, {i.read(2, 'b32')} >> {shift}"
    else:
        value = f"dot_4<{kinds}>({i.read(1, 'b32')}, {i.read(2, 'b32')}"
    return i.write(f"{value}, {i.read(3, 'b32')})", "b32")


EMITTERS: dict[str, Emitter] = {
    "add": _add_or_sub("add"),
    "sub": _add_or_sub("sub"),
    "addc": _with_carry("add"),
    "subc": _with_carry("sub"),
    "mul": mul,
    "mad": mad,
    "madc": madc,
    "fma": fma,
    "mul24": mul24,
    "mad24": mul24,
    "sad": sad,
    "div": div,
    "rem": rem,
    "rcp": rcp,
    "sqrt": sqrt,
    "rsqrt": rsqrt,
    "ex2": _function("exp2"),
    "lg2": _function("log2"),
    "sin": _function("sin"),
    "cos": _function("cos"),
    "tanh": _function("tanh"),
    "abs": _sign(_abs, "{value} < 0 ? 0 - {bits}({value}) : {bits}({value})"),
    "neg": _sign(_neg, "0 - {bits}({value})"),
    "copysign": copysign,
    "dp4a": dot_product,
    "dp2a": dot_product,
}
