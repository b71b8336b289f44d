"""Cross-entropy of rows of logits in plain torch: the backends' contract, the tests' oracle, the
fake of the ops, and the second derivative.

Runs in any floating dtype; float64 stays float64, everything else is computed in float32.  Nothing
is checked here: a target out of range makes its row NaN, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unsupported(*_: object) -> str | None:
    return None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def logits(input: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """x' = softcap * tanh(logit_scale * x / softcap), or logit_scale * x where softcap is 0."""
    x = _wide(input)
    if logit_scale != 1.0:
        x = x * logit_scale
    return softcap * torch.tanh(x / softcap) if softcap else x


def log_sum_exp(x: Tensor) -> Tensor:
    """[2, N]: lse of every row of x [N, C], then what its rounding left over.  Differentiable.

    lse is the sum of the row's maximum and of log(sum(exp(x - maximum))); far from 0 its rounding
    would show in every probability exp(x - lse), so both parts are kept.  NaN for a row with a NaN
    or +inf and for a row of nothing but -inf, as torch.log_softmax has it.
    """
    top = x.amax(1)
    top = torch.where(top.isinf(), torch.nan, top).detach()
    log = torch.logsumexp(x - top[:, None], 1)
    lse = top + log
    # The error of the addition, exactly (Knuth's TwoSum); a constant to autograd.
    high, low = lse.detach(), log.detach()
    part = high - top
    rest = (top - (high - part)) + (low - part)
    return torch.stack((lse, rest))


def class_weights(weight: Tensor | None, x: Tensor) -> Tensor:
    """[C] in x's dtype: `weight`, or ones."""
    return x.new_ones(x.shape[1]) if weight is None else weight.to(x.dtype)


def _picked(target: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N] each: target made safe to index with, whether it is ignored, whether it is a class."""
    ignored = target == ignore_index
    valid = (target >= 0) & (target < classes)
    return torch.where(valid & ~ignored, target, 0), ignored, valid


def forward(
    input: Tensor,  # [N, C], any row stride, last stride 1
    target: Tensor,  # int64 [N], or probabilities [N, C] in input's dtype or float32
    weight: Tensor | None,  # [C], any floating dtype
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,  # 0: none
    logit_scale: float,
    stats: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """losses [N], lse [2, N], and with `stats` log_prob [N] (indices only) and best [N].

    lse [0] is log(sum(exp(x'))) of every row, ignored or not, lse [1] what its rounding left over.
    log_prob is x'_target - lse, 0 for ignored rows.  best is the first class of the largest x (the
    smallest where logit_scale is negative), a NaN counting as largest.  Floating outputs are
    float32, or float64 for float64 input; best is int64.
    """
    x = logits(input, softcap, logit_scale)
    lse = log_sum_exp(x)
    minus_log_prob = (lse[0][:, None] - x) + lse[1][:, None]  # [N, C]
    weights = class_weights(weight, x)
    log_prob = best = None
    if target.is_floating_point():
        q = smoothed(target.to(x.dtype), label_smoothing)
        losses = (q * weights * minus_log_prob).sum(1) + z_loss * lse[0].square()
    else:
        safe, ignored, valid = _picked(target, x.shape[1], ignore_index)
        picked = minus_log_prob.gather(1, safe[:, None])[:, 0]
        losses = (1 - label_smoothing) * weights[safe] * picked
        if label_smoothing:
            losses = losses + label_smoothing / x.shape[1] * (weights * minus_log_prob).sum(1)
        if z_loss:
            losses = losses + z_loss * lse[0].square()
        losses = torch.where(ignored, 0, torch.where(valid, losses, torch.nan))
        if stats:
            log_prob = torch.where(ignored, 0, torch.where(valid, -picked, torch.nan))
    if stats:
        best = (input if logit_scale >= 0 else -input).argmax(1)
    return losses, lse, log_prob, best


def smoothed(q: Tensor, label_smoothing: float) -> Tensor:
    return q * (1 - label_smoothing) + label_smoothing / q.shape[1] if label_smoothing else q


def backward(
    dlosses: Tensor,  # [N]; stride 0 where all rows have the same gradient
    dlse: Tensor | None,  # [N], the gradient of lse[0]; None: 0
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    stats: bool,
    lse: Tensor,  # [2, N], as forward returned it
    output_mask: Sequence[bool],  # dinput, dtarget
    inplace: bool,  # write dinput over input, whose rows must not overlap
) -> tuple[Tensor | None, Tensor | None]:
    """dinput [N, C] contiguous in input's dtype (or input itself), dtarget of probabilities.

    An ignored row receives dlse alone, and exactly 0 where that is None.
    """
    x = logits(input, softcap, logit_scale)
    high, rest = lse
    weights = class_weights(weight, x)
    classes = x.shape[1]
    probability = torch.exp((x - high[:, None]) - rest[:, None])
    g = dlosses.to(x.dtype)
    dinput = dtarget = None
    if target.is_floating_point():
        q = smoothed(target.to(x.dtype), label_smoothing) * weights
        slope = g * (q.sum(1) + 2 * z_loss * high)
        dx = slope[:, None] * probability - g[:, None] * q
        if output_mask[1]:
            minus_log_prob = (high[:, None] - x) + rest[:, None]
            dtarget = (g[:, None] * (1 - label_smoothing) * weights * minus_log_prob).to(
                target.dtype
            )
    else:
        safe, ignored, valid = _picked(target, classes, ignore_index)
        on = (1 - label_smoothing) * weights[safe]
        slope = on + label_smoothing / classes * weights.sum() + 2 * z_loss * high
        dx = slope[:, None] * probability - label_smoothing / classes * weights
        dx = dx - torch.zeros_like(x).scatter(1, safe[:, None], on[:, None])
        dx = torch.where(valid[:, None], g[:, None] * dx, torch.nan)
        dx = torch.where(ignored[:, None], 0, dx)
    if dlse is not None:
        dx = dx + dlse.to(x.dtype)[:, None] * probability
    if output_mask[0]:
        if softcap:
            dx = dx * (1 - (x / softcap).square())
        dinput = (dx * logit_scale).to(input.dtype).contiguous()
        if inplace:
            dinput = input.copy_(dinput)
    return dinput, dtarget
