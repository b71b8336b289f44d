"""What the Triton kernels of cross-entropy share: logits, shares, pieces of a row, its results.

The loss of a row is sum_c k_c (lse - x'_c) + z_loss lse^2, where k_c is the class's share: of the
target `on` w_c, and of every class w_c (on q_c + off) with probabilities, w_c off with smoothing.
The maths is in README.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**31))  # below the key of every number
NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def tanh(u):
    size, square = tl.abs(u), u * u
    # Up to 0.625 the polynomial of Cephes' tanhf (S. Moshier): the other form would cancel there.
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, small * square * u + u, tl.where(u < 0, -large, large))


@triton.jit
def logits(raw, softcap, logit_scale, SOFTCAP: tl.constexpr):
    x = raw.to(tl.float32) * logit_scale
    if SOFTCAP:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def shares(
    q_ptr,  # probabilities
    q_place,  # [...] where those of these classes lie
    weight_ptr,  # [classes]
    column,  # [...]
    mask,  # [...]
    on,
    off,
    PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """k_c, the target's own left out; 0 outside of the mask."""
    q = 0.0
    if PROBABILITIES:
        q = tl.load(q_ptr + q_place, mask=mask, other=0.0)
    return shares_of(q, weight_ptr, column, mask, mask, on, off, PROBABILITIES, HAS_WEIGHT)


@triton.jit
def shares_of(
    q,  # [...], of any value outside of the mask
    weight_ptr,  # [classes]
    column,  # [...] or what broadcasts to it
    mask,  # [...]
    mask_column,  # of `column`
    on,
    off,
    PROBABILITIES: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    share = tl.where(mask, off, 0.0)
    if PROBABILITIES:
        share = tl.where(mask, on * q.to(tl.float32) + off, 0.0)
    if HAS_WEIGHT:
        share *= tl.load(weight_ptr + column, mask=mask_column, other=0.0)
    return share


@triton.jit
def keys(raw, mask, logit_scale):
    """int32, in the order of the logits: a NaN above all numbers, one zero."""
    x = raw.to(tl.float32)
    x = tl.where(logit_scale < 0, -x, x)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(mask, tl.where(x != x, 0x7FFFFFFF, key), NO_KEY)


@triton.jit
def base_of(top):
    """What sums are relative to: 0 before the first finite logit, for -inf - -inf is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def pieces(start, count, VEC: tl.constexpr):
    """Elements before the first sector (32 bytes, two vectors) and in whole vectors after it.

    `start` and `count` are those of a row or a part of it; the first vector is at an offset that
    Triton can see to be a multiple of VEC.
    """
    SECTOR: tl.constexpr = 2 * VEC
    first = tl.cdiv(start, SECTOR) * SECTOR
    head = tl.minimum(first - start, count).to(tl.int32)
    return first, head, (count - head) // VEC * VEC


@triton.jit
def ends(head, body, count, VEC: tl.constexpr):
    """Columns of the elements before and after the vectors, and which there are: [4 * VEC]."""
    SECTOR: tl.constexpr = 2 * VEC
    place = tl.arange(0, 2 * SECTOR)
    column = tl.where(place < SECTOR, place, head + body + place - SECTOR)
    return column, tl.where(place < SECTOR, place < head, column < count)


@triton.jit
def vectors(UNROLL: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """Places of one step's elements, [UNROLL, THREADS, VEC]: sums over axes 2 and 0 then stay
    inside a thread, and a warp's loads are of neighbours."""
    step = tl.arange(0, UNROLL)[:, None, None] * (THREADS * VEC)
    return step + tl.arange(0, THREADS)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]


@triton.jit
def of_rows(ptr, place, mask, SPREAD: tl.constexpr):
    """Values at `place`, each loaded by one of SPREAD threads.

    Of fewer values than a program has threads Triton has every thread load all that it needs: for
    short rows as many bytes as the logits.  The gather hands them out by shuffles; a change of
    layout without it would be stmatrix on sm_90, with several threads storing to one place.
    """
    if SPREAD == 1:
        values = tl.load(ptr + place, mask=mask, other=0)
    else:
        lane = tl.arange(0, SPREAD)[:, None]
        spread = tl.load(ptr + place[None, :] + lane * 0, mask=mask[None, :] & (lane == 0), other=0)
        values = tl.gather(tl.sum(spread, 0), tl.arange(0, place.shape[0]), 0)
    return values


@triton.jit
def finish(
    row,  # [...] int64
    mask,
    top,  # [...] the largest logit
    total,  # sum of e^(x' - top)
    cost,  # sum of k_c (base_of(top) - x'_c)
    mass,  # sum of k_c
    logit,  # the target's
    best,  # column of the largest
    target,
    weight_ptr,
    losses_ptr,
    lse_ptr,
    log_prob_ptr,
    best_ptr,
    rows,
    classes,
    ignore_index,
    on,
    z_loss,
    PROBABILITIES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    STATS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    top = tl.where(tl.abs(top) == float("inf"), float("nan"), top)
    log_total = tl.log(total)
    lse = top + log_total
    # The error of the addition, exactly (Knuth's TwoSum).
    part = lse - top
    rest = (top - (lse - part)) + (log_total - part)
    tl.store(lse_ptr + row, lse, mask=mask)
    tl.store(lse_ptr + rows + row, rest, mask=mask)
    loss = tl.where(z_loss == 0, 0.0, z_loss * lse * lse)
    if SHARED:
        loss += cost + mass * log_total
    if not PROBABILITIES:
        ignored = target == ignore_index
        there = (target >= 0) & (target < classes)
        # Not logit - lse, which would show the rounding of lse in the loss of a sure row.
        log_prob = tl.where(there, (logit - top) - log_total, float("nan"))
        weighted = on * log_prob
        if HAS_WEIGHT:
            weighted *= of_rows(weight_ptr, tl.where(there, target, 0), mask, SPREAD)
        loss = tl.where(ignored, 0.0, loss - weighted)
        if STATS:
            tl.store(log_prob_ptr + row, tl.where(ignored, 0.0, log_prob), mask=mask)
    tl.store(losses_ptr + row, loss, mask=mask)
    if STATS:
        tl.store(best_ptr + row, best.to(tl.int64), mask=mask)


@triton.jit
def factors(
    row,  # [...] int64
    mask,
    dlosses_ptr,
    dlse_ptr,
    target_ptr,
    weight_ptr,
    lse_ptr,
    mass_ptr,
    dlosses_stride,
    dlse_stride,
    rows,
    classes,
    ignore_index,
    on,
    off,
    z_loss,
    PROBABILITIES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Of rows: lse, its rest, the factors of softmax and of k_c, what the target's class gets
    less, its column, and whether the gradient is 0 whatever the logits."""
    lse = of_rows(lse_ptr, row, mask, SPREAD)
    rest = of_rows(lse_ptr + rows, row, mask, SPREAD)
    g = of_rows(dlosses_ptr, row * dlosses_stride, mask, SPREAD)
    if PROBABILITIES:
        target = row * 0 - 1  # no column
        ignored = target == 0
        mass = of_rows(mass_ptr, row, mask, SPREAD)
        less = g * 0.0
        slope = g * (mass + 2.0 * z_loss * lse)
    else:
        target = of_rows(target_ptr, row, mask, SPREAD)
        ignored = target == ignore_index
        there = (target >= 0) & (target < classes)
        less = tl.zeros_like(g) + on
        if HAS_WEIGHT:
            less *= of_rows(weight_ptr, tl.where(there, target, 0), mask, SPREAD)
        mass = less
        if SHARED:
            if HAS_WEIGHT:
                mass += off * tl.load(mass_ptr)
            else:
                mass += off * classes
        g = tl.where(ignored, 0.0, g)
        slope = g * (mass + 2.0 * z_loss * lse)
        slope = tl.where(ignored, 0.0, tl.where(there, slope, float("nan")))
        less *= g
    zero = ignored
    if HAS_DLSE:
        slope += of_rows(dlse_ptr, row * dlse_stride, mask, SPREAD)
        zero = ignored & (row < 0)
    return lse, rest, slope, g, less, target, zero


@triton.jit
def gradient(
    raw,
    share,
    is_target,
    lse,
    rest,
    slope,
    g,
    less,
    softcap,
    logit_scale,
    SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    x = logits(raw, softcap, logit_scale, SOFTCAP)
    dx = slope * tl.exp((x - lse) - rest)
    if SHARED:
        dx -= g * share
    dx = tl.where(is_target, dx - less, dx)
    if SOFTCAP:
        slope_of_cap = x / softcap
        dx *= 1.0 - slope_of_cap * slope_of_cap
    return dx * logit_scale
