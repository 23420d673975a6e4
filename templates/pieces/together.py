"""Rows that choose together: blocks of ROWS rows at multiples of ROWS of their sequence's positions.

A sequence has the blocks of which it has a row, be it one.  All blocks are numbered one sequence after the
other, with gaps: n rows meet at most n // ROWS + 2 blocks.
SEQ is int32[Z, 6], a row a sequence: q_start, q_first, q_len, q_offset, k_first, k_len.
"""

import triton
import triton.language as tl


@triton.jit
def block_at(p, ROWS: tl.constexpr):
    """The block of position p, which may be negative."""
    return (p - tl.where(p < 0, ROWS - 1, 0)) // ROWS


@triton.jit
def count_blocks(q_offset, q_len, ROWS: tl.constexpr):
    """How many blocks have one of a sequence's rows."""
    last = block_at(q_offset + q_len - 1, ROWS)
    return tl.where(q_len > 0, last - block_at(q_offset, ROWS) + 1, 0)


@triton.jit
def first_block(SEQ, z, ROWS: tl.constexpr):
    """The number of a sequence's first block among those of all."""
    return tl.load(SEQ + z * 6) // ROWS + 2 * z


@triton.jit
def find_blocks(SEQ, num_sequences, tile, BLOCK, ROWS: tl.constexpr):
    """The sequence of a tile of BLOCK blocks, and the tile's first block within it."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = first_block(SEQ, middle, ROWS) // BLOCK + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = first_block(SEQ, low, ROWS) // BLOCK + low
    return low, (tile - start) * BLOCK


@triton.jit
def begun_limit(
    block,
    k_len,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHORT: tl.constexpr,
):
    """Entries that a block of rows may choose: all, or when causal those that begin by its last row.

    SHORT: the last one of the keys may be short.
    """
    if SHORT:
        limit = (k_len + STRIDE - 1) // STRIDE
    else:
        limit = tl.maximum(k_len + STRIDE - SIZE, 0) // STRIDE
    if CAUSAL:
        last = block * ROWS + ROWS - 1
        limit = tl.minimum(limit, tl.maximum(last + STRIDE, 0) // STRIDE)
    return limit


@triton.jit
def is_forced_of_block(
    e,
    block,
    k_len,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The FIRST entries, and of each of the rows the LAST ones that end with its own."""
    forced = e < FIRST
    if LAST > 0:
        first_own = block_at(block * ROWS, STRIDE)
        last_own = block_at(block * ROWS + ROWS - 1, STRIDE)
        forced = forced | ((e > first_own - LAST) & (e <= last_own))
    limit = begun_limit(block, k_len, ROWS, STRIDE, STRIDE, CAUSAL, True)
    return forced & (e >= 0) & (e < limit)


@triton.jit
def settled_limit(
    p, k_len, SEGMENT: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr, SHORT: tl.constexpr
):
    """Entries cut from sorted segments that position p sees whole: those of segments that are over.

    Without causality all, with SHORT also a last one of fewer tokens.
    """
    if CAUSAL:
        return tl.minimum(k_len, tl.maximum(p + 1, 0)) // SEGMENT * (SEGMENT // STRIDE)
    elif SHORT:
        return (k_len + STRIDE - 1) // STRIDE
    else:
        return k_len // STRIDE


@triton.jit
def begun_segments(p, k_len, SEGMENT: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Entries cut from sorted segments of which position p may see a token: up to its own segment's last."""
    limit = (k_len + STRIDE - 1) // STRIDE
    if CAUSAL:
        own = tl.maximum(p + SEGMENT, 0) // SEGMENT * (SEGMENT // STRIDE)
        limit = tl.minimum(limit, own)
    return limit


@triton.jit
def is_listed(e, listed, live, COUNT: tl.constexpr):
    """Whether an entry is one of the first `live` ones of a list of COUNT.  e: [R, N], live: [R, 1]"""
    found = e < 0
    for i in tl.static_range(COUNT):
        found = found | (e == tl.load(listed + i + 0 * live, mask=i < live, other=-1))
    return found & (e >= 0)


@triton.jit
def is_forced_of_segments(
    e,
    block,
    k_len,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The entries of the FIRST segments, and of each of the rows those of the LAST ones up to its own."""
    segment = e * STRIDE // SEGMENT
    forced = segment < FIRST
    if LAST > 0:
        first_own = block_at(block * ROWS, SEGMENT)
        last_own = block_at(block * ROWS + ROWS - 1, SEGMENT)
        forced = forced | ((segment > first_own - LAST) & (segment <= last_own))
    last = block * ROWS + ROWS - 1
    return forced & (e >= 0) & (e < begun_segments(last, k_len, SEGMENT, STRIDE, CAUSAL))


@triton.jit
def is_forced_or_listed(
    e,
    block,
    k_len,
    listed,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """The same, and as soon as they begin those of a list, of which a sequence has as many as keys."""
    forced = is_forced_of_segments(e, block, k_len, ROWS, SEGMENT, STRIDE, FIRST, LAST, CAUSAL)
    last = block * ROWS + ROWS - 1
    begun = e < begun_segments(last, k_len, SEGMENT, STRIDE, CAUSAL)
    return forced | (is_listed(e, listed, k_len, COUNT) & begun)


@triton.jit
def chosen_by(bits, entry, there):
    """Whether rows of bits have an entry.  bits: pointers; there: which of them to look at."""
    word = tl.load(bits + entry // 32, mask=there, other=0)
    return ((word >> (entry % 32)) & 1) != 0


@triton.jit
def as_bits(chosen, WORDS: tl.constexpr):
    """bool[WORDS * 32] -> i32[WORDS], the first of each 32 as the lowest bit"""
    return tl.sum(tl.reshape(chosen.to(tl.int32), [WORDS, 32]) << tl.arange(0, 32)[None, :], 1)


@triton.jit
def keep_bits(bits, words, word, first, chosen, STEP: tl.constexpr):
    """Write which of STEP entries are chosen, in a row of words.  -> the last word, i32[1], as far as known

    word: the same of the entries before.  first: that of the step, a multiple of STEP.  chosen: bool[1, STEP]
    """
    if STEP >= 32:
        place = first // 32 + tl.arange(0, STEP // 32)
        tl.store(bits + place, as_bits(chosen, STEP // 32), mask=place < words)
    else:
        bit = (first + tl.arange(0, STEP)) % 32
        begun = tl.where(first % 32 == 0, word * 0, word)
        word = begun | tl.sum(chosen.to(tl.int32) << bit[None, :], 1)
        tl.store(bits + first // 32 + word * 0, word, mask=first // 32 + word * 0 < words)
    return word
