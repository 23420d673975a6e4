"""Union lists: which entries the rows of a tile chose between them, and which rows chose each.

A pair is entry * ROWS + row.  Sorted, the pairs of one entry are a run, and the runs ascend.
"""

import triton
import triton.language as tl


@triton.jit
def later(a, b):
    """The later of two places."""
    return tl.maximum(a, b)


@triton.jit
def earlier(a, b):
    """The earlier of two places."""
    return tl.minimum(a, b)


@triton.jit
def run_start(begins):
    """Of each place, where its run begins.  begins: [N] -> [N]"""
    place = tl.arange(0, begins.shape[0])
    return tl.associative_scan(tl.where(begins, place, 0), 0, later)


@triton.jit
def run_end(ends):
    """Of each place, where its run ends.  ends: [N] -> [N]"""
    last = ends.shape[0] - 1
    place = tl.arange(0, ends.shape[0])
    return tl.associative_scan(tl.where(ends, place, last), 0, earlier, reverse=True)


@triton.jit
def run_sum(x, start):
    """The sum of each run, right at its last place.  x, start: [N] -> [N]"""
    through = tl.cumsum(x, 0)
    return through - tl.gather(through - x, start, 0)


@triton.jit
def row_bits(row, counts, WORD: tl.constexpr):
    """Rows 32 * WORD to 32 * WORD + 31 as single bits of a word.  row, counts: [N] -> u32[N]

    Unsigned, for sums of them to wrap around: the difference of two is right all the same.
    """
    one = tl.where(counts & (row // 32 == WORD), 1, 0).to(tl.uint32)
    return one << (row % 32).to(tl.uint32)


@triton.jit
def first_rows(count):
    """A word of the first so many rows: all of its bits from 32 rows on, none up to 0.  -> i32"""
    others = tl.full([], -1, tl.int32) << tl.minimum(tl.maximum(count, 0), 31)
    return tl.where(count >= 32, -1, ~others)


@triton.jit
def first_bucket(z, k_first, length, STRIDE: tl.constexpr):
    """The first block of sequence z among those of all: `length` blocks a sequence and one more.

    Packed sequences lie one after the other, and `length` is 0.
    """
    return z * length + k_first // STRIDE + z


@triton.jit
def find_bucket(SEQ, num_sequences, bucket, length, STRIDE: tl.constexpr):
    """The sequence of a block among those of all, and its number in the sequence."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = first_bucket(middle, tl.load(SEQ + middle * 6 + 4), length, STRIDE) <= bucket
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, bucket - first_bucket(low, tl.load(SEQ + low * 6 + 4), length, STRIDE)


@triton.jit
def marked(word, column):
    """Which of a block's 64 tokens each row chose.  word: i64[M], column: [N] -> bool[M, N]"""
    return ((word[:, None] >> column.to(tl.int64)[None, :]) & 1) != 0


@triton.jit
def marked_by(word, column):
    """The same, keys first.  word: i64[M], column: [N] -> bool[N, M]"""
    return ((word[None, :] >> column.to(tl.int64)[:, None]) & 1) != 0
