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
def max_tokens(acc, x, inside):
    """The greatest of what was and the tokens that are inside; NaN if any is.  -> [E, WIDTH]

    x: [E, J, WIDTH], 0 where not inside.
    """
    strange = tl.max((x != x).to(tl.int32), 1) > 0
    x = tl.where(inside[:, :, None] & (x == x), x, float("-inf"))
    greatest = tl.maximum(acc, tl.max(x, 1))
    return tl.where(strange | (acc != acc), float("nan"), greatest)


@triton.jit
def store_entries(address, entries, live):
    """Round to the dtype that is kept, once; float16 keeps its greatest number where it has no greater.

    address, entries: [E, WIDTH]; live: [E, 1]
    """
    if address.dtype.element_ty == tl.float16:
        entries = tl.where(entries > 65504.0, 65504.0, entries)
        entries = tl.where(entries < -65504.0, -65504.0, entries)
    tl.store(address, entries, mask=live)
