"""Where a tile of rows lies: which sequence, and which of its rows.

SEQ is int32[Z, 6], a row a sequence: q_start, q_first, q_len, q_offset, k_first, k_len.
"""

import triton
import triton.language as tl


@triton.jit
def find_sequence(SEQ, num_sequences, tile, BLOCK, COLUMN: tl.constexpr, DIVISOR: tl.constexpr):
    """The last sequence whose first tile is <= tile, and the tile's first item within it."""
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        start = tl.load(SEQ + middle * 6 + COLUMN) // DIVISOR // BLOCK + middle
        low = tl.where(start <= tile, middle, low)
        high = tl.where(start <= tile, high, middle)
    start = tl.load(SEQ + low * 6 + COLUMN) // DIVISOR // BLOCK + low
    return low, (tile - start) * BLOCK
