"""cp.async: copies of each thread into shared memory, and bulk copies of lines of memory."""

from __future__ import annotations

from ptx.instructions import tensor
from ptx.instructions.base import Emitter, Instruction
from ptx.instructions.memory import CACHE, cache_policy
from ptx.operands import Register, Unsupported
from ptx.syntax import Integer, Name, Not, Operand


def cp(i: Instruction) -> str:
    if i.take("reduce"):
        i.one_of(("async",))
        i.one_of(("bulk",))
        if not i.take("tensor"):
            raise Unsupported("cp.reduce without a tensor")
        return tensor.reduce(i)
    i.one_of(("async",))
    if i.take("bulk"):
        return _bulk(i)
    if i.take("mbarrier"):
        i.one_of(("arrive",))
        i.type(("b64",))
        no_increment = str(i.take("noinc")).lower()
        barrier = i.pointer(0, i.space(("shared",)))
        return f"cp_async_mbarrier_arrive({barrier}, {no_increment}, {i.site});"
    if i.take("commit_group"):
        return "cp_async_commit();"
    if i.take("wait_group"):
        return f"cp_async_wait({i.read(0, 'u32')});"
    if i.take("wait_all"):
        return "cp_async_wait_all();"
    return _cp_async(i)


def _is_predicate(i: Instruction, operand: Operand) -> bool:
    if isinstance(operand, Not):
        return True
    found = i.names.find(operand.text) if isinstance(operand, Name) else None
    return isinstance(found, Register) and found.type == "pred"


def _cp_async(i: Instruction) -> str:
    """cp.async.ca.shared.global [to], [from], size{, source size or ignore}{, policy}"""
    i.take_all(CACHE)
    i.one_of(("shared", "shared::cta"))
    i.one_of(("global",))
    cache_policy(i, i.count - 1)
    size = i.operand(2)
    if not isinstance(size, Integer) or size.value not in (4, 8, 16):
        raise Unsupported("a size that is not 4, 8 or 16")
    source_size = f"{size.value}"
    if i.count > 3 and not i.is_read(3):
        if _is_predicate(i, i.operand(3)):  # true: nothing is read, zeros are written
            source_size = f"{i.read(3, 'pred')} ? 0 : {size.value}"
        else:
            source_size = i.read(3, "u32")
    i.accesses("global")
    i.accesses("shared")
    to, source = i.pointer(0, "shared"), i.pointer(1, "global")
    return f"cp_async({to}, {source}, {size.value}, {source_size}, {i.site});"


def _bulk(i: Instruction) -> str:
    if i.take("commit_group"):
        return "bulk_commit();"
    if i.take("wait_group"):
        only_reads = str(i.take("read")).lower()
        return f"bulk_wait({i.read(0, 'u32')}, {only_reads});"
    if "prefetch" in i.words:  # into the L2 cache
        i.words.clear()
        for index in range(i.count):
            i.operand(index)
        return ""
    if i.take("tensor"):
        return tensor.copy(i)
    cache_policy(i, i.count - 1)
    if i.words[:2] == ["global", "shared::cta"]:
        del i.words[:2]
        i.one_of(("bulk_group",))
        arguments = f"{i.pointer(0, 'global')}, {i.pointer(1, 'shared')}, {i.read(2, 'u32')}"
        return f"bulk_store({arguments}, {i.site});"
    if i.words[:1] in (["shared::cluster"], ["shared::cta"]) and i.words[1:2] == ["global"]:
        del i.words[:2]
        i.one_of(("mbarrier::complete_tx::bytes",))
        arguments = f"{i.pointer(0, 'shared')}, {i.pointer(1, 'global')}, {i.read(2, 'u32')}"
        return f"bulk_load({arguments}, {i.pointer(3, 'shared')}, {i.site});"
    raise Unsupported("these spaces")


EMITTERS: dict[str, Emitter] = {"cp": cp}
