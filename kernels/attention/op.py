"""Attention for users: dispatch, autograd and the functions.  Maths: README.md."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from kernels.attention import arguments as checks
from kernels.attention import broadcast, reference
from kernels.attention.arguments import Call
from kernels.dispatch import Operators, define

_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks,"
    " Tensor? global_mask, Tensor? seed, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " SymInt[] pattern, float[] scaling"
)
choose = define(
    "attention",
    forward=f"({_SCHEMA}) -> (Tensor out, Tensor lse)",
    backward=f"(Tensor dout, Tensor? dlse, {_SCHEMA}, Tensor out, Tensor lse, bool[5] output_mask)"
    " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dmask, Tensor dsinks)",
    gradients=2,
)

_is_compiling = torch.compiler.is_dynamo_compiling
_is_transforming = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled
_is_autocast = torch._C._is_any_autocast_enabled


class AttentionFunction(torch.autograd.Function):
    """Backward runs the forward's backend, or, under create_graph, the reference's formula."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
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
        pattern: tuple[int, ...],
        scaling: tuple[float, ...],
    ) -> tuple[Tensor, Tensor]:
        fixed = alibi_slopes, global_mask, seed, cu_seqlens_q, cu_seqlens_k
        out, lse = backend.forward(
            query, key, value, mask, alibi_slopes, sinks, *fixed[1:], pattern, scaling
        )
        ctx.set_materialize_grads(False)  # dlse is None where nobody asked for lse
        ctx.save_for_backward(query, key, value, mask, sinks, out, lse)
        ctx.rest = backend, fixed, pattern, scaling
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, mask, sinks, out, lse = ctx.saved_tensors
        backend, (alibi_slopes, *fixed), pattern, scaling = ctx.rest
        needs = ctx.needs_input_grad
        wanted = (needs[1], needs[2], needs[3], needs[4], needs[6])
        if dout is None and dlse is None:
            return (None,) * 13
        call = query, key, value, mask, alibi_slopes, sinks, *fixed, pattern, scaling
        if _is_grad_enabled():
            # create_graph: out and lse depend on the inputs, so they take part in the derivative.
            out, lse = reference.forward(*call)
            backend = reference
        elif wanted[3] and isinstance(backend, Operators):
            backend = reference  # a registered op cannot tell that the mask wants a gradient
        if dout is None:
            dout = torch.zeros_like(out)
        dout = checks.with_unit_stride(dout)
        dlse = None if dlse is None else dlse.contiguous()
        found = backend.backward(dout, dlse, *call, out, lse, wanted)
        dquery, dkey, dvalue, dmask, dsinks = (
            gradient if asked else None for gradient, asked in zip(found, wanted, strict=True)
        )
        return (None, dquery, dkey, dvalue, dmask, None, dsinks) + (None,) * 6


# Function.apply without its preparations for torch.func, which has a way of its own below.
_apply = super(torch.autograd.Function, AttentionFunction).apply


def run(call: Call) -> tuple[Tensor, Tensor]:
    """out and lse of a checked call."""
    query, key, value, mask, _, sinks = call[:6]
    if _is_transforming() or forward_ad._current_level >= 0:
        return reference.forward(*call)  # a kernel on raw memory cannot take part in transforms
    if 0 in query.shape or value.shape[3] == 0:
        return reference.forward(*call)  # an empty result: no kernel needs to know
    if call.cu_seqlens_q is not None and query.is_meta:
        return reference.forward(*call)  # there are no lengths for eager to read
    backend = choose(*call)
    if _is_grad_enabled() and (
        query.requires_grad
        or key.requires_grad
        or value.requires_grad
        or (mask is not None and mask.requires_grad)
        or (sinks is not None and sinks.requires_grad)
    ):
        if _is_compiling():
            return AttentionFunction.apply(backend, *_distinct(call))
        return _apply(backend, *call)
    return backend.forward(*call)


def _distinct(call: Call) -> list[Any]:
    """The call without one tensor in two places, which torch.compile refuses."""
    found: list[Any] = []
    for x in call:
        if isinstance(x, Tensor) and any(x is y for y in found):
            found.append(x.view_as(x))
        else:
            found.append(x)
    return found


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    global_tokens: int = 0,
    global_mask: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
    seed: int | Tensor | None = None,
) -> Any:
    """``torch.nn.functional.scaled_dot_product_attention``, fused, with more patterns.

    softmax(query @ key.T * scale) @ value, softmax over the keys that the query sees; computed
    block by block without ever storing the scores (Dao et al., "FlashAttention", arXiv:2205.14135).

    Args:
        query: [..., H, Tq, D] of float32, bfloat16, float16 or float64 (float64 runs PyTorch's
            ops).  Leading dimensions of all three broadcast.  Any strides; where the last is not
            1 the tensor is copied once.
        key, value: [..., H or Hkv, Tk, D] and [..., H or Hkv, Tk, Dv], query's dtype and device.
        attn_mask: bool (True: takes part) or float (added to the scaled scores; float32 or query's
            dtype), broadcastable to [..., H, Tq, Tk]; not together with is_causal.  A float mask
            that requires a gradient gets one.
        dropout_p: probability, 0 to 1, with which a weight is dropped.
        is_causal: keys after the query's position are not seen.
        scale: default 1 / sqrt(D).
        enable_gqa: key and value have fewer heads, each serving H / Hkv query heads in a row.
        window: (left, right); the query at position p sees keys p - left ... p + right only, None
            meaning no end (Longformer's local attention, arXiv:2004.05150).
        global_tokens, global_mask: the first so many positions, bool [..., Tk]: exempt from the
            window as keys and as queries; is_causal still holds.
        softcap: scores become softcap * tanh(score / softcap).
        alibi_slopes: (H,) or (B, H); slope * |key - position| is subtracted (arXiv:2108.12409).
        sinks: (H,) learnable; exp(sink) joins the softmax's denominator.
        causal_alignment: position of query i among the keys: i ("upper_left", as PyTorch) or
            i + Tk - Tq ("lower_right").
        return_lse: also returns the logarithm of each softmax's denominator.
        seed: of dropout, an int or an int64 Tensor [1] on query's device; None draws one from
            PyTorch's generator.  Equal seeds give equal masks in every backend.

    Returns:
        out [..., H, Tq, Dv] in query's dtype, in query's order of heads and time in memory; with
        return_lse (out, lse), lse [..., H, Tq] in float32 (float64 for float64), natural
        logarithm, differentiable.  Queries that see no key give 0, lse -inf and gradients of 0.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as PyTorch's op, before anything runs;
        TypeError, ValueError for the arguments it does not have.

    Differentiable any number of times; the first derivative is fused and deterministic.  Autocast
    casts as for PyTorch's op.  Inside torch.func transforms, forward-mode differentiation and for
    second derivatives the scores are stored.
    """
    tensors = query, key, value, attn_mask, global_mask, alibi_slopes, sinks
    if has_torch_function(tensors):
        return handle_torch_function(
            scaled_dot_product_attention,
            tensors,
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            window=window,
            global_tokens=global_tokens,
            global_mask=global_mask,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            causal_alignment=causal_alignment,
            return_lse=return_lse,
            seed=seed,
        )
    call: Any = None
    if (
        attn_mask is None
        and dropout_p == 0
        and enable_gqa is False
        and window is None
        and global_tokens == 0
        and global_mask is None
        and softcap is None
        and alibi_slopes is None
        and sinks is None
        and causal_alignment == "upper_left"
        and seed is None
    ):
        call = _usual_call(query, key, value, is_causal, scale)
    if call is not None:
        out, lse = run(call)
        return (out, lse) if return_lse else out
    call, lead = prepare(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        window,
        global_tokens,
        global_mask,
        softcap,
        alibi_slopes,
        sinks,
        causal_alignment,
        seed,
    )
    out, lse = run(call)
    if len(lead) != 2:
        out, lse = out.reshape(*lead, *out.shape[2:]), lse.reshape(*lead, lse.shape[2])
    return (out, lse) if return_lse else out


def _usual_call(query: Any, key: Any, value: Any, is_causal: Any, scale: Any) -> Any:
    """What `prepare` would make of a call without anything special; None where it is to be asked.

    Small calls feel every attribute that Python looks up, and most are of this kind.
    """
    if not type(query) is type(key) is type(value) is Tensor or _is_autocast():
        return None
    shape, key_shape = query.shape, key.shape
    if (
        len(shape) != 4
        or key_shape != value.shape
        or key_shape[:2] != shape[:2]
        or key_shape[3] != shape[3]
        or 0 in shape
        or not query.dtype is key.dtype is value.dtype
        or query.dtype not in checks.DTYPES
        or not (query.is_cpu and key.is_cpu and value.is_cpu)
        or not query.stride(3) == key.stride(3) == value.stride(3) == 1
        or type(is_causal) is not bool
    ):
        return None
    if scale is None:
        scale = shape[3] ** -0.5
    elif type(scale) is not float:
        return None
    pattern = (int(is_causal), 0, -1, -1, 0, shape[2], key_shape[2])
    return Call(query, key, value, *(None,) * 7, pattern, (scale, 0.0, 0.0))


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: Sequence[int | None] | None,
    global_tokens: int,
    global_mask: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    causal_alignment: str,
    seed: int | Tensor | None,
) -> tuple[Call, tuple[int, ...]]:
    """The call as backends take it, and the output's leading dimensions; raises what is wrong."""
    name = broadcast.NAME
    checks.check_tensors(query, key, value, name)
    query, key, value, attn_mask = checks.autocast(query, key, value, attn_mask)
    checks.as_bool(name, "enable_gqa", enable_gqa)
    length_q, length_k, head_dim = query.shape[-2], key.shape[-2], query.shape[-1]
    lead = broadcast.lead_shape(query, key, value, enable_gqa)
    batch, heads = lead[:-1], lead[-1] if lead else 1
    pattern = checks.pattern_of(
        name, (length_q, length_k), is_causal, window, global_tokens, causal_alignment
    )
    scaling = checks.scaling_of(name, head_dim, scale, softcap, dropout_p)
    if attn_mask is not None:
        if is_causal:
            raise RuntimeError(f"{name}: attn_mask must be None where is_causal=True")
        attn_mask = broadcast.mask_of(attn_mask, query, lead, length_q, length_k)
    if global_mask is not None:
        global_mask = broadcast.global_mask_of(global_mask, query, lead, length_k)
    kv_heads = broadcast.key_value_heads(key, value, heads, enable_gqa)
    if enable_gqa and kv_heads == heads:
        key, value = (broadcast.repeat_heads(x, heads) for x in (key, value))
    query = broadcast.to_four_dims(query, batch, heads)
    key = broadcast.to_four_dims(key, batch, kv_heads)
    value = broadcast.to_four_dims(value, batch, kv_heads)
    if alibi_slopes is not None:
        alibi_slopes = checks.alibi_of(name, alibi_slopes, query.shape[0], heads, query)
    if sinks is not None:
        checks.check_sinks(name, sinks, heads, query)
    seed = checks.seed_of(name, seed, scaling[2], query)
    tensors = query, key, value, attn_mask, alibi_slopes, sinks, global_mask, seed, None, None
    return Call(*tensors, pattern, scaling), lead


def backend_arguments(*arguments: Any, **keywords: Any) -> Call:
    """What backends are asked about a public call; for dispatch.explain."""
    call = inspect.signature(scaled_dot_product_attention).bind(*arguments, **keywords)
    call.apply_defaults()
    call.arguments.pop("return_lse")
    return prepare(**call.arguments)[0]
