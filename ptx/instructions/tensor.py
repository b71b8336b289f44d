"""Tensor copies by a tensor map (cp.async.bulk.tensor) and changes of tensor maps."""

from __future__ import annotations

from ptx.instructions.base import Emitter, Instruction
from ptx.instructions.memory import ORDER, cache_policy
from ptx.operands import Unsupported
from ptx.syntax import Address, Vector

_DIMENSIONS = {f"{n}d": n for n in range(1, 6)}
# The number that device.h's tensor_reduce takes.
_REDUCTIONS = {"add": 0, "min": 1, "max": 2, "inc": 3, "dec": 4, "and": 5, "or": 6, "xor": 7}


def _map_and_coordinates(i: Instruction, index: int, dims: int) -> tuple[str, str]:
    operand = i.operand(index)
    if not isinstance(operand, Address) or not isinstance(operand.coordinates, Vector):
        raise Unsupported("a tensor copy without coordinates")
    if len(operand.coordinates.items) != dims:
        raise Unsupported("another number of coordinates than dimensions")
    values = i.array(operand.coordinates.items, "s32")
    return f"pointer({i.names.address(operand)})", f"const s32 coordinates[] = {values};"


def copy(i: Instruction) -> str:
    dims = _DIMENSIONS[i.one_of(_DIMENSIONS)]
    i.take("tile")
    cache_policy(i, i.count - 1)
    if i.words[:2] == ["global", "shared::cta"]:
        del i.words[:2]
        i.one_of(("bulk_group",))
        tensor_map, coordinates = _map_and_coordinates(i, 0, dims)
        call = f"tensor_store({dims}, {tensor_map}, coordinates, {i.pointer(1, 'shared')}"
    elif i.words[:1] in (["shared::cluster"], ["shared::cta"]) and i.words[1:2] == ["global"]:
        del i.words[:2]
        i.one_of(("mbarrier::complete_tx::bytes",))
        i.take("cta_group::1")
        tensor_map, coordinates = _map_and_coordinates(i, 1, dims)
        call = f"tensor_load({dims}, {i.pointer(0, 'shared')}, {tensor_map}, coordinates,"
        call += f" {i.pointer(2, 'shared')}"
    else:
        raise Unsupported("these spaces")
    return f"{{ {coordinates} {call}, {i.site}); }}"


def reduce(i: Instruction) -> str:
    dims = _DIMENSIONS[i.one_of(_DIMENSIONS)]
    i.take("tile")
    cache_policy(i, i.count - 1)
    if i.words[:2] != ["global", "shared::cta"]:
        raise Unsupported("these spaces")
    del i.words[:2]
    operation = _REDUCTIONS[i.one_of(_REDUCTIONS)]
    i.one_of(("bulk_group",))
    tensor_map, coordinates = _map_and_coordinates(i, 0, dims)
    call = f"tensor_reduce({dims}, {operation}, {tensor_map}, coordinates,"
    return f"{{ {coordinates} {call} {i.pointer(1, 'shared')}, {i.site}); }}"


# ---- tensor maps ---------------------------------------------------------------------------------

_FIELDS = {
    "global_address": "kGlobalAddress",
    "rank": "kRank",
    "box_dim": "kBoxDim",
    "global_dim": "kGlobalDim",
    "global_stride": "kGlobalStride",
    "element_stride": "kElementStride",
    "elemtype": "kElementType",
    "interleave_layout": "kInterleaveLayout",
    "swizzle_mode": "kSwizzleMode",
    "swizzle_atomicity": "kSwizzleAtomicity",
    "fill_mode": "kFillMode",
}
_WITH_ORDINAL = ("box_dim", "global_dim", "global_stride", "element_stride")


def tensormap(i: Instruction) -> str:
    if i.take("cp_fenceproxy"):
        return _copy_fence(i)
    i.one_of(("replace",))
    i.one_of(("tile",))
    type = i.type(("b32", "b64"))
    i.one_of(("b1024",))
    field = i.one_of(_FIELDS)
    space = i.space()
    ordinal, value = "0", i.read(i.count - 1, type)
    if field in _WITH_ORDINAL:
        ordinal = i.read(1, "u32")
    target = i.pointer(0, space)
    arguments = f"TensorField::{_FIELDS[field]}, {target}, {ordinal}, {value}"
    return f"tensor_map_replace({arguments}, {i.site});"


def _copy_fence(i: Instruction) -> str:
    """tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned"""
    i.one_of(("global",))
    i.one_of(("shared::cta",))
    i.one_of(("tensormap::generic",))
    i.take_all((*ORDER, "sync", "aligned"))
    i.operand(2)  # always 128 bytes
    return f"tensor_map_copy_fence({i.pointer(0, 'global')}, {i.pointer(1, 'shared')}, {i.site});"


EMITTERS: dict[str, Emitter] = {"tensormap": tensormap}
