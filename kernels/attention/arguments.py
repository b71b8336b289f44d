"""The arguments of the public functions, checked and brought into the one form backends take.

Everything that can be wrong with a call is found here, before anything runs; what PyTorch's op
takes, too, is refused with PyTorch's types of errors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
ALIGNMENTS = ("upper_left", "lower_right")


class Call(NamedTuple):
    """What a backend's forward is called with; see pattern.py for the last two."""

    query: Tensor  # [B, H, Tq, D], last stride 1 as in key and value
    key: Tensor  # [B, Hkv, Tk, D]
    value: Tensor  # [B, Hkv, Tk, Dv]
    mask: Tensor | None  # [B, H, Tq, Tk]
    alibi_slopes: Tensor | None  # float32 [B, H]
    sinks: Tensor | None  # [H]
    global_mask: Tensor | None  # bool [B, Tk]
    seed: Tensor | None  # int64 [1]; None: no dropout
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    pattern: tuple[int, ...]
    scaling: tuple[float, float, float]


def check_tensors(query: Any, key: Any, value: Any, function: str, rank: int = 2) -> None:
    """Three tensors of one floating dtype on one device, at least `rank`-dimensional."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a Tensor, not {type(tensor).__name__}")
        if tensor.dim() < rank:
            raise RuntimeError(
                f"{function}: {name} must be at least {rank}-dimensional, "
                f"but has shape {list(tensor.shape)}"
            )
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise RuntimeError(
            f"{function}: query, key and value must have one dtype, but query is {query.dtype}, "
            f"key {key.dtype} and value {value.dtype}"
        )
    if query.dtype not in DTYPES:
        raise NotImplementedError(
            f"{function}: query is {query.dtype}; accepted are float32, bfloat16, float16, float64"
        )
    for name, tensor in (("key", key), ("value", value)):
        check_device(function, name, tensor, query)
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(
            f"{function}: query and key must have one last size, but query has shape "
            f"{list(query.shape)} and key {list(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2] and rank == 2:
        raise RuntimeError(
            f"{function}: key and value must have one length, but key has shape "
            f"{list(key.shape)} and value {list(value.shape)}"
        )


def check_device(function: str, name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise RuntimeError(
            f"{function}: {name} is on {tensor.device}, but query is on {query.device}; "
            "they must be on one device"
        )


def as_float(function: str, name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise TypeError(f"{function}: {name} must be a float, not {type(value).__name__}")
    return float(value)


def as_int(function: str, name: str, value: Any, least: int) -> int:
    # Under torch.compile an int may be symbolic, of which no attribute can be asked for.
    if type(value) is not int and not isinstance(value, torch.SymInt):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{function}: {name} must be an int, not {type(value).__name__}")
        value = value.__index__()
    if value < least:
        raise ValueError(f"{function}: {name} must be {least} or more, got {value}")
    return value


def as_bool(function: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be a bool, not {type(value).__name__}")
    return value


def scaling_of(
    function: str, head_dim: int, scale: Any, softcap: Any, dropout_p: Any
) -> tuple[float, float, float]:
    """The numbers of pattern.Scaling."""
    p = as_float(function, "dropout_p", dropout_p)
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"{function}: dropout_p must be between 0 and 1, got {p}")
    if scale is None:
        scale = head_dim**-0.5 if head_dim else 1.0
    else:
        scale = as_float(function, "scale", scale)
    cap = 0.0 if softcap is None else as_float(function, "softcap", softcap)
    if not 0.0 <= cap < math.inf:
        raise ValueError(f"{function}: softcap must be None or positive and finite, got {softcap}")
    return scale, cap, p


def window_of(function: str, window: Any) -> tuple[int, int]:
    """How far the window reaches to the left and right; -1 where it has no end."""
    if window is None:
        return -1, -1
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(
            f"{function}: window must be None or a pair (left, right), each an int or None, "
            f"got {window!r}"
        )
    left, right = (
        -1 if reach is None else as_int(function, f"window[{side}]", reach, 0)
        for side, reach in enumerate(window)
    )
    return left, right


def pattern_of(
    function: str,
    lengths: tuple[int, int],
    is_causal: Any,
    window: Any,
    global_tokens: Any,
    causal_alignment: Any,
) -> tuple[int, ...]:
    """The numbers of pattern.Pattern, those without effect at their defaults."""
    longest_q, longest_k = lengths
    causal = as_bool(function, "is_causal", is_causal)
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(
            f"{function}: causal_alignment must be one of {', '.join(map(repr, ALIGNMENTS))}, "
            f"got {causal_alignment!r}"
        )
    left, right = window_of(function, window)
    globals_ = as_int(function, "global_tokens", global_tokens, 0)
    reach = longest_q + longest_k  # no distance is as large
    if causal or right >= reach:
        right = -1
    if left >= reach:
        left = -1
    lower_right = causal_alignment == "lower_right"
    return int(causal), int(lower_right), left, right, min(globals_, longest_k), *lengths


def alibi_of(function: str, slopes: Any, batch: int, heads: int, query: Tensor) -> Tensor:
    """float32 [batch, heads] of slopes (heads,) or (batch, heads)."""
    if not isinstance(slopes, Tensor):
        raise TypeError(f"{function}: alibi_slopes must be a Tensor, not {type(slopes).__name__}")
    if tuple(slopes.shape) not in ((heads,), (batch, heads), (1, heads)):
        raise ValueError(
            f"{function}: alibi_slopes must have shape ({heads},) or ({batch}, {heads}), one slope "
            f"a head, but has shape {list(slopes.shape)}"
        )
    if slopes.dtype not in DTYPES:
        raise TypeError(f"{function}: alibi_slopes is {slopes.dtype}; accepted are float dtypes")
    check_device(function, "alibi_slopes", slopes, query)
    if slopes.requires_grad:
        raise ValueError(f"{function}: alibi_slopes has no gradient; pass alibi_slopes.detach()")
    return slopes.float().expand(batch, heads)


def check_sinks(function: str, sinks: Any, heads: int, query: Tensor) -> None:
    if not isinstance(sinks, Tensor):
        raise TypeError(f"{function}: sinks must be a Tensor, not {type(sinks).__name__}")
    if tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"{function}: sinks must have shape ({heads},), one a head, but has shape "
            f"{list(sinks.shape)}"
        )
    if sinks.dtype not in DTYPES:
        raise TypeError(f"{function}: sinks is {sinks.dtype}; accepted are float dtypes")
    check_device(function, "sinks", sinks, query)


def seed_of(function: str, seed: Any, dropout_p: float, query: Tensor) -> Tensor | None:
    """int64 [1] on query's device, without a sync; None without dropout."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"{function}: a seed that is a Tensor must be one int64, but this is {seed.dtype} "
                f"of shape {list(seed.shape)}"
            )
        check_device(function, "seed", seed, query)
    elif seed is not None:
        seed = as_int(function, "seed", seed, -(2**63))
        if seed >= 2**63:
            raise ValueError(f"{function}: seed must fit 64 bits with sign, got {seed}")
    if dropout_p == 0.0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    return torch.full((1,), seed, dtype=torch.int64, device=query.device)


def with_unit_stride(x: Tensor) -> Tensor:
    """`x`, copied where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype of a surrounding torch.autocast, which leaves float64 alone."""
    device = tensors[0].device.type  # type: ignore[union-attr]
    if not torch._C._is_any_autocast_enabled() or device == "meta":  # which has no autocast
        return tensors
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )
