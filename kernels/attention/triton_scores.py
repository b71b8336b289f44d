"""What the Triton attention kernels share on the device: geometry of a block, scores, dropout.

A program owns a block of queries (or of keys) and walks over blocks of the other side.  `i` and `j`
are a tile's query and key numbers, shaped to broadcast, so every helper serves tiles of
[queries, keys] and of [keys, queries].  Scores are powers of two: natural ones times log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_REST = tl.constexpr(1.92596298909109e-8)  # what rounding LOG2_E to float32 leaves
LN_2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**30)  # a window that reaches past every position


@triton.jit
def sequence(cu_ptr, number):
    """(first row, rows) of a packed sequence."""
    first = tl.load(cu_ptr + number)
    return first, tl.load(cu_ptr + number + 1) - first


@triton.jit
def head_side(ptr, strides, batch, head, first, width, BLOCK_D: tl.constexpr, VEC: tl.constexpr):
    """One head's rows, for load_rows: (pointer, stride of a row, offsets in a row, width).

    Strides and width come in units of VEC: the products show Triton where vectors may begin.
    """
    stride_b, stride_h, stride_t = strides
    start = batch * stride_b + tl.cast(head, tl.int64) * stride_h + first * stride_t
    return ptr + start * VEC, stride_t * VEC, tl.arange(0, BLOCK_D), width * VEC


@triton.jit
def _row_pointers(side, start, rows, WIDE: tl.constexpr):
    """Of `rows`, which lie in the block that begins at row `start`; WIDE: anywhere.

    The offsets within a block stay the same from block to block and fit 32 bits, so that a loop
    over blocks needs one 64-bit pointer and not one for each vector.
    """
    ptr, stride, offs_d, width = side
    if WIDE:
        ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    else:
        ptr += tl.cast(start, tl.int64) * stride
        ptrs = ptr + ((rows - start)[:, None] * stride + offs_d[None, :])
    return ptrs


@triton.jit
def load_rows(side, start, rows, valid, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """[rows, BLOCK_D] of one head; zeros past its width, and in rows that are not `valid`.

    `valid` is None where all rows are; WHOLE: the width is BLOCK_D.
    """
    ptrs = _row_pointers(side, start, rows, WIDE)
    if valid is not None and WHOLE:
        tile = tl.load(ptrs, mask=valid[:, None], other=0.0)
    elif valid is not None:
        tile = tl.load(ptrs, mask=valid[:, None] & (side[2] < side[3])[None, :], other=0.0)
    elif WHOLE:
        tile = tl.load(ptrs)
    else:
        tile = tl.load(ptrs, mask=(side[2] < side[3])[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(side, start, rows, valid, tile, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """Writes [rows, BLOCK_D] of one head in the dtype of its pointer, but for rows not valid."""
    inside = valid[:, None] if WHOLE else valid[:, None] & (side[2] < side[3])[None, :]
    ptrs = _row_pointers(side, start, rows, WIDE)
    tl.store(ptrs, tile.to(side[0].dtype.element_ty), mask=inside)


@triton.jit
def block_range(first, last, before, after, length, BLOCK: tl.constexpr):
    """Blocks of the other side that places first ... last see, each from before to after its own.

    Returns (begin, plain_begin, plain_end, end): blocks begin ... end hold all that any of the
    places sees, and every place sees all of the plain ones.
    """
    low = tl.maximum(first - before, 0)
    high = tl.minimum(last + after + 1, length)
    begin = low // BLOCK
    end = tl.where(low < high, tl.cdiv(high, BLOCK), begin)
    plain_begin = tl.cdiv(tl.maximum(last - before, 0), BLOCK)
    plain_end = tl.maximum(tl.minimum(first + after + 1, length), 0) // BLOCK
    plain_begin = tl.minimum(tl.maximum(plain_begin, begin), end)
    plain_end = tl.minimum(tl.maximum(plain_end, plain_begin), end)
    return begin, plain_begin, plain_end, end


@triton.jit
def global_rank(rank_ptr, position, global_tokens, length):
    """How many global positions are smaller than `position`, which is 0 ... length."""
    if rank_ptr is None:
        rank = tl.minimum(tl.minimum(position, global_tokens), length)
    else:
        rank = tl.load(rank_ptr + position)
    return rank


@triton.jit
def global_position(list_ptr, entry, count):
    """Positions of entries of the ascending list of global positions; past its end, of none."""
    if list_ptr is None:
        position = entry
    else:
        position = tl.load(list_ptr + entry, mask=entry < count, other=0)
    return position


@triton.jit
def is_global(rank_ptr, position, global_tokens, length):
    """Whether positions, of which some may lie outside the sequence, are global ones."""
    inside = (position >= 0) & (position < length)
    if rank_ptr is None:
        chosen = position < global_tokens
    else:
        rank = tl.load(rank_ptr + position, mask=inside, other=0)
        chosen = tl.load(rank_ptr + position + 1, mask=inside, other=0) > rank
    return inside & chosen


@triton.jit
def own_block(
    block,
    blocks,  # of the length; further ones are of the list of global positions
    offset,  # a row's position is its number + offset
    length,
    list_ptr,
    rank_ptr,
    global_tokens,
    length_k,
    BLOCK: tl.constexpr,
    GLOBALS: tl.constexpr,
):
    """The queries or keys a program owns: (rows, valid, stored, first, last, listed).

    Rows at global positions are computed by the programs that own them as `listed`, so the others
    do not store them.  `first` > `last` where there are none.
    """
    start = block * BLOCK
    rows = start + tl.arange(0, BLOCK)
    valid = rows < length
    stored, listed = valid, block >= blocks
    first, last = start, tl.minimum(start + BLOCK, length) - 1
    if GLOBALS:
        count = global_rank(rank_ptr, length_k, global_tokens, length_k)
        entries = rows - blocks * BLOCK
        gathered = global_position(list_ptr, tl.maximum(entries, 0), count) - offset
        inside = (entries < count) & (gathered >= 0) & (gathered < length)
        stored &= ~is_global(rank_ptr, rows + offset, global_tokens, length_k)
        stored = tl.where(listed, inside, stored)
        valid = tl.where(listed, inside, valid)
        rows = tl.where(listed, gathered, rows)
        first = tl.min(tl.where(valid, rows, length), 0)
        last = tl.max(tl.where(valid, rows, -1), 0)
    return rows, valid, stored, first, last, listed


@triton.jit
def edge_block(
    step, begin, plain_begin, plain_end, edges, entry, count, length, list_ptr, offset,
    BLOCK: tl.constexpr, GLOBALS: tl.constexpr,
):  # fmt: skip
    """What a walk over the blocks that are not plain, then over listed positions, comes to.

    Returns (numbers [BLOCK], which are valid, the first, whether they are listed): the first
    `edges` steps are blocks, the others BLOCK positions each of entries `entry` ... `count` of the
    list, made numbers by taking `offset`.
    """
    block = begin + step
    block = tl.where(block < plain_begin, block, block + plain_end - plain_begin)
    numbers = block * BLOCK + tl.arange(0, BLOCK)
    valid = numbers < length
    listed = step >= edges
    if GLOBALS:
        entries = entry + (step - edges) * BLOCK + tl.arange(0, BLOCK)
        gathered = global_position(list_ptr, tl.maximum(entries, 0), count) - offset
        inside = (entries < count) & (gathered >= 0) & (gathered < length)
        valid = tl.where(listed, inside, valid)
        numbers = tl.where(listed, gathered, numbers)
    return numbers, valid, block * BLOCK, listed


@triton.jit
def both(rows_valid, columns_valid):
    """Where a tile lies inside the tensors; None stands for all of a side, not of both."""
    if rows_valid is None:
        inside = columns_valid[None, :]
    elif columns_valid is None:
        inside = rows_valid[:, None]
    else:
        inside = rows_valid[:, None] & columns_valid[None, :]
    return inside


@triton.jit
def seen(distance, left, right, future, listed, GLOBALS: tl.constexpr):
    """What a tile may use: the window's part, or of listed global positions what lies outside it.

    `distance` is j - p.  So a pair is met once, in its block or in the list.
    """
    near = (distance >= -left) & (distance <= right)
    if GLOBALS:
        near = tl.where(listed, (distance <= future) & ~near, near)
    return near


@triton.jit
def tanh(x):
    """To two units in the last place; 1 - 2 / (exp(2 x) + 1) loses digits where x is small."""
    square = x * x
    # (tanh(x) / x - 1) / x**2 for |x| < 0.6, least squares at Chebyshev points
    series = -0.006276390049606562 * square + 0.021116215735673904
    series = series * square - 0.053875137120485306
    series = series * square + 0.13332924246788025
    series = series * square - 0.3333333134651184
    small = x + x * square * series
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(square < 0.36, small, tl.where(x < 0.0, -large, large))


@triton.jit
def scores(qk, i, j, valid, visible, mask_ptr, slope, features, SOFTCAP: tl.constexpr):
    """(scores, how fast they grow with qk): the second over scale, 1 without a softcap.

    `valid`: where the tile lies inside the tensors; `visible`: None in a plain block.
    """
    # A query's position is i + offset.  The scale is over the cap where there is one; scale, cap
    # and slope are times log2(e); the mask is the head's.
    offset, scale, cap, stride_mask_m, stride_mask_n = features
    s = qk * scale
    growth = 1.0
    if SOFTCAP:
        capped = tanh(s)
        s = capped * cap
        growth = 1.0 - capped * capped
    if slope is not None:
        s -= slope * tl.abs(j - i - offset).to(tl.float32)
    if mask_ptr is not None:
        ptrs = mask_ptr + i.to(tl.int64) * stride_mask_m + j * stride_mask_n
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(tl.load(ptrs, mask=valid, other=0) != 0, s, float("-inf"))
        else:
            s += tl.load(ptrs, mask=valid, other=0.0).to(tl.float32) * LOG2_E
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    return s, growth


@triton.jit
def kept(seed, dropout, rows, keys, first_key, GATHERED: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Which weights [BLOCK_M, BLOCK_N] dropout keeps: those with 16 random bits >= threshold.

    One call of Philox4x32-10 serves the keys 32 a + 8 n + 2 t + {0, 1}: word n, its low half for
    the even key.  Unless GATHERED the keys follow on `first_key`, a multiple of 32, and no call is
    made twice.  TRANSPOSED: [BLOCK_N, BLOCK_M].
    """
    number, threshold = dropout
    BLOCK_M: tl.constexpr = rows.shape[0]
    BLOCK_N: tl.constexpr = keys.shape[0]
    i, head, zero = rows.to(tl.uint32)[:, None], number.to(tl.uint32), (number * 0).to(tl.uint32)
    if GATHERED:
        call = ((keys >> 5) * 4 + ((keys >> 1) & 3)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, i, call, head, zero)
        word = ((keys >> 3) & 3)[None, :]
        bits = tl.where(word < 2, tl.where(word < 1, w0, w1), tl.where(word < 3, w2, w3))
        bits = (bits >> ((keys & 1) * 16).to(tl.uint32)[None, :]) & 0xFFFF
        keep = bits >= threshold
    else:
        call = (first_key // 8 + tl.arange(0, BLOCK_N // 8)).to(tl.uint32)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, i, call, head, zero)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., x, y] is word 2 x + y
        halves = tl.join(words & 0xFFFF, words >> 16) >= threshold
        halves = tl.reshape(halves, (BLOCK_M, BLOCK_N // 32, 4, 4, 2))  # a, t, n, even and odd
        keep = tl.reshape(tl.permute(halves, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))
    return tl.trans(keep) if TRANSPOSED else keep


@triton.jit
def weights(
    qk,  # products of queries and keys
    lse,  # of the queries, as powers of two
    lse_rest,  # or None: see row_statistics
    i,
    j,
    valid,
    visible,
    mask_ptr,
    slope,
    features,
    SCORES: tl.constexpr,
):
    """(p before dropout, how fast scores grow with the scaled products)."""
    growth = 1.0
    if SCORES == 0 and visible is None:
        s = tl.fma(qk, features[1], -lse)
    else:
        s, growth = scores(qk, i, j, valid, visible, mask_ptr, slope, features, SCORES == 2)
        s -= lse
    if lse_rest is not None:
        s -= lse_rest
    return tl.exp2(s), growth


@triton.jit
def row_statistics(lse_ptr, delta_ptr, rows, valid):
    """lse as a power of two, what its rounding leaves, and delta.

    Rows that are not `valid` (None: all are) weigh 0.  In float32 gradients the rounding of
    lse times log2(e) would show.
    """
    if valid is None:
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
    else:
        lse = tl.load(lse_ptr + rows, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=valid, other=0.0)
    # A row that saw nothing has scores of -inf only: any finite lse gives it weights of 0.
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    power = lse * LOG2_E
    rest = tl.fma(lse, LOG2_E, -power) + lse * LOG2_E_REST
    return power, tl.where(lse == float("inf"), 0.0, rest), delta


@triton.jit
def list_globals_kernel(
    mask_ptr,  # uint8 [B, T], strided
    list_ptr,  # int32 [B, T]: the global positions of each batch, ascending
    rank_ptr,  # int32 [B, T + 1]: how many there are before each position
    stride_b,
    stride_t,
    length,
    global_tokens,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    list_ptr += batch * length
    rank_ptr += batch * (length + 1)
    count = 0
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        ptrs = mask_ptr + batch * stride_b + t.to(tl.int64) * stride_t
        chosen = (tl.load(ptrs, mask=t < length, other=0) != 0) | (t < global_tokens)
        chosen = (chosen & (t < length)).to(tl.int32)
        rank = count + tl.cumsum(chosen, 0) - chosen
        tl.store(rank_ptr + t, rank, mask=t < length)
        tl.store(list_ptr + rank, t, mask=chosen != 0)
        count += tl.sum(chosen, 0)
    tl.store(rank_ptr + length, count)
