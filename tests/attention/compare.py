"""Results of a call with all gradients, and whether they are as exact as PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import _accuracy, dispatch
from tests.attention import oracle
from tests.tolerance import assert_as_exact_as_torch

NAMES = ("out", "lse", "dquery", "dkey", "dvalue", "dmask", "dsinks")


def results(
    function, tensors, dout, dlse, mask_gradient: bool = False, **keywords
) -> list[Tensor | None]:
    """out, lse and the gradients of query, key, value, mask and sinks, None where there is none."""
    given = [None if x is None else x.detach() for x in tensors]
    leaves = [x if n != 3 or mask_gradient else None for n, x in enumerate(given)]
    wanted = [x.requires_grad_() for x in leaves if x is not None]
    query, key, value, mask, sinks = given
    out, lse = function(query, key, value, attn_mask=mask, sinks=sinks, **keywords)
    loss = (out * dout.to(out.dtype)).sum()
    if dlse is not None:
        # A row that sees nothing has an lse of -inf, which takes part in no loss.
        loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse.to(lse.dtype)).sum()
    found = iter(torch.autograd.grad(loss, wanted))
    gradients = [None if x is None else next(found) for x in leaves]
    return [out.detach(), lse.detach(), *gradients]


def check(
    function,
    tensors,
    dlse: bool = True,
    cancels: bool = False,
    formula=oracle.attention,
    split=None,
    **keywords,
) -> list[Tensor | None]:
    """`function`'s results are as exact as those of the formula in the same dtype.

    In the same dtype it is evaluated in two orders, as PyTorch's unfused path does and from lse and
    the rounded out as every fused backward, PyTorch's too, does; the larger error counts.

    Gradients in float32 are sums that cancel.  Computed in any order a sum of n terms t is off by
    up to (n - 1) eps/2 sum |t| (Higham, "Accuracy and Stability of Numerical Algorithms", 4.2), so
    the floor of one eps is taken of sum |t|, for both sides alike: the factor 2 stays.  Without it
    PyTorch's own fused op fails on a dozen of the small calls here.  `cancels` is for calls where
    most queries see hardly more than one key: dp is then equal to delta but for rounding, and the
    terms are those of the two.  For the lse, m + log(l), they are at least 1: l with a relative
    error of eps moves it by eps.
    `split` gives the tensors and dout of each packed sequence, which `formula` takes together.
    """
    query, key, value, mask, sinks = tensors
    shape = (*query.shape[:3], value.shape[3])
    dout = torch.randn(shape).to(query.dtype)
    grad_lse = torch.randn(shape[:3]) if dlse else None
    ours = results(function, tensors, dout, grad_lse, **keywords)
    kept_lse = lse_gradient_for_rounded_out(formula, tensors, dout, grad_lse, keywords)
    variants = [
        results(formula, tensors, dout, grad_lse, **keywords),
        results(formula, tensors, dout, kept_lse, from_lse=True, **keywords),
    ]
    doubles = [x.double() if x is not None and x.is_floating_point() else x for x in tensors]
    exact = results(formula, doubles, dout, grad_lse, **keywords)
    assert ours[0].dtype == query.dtype
    assert ours[1].dtype == torch.promote_types(query.dtype, torch.float32)
    for gradient, tensor in zip(ours[2:], tensors, strict=True):
        assert gradient is None or gradient.dtype == tensor.dtype
    theirs = [larger_error(*three) for three in zip(*variants, exact, strict=True)]
    if runs_in_aten(query, key):
        theirs[1] = exact[1] + error_of_fused_lse(query, key, keywords.get("is_causal", False))
    terms = None
    if (formula is oracle.attention or split) and (cancels or query.dtype == torch.float32):
        parts = split(doubles, dout.double()) if split else [(doubles, dout.double())]
        each = [sizes(*part, keywords, cancels) for part in parts]
        terms = [max(of_result) for of_result in zip(*each, strict=True)]
    assert_as_exact_as_torch(ours, theirs, exact, NAMES, terms)
    return ours


def larger_error(first: Tensor | None, second: Tensor | None, exact: Tensor | None) -> Any:
    if first is None or second is None or exact is None:
        return None
    errors = [_accuracy.error(x, exact) for x in (first, second)]
    return first if errors[0] >= errors[1] else second


def lse_gradient_for_rounded_out(formula, tensors, dout, dlse, keywords) -> Tensor:
    """The gradient of lse with which the formula computes delta = dout . out - dlse as if from the
    rounded out: all that is left of it in the backward."""
    floats = [x.float() if x is not None and x.is_floating_point() else x for x in tensors]
    with torch.no_grad():
        out = formula(*floats[:4], sinks=floats[4], **keywords)[0]
    lost = (dout.float() * (out.to(dout.dtype).float() - out)).sum(-1)
    return -lost if dlse is None else dlse - lost


def runs_in_aten(query: Tensor, key: Tensor) -> bool:
    """Whether `eager` is forced and may pass a 16-bit call on to PyTorch's fused attention, whose
    exp is good for 16 bits only; it is its own yardstick then."""
    if query.dtype.itemsize != 2 or not key.shape[2] or not query.numel():
        return False
    return dispatch.explain("attention", query, key, key, enable_gqa=True).backend == "eager"


def error_of_fused_lse(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """What PyTorch's fused attention for CPUs adds to the lse of a plain call."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    scores = query.double() @ key.double().transpose(-2, -1) * query.shape[3] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return flash(query, key, key, 0.0, causal)[1] - scores.logsumexp(-1)


def sizes(tensors, dout: Tensor, keywords, cancels: bool) -> list[float]:
    """The sizes of what each result is summed from: of p (dp - delta) times keys or queries."""
    query, key, value, mask, sinks = tensors
    if not key.numel() or not query.numel():
        return [0.0] * len(NAMES)
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    with torch.no_grad():
        found = oracle.weights(query, key, mask, sinks=sinks, **keywords)
        p, lse = found[..., :-1], found[..., -1:]
        if cancels:
            dp = dout.abs() @ value.abs().transpose(-2, -1)
        else:
            dp = (dout @ value.transpose(-2, -1)).abs()
        dp = dp / (1 - keywords.get("dropout_p", 0.0))
        delta = (p * dp).sum(-1, keepdim=True)
        ds = p * (dp + delta)
        scale = abs(keywords.get("scale") or query.shape[3] ** -0.5)
        dquery = scale * (ds @ key.abs()).max().item()
        dkey = scale * (ds.transpose(-2, -1) @ query.abs()).max().item()
        dsinks = 0.0
        if sinks is not None:
            dsinks = ((sinks[:, None, None] - lse).exp() * delta).sum((0, 2, 3)).max().item()
    return [0.0, 1.0, dquery, dkey, 0.0, ds.max().item(), dsinks]
