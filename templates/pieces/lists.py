"""Union lists: which entries the rows of a tile chose between them, and which rows chose each.

A pair is entry * ROWS + row.  Sorted, the pairs of one entry are a run, and the runs ascend.
"""

import triton
import triton.language as tl


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
def marked(word, column):
    """Which of a block's 64 tokens each row chose.  word: i64[M], column: [N] -> bool[M, N]"""
    return ((word[:, None] >> column.to(tl.int64)[None, :]) & 1) != 0
