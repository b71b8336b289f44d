"""How the Triton attention kernels are launched: what all of them take, and which tiles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import _triton
from kernels.attention.pattern import Pattern, Scaling, dropout_factor, dropout_threshold
from kernels.attention.triton_walk import FAR, list_globals_kernel

LARGEST_DIM = 256
LONGEST = 2**29  # positions and window reaches then add up in 32 bits
LARGEST_STRIDE = 2**31 // 512  # of a row, so that offsets within a block fit 32 bits
LIST_BLOCK = 1024  # positions that list_globals_kernel takes at a time
LOG2_E = math.log2(math.e)

# Arguments of whose values Triton makes no kernels of their own; VEC stands for what divides them.
NUMBERS = [f"stride_{tensor}{dim}" for tensor in ("q", "o", "do", "dq") for dim in "bhm"]
NUMBERS += [f"stride_{tensor}{dim}" for tensor in ("k", "v", "dk", "dv") for dim in "bhn"]
NUMBERS += [f"stride_d{dim}" for dim in "bhm"]
NUMBERS += ["stride_sb", "stride_sh", "heads", "group", "rows_q", "rows_k", "head_dim"]
NUMBERS += ["value_dim", "blocks", "programs", "lower_right", "left", "right", "future"]
NUMBERS += ["global_tokens", "scale", "cap", "threshold", "keep_factor", "softmax_scale"]

Tiles = Mapping[str, tuple[tuple[int, ...], ...]]  # see triton.py


@dataclass(frozen=True)
class Call:
    """One normalised call as the kernels take it."""

    arguments: dict[str, Any]
    sequences: int
    is_plain: bool  # no more than causality and a window, and rows of whole vectors
    most_globals: int  # no sequence has more global positions

    def launch(
        self,
        kernel: Any,
        tensors: tuple[Tensor, ...],
        tiles: Tiles,
        rows: int,
        heads: int,
        own: str,
    ) -> None:
        """Starts the programs that own blocks of at most `rows` rows of each of `heads` heads.

        `own` names the block's size.  Rows at global positions have further blocks of their own.
        """
        tile = self._tile(tiles, tensors[0])
        blocks = triton.cdiv(rows, tile[own])
        programs = blocks + triton.cdiv(self.most_globals, tile[own])
        found = self.arguments | tile | {"blocks": blocks, "programs": programs}
        named = {name: found[name] for name in kernel.arg_names[len(tensors) :]}
        options = {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]}
        grid = (programs * heads * self.sequences,)
        kernel[grid](*tensors, **named, **options, **_triton.LAUNCH)

    def _tile(self, tiles: Tiles, query: Tensor) -> dict[str, int]:
        """The first row of the table that fits."""
        widest = max(self.arguments["BLOCK_D"], self.arguments["BLOCK_DV"])
        rows = tiles[_triton.architecture(query)]
        size = query.dtype.itemsize
        found = next(
            row[3:]
            for row in rows
            if size <= row[0] and widest <= row[1] and (self.is_plain or not row[2])
        )
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "SLICE")
        return dict(zip(names, found, strict=True))


def strides(name: str, tensor: Tensor | None, dims: str, vec: int = 1) -> dict[str, int]:
    """Arguments stride_<name><dim>, in units of `vec`; those that nothing depends on are 0."""
    if tensor is None:
        return {f"stride_{name}{dim}": 0 for dim in dims}
    sizes = zip(dims, tensor.stride(), tensor.shape, strict=False)
    return {f"stride_{name}{dim}": n // vec if size > 1 else 0 for dim, n, size in sizes}


def vector(tensors: Iterable[Tensor], most: int = 8) -> int:
    """Elements, at most `most`, that divide every row and every distance between rows."""
    numbers = [most]
    for tensor in tensors:
        numbers += [tensor.stride(dim) for dim in range(3) if tensor.shape[dim] > 1]
        numbers.append(tensor.shape[3])
    return math.gcd(*numbers)


def prepare(
    tensors: Mapping[str, Tensor],  # as the kernels name their strides: q, k, v, then the others
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    global_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pattern: Pattern,
    scaling: Scaling,
    sinks: Tensor | None = None,
) -> Call:
    """What the forward, dk/dv and dq kernels take, of one normalised call."""
    query, key, value = tensors["q"], tensors["k"], tensors["v"]
    vec = vector(tensors.values())
    globals_ = pattern.windowed and (pattern.global_tokens > 0 or global_mask is not None)
    listed = _list_globals(global_mask, pattern) if globals_ else (None, None)
    dropped = seed is not None and scaling.dropout_p > 0
    rows_k, head_dim, value_dim = key.shape[2], query.shape[3], value.shape[3]
    arguments: dict[str, Any] = {
        "mask_ptr": _as_bytes(mask),
        "slopes_ptr": alibi_slopes,
        "sinks_ptr": None if sinks is None else sinks.contiguous(),
        "seed_ptr": seed if dropped else None,
        "list_ptr": listed[0],
        "rank_ptr": listed[1],
        "cu_q_ptr": cu_seqlens_q,
        "cu_k_ptr": cu_seqlens_k,
        "heads": query.shape[1],
        "group": query.shape[1] // key.shape[1],
        "rows_q": query.shape[2],
        "rows_k": rows_k,
        "head_dim": head_dim // vec,
        "value_dim": value_dim // vec,
        "softmax_scale": scaling.scale,
        "threshold": dropout_threshold(scaling.dropout_p) if dropped else 0,
        "keep_factor": dropout_factor(scaling.dropout_p) if dropped else 1.0,
        "VEC": vec,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(value_dim)),
        "GLOBALS": globals_,
        "WIDE": globals_ or max(x.stride(2) for x in tensors.values()) >= LARGEST_STRIDE,
        "PRECISION": _triton.float32_dot(query) if query.dtype == torch.float32 else "ieee",
    }
    arguments["WHOLE"] = (arguments["BLOCK_D"], arguments["BLOCK_DV"]) == (head_dim, value_dim)
    for name, tensor in tensors.items():
        row = "n" if name[-1] in "kv" else "m"
        arguments |= strides(name, tensor, f"bh{row}", vec)
    arguments |= strides("mask_", mask, "bhmn", 1)
    arguments |= strides("s", alibi_slopes, "bh", 1)
    arguments |= reaches(pattern)
    arguments |= score_numbers(mask, alibi_slopes, scaling)
    sequences = query.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    most = pattern.max_seqlen_k if global_mask is not None else pattern.global_tokens
    is_plain = not (globals_ or dropped or arguments["SCORES"]) and vec >= _triton.VECTOR
    return Call(arguments, sequences, is_plain, min(most, pattern.max_seqlen_k) if globals_ else 0)


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes it is made of; others as they are."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def reaches(pattern: Pattern) -> dict[str, int]:
    """How far a query sees by the window to both sides, and into the future by anything."""
    future = 0 if pattern.causal else FAR.value
    left, right = (
        min(reach, FAR.value) if reach >= 0 else FAR.value
        for reach in (pattern.left, pattern.right)
    )
    return {
        "lower_right": pattern.lower_right,
        "left": left,
        "right": min(right, future),
        "future": future,
        "global_tokens": min(pattern.global_tokens, FAR.value),
    }


def score_numbers(mask: Tensor | None, slopes: Tensor | None, scaling: Scaling) -> dict[str, Any]:
    """Numbers that make products scores; SCORES: 2 with a softcap, 0 for a positive scale alone."""
    scale, cap = scaling.scale * LOG2_E, 0.0
    kind = 0 if mask is None and slopes is None and scaling.scale > 0 else 1
    if scaling.softcap:
        scale, cap, kind = scaling.scale / scaling.softcap, scaling.softcap * LOG2_E, 2
    return {"scale": scale, "cap": cap, "SCORES": kind}


def _list_globals(global_mask: Tensor | None, pattern: Pattern) -> tuple[Tensor | None, ...]:
    """The lists that list_globals_kernel makes; (None, None) where `global_tokens` says it all."""
    if global_mask is None:
        return None, None
    batch, length = global_mask.shape
    listed = global_mask.new_empty((batch, max(length, 1)), dtype=torch.int32)
    ranks = global_mask.new_empty((batch, length + 1), dtype=torch.int32)
    list_globals_kernel[(batch,)](
        global_mask.view(torch.uint8),
        listed,
        ranks,
        *global_mask.stride(),
        length,
        min(pattern.global_tokens, FAR.value),
        BLOCK=LIST_BLOCK,
        **_triton.LAUNCH,
    )
    return listed, ranks


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    global_mask: Tensor | None,
    seed: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    pattern: Pattern,
    scaling: Scaling,
) -> str | None:
    """None where these kernels accept the call, else one sentence saying why not."""
    if query.shape[3] > LARGEST_DIM or value.shape[3] > LARGEST_DIM:
        return f"head dimensions above {LARGEST_DIM} do not fit shared memory"
    if max(query.shape[2], key.shape[2]) > LONGEST:
        return f"more than {LONGEST} positions are not counted in 32 bits"
    if mask is not None and mask.requires_grad:
        return "the mask requires a gradient"
    return _triton.unsupported(list_globals_kernel, query, mask, sinks)
