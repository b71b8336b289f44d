"""Which blocks a Triton attention program walks over: the window's, and those of global positions.

A program owns a block of queries (or of keys) and walks over blocks of the other side.  Those that
every own row sees whole come first and carry no mask; those on the diagonal, at the window's edges
and at the end follow, then the global positions outside the window, gathered from a list.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(2**30)  # a window that reaches past every position


@triton.jit
def sequence(b, cu_q_ptr, cu_k_ptr, rows_q, rows_k, lower_right):
    """Of sequence b: (batch entry, first query, first key, numbers of both, offset).

    A query's position is its number + offset.
    """
    batch, first_q, first_k, length_q, length_k = b, 0, 0, rows_q, rows_k
    if cu_q_ptr is not None:
        batch = 0
        first_q, first_k = tl.load(cu_q_ptr + b), tl.load(cu_k_ptr + b)
        length_q = tl.load(cu_q_ptr + b + 1) - first_q
        length_k = tl.load(cu_k_ptr + b + 1) - first_k
    offset = lower_right * (length_k - length_q)
    return batch, first_q, first_k, length_q, length_k, offset


@triton.jit
def block_range(ends, reach, length, BLOCK: tl.constexpr):
    """Blocks of the other side that places first ... last see, each from before to after its own.

    Returns (begin, plain_begin, plain_end, end): blocks begin ... end hold all that any of the
    places sees, and every place sees all of the plain ones.
    """
    first, last = ends
    before, after = reach
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
def seen(i, j, sight, listed, GLOBALS: tl.constexpr):
    """What a tile may use: the window's part, or of listed global positions what lies outside it.

    So a pair is met once, in its block or in the list.
    """
    offset, left, right, future = sight
    distance = j - offset - i
    near = (distance >= -left) & (distance <= right)
    if GLOBALS:
        near = tl.where(listed, (distance <= future) & ~near, near)
    return near


@triton.jit
def walk(
    add,  # adds to the state what a block of the other side gives
    state,  # what grows from block to block
    fixed,  # what `add` is told of the own rows and of all scores
    mask_ptr,  # of the head, or None
    slope,  # of ALiBi as a power of two, or None
    seed,  # of dropout, or None
    ends,  # of the own rows: the first and the last of them, as places on the other side
    reach,  # how far they see before and after their places
    length,  # of the other side
    listed,  # whether the own rows are global: then they see everything, and no list follows
    entries,  # of the list: the first, and where it ends
    list_ptr,
    offset,  # a listed position is a number of the other side + offset
    BLOCK: tl.constexpr,
    SCORES: tl.constexpr,
    GLOBALS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`state` after every block that the own rows see: plain ones, edges, listed positions."""
    begin, plain_begin, plain_end, end = block_range(ends, reach, length, BLOCK)
    for block in range(plain_begin, plain_end):
        numbers = block * BLOCK + tl.arange(0, BLOCK)
        state = add(
            state, fixed, mask_ptr, slope, seed, block * BLOCK, numbers, None, False,
            SCORES, GLOBALS, WHOLE, WIDE, SLICE, PRECISION,
        )  # fmt: skip
    edges = plain_begin - begin + end - plain_end
    steps = edges
    if GLOBALS:
        steps += tl.where(listed, 0, tl.cdiv(entries[1] - entries[0], BLOCK))
    for step in range(steps):
        block = begin + step
        block = tl.where(block < plain_begin, block, block + plain_end - plain_begin)
        numbers = block * BLOCK + tl.arange(0, BLOCK)
        valid, from_list = numbers < length, step >= edges
        if GLOBALS:
            entry = entries[0] + (step - edges) * BLOCK + tl.arange(0, BLOCK)
            gathered = global_position(list_ptr, tl.maximum(entry, 0), entries[1]) - offset
            inside = (entry < entries[1]) & (gathered >= 0) & (gathered < length)
            valid = tl.where(from_list, inside, valid)
            numbers = tl.where(from_list, gathered, numbers)
        state = add(
            state, fixed, mask_ptr, slope, seed, block * BLOCK, numbers, valid, from_list,
            SCORES, GLOBALS, WHOLE, WIDE, SLICE, PRECISION,
        )  # fmt: skip
    return state


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
