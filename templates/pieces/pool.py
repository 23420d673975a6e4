"""Entries of a level: where a tile of them lies, and how a block of tokens becomes one vector.

SEQ is int32[Z, 6], a row a sequence: q_start, q_first, q_len, q_offset, k_first, k_len.
"""

import triton
import triton.language as tl


@triton.jit
def find_entries(SEQ, num_sequences, tile, length, BLOCK, STRIDE: tl.constexpr):
    """The sequence of a tile of entries, the tile's first entry in it, the sequence's first row of the pool.

    The pool holds sequence z from row z * length + k_first // STRIDE on: `length` is the length of
    one sequence of the pool, and 1 (0 if none is short) when sequences are packed one after the other.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        start = middle * length + tl.load(SEQ + middle * 6 + 4) // STRIDE
        before = start // BLOCK + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = low * length + tl.load(SEQ + low * 6 + 4) // STRIDE
    return low, (tile - start // BLOCK - low) * BLOCK, start


@triton.jit
def pooled_entries(k_len, SIZE: tl.constexpr, STRIDE: tl.constexpr, SHORT: tl.constexpr):
    """How many entries a sequence's pool has: the whole ones, or with SHORT a short last one too."""
    if SHORT:
        return (k_len + STRIDE - 1) // STRIDE
    else:
        return tl.maximum(k_len + STRIDE - SIZE, 0) // STRIDE


@triton.jit
def load_tokens(base, token, inside, stride, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """Tokens of a tile of entries, in float32, 0 outside.  token, inside: [E, J] -> [E, J, WIDTH]"""
    columns = OFFSET + tl.arange(0, WIDTH)
    address = base + token.to(tl.int64)[:, :, None] * stride + columns[None, None, :]
    return tl.load(address, mask=inside[:, :, None], other=0.0).to(tl.float32)


@triton.jit
def load_columns(base, token, inside, stride, columns):
    """As load_tokens, of any columns.  columns: [W] -> [E, J, W]"""
    address = base + token.to(tl.int64)[:, :, None] * stride + columns[None, None, :]
    return tl.load(address, mask=inside[:, :, None], other=0.0).to(tl.float32)


@triton.jit
def weigh_step(gate, inside, top, total):
    """A tile of the softmax over an entry's tokens.  gate: [E, J, W], top, total: [E, W]

    -> weights [E, J, W], new top, new total, rescale of old sums
    """
    gate = tl.where(inside[:, :, None], gate, float("-inf"))
    new = tl.maximum(top, tl.max(gate, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    weight = tl.exp2((gate - safe[:, None, :]) * 1.4426950408889634)
    rescale = tl.exp2((top - safe) * 1.4426950408889634)
    return weight, new, total * rescale + tl.sum(weight, 1), rescale


@triton.jit
def normed(x, size, NORM, columns):
    """Vectors over their root mean square, times a learned weight.  x: [E, W], size: [E]"""
    return tl.div_rn(x, size[:, None]) * tl.load(NORM + columns).to(tl.float32)[None, :]


@triton.jit
def mates(at, START: tl.constexpr, DIMS: tl.constexpr, HALVES: tl.constexpr):
    """Of a channel its mate, their pair, whether it is the first of the two, and whether it turns.

    Pairs are of the DIMS channels from START on: neighbours, or one of either half.
    """
    c = at - START
    turned = (c >= 0) & (c < DIMS)
    inner = tl.where(turned, c, 0)
    if HALVES:
        early = inner < DIMS // 2
        pair = inner % (DIMS // 2)
        mate = tl.where(early, at + DIMS // 2, at - DIMS // 2)
    else:
        early = inner % 2 == 0
        pair = inner // 2
        mate = tl.where(early, at + 1, at - 1)
    return tl.where(turned, mate, at), pair, early, turned


@triton.jit
def angles(position, pair, FREQUENCY: tl.constexpr):
    """cos and sin of position * base ** (pair * ...), FREQUENCY its binary logarithm a pair.  -> [E, W]

    Whole turns are taken off in float64: positions have many.
    """
    step = tl.exp2(pair.to(tl.float64) * FREQUENCY) * 0.15915494309189535
    turns = position.to(tl.float64)[:, None] * step[None, :]
    angle = (turns - tl.floor(turns)).to(tl.float32) * 6.283185307179586
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def max_tokens(acc, x, inside):
    """The greatest of what was and the tokens that are inside; NaN if any is.  -> [E, WIDTH]

    x: [E, J, WIDTH], 0 where not inside.
    """
    strange = tl.max((x != x).to(tl.int32), 1) > 0
    x = tl.where(inside[:, :, None] & (x == x), x, float("-inf"))
    greatest = tl.maximum(acc, tl.max(x, 1))
    return tl.where(strange | (acc != acc), float("nan"), greatest)


@triton.jit
def as_kept(entries, DTYPE: tl.constexpr):
    """What entries become in the dtype that they are kept in, in float32; float16 has a greatest number."""
    if DTYPE == tl.float16:
        entries = tl.where(entries > 65504.0, 65504.0, entries)
        entries = tl.where(entries < -65504.0, -65504.0, entries)
    return entries.to(DTYPE).to(tl.float32)


@triton.jit
def store_entries(address, entries, live):
    """Round to the dtype that is kept, once; float16 keeps its greatest number where it has no greater.

    address, entries: [E, WIDTH]; live: [E, 1]
    """
    if address.dtype.element_ty == tl.float16:
        entries = tl.where(entries > 65504.0, 65504.0, entries)
        entries = tl.where(entries < -65504.0, -65504.0, entries)
    tl.store(address, entries, mask=live)
