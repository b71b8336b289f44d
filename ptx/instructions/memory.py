"""Memory and its addresses: ld, st, atom, red, cvta, isspacep."""

from __future__ import annotations

from ptx.instructions.base import SCOPES, Emitter, Instruction, c_type, unsigned
from ptx.instructions.narrow import FORMATS, binary
from ptx.operands import Symbol, Unsupported
from ptx.syntax import TYPE_BYTES, Address, Name

# What a cache does with the line changes nothing that the executor counts.
CACHE = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "L2::64B", "L2::128B", "L2::256B"),
    *(f"L1::evict_{policy}" for policy in ("normal", "unchanged", "first", "last")),
    *(f"L2::evict_{policy}" for policy in ("normal", "first", "last")),
    "L1::no_allocate",
)
# Every access is checked alike: the race detector takes barriers as order, not fences.
ORDER = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio", *SCOPES)
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


def cache_policy(i: Instruction, index: int) -> None:
    """.L2::cache_hint has the policy as its operand."""
    if i.take("L2::cache_hint"):
        i.operand(index)


def _memory_words(i: Instruction, operand: int) -> int:
    """Takes the words that loads and stores share; returns the elements of the vector."""
    i.take_all((*ORDER, *CACHE))
    cache_policy(i, operand)
    return _VECTORS.get(i.one_of(_VECTORS, ""), 1)


def _parameter(i: Instruction, index: int, size: int) -> str:
    """A .param address: a buffer of a call, or the kernel's parameters."""
    operand = i.operand(index)
    if not isinstance(operand, Address) or not isinstance(operand.base, Name):
        raise Unsupported("an absolute address of a parameter")
    found = i.names.find(operand.base.text)
    if isinstance(found, Symbol) and found.space == "param":
        return f"{found.cpp} + {operand.offset}" if operand.offset else found.cpp
    if not i.function.is_kernel:
        raise Unsupported("a computed address of a function's parameter")
    address = i.names.address(operand)
    return f"parameter(parameters, kParameterBytes, {address}, {size}, {i.site})"


def ld(i: Instruction) -> str:
    type = i.type()
    space = i.space(("global", "shared", "local", "const", "param"))
    read_only = i.take("nc")
    elements = _memory_words(i, 2)
    size = TYPE_BYTES[type]
    total, value, targets = size * elements, c_type(type), i.vector(0)
    if len(targets) != elements:
        raise Unsupported(f"{len(targets)} destinations")
    if space == "param":
        source = _parameter(i, 1, total)
    elif space == "local":
        source = f"local(u32({i.names.address(i.operand(1))}), {total}, {i.site})"
    else:
        pointer = i.pointer(1, space)
        where = i.accesses(space)
        if read_only:
            code = f"const void* p = {pointer}; read_only(p, {total}, {i.site}); "
            source = f"read(p, {total}, {where}, {i.site})"
            return "{ " + code + _load(i, source, type, value, size) + " }"
        source = f"read({pointer}, {total}, {where}, {i.site})"
    return _load(i, source, type, value, size)


def _load(i: Instruction, source: str, type: str, value: str, size: int) -> str:
    targets = i.vector(0)
    if len(targets) == 1:
        return i.names.write(targets[0], type, f"load<{value}>({source})")
    writes = " ".join(
        i.names.write(target, type, f"load<{value}>(source, {number * size})")
        for number, target in enumerate(targets)
    )
    return f"{{ const void* source = {source}; {writes} }}"


def st(i: Instruction) -> str:
    type = i.type()
    space = i.space(("global", "shared", "local", "param"))
    elements = _memory_words(i, 2)
    total, value, sources = TYPE_BYTES[type] * elements, c_type(type), i.vector(1)
    if len(sources) != elements:
        raise Unsupported(f"{len(sources)} sources")
    data = f"const {value} data[] = {i.array(sources, type)};"
    if space in ("param", "local"):
        if space == "param":
            target = _parameter(i, 0, total)
        else:
            target = f"local(u32({i.names.address(i.operand(0))}), {total}, {i.site})"
        if elements == 1:
            return f"store<{value}>({target}, {i.names.read(sources[0], type)});"
        return f"{{ {data} __builtin_memcpy({target}, data, {total}); }}"
    where = i.accesses(space)
    return f"{{ {data} write({i.pointer(0, space)}, {total}, {where}, {i.site}, data); }}"


# ---- atomics -------------------------------------------------------------------------------------

_INTEGERS = ("u32", "s32", "u64", "s64")
_BITS = ("b32", "b64")
_FLOATS = ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")
_ATOMIC_TYPES = {
    "add": (*_INTEGERS, *_FLOATS),
    "min": (*_INTEGERS, *_FLOATS),
    "max": (*_INTEGERS, *_FLOATS),
    **dict.fromkeys(("and", "or", "xor"), _BITS),
    "inc": ("u32",),
    "dec": ("u32",),
    "exch": ("b16", *_BITS, "b128"),
    "cas": ("b16", *_BITS, "b128"),
}
_ATOMIC = {
    "and": "old & b[{n}]",
    "or": "old | b[{n}]",
    "xor": "old ^ b[{n}]",
    "exch": "b[{n}]",
    "cas": "old == b[{n}] ? c : old",
    "inc": "old >= b[{n}] ? 0 : old + 1",
    "dec": "old == 0 || old > b[{n}] ? b[{n}] : old - 1",
}


def _atomic_result(i: Instruction, operation: str, type: str, space: str, number: int) -> str:
    b = f"b[{number}]"
    if operation in _ATOMIC:
        return _ATOMIC[operation].format(n=number)
    if type.removesuffix("x2") in FORMATS:
        if not i.take("noftz") and operation == "add":
            raise Unsupported(".noftz is missing")
        i.words.append("noftz")  # asked for again by the vector's next element
        return binary(operation, type, "old", b)
    if operation != "add":
        if type in ("f32", "f64"):
            raise Unsupported(f"{operation} of {type}")
        return f"old {'<' if operation == 'min' else '>'} {b} ? old : {b}"
    if type == "f32" and space != "shared":  # flushes subnormals, in global memory only
        total = f"flush(flush(old) + flush({b}))"
        return total if space == "global" else f"is_shared(u64(p)) ? old + {b} : {total}"
    return f"old + {b}" if type[0] == "f" else f"{c_type(type)}({unsigned(type)}(old) + {b})"


def _atomic(i: Instruction, address: int) -> str:
    type = i.type()
    i.take_all(ORDER)
    operation = i.one_of(_ATOMIC_TYPES)
    if type not in _ATOMIC_TYPES[operation]:
        raise Unsupported(f"{operation} of {type}")
    space = i.space()
    elements = _VECTORS.get(i.one_of(_VECTORS, ""), 1)
    cache_policy(i, i.count - 1)
    value, size = c_type(type), TYPE_BYTES[type]
    sources = i.vector(address + 1)
    if len(sources) != elements:
        raise Unsupported(f"{len(sources)} sources")
    code = [f"const {value} b[] = {i.array(sources, type)};"]
    if operation == "cas":
        code.append(f"const {value} c = {i.read(address + 2, type)};")
    code.append(
        f"void* p = atomic({i.pointer(address, space)}, {size * elements}, {i.accesses(space)},"
        f" {i.site});"
    )
    for number in range(elements):
        result = _atomic_result(i, operation, type, space, number)
        old = f"old{number}" if elements > 1 else "old"
        result = result.replace("old", old)
        code.append(f"const {value} {old} = load<{value}>(p, {number * size});")
        code.append(f"store<{value}>(p, {result}, {number * size});")
        if address == 1:
            code.append(i.names.write(i.vector(0)[number], type, old))
    i.take("noftz")
    return "{ " + " ".join(code) + " }"


def atom(i: Instruction) -> str:
    return _atomic(i, 1)


def red(i: Instruction) -> str:
    return _atomic(i, 0)


# ---- addresses -----------------------------------------------------------------------------------


def cvta(i: Instruction) -> str:
    type = i.type(("u32", "u64"))
    to = i.take("to")
    space = i.one_of(("global", "const", "param", "shared", "shared::cta", "local"))
    window = {"shared": "shared_window", "local": "current->local"}.get(space.partition("::")[0])
    value = i.read(1, "u64")
    if window:
        value = f"{value} {'-' if to else '+'} u64({window})"
    elif space == "param" and not to:
        # Triton 3.9 keeps the lower half of a parameter's address only.
        value = f"u64(parameters) + u64(s64(s32(u32({value}) - u32(u64(parameters)))))"
    return i.write(value if type == "u64" else f"u32({value})", type)


def isspacep(i: Instruction) -> str:
    space = i.one_of(("global", "shared", "shared::cta", "shared::cluster", "local"))
    tests = {
        "shared": "is_shared(a)",
        "local": "is_local(a, kLocalBytes)",
        "global": "!is_shared(a) && !is_local(a, kLocalBytes)",
    }
    test = tests[space.partition("::")[0]]
    return f"{{ const u64 a = {i.read(1, 'u64')}; {i.write(test, 'pred')} }}"


def mapa(i: Instruction) -> str:
    """Every cluster is one block: the address in block 0 is the address itself."""
    type = i.type(("u32", "u64"))
    i.take_all(("shared::cluster",))
    i.operand(2)
    return i.write(i.read(1, type), type)


def getctarank(i: Instruction) -> str:
    i.type(("u32", "u64"))
    i.take("shared::cluster")
    i.operand(1)
    return i.write("0u", "u32")


def nothing(i: Instruction) -> str:
    """Prefetches and priorities: hints without an effect on values."""
    i.words.clear()
    for index in range(i.count):
        i.operand(index)
    return ""


def createpolicy(i: Instruction) -> str:
    """A cache policy: the access that gets it does not use it either."""
    i.words.clear()
    for index in range(1, i.count):
        i.operand(index)
    return i.write("0ull", "b64")


EMITTERS: dict[str, Emitter] = {
    "ld": ld,
    "ldu": ld,
    "st": st,
    "atom": atom,
    "red": red,
    "cvta": cvta,
    "isspacep": isspacep,
    "mapa": mapa,
    "getctarank": getctarank,
    "prefetch": nothing,
    "prefetchu": nothing,
    "applypriority": nothing,
    "createpolicy": createpolicy,
}
