"""Diagonals of a sequence and head: bits, the farthest first, and lists of those that are kept."""

import triton
import triton.language as tl


@triton.jit
def listed_below(listed, count, value, HALVINGS: tl.constexpr):
    """How many of so many ascending numbers are below each value, by halves.  -> as value"""
    low = value * 0
    high = low + count
    for _ in range(HALVINGS):
        middle = (low + high) // 2
        found = tl.load(listed + middle, mask=low < high, other=0)
        below = (low < high) & (found < value)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def among(listed, count, value):
    """Whether values are among so many ascending numbers.  value: [N] -> bool[N]"""
    low = value * 0
    high = low + count
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = (low + high) // 2
        found = tl.load(listed + middle, mask=low < high, other=0)
        below = (low < high) & (found < value)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return (low < count) & (tl.load(listed + low, mask=low < count, other=0) == value)


@triton.jit
def bits_from(bits, place, words):
    """The 64 bits of a row of words from each place on, 0 outside of it.  -> i64, as place"""
    word = place >> 6
    shift = (place & 63).to(tl.uint64)
    low = tl.load(bits + word, mask=(word >= 0) & (word < words), other=0)
    high = tl.load(bits + word + 1, mask=(word >= -1) & (word + 1 < words), other=0)
    low = low.to(tl.uint64, bitcast=True) >> shift
    high = (high.to(tl.uint64, bitcast=True) << (63 - shift)) << 1
    return (low | high).to(tl.int64, bitcast=True)


@triton.jit
def bits_between(first, end):
    """A word of the bits from the first on and up to the end, either of which may lie outside.  -> i64"""
    first = tl.minimum(tl.maximum(first, 0), 63).to(tl.uint64)
    end = tl.minimum(tl.maximum(end, 0), 64)
    every = tl.full([], -1, tl.int64).to(tl.uint64, bitcast=True)
    below = tl.where(end > 0, every >> (64 - tl.maximum(end, 1)).to(tl.uint64), 0)
    return (below & (every << first)).to(tl.int64, bitcast=True)


@triton.jit
def words_listed(listed, count, begin, HALVINGS: tl.constexpr):
    """Of each place which of the 64 numbers from there on are listed, as bits.  begin: [N] -> i64[N]"""
    slot = listed_below(listed, count, begin, HALVINGS)[:, None] + tl.arange(0, 64)[None, :]
    found = tl.load(listed + slot, mask=slot < count, other=-1) - begin[:, None]
    there = (slot < count) & (found < 64)
    return tl.sum(there.to(tl.int64) << tl.where(there, found, 0).to(tl.int64), 1)


@triton.jit
def turned(word):
    """The bits of words in the other order.  i64 -> i64"""
    x = word.to(tl.uint64, bitcast=True)
    x = ((x >> 1) & 0x5555555555555555) | ((x & 0x5555555555555555) << 1)
    x = ((x >> 2) & 0x3333333333333333) | ((x & 0x3333333333333333) << 2)
    x = ((x >> 4) & 0x0F0F0F0F0F0F0F0F) | ((x & 0x0F0F0F0F0F0F0F0F) << 4)
    x = ((x >> 8) & 0x00FF00FF00FF00FF) | ((x & 0x00FF00FF00FF00FF) << 8)
    x = ((x >> 16) & 0x0000FFFF0000FFFF) | ((x & 0x0000FFFF0000FFFF) << 16)
    return ((x >> 32) | (x << 32)).to(tl.int64, bitcast=True)
