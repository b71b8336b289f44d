"""Barriers, fences and what the lanes of a warp do together."""

from __future__ import annotations

from ptx.instructions.base import SCOPES, Emitter, Instruction
from ptx.instructions.memory import nothing
from ptx.operands import Unsupported
from ptx.syntax import Name


def bar(i: Instruction) -> str:
    """bar.sync a{, b}; bar.arrive a, b; bar.red.op d, a{, b}, {!}c; bar.warp.sync mask."""
    if i.take("warp"):
        i.one_of(("sync",))
        return f"syncwarp({i.read(0, 'u32')}, {i.site});"
    i.take("cta")
    # Unaligned, the threads may come from different instructions, as specialised warps do.
    aligned = i.take("aligned") or i.statement.words[0] == "bar"
    kind = i.one_of(("sync", "arrive", "red"))
    if kind == "red":
        return _reduce(i)
    count = i.read(1, "u32") if i.count > 1 else "0"
    if kind == "arrive":
        return f"barrier_arrive({i.read(0, 'u32')}, {count}, {i.site});"
    return f"barrier({i.read(0, 'u32')}, {count}, {i.site}, {str(aligned).lower()});"


def _reduce(i: Instruction) -> str:
    type = i.type(("pred", "u32"))
    member = {"popc": "count", "or": "any", "and": "all"}[i.one_of(("popc", "or", "and"))]
    if (member == "count") != (type == "u32"):
        raise Unsupported(f"the type {type}")
    count = i.read(2, "u32") if i.count > 3 else "0"
    predicate = i.read(i.count - 1, "pred")
    code = f"barrier_reduce({i.read(1, 'u32')}, {count}, {predicate}, {i.site}).{member}"
    return i.write(code, type)


def fence(i: Instruction) -> str:
    """Order that barriers give is checked; a fence alone orders nothing in the race detector."""
    if not i.take("proxy"):
        i.take_all(
            ("sc", "acq_rel", "acquire", "release", "mbarrier_init", "sync_restrict::shared")
        )
        i.take_all((*SCOPES, "gl"))
        return ""
    tensor_map = "tensormap::generic"
    if tensor_map in i.words:
        i.take(tensor_map)
        i.take_all(SCOPES)
        if i.take("release"):
            return ""
        i.one_of(("acquire",))
        i.operand(1)  # the size: always 128
        return f"fence_proxy_tensormap({i.pointer(0, '')}, {i.site});"
    if i.one_of(("async", "alias")) == "alias":
        return ""
    i.take_all(("global", "shared::cta", "shared::cluster"))
    return "fence_proxy_async();"


def shfl(i: Instruction) -> str:
    i.type(("b32",))
    i.one_of(("sync",))
    modes = {"up": "kUp", "down": "kDown", "bfly": "kButterfly", "idx": "kIndex"}
    mode = modes[i.one_of(modes)]
    target, in_range = i.pair(0)
    value, lane, clamp, mask = (i.read(n, "u32") for n in (1, 2, 3, 4))
    call = f"shuffle(Shuffle::{mode}, {mask}, {value}, {lane}, {clamp}, {i.site}"
    if in_range is None:
        return i.names.write(target, "b32", f"{call})")
    writes = i.names.write(target, "b32", "value") + " " + i.names.write(in_range, "pred", "valid")
    return f"{{ bool valid; const u32 value = {call}, &valid); {writes} }}"


def vote(i: Instruction) -> str:
    i.one_of(("sync",))
    type = i.type(("pred", "b32"))
    modes = {"ballot": "kBallot", "all": "kAll", "any": "kAny", "uni": "kUniform"}
    word = i.one_of(modes)
    if (word == "ballot") != (type == "b32"):
        raise Unsupported(f"the type {type}")
    code = f"vote(Vote::{modes[word]}, {i.read(2, 'u32')}, {i.read(1, 'pred')}, {i.site})"
    return i.write(code if type == "b32" else f"{code} != 0", type)


def match(i: Instruction) -> str:
    i.one_of(("sync",))
    type = i.type(("b32", "b64"))
    arguments = f"{i.read(2, 'u32')}, {i.read(1, type)}"
    if i.one_of(("any", "all")) == "any":
        return i.write(f"match_any({arguments}, {i.site})", "b32")
    target, all_equal = i.pair(0)
    writes = i.names.write(target, "b32", "lanes")
    if all_equal is not None:
        writes += " " + i.names.write(all_equal, "pred", "all")
    return f"{{ bool all; const u32 lanes = match_all({arguments}, &all, {i.site}); {writes} }}"


def redux(i: Instruction) -> str:
    i.one_of(("sync",))
    type = i.type(("u32", "s32", "b32", "f32"))
    word = i.one_of(("add", "min", "max", "and", "or", "xor"))
    names = {"and": "kAnd", "or": "kOr", "xor": "kXor", "add": "kAdd"}
    if (word in ("and", "or", "xor")) != (type == "b32") or (word, type) == ("add", "f32"):
        raise Unsupported(f"{word} of {type}")
    operation = names.get(word) or f"k{word.capitalize()}{type[0].upper()}"
    code = f"redux(Redux::{operation}, {i.read(2, 'u32')}, {i.read(1, 'b32')}, {i.site})"
    return i.write(code, "b32")


def activemask(i: Instruction) -> str:
    i.type(("b32",))
    return i.write(f"active_mask({i.site})", "b32")


def elect(i: Instruction) -> str:
    i.one_of(("sync",))
    lane, elected = i.pair(0)
    if elected is None:
        raise Unsupported("no predicate")
    writes = i.names.write(lane, "b32", "lane") + " " + i.names.write(elected, "pred", "elected")
    code = f"bool elected; const u32 lane = elect({i.read(1, 'u32')}, &elected, {i.site});"
    return f"{{ {code} {writes} }}"


# ---- mbarrier ------------------------------------------------------------------------------------


def mbarrier(i: Instruction) -> str:
    operation = i.one_of(_MBARRIER)
    if operation in ("arrive", "arrive_drop") and i.take("expect_tx"):
        operation += ".expect_tx"
    i.type(("b64",))
    i.take_all(("release", "acquire", "relaxed", *SCOPES))
    return _MBARRIER[operation](i)


def _object(i: Instruction, index: int) -> str:
    return i.pointer(index, i.space(("shared",)))


def _init(i: Instruction) -> str:
    return f"mbarrier_init({_object(i, 0)}, {i.read(1, 'u32')}, {i.site});"


def _invalidate(i: Instruction) -> str:
    return f"mbarrier_invalidate({_object(i, 0)}, {i.site});"


def _has_state(i: Instruction) -> bool:
    """Is the first operand a register for the state, or `_`?  Some forms have none."""
    return isinstance(i.statement.operands[0], Name)


def _arrive(drop: bool) -> Emitter:
    def emit(i: Instruction) -> str:
        i.take("noComplete")
        address = int(_has_state(i))
        count = i.read(address + 1, "u32") if i.count > address + 1 else "1"
        code = f"mbarrier_arrive({_object(i, address)}, {count}, {str(drop).lower()}, {i.site})"
        return i.write(code, "b64") if address else f"{code};"

    return emit


def _arrive_expect(i: Instruction) -> str:
    address = int(_has_state(i))
    bytes = i.read(address + 1, "u32")
    code = f"mbarrier_arrive_expect({_object(i, address)}, {bytes}, {i.site})"
    return i.write(code, "b64") if address else f"{code};"


def _expect(i: Instruction) -> str:
    return f"mbarrier_expect({_object(i, 0)}, {i.read(1, 'u32')}, {i.site});"


def _wait(name: str) -> Emitter:
    def emit(i: Instruction) -> str:
        parity = i.take("parity")
        state = i.read(2, "u32" if parity else "u64")
        if i.count > 3:  # how long to wait at most
            i.operand(3)
        suffix = "_parity" if parity else ""
        return i.write(f"{name}{suffix}({_object(i, 1)}, {state}, {i.site})", "pred")

    return emit


def _pending_count(i: Instruction) -> str:
    return i.write(f"mbarrier_pending_count({i.read(1, 'u64')})", "b32")


_MBARRIER: dict[str, Emitter] = {
    "init": _init,
    "inval": _invalidate,
    "arrive": _arrive(drop=False),
    "arrive_drop": _arrive(drop=True),
    "arrive.expect_tx": _arrive_expect,
    "expect_tx": _expect,
    "test_wait": _wait("mbarrier_test"),
    "try_wait": _wait("mbarrier_try"),
    "pending_count": _pending_count,
}

EMITTERS: dict[str, Emitter] = {
    "bar": bar,
    "barrier": bar,
    "fence": fence,
    "membar": fence,
    "shfl": shfl,
    "vote": vote,
    "match": match,
    "redux": redux,
    "activemask": activemask,
    "elect": elect,
    "mbarrier": mbarrier,
    "nanosleep": nothing,
    "griddepcontrol": nothing,
    "setmaxnreg": nothing,
}
